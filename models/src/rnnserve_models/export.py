"""ONNX graphs of cells, for onnxruntime.

An LSTMCell or GRUCell becomes ONNX's operator of its name where that has its activations, else a ``Scan`` over
primitive operators; both honour the rows' lengths. A DenseCell is one ``MatMul`` for all the steps. float16 is
computed in float32, and each layer's outputs and states are rounded at each step.

Measured on onnxruntime 1.32 (x86-64, 1 and 2 threads, batches of 1 to 64 ragged rows, 1 to 128 units, every
activation): a row's bits do not depend on the other rows, nor on how its steps are cut into runs, but in float64, whose
exponentials differ, and with softplus outside an operator, whose logarithm does. So the graphs promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from onnx import helper

from rnnserve_models.activations import OnnxActivation, onnx_activation
from rnnserve_models.cell import Cell
from rnnserve_models.cells import DenseCell, GRUCell, LSTMCell, SimpleRNNCell
from rnnserve_models.errors import ModelError
from rnnserve_models.onnx_builder import GraphBuilder
from rnnserve_models.onnx_steps import STEPS
from rnnserve_models.spec import Axis, GraphInput, GraphSpec, GraphState, GraphTensor
from rnnserve_models.stack import StackedRNNCells

OPSET = 20  # the first with Gelu
IR_VERSION = 10  # that of the first onnx release to know the opset, and so read by any onnxruntime that does

_LSTM_GATES = (0, 3, 1, 2)  # ONNX's i, o, f, c among Keras's i, f, c, o
_GRU_GATES = (0, 1, 2)  # z, r, h in both

Recurrent = LSTMCell | GRUCell | SimpleRNNCell


def export_cell(cell: Cell, input_dim: int, dtype: DTypeLike = np.float32) -> tuple[bytes, GraphSpec]:
    """The graph of a cell, or of stacked cells, and what its tensors mean.

    The graph takes ``input`` [time, batch, input_dim], ``lengths`` int32 [batch], each from 1 to time (if any cell has
    a state), and the states by their names; it gives ``output`` and the states after each row's last step, as
    ``<name>_out``. What an output holds beyond a row's length is unspecified.

    Returns:
        A serialized ModelProto and its `GraphSpec`, whose ``file`` is ``model.onnx``.

    Raises:
        ModelError: a cell is not one of Keras's, has no weights, or has others than for ``input_dim`` and ``dtype``.
    """
    dtype = np.dtype(dtype)
    if cell.input_dim != input_dim or cell.dtype != dtype:
        raise ModelError(
            f"{type(cell).__name__}: to become a graph it must have weights for {input_dim} features of {dtype}; "
            f"its input_dim is {cell.input_dim}, its dtype {cell.dtype}"
        )
    graph = GraphBuilder(dtype)
    kind: Any = dtype.name
    states: list[GraphState] = []
    bit_identical = True
    specs = iter(cell.state_specs())
    value, axes = "input", _axes("time", "batch", input_dim)
    for part in cell.cells if isinstance(cell, StackedRNNCells) else (cell,):
        check_form(part)
        bit_identical &= _is_bit_identical(part)
        if "squeeze" in axes:
            value = graph.add("Squeeze", value, graph.constant(np.array([1])))  # [time, batch, units]
        own = [next(specs) for _ in part.state_names]
        finals = [f"{state.name}_out" for state in own]
        value, axes = add_cell(graph, part, value, "lengths", [state.name for state in own], finals)
        states += [
            GraphState(name=s.name, input=s.name, output=f"{s.name}_out", dtype=kind, axes=axes[1:], path=s.path)
            for s in own
        ]
    graph.add_node("Identity", [value], ["output"])
    spec = GraphSpec(
        file="model.onnx",
        inputs=(GraphInput(name="input", dtype=kind, axes=_axes("time", "batch", input_dim)),),
        outputs=(GraphTensor(name="output", dtype=kind, axes=axes),),
        states=tuple(states),
        lengths="lengths" if states else None,
        bit_identical=bit_identical,
    )
    return _model(graph, spec), spec


def check_form(cell: Cell) -> None:
    """Refuses a cell that no graph can compute.

    Raises:
        ModelError: it is such.
    """
    # Not isinstance: a class derived from one of these may compute something else.
    if type(cell) is not DenseCell and type(cell) not in STEPS:
        raise ModelError(f"{type(cell).__name__} has no form in ONNX; it needs engine: numpy")


def _is_bit_identical(cell: Cell) -> bool:
    """Whether onnxruntime gives a row the same bits in any company: as measured, see above."""
    if cell.dtype == np.float64:
        return False
    return operator_activations(cell) is not None or "softplus" not in _activation_names(cell)


def _activation_names(cell: Cell) -> set[str | None]:
    return {getattr(cell, "activation", None), getattr(cell, "recurrent_activation", None)}


def _model(graph: GraphBuilder, spec: GraphSpec) -> bytes:
    """The graph with its inputs and outputs as the spec has them."""
    inputs = [graph.info("input", _sizes(spec.inputs[0].axes))]
    inputs += [graph.info("lengths", ["batch"], np.int32)] if spec.lengths else []
    inputs += [graph.info(state.input, _sizes(state.axes)) for state in spec.states]
    outputs = [graph.info("output", _sizes(spec.outputs[0].axes))]
    outputs += [graph.info(state.output, _sizes(state.axes)) for state in spec.states]
    model = helper.make_model(
        graph.graph("cell", inputs, outputs),
        producer_name="rnnserve",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    serialized: bytes = model.SerializeToString()
    return serialized


def add_cell(
    graph: GraphBuilder, cell: Cell, value: str, lengths: str | None, states: Sequence[str], finals: Sequence[str]
) -> tuple[str, tuple[Axis, ...]]:
    """Adds a cell, which must have a form in ONNX (`check_form`).

    Args:
        graph: of the cell's dtype.
        cell: with its weights.
        value: the input, [time, batch, features].
        lengths: int32 [batch], each from 1 to time; None: every row has all the steps.
        states: the initial states, with the axes of the output but for the time.
        finals: names for the states after each row's last step.

    Returns:
        The outputs, and their axes.
    """
    if isinstance(cell, DenseCell):
        return _dense(graph, cell, value), _axes("time", "batch", cell.units)
    assert isinstance(cell, LSTMCell | GRUCell | SimpleRNNCell)  # check_form saw to it
    activations = operator_activations(cell)
    if activations is None:
        return _scan(graph, cell, value, lengths, states, finals), _axes("time", "batch", cell.units)
    y = _operator(graph, cell, activations, value, lengths, states, finals)
    return y, _axes("time", "squeeze", "batch", cell.units)


def operator_activations(cell: Cell) -> list[OnnxActivation] | None:
    """The activations of the operator that computes the cell, in the operator's order; None where there is none.

    onnxruntime's LSTM and GRU are of float32 only. Its RNN gives a row other bits in other company, which `_scan` does
    not, so that a SimpleRNNCell has no operator here.
    """
    if not isinstance(cell, LSTMCell | GRUCell) or cell.dtype != np.float32:
        return None
    names = [cell.recurrent_activation, cell.activation]
    if isinstance(cell, LSTMCell):
        names.append(cell.activation)
    activations = [onnx_activation(name) for name in names]
    return None if None in activations else [a for a in activations if a is not None]


def _operator(
    graph: GraphBuilder,
    cell: Recurrent,
    activations: list[OnnxActivation],
    value: str,
    lengths: str | None,
    states: Sequence[str],
    finals: Sequence[str],
) -> str:
    """ONNX's LSTM or GRU: [time, batch, features] to [time, 1, batch, units]."""
    lstm = isinstance(cell, LSTMCell)
    gates = _LSTM_GATES if lstm else _GRU_GATES
    bias = cell.weights.get("bias", np.zeros(cell.gates * cell.units, cell.dtype))
    both = bias if bias.ndim == 2 else np.stack([bias, np.zeros_like(bias)])  # [2, gates * units]: of W and of R
    attributes: dict[str, Any] = {}
    if isinstance(cell, GRUCell):
        attributes["linear_before_reset"] = int(cell.reset_after)
    for key in ("alpha", "beta"):
        if values := [getattr(a, key) for a in activations if getattr(a, key) is not None]:
            attributes[f"activation_{key}"] = values
    graph.add_node(
        "LSTM" if lstm else "GRU",
        [
            value,
            graph.weight(_reordered(cell.weights["kernel"], gates).T[None]),  # [1, gates * units, features]
            graph.weight(_reordered(cell.weights["recurrent_kernel"], gates).T[None]),  # [1, gates * units, units]
            graph.weight(_reordered(both, gates).reshape(1, -1)),  # [1, 2 * gates * units]
            lengths or "",
            *states,
        ],
        [y := graph.name(), *finals],
        hidden_size=cell.units,
        activations=[a.name for a in activations],
        **attributes,
    )
    return y


