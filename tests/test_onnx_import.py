"""Graphs made elsewhere become stateful and compute what the framework did; those that cannot are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import rnnserve
from keras_loop import with_random_weights
from rnnserve_models import DenseCell, GRUCell, LSTMCell, ModelError, SimpleRNNCell, StackedRNNCells
from rnnserve_models.engine.onnx import OnnxEngine
from rnnserve_models.export import export_cell
from rnnserve_models.importers.files import import_file
from rnnserve_models.importers.onnx import import_onnx
from rnnserve_models.importers.torch_state import read_torch_state
from rnnserve_models.load import load_model
from rnnserve_models.spec import StateSpec
from rnnserve_server.cli import app
from serving import running_server

FOLDER = Path(__file__).parent / "vectors" / "onnx"
TOLERANCE = 2e-5

REFUSED = {
    "dynamo_lstm_fixed": r"number of time steps is fixed .*\[3, 7, 3\]",
    "dynamo_lstm_stacked": r"number of time steps is fixed.* runs with 7 steps only",
    "dynamo_rnn": "no recurrent node",
    "dynamo_rnn_fixed": "no recurrent node",
    "keras2_fixed": r"number of time steps is fixed .*7, 3\].*always does 7 steps",
    "keras3_fixed": r"number of time steps is fixed .*7, 3\].*always does 7 steps",
    "keras2_unrolled": "no recurrent node .*unrolled over a fixed number of steps",
    "keras3_unrolled": "no recurrent node .*unrolled over a fixed number of steps",
    "script_lstm_fixed": "number of time steps is fixed",
    "script_lstm_packed": "packed: the graph puts the rows in another order.*'in1'.*pack_padded_sequence",
}
GRAPHS = sorted(path.stem for path in FOLDER.glob("*.onnx") if path.stem not in REFUSED)
WHOLE_CALLS = ("bidirectional", "reversed", "masked", "embedding", "conv")


def imported(name):
    return import_onnx((FOLDER / f"{name}.onnx").read_bytes(), origin=name)


def engine_of(result):
    return OnnxEngine(result.graph, result.spec, defaults=result.defaults)


def time_major(x, axes):
    return np.moveaxis(x, axes.index("time"), 0)


def expected(name, result):
    """The framework's first input, time-major, and first output: time-major, or [batch, ...] of the last step."""
    stored = load_file(FOLDER / f"{name}.safetensors")
    (tensor,) = result.spec.inputs
    y = stored["out.0"]
    return time_major(stored["in.0"], tensor.axes), time_major(y, tensor.axes) if result.spec.outputs[0].has_time else y


def given_states(name, engine):
    """The states that the framework was given, where the graph takes them; else the default."""
    stored, rows = load_file(FOLDER / f"{name}.safetensors"), len(load_file(FOLDER / f"{name}.safetensors")["in.0"])
    if "in.1" not in stored:
        return {}
    shape = lambda spec: (rows, *spec.shape)  # noqa: E731
    return {
        spec.name: np.moveaxis(stored[f"in.{1 + k}"], 1, 0).reshape(shape(spec)) for k, spec in enumerate(engine.states)
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_a_whole_sequence_is_what_the_framework_computed(name):
    result = imported(name)
    engine = engine_of(result)
    x, want = expected(name, result)
    steps, rows = x.shape[:2]
    states = given_states(name, engine) or {spec.name: spec.initial(rows) for spec in engine.states}
    y, _ = engine.run({engine.inputs[0].name: x}, np.full(rows, steps), states)
    got = y[engine.outputs[0].name]
    np.testing.assert_allclose(got if result.spec.outputs[0].has_time else got[-1], want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [n for n in GRAPHS if not any(part in n for part in WHOLE_CALLS)])
def test_calls_that_hand_their_states_on_are_one_call(name):
    result = imported(name)
    assert result.spec.sliceable
    engine = engine_of(result)
    x, want = expected(name, result)
    steps, rows = x.shape[:2]
    states = given_states(name, engine) or {spec.name: spec.initial(rows) for spec in engine.states}
    parts = []
    for start, stop in ((0, 1), (1, 5), (5, steps)):
        y, states = engine.run({engine.inputs[0].name: x[start:stop]}, np.full(rows, stop - start), states)
        parts.append(y[engine.outputs[0].name])
    got = np.concatenate(parts) if result.spec.outputs[0].has_time else parts[-1][-1]
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [n for n in GRAPHS if any(part in n for part in WHOLE_CALLS)])
def test_graphs_that_look_beyond_their_states_take_whole_calls_and_say_so(name):
    result = imported(name)
    assert not result.spec.sliceable
    assert any("must hold a whole sequence" in finding for finding in result.findings)


