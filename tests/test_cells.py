"""Cells: Keras's equations, configs and states."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from keras_loop import with_random_weights
from rnnserve_models import (
    CELL_CLASSES,
    Cell,
    DenseCell,
    GRUCell,
    LSTMCell,
    ModelError,
    SimpleRNNCell,
    StackedRNNCells,
    cells_from_specs,
    run_cell,
)
from rnnserve_models.spec import CellSpec

KINDS = {
    "lstm": lambda units, **config: LSTMCell(units=units, **config),
    "gru": lambda units, **config: GRUCell(units=units, **config),
    "gru_reset_before": lambda units, **config: GRUCell(units=units, reset_after=False, **config),
    "simple": lambda units, **config: SimpleRNNCell(units=units, **config),
    "dense": lambda units, **config: DenseCell(units=units, **config),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def random(shape, dtype="float64", seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def by_hand(cell, x, states):
    """Each gate on its own, in plain 2-D products, float64, default activations."""
    weights = {name: np.asarray(value, np.float64) for name, value in cell.weights.items()}
    u = cell.units
    kernel = [weights["kernel"][:, i : i + u] for i in range(0, cell.gates * u, u)]
    recurrent = [weights.get("recurrent_kernel", weights["kernel"])[:, i : i + u] for i in range(0, cell.gates * u, u)]
    bias = np.atleast_2d(weights.get("bias", np.zeros(cell.gates * u)))
    b_in = [bias[0, i : i + u] for i in range(0, cell.gates * u, u)]
    b_rec = [bias[-1, i : i + u] if len(bias) == 2 else 0.0 for i in range(0, cell.gates * u, u)]
    if isinstance(cell, DenseCell):
        return [x @ kernel[0] + b_in[0]]
    h = states[0]
    if isinstance(cell, SimpleRNNCell):
        return [np.tanh(x @ kernel[0] + h @ recurrent[0] + b_in[0])]
    if isinstance(cell, LSTMCell):
        i, f, g, o = (x @ k + h @ r + b for k, r, b in zip(kernel, recurrent, b_in, strict=True))
        c = sigmoid(f) * states[1] + sigmoid(i) * np.tanh(g)
        return [sigmoid(o) * np.tanh(c), c]
    z = sigmoid(x @ kernel[0] + b_in[0] + h @ recurrent[0] + b_rec[0])
    r = sigmoid(x @ kernel[1] + b_in[1] + h @ recurrent[1] + b_rec[1])
    if cell.reset_after:
        g = np.tanh(x @ kernel[2] + b_in[2] + r * (h @ recurrent[2] + b_rec[2]))
    else:
        g = np.tanh(x @ kernel[2] + b_in[2] + (r * h) @ recurrent[2])
    return [z * h + (1 - z) * g]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("float16", 4e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_equations(kind, dtype, tolerance, use_bias):
    """A step is what its gates give one by one."""
    cell = with_random_weights(KINDS[kind](5, use_bias=use_bias), 3, dtype)
    x = random((4, 3), dtype)
    states = [random((4, 5), dtype, seed) for seed, _ in enumerate(cell.state_specs())]
    output, new = cell.call(x, states)
    expected = by_hand(cell, x.astype(np.float64), [s.astype(np.float64) for s in states])
    assert output.dtype == dtype
    np.testing.assert_allclose(output, expected[0], rtol=0, atol=tolerance)
    for state, value in zip(new, expected, strict=False):
        assert state.dtype == dtype
        np.testing.assert_allclose(state, value, rtol=0, atol=tolerance)


def operator(cell, x, states):
    """Runs ONNX's operator for a cell whose gates stand in the same order in both: GRU and RNN."""
    name = "GRU" if isinstance(cell, GRUCell) else "RNN"
    bias = np.atleast_2d(cell.weights["bias"])
    attributes = {"linear_before_reset": int(cell.reset_after)} if name == "GRU" else {}
    feeds = {
        "X": x,
        "W": cell.weights["kernel"].T[None],
        "R": cell.weights["recurrent_kernel"].T[None],
        "B": np.concatenate([bias[0], bias[1] if len(bias) == 2 else 0 * bias[0]])[None],
        "initial_h": states[0][None],
    }
    node = helper.make_node(
        name, ["X", "W", "R", "B", "", "initial_h"], ["Y", "Y_h"], hidden_size=cell.units, **attributes
    )
    infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feeds.items()]
    outputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, None) for k in ("Y", "Y_h")]
    model = helper.make_model(
        helper.make_graph([node], "g", infos, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, h = session.run(None, {k: np.ascontiguousarray(v) for k, v in feeds.items()})
    return y[:, 0], h[0]


@pytest.mark.parametrize("kind", ["gru", "gru_reset_before", "simple"])
def test_against_onnx_operators(kind):
    """Ten steps agree with ONNX's operators to 1e-5 (LSTM: see test_export)."""
    cell = with_random_weights(KINDS[kind](6), 4)
    x, states = random((10, 3, 4), "float32"), [random((3, 6), "float32", 2)]
    y, h = operator(cell, x, states)
    output, new = run_cell(cell, x, np.full(3, 10), states)
    np.testing.assert_allclose(output, y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(new[0], h, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("units", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_batch(kind, units, dtype):
    """A row's bits are the same alone, among others, and at any place, in batches of 1 to 64."""
    cell = with_random_weights(KINDS[kind](units), 5, dtype)
    assert cell.bit_identical
    x = random((64, 5), dtype)
    states = [random((64, units), dtype, seed) for seed, _ in enumerate(cell.state_specs())]
    whole = cell.call(x, states)
    for rows in [*range(1, 65, 3), 64]:
        chosen = np.random.default_rng(rows).permutation(64)[:rows]
        part = cell.call(x[chosen], [state[chosen] for state in states])
        np.testing.assert_array_equal(part[0], whole[0][chosen])
        for state, of_whole in zip(part[1], whole[1], strict=True):
            np.testing.assert_array_equal(state, of_whole[chosen])


def test_bits_do_not_depend_on_the_memory_layout():
    """Rows that lie apart in memory give the bits of rows that lie side by side."""
    cell = with_random_weights(LSTMCell(units=6), 5)
    x, states = random((9, 5), "float32"), [random((9, 6), "float32", seed) for seed in (2, 3)]
    expected, _ = cell.call(x, states)
    output, _ = cell.call(np.asfortranarray(x), [np.asfortranarray(state) for state in states])
    np.testing.assert_array_equal(output, expected)


def test_shapes_and_names():
    """Weights come in Keras's get_weights() order, and states are listed and named as Keras does."""
    assert list(LSTMCell(units=3).weight_shapes(2).items()) == [
        ("kernel", (2, 12)),
        ("recurrent_kernel", (3, 12)),
        ("bias", (12,)),
    ]
    assert GRUCell(units=3).weight_shapes(2)["bias"] == (2, 9)
    assert GRUCell(units=3, reset_after=False).weight_shapes(2)["bias"] == (9,)
    assert list(SimpleRNNCell(units=3, use_bias=False).weight_shapes(2)) == ["kernel", "recurrent_kernel"]
    assert LSTMCell(units=3).state_size == [3, 3]
    assert GRUCell(units=3).state_size == 3
    assert DenseCell(units=3).state_size == []
    assert [state.shape for state in LSTMCell(units=3).get_initial_state(2, "float16")] == [(2, 3), (2, 3)]
    assert LSTMCell(units=3).get_initial_state(2, "float16")[0].dtype == np.float16


def test_stacked_states():
    """A state's path counts the cells that have states, its name counts all of them."""
    stack = StackedRNNCells([LSTMCell(units=3), DenseCell(units=5), GRUCell(units=2), DenseCell(units=1)])
    specs = stack.state_specs("float16")
    assert [(s.name, s.shape, s.path) for s in specs] == [
        ("0.h", (3,), (0, 0)),
        ("0.c", (3,), (0, 1)),
        ("2.h", (2,), (1, 0)),
    ]
    assert specs[0].dtype == np.float16
    assert stack.state_size == [[3, 3], 2]
    assert stack.output_size == 1
    assert [len(part) for part in stack.get_initial_state(4)] == [2, 1]
    assert stack.flat_states(stack.nest_states([1, 2, 3])) == [1, 2, 3]
    assert stack.nest_states([1, 2, 3]) == [[1, 2], [3]]
    assert list(stack.weight_shapes(4))[:4] == ["0.kernel", "0.recurrent_kernel", "0.bias", "1.kernel"]
    assert stack.weight_shapes(4)["2.kernel"] == (5, 6)


def test_a_stack_is_its_cells_in_a_row():
    """A stacked step gives each cell the output of the one before."""
    stack = with_random_weights(StackedRNNCells([LSTMCell(units=3), DenseCell(units=5), GRUCell(units=2)]), 4)
    lstm, dense, gru = stack.cells
    x, states = random((6, 4), "float32"), [[random((6, 3), "float32"), random((6, 3), "float32", 2)]]
    states.append([random((6, 2), "float32", 3)])
    output, new = stack.call(x, states)
    first, after = lstm.call(x, states[0])
    expected, last = gru.call(dense.call(first, [])[0], states[1])
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(new[0][1], after[1])
    np.testing.assert_array_equal(new[1][0], last[0])
    assert list(stack.weights) == list(stack.weight_shapes(4))


def test_keras_config():
    """What get_config() gives makes the cell; what concerns training only is ignored."""
    config = {
        "name": "cell",
        "trainable": True,
        "dtype": {"class_name": "DTypePolicy", "config": {"name": "float32"}},
        "units": 4,
        "activation": "relu",
        "recurrent_activation": "hard_sigmoid",
        "use_bias": True,
        "kernel_initializer": {"class_name": "GlorotUniform"},
        "recurrent_initializer": {},
        "bias_initializer": {},
        "unit_forget_bias": True,
        "kernel_regularizer": None,
        "recurrent_regularizer": None,
        "bias_regularizer": None,
        "kernel_constraint": None,
        "recurrent_constraint": None,
        "bias_constraint": None,
        "dropout": 0.5,
        "recurrent_dropout": 0.0,
        "seed": None,
        "implementation": 2,
    }
    cell = cells_from_specs([CellSpec(class_name="LSTMCell", config=config)])
    assert isinstance(cell, LSTMCell)
    assert (cell.units, cell.activation, cell.recurrent_activation) == (4, "relu", "hard_sigmoid")


def test_specs():
    """One description is a cell, several are a stack, and a stack can be described as Keras does."""
    gru, dense = (CellSpec(class_name=name, config={"units": 2}) for name in ("GRUCell", "Dense"))
    assert isinstance(cells_from_specs([gru]), GRUCell)
    assert [type(cell) for cell in cells_from_specs([gru, dense]).cells] == [GRUCell, DenseCell]
    stacked = CellSpec(class_name="StackedRNNCells", config={"cells": [gru.model_dump(), dense.model_dump()]})
    assert [type(cell) for cell in cells_from_specs([stacked]).cells] == [GRUCell, DenseCell]
    assert GRUCell(units=2).reset_after


@pytest.mark.parametrize(
    ("class_name", "config", "message"),
    [
        ("LSTM", {"units": 2}, r"unknown cell class 'LSTM'; the classes are LSTMCell, GRUCell"),
        ("LSTMCell", {"units": 2, "unitz": 3}, r"LSTMCell: unknown keys \['unitz'\]; the keys are \['units'"),
        ("LSTMCell", {"units": 2, "reset_after": True}, r"unknown keys \['reset_after'\]"),
        ("LSTMCell", {}, r"LSTMCell: .*'units'"),
        ("GRUCell", {"units": 0}, r"GRUCell: units must be a positive integer, got 0"),
        ("GRUCell", {"units": True}, r"units must be a positive integer"),
        ("GRUCell", {"units": 2, "reset_after": 1}, r"reset_after must be true or false, got 1"),
        ("GRUCell", {"units": 2, "activation": "tahn"}, r"unknown activation 'tahn'"),
        ("StackedRNNCells", {"cells": []}, r"cells is empty"),
        ("StackedRNNCells", {"cells": [{"config": {}}]}, r"must have a class_name and a config"),
        ("StackedRNNCells", {"cellz": []}, r"unknown keys \['cellz'\]"),
    ],
)
def test_bad_config(class_name, config, message):
    """A description that is wrong is refused by the name of what is wrong."""
    with pytest.raises(ModelError, match=message):
        cells_from_specs([CellSpec(class_name=class_name, config=config)])


def test_bad_stacks():
    """A stack refuses a stack, features that do not fit, and mixed dtypes."""
    with pytest.raises(ModelError, match=r"cells\.0 is a stack"):
        StackedRNNCells([StackedRNNCells([GRUCell(units=1)])])
    first = with_random_weights(GRUCell(units=2), 3)
    with pytest.raises(ModelError, match=r"cells\.1 takes 4 features, but gets 2"):
        StackedRNNCells([first, with_random_weights(GRUCell(units=2), 4)])
    with pytest.raises(ModelError, match=r"cells\.1 is float64, cells\.0 float32"):
        StackedRNNCells([first, with_random_weights(GRUCell(units=2), 2, "float64")])


def test_bad_weights():
    """Weights are refused by name, with the shape that was expected; a cell without any says so."""
    cell = SimpleRNNCell(units=2)
    good = {"kernel": np.ones((3, 2)), "recurrent_kernel": np.ones((2, 2)), "bias": np.ones(2)}
    with pytest.raises(ModelError, match=r"SimpleRNNCell: weights \['bias'\] are missing"):
        cell.with_weights({k: v for k, v in good.items() if k != "bias"}, 3)
    with pytest.raises(ModelError, match=r"unexpected weights \['extra'\]"):
        cell.with_weights({**good, "extra": np.ones(1)}, 3)
    with pytest.raises(ModelError, match=r"kernel: expected shape \[4, 2\], got \[3, 2\]"):
        cell.with_weights(good, 4)
    with pytest.raises(ModelError, match=r"one of float16, float32, float64, got int32"):
        cell.with_weights(good, 3, "int32")
    with pytest.raises(ModelError, match=r"has no weights"):
        cell.call(np.ones((1, 3)), [np.ones((1, 2))])


def test_cells_are_immutable():
    """Weights are copied and read-only, and giving a cell weights leaves it as it was."""
    cell, kernel = DenseCell(units=1, use_bias=False), np.ones((2, 1), np.float32)
    bound = cell.with_weights({"kernel": kernel}, 2)
    kernel[:] = 5
    assert bound.weights["kernel"].max() == 1
    assert not cell.weights
    with pytest.raises(ValueError, match="read-only"):
        bound.weights["kernel"][:] = 0
    with pytest.raises(AttributeError):
        bound.units = 3


class Counter(Cell):
    """A cell of a user's own: counts its steps and adds a weight, if it has one."""

    state_size = 1
    output_size = 1

    def call(self, inputs, states):
        count = states[0] + 1
        return count, [count]


def test_a_cell_of_ones_own(monkeypatch):
    """call, state_size and output_size are enough; the registry serves it, and configs are checked."""
    monkeypatch.setitem(CELL_CLASSES, "Counter", Counter)
    cell = cells_from_specs([CellSpec(class_name="Counter", config={})]).with_weights({}, 2, "float64")
    assert [spec.name for spec in cell.state_specs()] == ["state_0"]
    assert not cell.bit_identical
    y, states = run_cell(cell, np.zeros((3, 2, 2)), np.array([3, 1]), cell.get_initial_state(2))
    assert y[..., 0].tolist() == [[1, 1], [2, 0], [3, 0]]
    assert states[0].tolist() == [[3], [1]]
    with pytest.raises(ModelError, match="Counter"):
        cells_from_specs([CellSpec(class_name="Counter", config={"start": 1})])


def test_nan_and_infinity_pass_without_warning():
    """Numbers that are none go through, in their own row only."""
    cell = with_random_weights(LSTMCell(units=2), 2, "float16")
    x = np.array([[[np.nan, 1], [np.inf, -np.inf], [6e4, 6e4], [1, 1]]], "float16")
    y, _ = run_cell(cell, x, np.full(4, 1), cell.get_initial_state(4))
    assert np.isnan(y[0, 0]).all()
    assert np.isfinite(y[0, 3]).all()
