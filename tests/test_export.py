"""Graphs of cells: under onnxruntime they compute what the cells do, and keep their promise of bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from keras_loop import with_random_weights
from rnnserve_models import DenseCell, GRUCell, LSTMCell, ModelError, SimpleRNNCell, StackedRNNCells, run_cell
from rnnserve_models.activations import ACTIVATION_NAMES
from rnnserve_models.export import export_cell

STEPS, ROWS, FEATURES = 6, 64, 5
LENGTHS = np.random.default_rng(0).integers(1, STEPS + 1, ROWS)
LENGTHS[0] = STEPS
VALID = np.arange(STEPS)[:, None] < LENGTHS  # [T, R]

CELLS = {
    "lstm": LSTMCell(units=7),
    "lstm_no_bias": LSTMCell(units=7, use_bias=False),
    "gru": GRUCell(units=7),
    "gru_no_bias": GRUCell(units=7, use_bias=False),
    "gru_reset_before": GRUCell(units=7, reset_after=False),
    "simple": SimpleRNNCell(units=7),
    "dense": DenseCell(units=7, activation="tanh"),
    "lstm_scan": LSTMCell(units=7, activation="mish", recurrent_activation="hard_sigmoid"),
    "gru_scan": GRUCell(units=7, activation="selu"),
    "gru_scan_no_bias": GRUCell(units=7, activation="selu", use_bias=False),
    "gru_scan_reset_before": GRUCell(units=7, activation="silu", reset_after=False),
    "stack": StackedRNNCells([LSTMCell(units=4), DenseCell(units=6), SimpleRNNCell(units=3), GRUCell(units=7)]),
    "stack_dense": StackedRNNCells([GRUCell(units=4, activation="elu"), LSTMCell(units=5), DenseCell(units=2)]),
}
TOLERANCE = {"float16": 4e-3, "float32": 1e-5, "float64": 1e-12}


class Graph:
    """An exported cell under onnxruntime."""

    def __init__(self, cell, dtype="float32", threads=1):
        content, self.spec = export_cell(cell, cell.input_dim, dtype)
        onnx.checker.check_model(content, full_check=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(self, x, lengths, states):
        feeds = {"input": x}
        if self.spec.lengths:
            feeds["lengths"] = lengths.astype(np.int32)
        for spec, state in zip(self.spec.states, states, strict=True):
            feeds[spec.input] = state[None] if "squeeze" in spec.axes else state
        y, *new = self.session.run(["output", *(spec.output for spec in self.spec.states)], feeds)
        for spec, array in zip((self.spec.outputs[0], *self.spec.states), (y, *new), strict=True):
            assert array.ndim == len(spec.axes)
        y = y[:, 0] if "squeeze" in self.spec.outputs[0].axes else y
        return y, [s[0] if "squeeze" in spec.axes else s for spec, s in zip(self.spec.states, new, strict=True)]


def batch(cell, dtype="float32"):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(STEPS, ROWS, FEATURES)).astype(dtype)
    x[~VALID] = 0
    return x, [rng.normal(size=(ROWS, *spec.shape)).astype(dtype) for spec in cell.state_specs()]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CELLS)
def test_graph_is_the_cell(name, dtype):
    """A ragged batch gives what the cell gives: outputs at valid steps, states after each row's last."""
    cell = with_random_weights(CELLS[name], FEATURES, dtype)
    x, states = batch(cell, dtype)
    y, new = Graph(cell, dtype).run(x, LENGTHS, states)
    expected, finals = run_cell(cell, x, LENGTHS, states)
    assert y.dtype == dtype
    np.testing.assert_allclose(y[VALID], expected[VALID], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for state, final in zip(new, finals, strict=True):
        assert state.dtype == dtype
        np.testing.assert_allclose(state, final, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_every_activation(name, dtype):
    """Each activation, in either place of a cell and in Dense, is the same function in a graph."""
    for cell in (
        LSTMCell(units=3, activation=name),
        GRUCell(units=3, recurrent_activation=name),
        DenseCell(units=9, activation=name),
    ):
        cell = with_random_weights(cell, FEATURES, dtype)
        x, states = batch(cell, dtype)
        ones = np.ones(ROWS, int)
        y, _ = Graph(cell, dtype).run(x[:1], ones, states)
        expected, _ = run_cell(cell, x[:1], ones, states)
        tolerance = 1e-6 if (name, dtype) == ("gelu", "float64") else TOLERANCE[dtype]  # of float32's erf
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", CELLS)
def test_promise_of_bits(name, dtype, threads):
    """A row's bits are the same in batches of 1 to 64 ragged rows, at any place, and however its steps are cut."""
    cell = with_random_weights(CELLS[name], FEATURES, dtype)
    graph = Graph(cell, dtype, threads)
    assert graph.spec.bit_identical
    x, states = batch(cell, dtype)
    y, new = graph.run(x, LENGTHS, states)
    for rows in (1, 2, 3, 4, 5, 8, 13, 16, 31, 47):
        chosen = np.random.default_rng(rows).permutation(ROWS)[:rows]
        steps = LENGTHS[chosen].max()
        part, after = graph.run(x[:steps, chosen], LENGTHS[chosen], [state[chosen] for state in states])
        np.testing.assert_array_equal(part[VALID[:steps, chosen]], y[:steps, chosen][VALID[:steps, chosen]])
        for state, whole in zip(after, new, strict=True):
            np.testing.assert_array_equal(state, whole[chosen])
    longest = LENGTHS == STEPS
    carried = [state[longest] for state in states]
    for start, stop in ((0, 1), (1, 4), (4, STEPS)):
        chunk, carried = graph.run(x[start:stop, longest], np.full(longest.sum(), stop - start), carried)
        np.testing.assert_array_equal(chunk, y[start:stop, longest])
    for state, whole in zip(carried, new, strict=True):
        np.testing.assert_array_equal(state, whole[longest])


@pytest.mark.parametrize(
    ("cell", "dtype", "promise"),
    [
        (LSTMCell(units=2, activation="softplus"), "float32", True),
        (DenseCell(units=2, activation="softplus"), "float32", False),
        (LSTMCell(units=2), "float64", False),
    ],
)
def test_no_promise_where_none_can_be_kept(cell, dtype, promise):
    """float64, and softplus outside an operator, promise nothing."""
    cell = with_random_weights(cell, FEATURES, dtype)
    assert export_cell(cell, FEATURES, dtype)[1].bit_identical is promise


@pytest.mark.parametrize(
    ("cell", "dtype", "operator"),
    [
        (LSTMCell(units=2), "float32", "LSTM"),
        (GRUCell(units=2, recurrent_activation="hard_sigmoid"), "float32", "GRU"),
        (LSTMCell(units=2, activation="gelu"), "float32", "Scan"),
        (LSTMCell(units=2), "float16", "Scan"),
        (GRUCell(units=2), "float64", "Scan"),
        (SimpleRNNCell(units=2), "float32", "Scan"),
        (DenseCell(units=2), "float32", "MatMul"),
    ],
)
def test_form(cell, dtype, operator):
    """A cell is ONNX's operator of its name where that keeps the promises, else a Scan."""
    content, _ = export_cell(with_random_weights(cell, FEATURES, dtype), FEATURES, dtype)
    operators = [node.op_type for node in onnx.load_model_from_string(content).graph.node]
    assert operator in operators
    assert len({"LSTM", "GRU", "RNN", "Scan"} & set(operators)) <= 1


def test_spec():
    """The spec names the graph's tensors, their axes and Keras's nesting."""
    cell = with_random_weights(StackedRNNCells([DenseCell(units=4), LSTMCell(units=3), SimpleRNNCell(units=2)]), 5)
    _, spec = export_cell(cell, 5)
    assert spec.inputs[0].axes == ("time", "batch", 5)
    assert spec.outputs[0].axes == ("time", "batch", 2)
    assert spec.lengths == "lengths"
    assert [(s.name, s.input, s.output, s.axes, s.path) for s in spec.states] == [
        ("1.h", "1.h", "1.h_out", ("squeeze", "batch", 3), (0, 0)),
        ("1.c", "1.c", "1.c_out", ("squeeze", "batch", 3), (0, 1)),
        ("2.h", "2.h", "2.h_out", ("batch", 2), (1, 0)),
    ]
    _, spec = export_cell(with_random_weights(LSTMCell(units=3), 5), 5)
    assert spec.outputs[0].axes == ("time", "squeeze", "batch", 3)
    _, spec = export_cell(with_random_weights(DenseCell(units=3), 5), 5)
    assert spec.lengths is None


class Doubled(DenseCell):
    """Derived from a cell of Keras's, and another thing."""

    def call(self, inputs, states):
        output, states = super().call(inputs, states)
        return 2 * output, states


def test_refusals():
    """A cell without weights, with others than asked for, or of a user's own does not become a graph."""
    with pytest.raises(ModelError, match=r"must have weights for 5 features of float32; its input_dim is None"):
        export_cell(LSTMCell(units=2), 5)
    with pytest.raises(ModelError, match=r"its input_dim is 5, its dtype float64"):
        export_cell(with_random_weights(LSTMCell(units=2), 5, "float64"), 5)
    with pytest.raises(ModelError, match=r"Doubled has no form in ONNX"):
        export_cell(with_random_weights(Doubled(units=2), 5), 5)