def test_states_are_exposed_by_operator():
    assert [s.name for s in imported("script_lstm_stacked").spec.states] == ["0.h", "0.c", "1.h", "1.c"]
    assert [s.axes for s in imported("keras3_bidirectional").spec.states] == [(2, "batch", 4)] * 2
    assert [s.name for s in imported("keras3_masked").spec.states] == ["h", "c"]  # not the previous output
    assert [s.name for s in imported("keras3_cells").spec.states] == ["state_0", "state_1", "state_2"]


def test_an_output_that_is_a_state_is_returned_as_state():
    result = imported("script_gru_stacked_states")
    assert [output.name for output in result.spec.outputs] == ["y"]
    assert "output hn is the state 0.h and 1.h: it is returned as state" in result.findings


@pytest.mark.parametrize("name", ["keras2_stateful", "keras3_stateful", "keras2_stateful_simple", "script_gru_learned"])
def test_a_frozen_state_is_the_default(name):
    result = imported(name)
    engine = engine_of(result)
    assert all(spec.initial(3).any() for spec in engine.states)
    assert any("starts from what the file froze" in finding for finding in result.findings)


def test_frozen_rows_are_given_out_in_turn():
    spec = StateSpec("h", np.dtype(np.float32), (2,), (0,), np.array([[1, 2], [3, 4]], np.float32))
    np.testing.assert_array_equal(spec.initial(3), [[1, 2], [3, 4], [1, 2]])
    np.testing.assert_array_equal(spec.initial(1), [[1, 2]])


@pytest.mark.parametrize("name", ["keras3_stateful", "keras3_stateful_simple", "script_lstm_batch_fixed"])
def test_a_file_bound_to_its_rows_takes_any_number(name):
    result = imported(name)
    engine = engine_of(result)
    x = np.random.default_rng(3).standard_normal((4, 5, 3)).astype(np.float32)
    states = {s.name: np.random.default_rng(4).standard_normal((5, *s.shape)).astype(s.dtype) for s in engine.states}
    lengths = np.array([4, 2, 3, 4, 1])
    y, after = engine.run({"x": x}, lengths, states)
    for row, length in enumerate(lengths):
        alone, alone_after = engine.run(
            {"x": x[:length, row : row + 1]}, lengths[row : row + 1], {n: s[row : row + 1] for n, s in states.items()}
        )
        for output in y:
            np.testing.assert_allclose(y[output][:length, row], alone[output][:, 0], atol=TOLERANCE)
        for state in after:
            np.testing.assert_allclose(after[state][row], alone_after[state][0], atol=TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name):
    with pytest.raises(ModelError, match=f"(?s){name}.*{REFUSED[name]}"):
        imported(name)


CELLS = {
    "lstm": LSTMCell(units=4),
    "gru": GRUCell(units=4),
    "scan": GRUCell(units=4, activation="selu"),
    "simple": SimpleRNNCell(units=4),
    "stack": StackedRNNCells([LSTMCell(units=4), SimpleRNNCell(units=3), DenseCell(units=2)]),
}


