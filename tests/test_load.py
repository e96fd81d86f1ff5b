"""From a model directory to a model that runs, or to the reason why not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from safetensors.numpy import save

import graphs
from graphs import FEATURES, FLOAT, INT64, STATE, UNITS, directory, info, lstm, lstm_spec, node
from keras_loop import with_random_weights
from rnnserve_models import GRUCell, LSTMCell, ModelError, run_cell
from rnnserve_models.load import load_model

CELL = {"cell": {"class_name": "LSTMCell", "config": {"units": 3}}, "input_dim": 2, "weights": "weights.safetensors"}


def weights(cell, dtype="float32", **changes):
    bound = with_random_weights(cell, 2, dtype)
    arrays = {f"0.{name}": np.ascontiguousarray(array) for name, array in bound.weights.items()}
    return save({name: array for name, array in {**arrays, **changes}.items() if array is not None})


def refused(path, *said, **options):
    with pytest.raises(ModelError) as caught:
        load_model(path, **options)
    for words in said:
        assert words in str(caught.value)
    assert str(path) in str(caught.value)


def edited(spec, **changes):
    return {**spec, **changes}


GRAPH = lstm_spec()
X = GRAPH["graph"]["inputs"][0]
H, C = GRAPH["graph"]["states"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cell: [", ["is not YAML"]),
        ("", ["must be a mapping", "NoneType"]),
        ("- a", ["must be a mapping", "list"]),
        ("cell: !!python/object/apply:os.system ['true']", ["is not YAML"]),
        (b"\xff\xfe\xff", ["cannot be read"]),
        ({}, ["give one of cell", "graph"]),
        ({**CELL, **GRAPH}, ["give one of cell", "graph"]),
        (edited(CELL, cel=1), ["cel:", "Extra inputs"]),
        (edited(CELL, engine="torch"), ["engine:", "'numpy'", "got 'torch'"]),
        (edited(CELL, dtype="int32"), ["dtype:", "'float16'", "got 'int32'"]),
        (edited(CELL, input_dim=0), ["input_dim:", "greater than 0", "got 0"]),
        (edited(CELL, input_dim=None), ["needs input_dim"]),
        (edited(CELL, weights=None), ["weights", "are missing"]),
        (edited(CELL, options={"return_sequence": True}), ["unknown options ['return_sequence']"]),
        (edited(CELL, settable_options=["masking"]), ["unknown options ['masking']"]),
        (edited(CELL, options={"stateful": "maybe"}), ["options.stateful:", "valid boolean", "got 'maybe'"]),
        (edited(CELL, cell={"class_name": "LSTM"}), ["cell", "config", "Field required"]),
        (edited(CELL, cell={"class_name": "Nope", "config": {}}), ["unknown cell class 'Nope'", "LSTMCell"]),
        (edited(CELL, cell={"class_name": "LSTMCell", "config": {"unit": 3}}), ["LSTMCell", "unit"]),
        (edited(CELL, cell={"class_name": "LSTMCell", "config": {"units": -3}}), ["units", "positive", "-3"]),
        (edited(CELL, cell=[]), ["cell"]),
        (edited(GRAPH, input_dim=2), ["input_dim, weights and finite belong to cell"]),
        (edited(GRAPH, engine="numpy"), ["a graph runs under onnx"]),
        (lstm_spec(file=None), ["graph.file:", "Field required"]),
        (lstm_spec(inputs=[]), ["graph.inputs:", "at least 1"]),
        (lstm_spec(inputs=[{**X, "axes": ["time", 2]}]), ["graph.inputs.0", "name batch once", "['time', 2]"]),
        (lstm_spec(inputs=[{**X, "axes": ["batch", "T", 2]}]), ["graph.inputs.0.axes.1", "'squeeze'", "got 'T'"]),
        (lstm_spec(inputs=[{**X, "axes": ["batch", "time", -2]}]), ["graph.inputs.0.axes.2", "-2"]),
        (lstm_spec(inputs=[{**X, "dtype": "complex64"}]), ["graph.inputs.0.dtype", "got 'complex64'"]),
        (lstm_spec(inputs=[{**X, "context": 5}]), ["context is 5", "[2] elements"]),
        (lstm_spec(inputs=[X, X]), ["names given twice: ['x']"]),
        (lstm_spec(states=[{**H, "axes": ["time", "batch", 3]}]), ["graph.states.0", "time never"]),
        (lstm_spec(states=[H, H]), ["names given twice: ['h']"]),
        (lstm_spec(inputs=[X, {"name": "s", "axes": ["batch"]}]), ["either every input has a time axis or none"]),
        (lstm_spec(inputs=[{**X, "axes": ["batch", 2]}]), ["an output has a time axis, but no input has"]),
    ],
)
def test_malformed_descriptions(tmp_path, spec, said):
    """A model.yaml that is not one is refused with the file, the key, what was expected and what was found."""
    files = {"weights": weights(LSTMCell(units=3)), "graph": lstm()}
    path = directory(tmp_path, spec if not isinstance(spec, bytes) else "", **files)
    if isinstance(spec, bytes):
        (path / "model.yaml").write_bytes(spec)
    refused(path, *said)


@pytest.mark.parametrize("name", ["../w", "/etc/hostname", "a/../../w", "..", "."])
def test_files_are_beside_the_description(tmp_path, name):
    """A description can name no file outside its directory."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").write_bytes(weights(LSTMCell(units=3)))
    refused(directory(tmp_path, edited(CELL, weights=name)))
    refused(directory(tmp_path, lstm_spec(file=name)))