def _reordered(weight: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """Puts the gates, which lie side by side in the last axis, in another order."""
    parts = np.split(weight, len(gates), axis=-1)
    return np.concatenate([parts[gate] for gate in gates], axis=-1)


def _dense(graph: GraphBuilder, cell: DenseCell, value: str) -> str:
    """[time, batch, features] to [time, batch, units]."""
    return graph.narrowed(graph.activation(cell.activation, _affine(graph, cell, value)))


def _affine(graph: GraphBuilder, cell: DenseCell | Recurrent, value: str) -> str:
    """x W + b, where b is the input's part of the bias: [time, batch, features] to [time, batch, gates * units]."""
    value = graph.add("MatMul", graph.widened(value), graph.weight(cell.weights["kernel"]))
    if cell.use_bias:
        value = graph.add("Add", value, graph.weight(np.atleast_2d(cell.weights["bias"])[0]))
    return value


def _scan(
    graph: GraphBuilder, cell: Recurrent, value: str, lengths: str | None, states: Sequence[str], finals: Sequence[str]
) -> str:
    """The cell's equations, a step at a time: [time, batch, features] to [time, batch, units].

    After a row's last step its state stays, and its output is that of the last step.
    """
    x = _affine(graph, cell, value)  # [time, batch, gates * units]
    body = graph.body()
    names = [body.name() for _ in states]
    x_t, live = body.name(), body.name()  # [batch, gates * units], [batch, 1]
    before = [body.widened(name) for name in names]  # each [batch, units]
    after = STEPS[type(cell)](body, cell, x_t, *before)
    if lengths is not None:
        after = [body.add("Where", live, *pair) for pair in zip(after, before, strict=True)]
    after = [body.narrowed(state) for state in after]
    output = body.add("Identity", after[0])
    scanned = [body.info(x_t, dtype=body.wide)] + ([body.info(live, dtype=np.bool_)] if lengths else [])
    graph.add_node(
        "Scan",
        [*states, x, *([_live(graph, value, lengths)] if lengths else [])],
        [*finals, y := graph.name()],
        num_scan_inputs=len(scanned),
        body=body.graph(
            "step",
            [*map(body.info, names), *scanned],
            [*map(body.info, after), body.info(output)],
        ),
    )
    return y


def add_step(graph: GraphBuilder, cell: Cell, x: str, states: Sequence[str]) -> list[str]:
    """One step of a recurrent cell: x [batch, features] and the states [batch, units] to the new states.

    The first of them is the output.
    """
    assert isinstance(cell, LSTMCell | GRUCell | SimpleRNNCell)
    after = STEPS[type(cell)](graph, cell, _affine(graph, cell, x), *map(graph.widened, states))
    return [graph.narrowed(state) for state in after]


def _live(graph: GraphBuilder, value: str, lengths: str) -> str:
    """Which rows have a step, at each step: bool [time, batch, 1]."""
    time = graph.add("Squeeze", graph.add("Shape", value, start=0, end=1))
    steps = graph.add("Range", graph.constant(np.array(0)), time, graph.constant(np.array(1)))  # [time]
    steps = graph.add("Unsqueeze", graph.cast(steps, np.int32), graph.constant(np.array([1, 2])))  # [time, 1, 1]
    return graph.add("Less", steps, graph.add("Unsqueeze", lengths, graph.constant(np.array([1]))))


def _axes(*axes: Axis) -> tuple[Axis, ...]:
    return axes


def _sizes(axes: Sequence[Axis]) -> list[str | int]:
    """Axes as ONNX has them."""
    return [1 if axis == "squeeze" else axis for axis in axes]