@pytest.mark.parametrize("name", CELLS)
def test_our_own_exports_come_back(name):
    cell = with_random_weights(CELLS[name], 3)
    graph, spec = export_cell(cell, 3)
    result = import_onnx(graph)
    assert result.spec.lengths == "lengths"
    assert [state.name for state in result.spec.states] == [state.name for state in spec.states]
    x = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    lengths = np.array([5, 1, 3, 2])
    want, got = OnnxEngine(graph, spec, states=cell.state_specs()), engine_of(result)
    states = {s.name: np.full((4, *s.shape), 0.25, np.float32) for s in want.states}
    (y, after), (y2, after2) = want.run({"input": x}, lengths, states), got.run({"input": x}, lengths, states)
    valid = np.arange(5)[:, None] < lengths
    np.testing.assert_array_equal(y["output"][valid], y2["output"][valid])
    for state in after:
        np.testing.assert_array_equal(after[state], after2[state])


# ------------------------------------------------------------------------------------------------ graphs made by hand


def small(nodes, *, inputs=None, outputs=None, extra=()):
    """A graph over x [batch, time, 2], with the weights of a GRU of 2 units."""
    rng = np.random.default_rng(5)
    weights = {"W": rng.standard_normal((1, 6, 2)), "R": rng.standard_normal((1, 6, 2)), "zero": np.zeros((1, 2, 2))}
    stored = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    info = lambda name, axes: helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)  # noqa: E731
    graph = helper.make_graph(
        nodes,
        "hand",
        [info(name, axes) for name, axes in (inputs or {"x": ["time", "batch", 2]}).items()],
        [info(name, axes) for name, axes in (outputs or {"y": None}).items()],
        [*stored, *extra],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def gru(inputs=("x", "W", "R"), outputs=("y",), **options):
    return helper.make_node("GRU", inputs, outputs, hidden_size=2, **options)


def test_a_state_that_the_graph_takes_but_does_not_give_is_given():
    nodes = [gru(["x", "W", "R", "", "", "h0"], ["y"])]
    model = small(nodes, inputs={"x": ["time", "batch", 2], "h0": [1, "batch", 2]})
    result = import_onnx(model.SerializeToString())
    assert [(s.name, s.output) for s in result.spec.states] == [("h0", "0.h_out")]


def test_a_decoder_fed_by_an_encoder_keeps_its_state():
    nodes = [gru(outputs=["unused", "h"]), gru(["x", "W", "R", "", "", "h"], ["y"])]
    result = import_onnx(small(nodes).SerializeToString())
    assert [s.name for s in result.spec.states] == ["0.h"]
    assert not result.spec.sliceable


def test_a_graph_of_one_step_runs_step_by_step():
    model = small([gru()], inputs={"x": [1, "batch", 2]})
    result = import_onnx(model.SerializeToString())
    assert result.spec.inputs[0].axes == ("squeeze", "batch", 2)
    assert result.options == {"return_sequences": True}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (b"no graph", "is not an ONNX model"),
        (b"", "is not an ONNX model"),
        (small([gru()], inputs={"x": ["a", "b", "c"]}), "cannot be told"),
        (small([gru()], inputs={"x": [7, "batch", 2]}), "number of time steps is fixed"),
        (
            small(
                [gru(), helper.make_node("Mul", ["y", "s"], ["z"])],
                inputs={"x": ["t", "n", 2], "s": []},
                outputs={"z": None},
            ),
            "input 's' has shape .*no batch axis",
        ),
        (
            small([helper.make_node("ReduceMean", ["x"], ["m"], keepdims=1), gru(["m", "W", "R"])]),
            "cannot be told|depend on the other rows",
        ),
        (
            small(
                [
                    helper.make_node("ReduceSum", ["x", "axis"], ["h0"], keepdims=1),
                    gru(["x", "W", "R", "", "", "h0"]),
                ],
                extra=[numpy_helper.from_array(np.array([0]), "axis")],
            ),
            "initial state h of the GRU node 'y' is computed from the input",
        ),
        (
            small([gru(), helper.make_node("Softmax", ["y"], ["z"], axis=2)], outputs={"z": None}),
            "depend on the other rows",
        ),
        (small([gru(layout=1)]), "layout 1"),
    ],
)
def test_odd_files_are_refused_with_the_reason(model, reason):
    content = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(ModelError, match=f"(?s)graph: .*{reason}"):
        import_onnx(content)