def test_missing_files_are_named(tmp_path):
    """A file that is not there is named, with the command that takes it where there is one."""
    refused(tmp_path / "m" / "1", "model.yaml", "cannot be read")
    refused(directory(tmp_path, CELL), "weights.safetensors", "the file is missing")
    source = {"package": "some-package", "version": "1.0", "path": "x", "sha256": "0" * 64}
    refused(directory(tmp_path, lstm_spec(source=source)), "graph.onnx", "some-package 1.0", "rnnserve fetch")


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no tensors here", ["is not a safetensors file"]),
        (b"", ["is not a safetensors file"]),
        (weights(LSTMCell(units=3))[:-4], ["is not a safetensors file"]),
        (weights(LSTMCell(units=3), **{"0.bias": None}), ["0.bias"]),
        (weights(LSTMCell(units=3), **{"0.extra": np.zeros(1, "f4")}), ["0.extra"]),
        (weights(LSTMCell(units=3), **{"0.bias": np.zeros(11, "f4")}), ["0.bias", "[12]", "[11]"]),
        (weights(LSTMCell(units=4)), ["0.kernel"]),
        (weights(LSTMCell(units=3), "float64"), ["float32", "float64"]),
    ],
)
def test_wrong_weights(tmp_path, content, said, engine):
    """Weights that are missing, too many, of a wrong shape or dtype, or no weights at all, are refused by name."""
    refused(directory(tmp_path, CELL, weights=content), "weights.safetensors", *said, engine=engine)


def test_the_engine_is_chosen(tmp_path):
    """Cells run under either engine: as asked, else as model.yaml says, else under onnx. Both agree."""
    path = directory(tmp_path, CELL, weights=weights(LSTMCell(units=3)))
    assert load_model(path).engine.name == "onnx"
    assert load_model(path, engine="numpy").engine.name == "numpy"
    directory(tmp_path, edited(CELL, engine="numpy"))
    assert load_model(path).engine.name == "numpy"
    assert load_model(path, engine="onnx").engine.name == "onnx"
    assert load_model(directory(tmp_path, GRAPH, name="g", graph=lstm()), engine="numpy").engine.name == "onnx"


def test_a_model_is_named_by_its_directories(tmp_path):
    """Name and version are the last two parts of the path; `finite` reaches the engine's inputs."""
    path = directory(tmp_path, edited(CELL, finite=True), name="n", version="3.1", weights=weights(LSTMCell(units=3)))
    for engine in ("numpy", "onnx"):
        model = load_model(path, engine=engine)
        assert (model.name, model.version) == ("n", "3.1")
        assert [tensor.finite for tensor in model.engine.inputs] == [True]


def test_the_digest_is_of_every_file(tmp_path):
    """The digest is the same for the same files wherever they are, and another when any byte of any differs."""
    one, two = weights(LSTMCell(units=3)), weights(LSTMCell(units=3), **{"0.bias": np.ones(12, "f4")})
    digests = [
        load_model(directory(tmp_path, CELL, name=name, weights=content)).digest
        for name, content in (("a", one), ("b", one), ("c", two))
    ]
    digests.append(load_model(directory(tmp_path, edited(CELL, description="x"), name="d", weights=one)).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)
    graph = [
        load_model(directory(tmp_path, lstm_spec(lengths=lengths), name=f"g{lengths}", graph=lstm(lengths=lengths)))
        for lengths in (False, True)
    ]
    assert graph[0].digest != graph[1].digest


def oracle(x, lengths, h, c, seed=0):
    """Rows of an LSTM with `lstm_weights`, by NumPy's cell, whose gates are in Keras's order."""
    W, R, B = graphs.lstm_weights(seed).values()
    order = np.concatenate([np.arange(UNITS) + UNITS * gate for gate in (0, 2, 3, 1)])  # iofc to ifco
    cell = LSTMCell(units=UNITS).with_weights(
        {
            "kernel": W[0][order].T,
            "recurrent_kernel": R[0][order].T,
            "bias": (B[0][: 4 * UNITS] + B[0][4 * UNITS :])[order],
        },
        FEATURES,
    )
    return run_cell(cell, x, lengths, [h, c])


VARIANTS = {
    "plain": (lstm(), lstm_spec()),
    "lengths": (lstm(lengths=True), lstm_spec(lengths=True)),
    "batch_major": (lstm(batch_major=True), lstm_spec(batch_major=True)),
    "stepwise": (
        graphs.step_lstm(),
        lstm_spec(inputs=[{**X, "axes": ["batch", FEATURES]}], outputs=[{"name": "y", "axes": ["batch", UNITS]}]),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_graphs_of_every_form(tmp_path, name):
    """A graph with lengths or without, time- or batch-major, of one step or many, computes each row's own steps."""
    content, spec = VARIANTS[name]
    engine = load_model(directory(tmp_path, spec, graph=content)).engine
    rng = np.random.default_rng(1)
    x, lengths = rng.normal(size=(7, 5, FEATURES)).astype(np.float32), np.array([7, 1, 4, 4, 6])
    h, c = rng.normal(size=(2, 5, UNITS)).astype(np.float32)
    outputs, states = engine.run({"x": x}, lengths, {"h": h, "c": c})
    y, (hn, cn) = oracle(x, lengths, h, c)
    valid = np.arange(7)[:, None] < lengths
    np.testing.assert_allclose(outputs["y"][valid], y[valid], atol=1e-6)
    np.testing.assert_allclose(states["h"], hn, atol=1e-6)
    np.testing.assert_allclose(states["c"], cn, atol=1e-6)


def test_several_inputs_outputs_and_states(tmp_path):
    """Two inputs, one of integers without features, two outputs, two recurrences and a constant, all of one graph."""
    nodes = [
        node("Cast", ["k"], ["kf"], to=FLOAT),
        node("Mul", ["kf", "factor"], ["ks"]),
        node("Unsqueeze", ["ks", "two"], ["kx"]),
        node("Concat", ["x", "kx"], ["both"], axis=2),
        node("LSTM", ["both", "W", "R", "B", "", "h", "c"], ["y", "hn", "cn"], hidden_size=UNITS),
        node("Transpose", ["x"], ["xt"], perm=[0, 1, 2]),
        node("GRU", ["xt", "GW", "GR", "", "", "g"], ["z", "gn"], hidden_size=2),
    ]
    inputs = [
        info("x", ["t", "b", 2]),
        info("k", ["t", "b"], INT64),
        info("factor", []),
        *(info(name, ["n", "b", UNITS]) for name in "hc"),
        info("g", ["n", "b", 2]),
    ]
    outputs = [info("y", None), info("z", None), info("hn", None), info("cn", None), info("gn", None)]
    rng = np.random.default_rng(2)
    content = graphs.model(
        nodes,
        inputs,
        outputs,
        {
            **graphs.lstm_weights(features=3),
            "two": np.array([2]),
            "GW": rng.normal(size=(1, 6, 2)).astype(np.float32),
            "GR": rng.normal(size=(1, 6, 2)).astype(np.float32),
        },
    )
    spec = lstm_spec(
        inputs=[X, {"name": "count", "tensor": "k", "dtype": "int64", "axes": ["time", "batch"]}],
        outputs=[*GRAPH["graph"]["outputs"], {"name": "z", "axes": ["time", "squeeze", "batch", 2]}],
        states=[H, C, {"name": "g", "input": "g", "output": "gn", "axes": ["squeeze", "batch", 2], "path": [1, 0]}],
        constants=[{"tensor": "factor", "dtype": "float32", "value": 0.5}],
    )
    engine = load_model(directory(tmp_path, spec, graph=content)).engine
    assert [(tensor.name, tensor.dtype.name, tensor.shape) for tensor in engine.inputs] == [
        ("x", "float32", (2,)),
        ("count", "int64", ()),
    ]
    assert [state.path for state in engine.states] == [(0,), (1,), (1, 0)]
    x, k = rng.normal(size=(4, 2, 2)).astype(np.float32), rng.integers(0, 5, (4, 2))
    zeros = {state.name: state.initial(2) for state in engine.states}
    whole, after = engine.run({"x": x, "count": k}, np.array([4, 4]), zeros)
    assert {name: y.shape for name, y in whole.items()} == {"y": (4, 2, 3), "z": (4, 2, 2)}
    first, between = engine.run({"x": x[:3], "count": k[:3]}, np.array([3, 3]), zeros)
    second, last = engine.run({"x": x[3:], "count": k[3:]}, np.array([1, 1]), between)
    for name, y in whole.items():
        np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), y)
    for name, state in after.items():
        np.testing.assert_array_equal(last[name], state)
    _, other = engine.run({"x": x, "count": k + 1}, np.array([4, 4]), zeros)
    assert (other["h"] != after["h"]).all()