def test_external_data_is_refused():
    model = small([gru()])
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "elsewhere")
    with pytest.raises(ModelError, match="keeps 'W' and maybe more in other files"):
        import_onnx(model.SerializeToString())


def test_a_recurrent_node_inside_an_if_is_refused():
    branch = helper.make_graph([gru()], "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    other = helper.make_graph(
        [gru(outputs=["y2"])], "other", [], [helper.make_tensor_value_info("y2", TensorProto.FLOAT, None)]
    )
    true = numpy_helper.from_array(np.array(True), "true")
    model = small(
        [helper.make_node("If", ["true"], ["out"], then_branch=branch, else_branch=other)],
        outputs={"out": None},
        extra=[true],
    )
    with pytest.raises(ModelError, match="stands in a branch of an If"):
        import_onnx(model.SerializeToString())


def loop(step, condition="going"):
    """A Loop that carries h [batch, 2] and a running sum over x [time, batch, 2]."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "i"], ["x_t"]),
            helper.make_node("Add", ["x_t", "h"], ["z"]),
            helper.make_node("Tanh", ["z"], ["h_out"]),
            *step,
            helper.make_node("Identity", ["h_out"], ["scan"]),
        ],
        "body",
        [
            info("i", TensorProto.INT64, []),
            info("going", TensorProto.BOOL, []),
            info("h", TensorProto.FLOAT, None),
            info("total", TensorProto.FLOAT, None),
        ],
        [
            info(condition, TensorProto.BOOL, []),
            info("h_out", TensorProto.FLOAT, None),
            info("total_out", TensorProto.FLOAT, None),
            info("scan", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Shape", ["x"], ["steps"], start=0, end=1),
        helper.make_node("Squeeze", ["steps"], ["count"]),
        helper.make_node("Shape", ["x"], ["shape"], start=1),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Loop", ["count", "true", "zeros", "zeros"], ["h_end", "t_end", "y"], name="loop", body=body),
    ]
    return small(nodes, extra=[numpy_helper.from_array(np.array(True), "true")])


def test_a_loop_that_adds_up_something_is_refused():
    model = loop([helper.make_node("Add", ["total", "h_out"], ["total_out"]), keep_going()], "on")
    with pytest.raises(ModelError, match="the Loop node 'loop' adds up 'total' from step to step"):
        import_onnx(model.SerializeToString())


def test_a_loop_that_stops_by_its_values_is_refused():
    step = [
        helper.make_node("Identity", ["x_t"], ["total_out"]),
        helper.make_node("ReduceMax", ["h_out"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["on"], to=TensorProto.BOOL),
    ]
    with pytest.raises(ModelError, match="decides by the values of 'h' when to stop"):
        import_onnx(loop(step, "on").SerializeToString())


def test_a_loop_is_opened():
    result = import_onnx(
        loop([helper.make_node("Identity", ["x_t"], ["total_out"]), keep_going()], "on").SerializeToString()
    )
    assert [(s.name, s.axes) for s in result.spec.states] == [("h", ("batch", 2))]
    assert result.spec.sliceable


def keep_going():
    return helper.make_node("Identity", ["going"], ["on"])


# -------------------------------------------------------------------------------------------------------- PyTorch


TORCH = {
    "torch_lstm": {},
    "torch_lstm_2": {},
    "torch_lstm_bidirectional": {},
    "torch_gru_2": {},
    "torch_gru_bidirectional": {},
    "torch_rnn_relu": {"nonlinearity": "relu"},
    "torch_rnn_bidirectional": {},
}


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize("name", TORCH)
def test_state_dicts_compute_what_torch_does(name, engine, tmp_path):
    import_file(FOLDER / f"{name}.safetensors", tmp_path, name, **TORCH[name])
    model = load_model(tmp_path / name / "1", engine=engine).engine
    stored = load_file(FOLDER / f"expected_{name}.safetensors")
    x = stored["in.0"].swapaxes(0, 1)
    states = {s.name: s.initial(x.shape[1]) for s in model.states}
    y, after = model.run({"input": x}, np.full(x.shape[1], len(x)), states)
    np.testing.assert_allclose(y["output"].swapaxes(0, 1), stored["out.0"], atol=TOLERANCE, rtol=0)
    lstm = "lstm" in name
    for position, spec in enumerate(model.states):
        layer = position // 2 if lstm else position
        want = stored["out.2" if lstm and position % 2 else "out.1"]  # [layers * directions, batch, hidden]
        per = 2 if "bidirectional" in name else 1
        want = want[layer * per : (layer + 1) * per].swapaxes(0, 1).reshape(after[spec.name].shape)
        np.testing.assert_allclose(after[spec.name], want, atol=TOLERANCE, rtol=0)


def changed(path, source="torch_lstm", drop=(), **tensors):
    stored = load_file(FOLDER / f"{source}.safetensors")
    save_file({**{k: v for k, v in stored.items() if k not in drop}, **tensors}, path)
    return path


def test_tensors_beside_the_module_need_a_prefix(tmp_path):
    stored = load_file(FOLDER / "torch_lstm_2.safetensors")
    path = tmp_path / "state.safetensors"
    save_file({**stored, "head.weight": np.ones((2, 4), np.float32)}, path)
    with pytest.raises(ModelError, match=r"beside the recurrent module's: head.weight; .*--prefix encoder.rnn."):
        read_torch_state(path)
    assert len(read_torch_state(path, prefix="encoder.rnn").layers) == 2
    with pytest.raises(ModelError, match=r"no recurrent module under 'decoder'; there is \['encoder.rnn.'\]"):
        read_torch_state(path, prefix="decoder")
    save_file({**stored, **{f"decoder.{k[12:]}": v for k, v in stored.items()}}, path)
    with pytest.raises(ModelError, match=r"several recurrent modules, \['decoder.', 'encoder.rnn.'\]"):
        read_torch_state(path)


def test_bad_state_dicts_are_refused_by_tensor(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(ModelError, match="weight_hr_l0: the module has proj_size"):
        read_torch_state(FOLDER / "torch_lstm_projected.safetensors")
    with pytest.raises(ModelError, match="bias_hh_l0 is missing"):
        read_torch_state(changed(path, drop=["bias_hh_l0"]))
    with pytest.raises(ModelError, match=r"weight_ih_l0_reverse is missing"):
        read_torch_state(changed(path, weight_hh_l0_reverse=np.zeros((16, 4), np.float32)))
    with pytest.raises(ModelError, match=r"bias_ih_l0: expected float32 \[16\], got float32 \[15\]"):
        read_torch_state(changed(path, bias_ih_l0=np.zeros(15, np.float32)))
    with pytest.raises(ModelError, match=r"weight_hh_l0: expected shape .* got \[20, 4\]"):
        read_torch_state(changed(path, weight_hh_l0=np.zeros((20, 4), np.float32)))
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ModelError, match=r"has no recurrent layer of PyTorch .* its tensors are weight"):
        read_torch_state(path)


# -------------------------------------------------------------------------------------------------------- command


def run(*arguments):
    return CliRunner().invoke(app, ["import", *map(str, arguments)])


def test_an_imported_file_is_served_with_its_states(tmp_path):
    import_file(FOLDER / "keras3_stateful.onnx", tmp_path, "frozen")
    import_file(FOLDER / "script_lstm_stacked.onnx", tmp_path, "stacked")
    import_file(FOLDER / "torch_gru_2.safetensors", tmp_path, "torch")
    with running_server(models=tmp_path) as server, rnnserve.Client(server.address) as client:
        for name, source in (
            ("frozen", "keras3_stateful"),
            ("stacked", "script_lstm_stacked"),
            ("torch", "expected_torch_gru_2"),
        ):
            stored = load_file(FOLDER / f"{source}.safetensors")
            x, want = stored["in.0"], stored["out.0"]
            layer = client.RNN(name, stateful=True, return_sequences=True)
            parts = [layer(x[:, :2]), layer(x[:, 2:3]), layer(x[:, 3:])]
            layer.close()
            np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=TOLERANCE)


def test_a_graph_that_looks_ahead_gets_whole_calls(tmp_path):
    """Longer than the server's slices, two sessions at once; and a frozen state for other rows than the file had."""
    import_file(FOLDER / "keras3_bidirectional.onnx", tmp_path, "both")
    import_file(FOLDER / "keras3_stateful.onnx", tmp_path, "frozen")
    x = np.random.default_rng(8).standard_normal((2, 11, 3)).astype(np.float32)
    engine = load_model(tmp_path / "both" / "1").engine
    states = {s.name: s.initial(2) for s in engine.states}
    want, _ = engine.run({"x": x.swapaxes(0, 1)}, np.full(2, 11), states)
    with running_server(models=tmp_path, slice_steps=4) as server, rnnserve.Client(server.address) as client:
        layer = client.RNN("both", return_sequences=True)
        np.testing.assert_allclose(layer(x), want["Identity"].swapaxes(0, 1), atol=TOLERANCE)
        held = client.RNN("frozen", return_sequences=True, stateful=True)
        first = load_file(FOLDER / "keras3_stateful.safetensors")
        np.testing.assert_allclose(held(first["in.0"][:1]), first["out.0"][:1], atol=TOLERANCE)
        held.close()


def test_the_command_writes_a_model_that_serves(tmp_path):
    result = run(FOLDER / "keras3_stateful.onnx", "--name", "held", "--models", tmp_path, "--version", "7")
    assert result.exit_code == 0, result.output
    assert "LSTM of 4 units" in result.output
    assert "differs from the original by at most" in result.output
    engine = load_model(tmp_path / "held" / "7").engine
    stored = load_file(FOLDER / "keras3_stateful.safetensors")
    states = {s.name: s.initial(3) for s in engine.states}
    y, _ = engine.run({"x": stored["in.0"].swapaxes(0, 1)}, np.full(3, 7), states)
    np.testing.assert_allclose(y["Identity"].swapaxes(0, 1), stored["out.0"], atol=TOLERANCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held"]

    again = run(FOLDER / "keras3_lstm.onnx", "--name", "held", "--models", tmp_path, "--version", "7")
    assert again.exit_code == 1
    assert "the version exists" in again.output


@pytest.mark.parametrize(
    ("file", "options", "reason"),
    [
        ("keras3_unrolled.onnx", {}, "no recurrent node"),
        ("torch_lstm_projected.safetensors", {}, "proj_size"),
        ("absent.onnx", {}, "there is no such file"),
        ("make_exports.py", {}, "expected a file .onnx"),
        ("keras3_lstm.onnx", {"--name": "../x"}, "name '../x'"),
        ("keras3_lstm.onnx", {"--version": ""}, "version ''"),
    ],
)
def test_the_command_leaves_no_trace_of_what_it_refuses(tmp_path, file, options, reason):
    options = {"--name": "new", "--models": tmp_path, **options}
    result = run(FOLDER / file, *(part for option in options.items() for part in option))
    assert result.exit_code == 1
    assert reason in result.output
    assert list(tmp_path.iterdir()) == []