def test_a_graph_of_another_ir_or_no_graph(tmp_path):
    """Bytes that are no ONNX model, and operators that do not exist, are refused."""
    refused(directory(tmp_path, GRAPH, graph=b"\x00\x01\x02 nonsense"), "graph.onnx")
    refused(directory(tmp_path, GRAPH, graph=b""), "graph.onnx")
    broken = graphs.parsed(lstm())
    broken.graph.node[0].op_type = "Nonsense"
    refused(directory(tmp_path, GRAPH, graph=broken.SerializeToString()), "graph.onnx", "Nonsense")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"states": [H]}, ["initial_c", "not fed from a declared state"]),
        ({"states": None}, ["initial_h", "not fed from a declared state"]),
        ({"inputs": [{**X, "tensor": "z"}]}, ["no input 'z'", "'x'"]),
        ({"inputs": [{**X, "dtype": "float64"}]}, ["input 'x' is float32 in the graph, but float64"]),
        ({"inputs": [{**X, "axes": ["time", "batch"]}]}, ["input 'x' has 3 axes in the graph, 2"]),
        ({"outputs": [{"name": "q", "axes": ["time", "batch", 3]}]}, ["no output 'q'"]),
        ({"outputs": [{"name": "y", "axes": ["time", "batch", 3]}]}, ["output 'y' has 4 axes in the graph, 3"]),
        ({"states": [{**H, "output": "hh"}, C]}, ["no output 'hh'"]),
        ({"states": [H, C, {**H, "name": "s", "input": "s"}]}, ["no input 's'"]),
        ({"states": [{**H, "dtype": "float16"}, C]}, ["'h' is float32 in the graph, but float16"]),
        ({"lengths": "x"}, ["input 'x'", "int32 or int64"]),
        ({"lengths": "zz"}, ["no input 'zz'"]),
        ({"constants": [{"tensor": "k", "dtype": "int64", "value": 1}]}, ["no input 'k'"]),
        ({"constants": [{"tensor": "k", "dtype": "int64", "value": "many"}]}, ["constants", "many"]),
        ({"constants": [{"tensor": "k", "dtype": "float32", "value": [[1], [1, 2]]}]}, ["constants"]),
        ({"constants": [{"tensor": "k", "dtype": "uint8", "value": 300}]}, ["constants", "300"]),
    ],
)
def test_descriptions_that_are_not_the_graphs(tmp_path, changes, said):
    """Every tensor that the description names must be in the graph, of that dtype and rank."""
    graph = {key: value for key, value in {**GRAPH["graph"], **changes}.items() if value is not None}
    refused(directory(tmp_path, {"graph": graph}, graph=lstm()), "graph.onnx", *said)


def test_undeclared_inputs_are_named(tmp_path):
    """An input of the graph that the description leaves out is named, with where to list it."""
    content = graphs.parsed(lstm())
    content.graph.input.append(info("rate", [], INT64))
    refused(directory(tmp_path, GRAPH, graph=content.SerializeToString()), "['rate']", "constants")


def test_wrong_extents_are_an_engine_error(tmp_path):
    """A state or output whose size the graph does not say is held against the description when it runs."""
    from rnnserve_models.engine.base import EngineError

    content = graphs.parsed(lstm())
    content.graph.output[0].type.tensor_type.shape.dim[3].dim_param = "units"
    spec = lstm_spec(outputs=[{"name": "y", "axes": ["time", "squeeze", "batch", 9]}])
    engine = load_model(directory(tmp_path, spec, graph=content.SerializeToString())).engine
    states = {state.name: state.initial(2) for state in engine.states}
    with pytest.raises(EngineError, match=r"y: the graph gave shape \[4, 1, 2, 3\], which is not .* \[4, 2, 9\]"):
        engine.run({"x": np.zeros((4, 2, 2), np.float32)}, np.array([4, 4]), states)


@pytest.mark.parametrize("initial", [("", ""), ("zeros", "c"), ("h", "zeros"), ("h", "")])
def test_a_graph_that_forgets_is_refused(tmp_path, initial):
    """A recurrent operator whose initial state is absent or constant would start every call anew."""
    content = graphs.parsed(lstm(initial=initial))
    for name in ("h", "c"):
        if name not in initial:  # onnxruntime would drop it; keep it used, but not by the operator
            content.graph.node.append(node("Identity", [name], [f"{name}_kept"]))
            content.graph.output.append(info(f"{name}_kept", STATE))
    refused(directory(tmp_path, GRAPH, graph=content.SerializeToString()), "LSTM", "every call would start anew")


def test_a_state_that_gives_only_its_shape_is_no_state(tmp_path):
    """Zeros in the shape of a declared state are still zeros."""
    content = graphs.parsed(lstm(initial=("z", "c")))
    content.graph.node.insert(0, node("ConstantOfShape", ["shape"], ["z"]))
    content.graph.node.insert(0, node("Shape", ["h"], ["shape"]))
    refused(directory(tmp_path, GRAPH, graph=content.SerializeToString()), "initial_h")


def test_a_state_may_come_through_other_nodes(tmp_path):
    """Declared states reach the operator through whatever computes on them."""
    content = graphs.parsed(lstm(initial=("h2", "c")))
    content.graph.node.insert(0, node("Tanh", ["h"], ["h2"]))
    load_model(directory(tmp_path, GRAPH, graph=content.SerializeToString()))


def body_lstm(initial=("h_in", "c_in")):
    """One step of an LSTM as the nodes of a body: x_t [B, 2] -> y_t [B, 3], h_out, c_out."""
    return [
        node("Unsqueeze", ["x_t", "zero"], ["x3"]),
        node("LSTM", ["x3", "W", "R", "B", "", *initial], ["y4", "h_out", "c_out"], hidden_size=UNITS),
        node("Squeeze", ["y4", "axes"], ["y_t"]),
    ]


INITIALIZERS = {
    **graphs.lstm_weights(),
    "zero": np.array([0]),
    "axes": np.array([0, 1]),
    "zeros": np.zeros((1, 1, UNITS), np.float32),
    "steps": np.array(3),
    "true": np.array(True),
}
IN_BODY = [info("h_in", STATE), info("c_in", STATE)]
OUT_BODY = [info("h_out", STATE), info("c_out", STATE)]
Y3 = [{"name": "y", "axes": ["time", "batch", UNITS]}]


def scan(initial=("h_in", "c_in"), fed=("h", "c")):
    body = helper.make_graph(
        body_lstm(initial), "body", [*IN_BODY, info("x_t", ["b", 2])], [*OUT_BODY, info("y_t", ["b", 3])]
    )
    nodes = [node("Scan", [*fed, "x"], ["hn", "cn", "y"], body=body, num_scan_inputs=1)]
    inputs = [info("x", ["t", "b", 2]), info("h", STATE), info("c", STATE)]
    return graphs.model(nodes, inputs, [info("y", None), info("hn", None), info("cn", None)], INITIALIZERS)


def loop(fed=("h", "c")):
    body = helper.make_graph(
        [
            node("Gather", ["x", "i"], ["x_t"], axis=0),
            *body_lstm(),
            node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [info("i", [], INT64), info("go", [], onnx.TensorProto.BOOL), *IN_BODY],
        [info("go_on", [], onnx.TensorProto.BOOL), *OUT_BODY, info("y_t", ["b", 3])],
    )
    nodes = [
        node("Shape", ["x"], ["length"], start=0, end=1),
        node("Squeeze", ["length"], ["trips"]),
        node("Loop", ["trips", "true", *fed], ["hn", "cn", "y"], body=body),
    ]
    inputs = [info("x", ["t", "b", 2]), info("h", STATE), info("c", STATE)]
    return graphs.model(nodes, inputs, [info("y", None), info("hn", None), info("cn", None)], INITIALIZERS)


def branches(then=("h", "c"), other=("", "")):
    def branch(name, initial):
        y, hn, cn = (f"{name}_{part}" for part in ("y", "h", "c"))
        inputs = ["x", "W", "R", "B", "", *initial]
        return helper.make_graph(
            [node("LSTM", inputs, [y, hn, cn], hidden_size=UNITS)], name, [], [info(each, None) for each in (y, hn, cn)]
        )

    nodes = [node("If", ["true"], ["y", "hn", "cn"], then_branch=branch("a", then), else_branch=branch("b", other))]
    nodes += [node("Identity", [name], [f"{name}_kept"]) for name in "hc"]
    inputs = [info("x", ["t", "b", 2]), info("h", STATE), info("c", STATE)]
    names = ("y", "hn", "cn", "h_kept", "c_kept")
    return graphs.model(nodes, inputs, [info(name, None) for name in names], INITIALIZERS)


@pytest.mark.parametrize(
    ("content", "outputs"), [(scan(), Y3), (loop(), Y3), (branches(), None)], ids=["scan", "loop", "if"]
)
def test_recurrences_inside_other_nodes(tmp_path, content, outputs):
    """An LSTM inside a Scan, a Loop or a branch of an If is one whose states are declared, and runs."""
    spec = lstm_spec(outputs=outputs) if outputs else GRAPH
    engine = load_model(directory(tmp_path, spec, graph=content)).engine
    x = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    h, c = np.random.default_rng(1).normal(size=(2, 2, UNITS)).astype(np.float32)
    found, states = engine.run({"x": x}, np.array([4, 2]), {"h": h, "c": c})
    y, (hn, cn) = oracle(x, np.array([4, 2]), h, c)
    np.testing.assert_allclose(found["y"][:, 0], y[:, 0], atol=1e-6)
    np.testing.assert_allclose(states["h"], hn, atol=1e-6)
    np.testing.assert_allclose(states["c"], cn, atol=1e-6)


def function_lstm():
    """An LSTM that starts from zeros, hidden in a function of the model's own."""
    lines = [node("LSTM", ["fx", "fw", "fr", "fb"], ["fy", "fh", "fc"], hidden_size=UNITS)]
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("own", "F", ["fx", "fw", "fr", "fb"], ["fy", "fh", "fc"], lines, opsets)
    nodes = [node("F", ["x", "W", "R", "B"], ["y", "hn", "cn"], domain="own")]
    nodes += [node("Identity", [name], [f"{name}_kept"]) for name in "hc"]
    inputs = [info("x", ["t", "b", 2]), info("h", STATE), info("c", STATE)]
    names = ("y", "hn", "cn", "h_kept", "c_kept")
    return graphs.model(nodes, inputs, [info(name, None) for name in names], INITIALIZERS, [function])


@pytest.mark.parametrize(
    "content",
    [scan(("zeros", "c_in")), scan(("h_in", "")), branches(("", ""), ("zeros", "c")), function_lstm()],
    ids=["scan", "scan_absent", "if", "function"],
)
def test_forgetting_inside_other_nodes(tmp_path, content):
    """An LSTM that starts anew is found inside a Scan, in every branch of an If, and in a function."""
    refused(directory(tmp_path, GRAPH, graph=content), "every call would start anew")


@pytest.mark.parametrize("where", ["initializer", "constant", "body"])
def test_tensors_in_other_files_are_refused(tmp_path, where):
    """A graph cannot make the server read a file beside it, or anywhere else."""
    content = graphs.parsed(scan())
    outside = graphs.tensor("outside", np.zeros(4, np.float32))
    outside.ClearField("raw_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../../secret")
    if where == "initializer":
        content.graph.initializer.append(outside)
    elif where == "constant":
        content.graph.node.insert(0, node("Constant", [], ["outside"], value=outside))
    else:
        content.graph.node[0].attribute[0].g.initializer.append(outside)
    refused(directory(tmp_path, GRAPH, graph=content.SerializeToString()), "keeps tensors in other files")


def test_an_output_without_time_is_the_last_steps(tmp_path):
    """An output that the graph gives once a run is honest only where the last output alone is asked for."""
    content = graphs.parsed(lstm())
    content.graph.node.append(node("Squeeze", ["hn", "one0"], ["last"]))
    content.graph.initializer.append(graphs.tensor("one0", np.array([0])))
    content.graph.output.append(info("last", ["batch", UNITS]))
    spec = lstm_spec(outputs=[{"name": "last", "axes": ["batch", UNITS]}])
    path = directory(tmp_path, spec, graph=content.SerializeToString())
    refused(path, "last", "return_sequences")
    settable = ["return_state", "stateful", "unroll", "time_major"]
    engine = load_model(directory(tmp_path, {**spec, "settable_options": settable})).engine
    x = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    zeros = {state.name: state.initial(2) for state in engine.states}
    outputs, states = engine.run({"x": x}, np.array([4, 2]), zeros)
    np.testing.assert_array_equal(outputs["last"][[3, 1], [0, 1]], states["h"])
    refused(directory(tmp_path, {**spec, "options": {"return_sequences": True}, "settable_options": settable}), "last")


def test_unreadable_files(tmp_path):
    """A file that cannot be read is a ModelError, not a crash of the server."""
    path = directory(tmp_path, GRAPH, graph=lstm())
    (path / "graph.onnx").unlink()
    (path / "graph.onnx").mkdir()
    refused(path, "graph.onnx")


def test_gru_under_both_engines(tmp_path):
    """What the two engines make of the same weights agrees to rounding."""
    spec = edited(CELL, cell={"class_name": "GRUCell", "config": {"units": 3}})
    path = directory(tmp_path, spec, weights=weights(GRUCell(units=3)))
    x = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    found = []
    for name in ("numpy", "onnx"):
        engine = load_model(path, engine=name).engine
        found.append(engine.run({"input": x}, np.array([4, 4]), {s.name: s.initial(2) for s in engine.states}))
    np.testing.assert_allclose(found[0][0]["output"], found[1][0]["output"], atol=1e-6)
