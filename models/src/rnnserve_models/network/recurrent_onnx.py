"""Recurrent layers in ONNX: options and masks in the graph, around the operators of `rnnserve_models.export`.

Under a mask, each row's valid steps move to the front, in their order, so that an operator that knows only lengths
computes what Keras does; then each step takes the output of the last valid step before it:

    order  = TopK(t + T * not(mask))          valid steps first
    y, s'  = cell(x[order], lengths = max(count, 1))
    output = y[cumsum(mask) - 1]              0 before the first valid step, or at every masked one
    s'     = s where count is 0               onnxruntime's operators give zeros for a length of 0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnnserve_models.cell import Cell
from rnnserve_models.cells import DenseCell
from rnnserve_models.export import add_cell, add_step, check_form, operator_activations
from rnnserve_models.network.layer import Masked
from rnnserve_models.onnx_builder import GraphBuilder
from rnnserve_models.options import LayerOptions
from rnnserve_models.stack import StackedRNNCells

LAST = np.iinfo(np.int64).max


def emit_layer(
    graph: GraphBuilder,
    cell: Cell,
    options: LayerOptions,
    inputs: Masked[str],
    states: Sequence[str],
    steps: int | None = None,
) -> tuple[Masked[str], list[str]]:
    """Adds a recurrent layer.

    Args:
        graph: of the cell's dtype.
        cell: a cell with its weights, or stacked cells.
        options: of the layer.
        inputs: [B, T, features], of the cell's dtype, and the mask.
        states: the initial states, each [B, units].
        steps: T, to write a step after the other (``unroll``); None: T is any.

    Returns:
        The output and its mask, and the states after the last step.

    Raises:
        ModelError: a cell has no form in ONNX.
    """
    for part in parts_of(cell):
        check_form(part)
    x, mask = inputs
    if options.go_backwards:
        x, mask = flip(graph, x), None if mask is None else flip(graph, mask)
    if steps is not None:
        y, finals = _unrolled(graph, cell, options, Masked(x, mask), states, steps)
    elif mask is None:
        y, finals = _stack(graph, cell, graph.add("Transpose", x, perm=[1, 0, 2]), None, states)
        if options.return_sequences:
            y = graph.add("Transpose", y, perm=[1, 0, 2])
        else:
            y = graph.add("Gather", y, graph.integer(-1), axis=0)
    else:
        y, finals = _masked(graph, cell, options, Masked(x, mask), states)
    return Masked(y, mask if options.return_sequences else None), finals


def parts_of(cell: Cell) -> tuple[Cell, ...]:
    """The cells of a stack, or the cell."""
    return cell.cells if isinstance(cell, StackedRNNCells) else (cell,)


def flip(graph: GraphBuilder, x: str) -> str:
    """[B, T, ...] with its steps in reverse."""
    return graph.add("Slice", x, graph.ints(-1), graph.ints(-LAST), graph.ints(1), graph.ints(-1))


def _stack(
    graph: GraphBuilder, cell: Cell, x: str, lengths: str | None, states: Sequence[str]
) -> tuple[str, list[str]]:
    """The cells, one after the other over all the steps: x [T, B, features] to [T, B, units]."""
    rest, finals = list(states), []
    for part in parts_of(cell):
        own = [rest.pop(0) for _ in part.state_names]
        after = [graph.name() for _ in own]
        squeezed = is_operator(part)
        if squeezed:
            own = [graph.add("Unsqueeze", state, graph.ints(0)) for state in own]  # [1, B, units]
        x, _ = add_cell(graph, part, x, lengths, own, after)
        if squeezed:
            x = graph.add("Squeeze", x, graph.ints(1))
            after = [graph.add("Squeeze", state, graph.ints(0)) for state in after]
        finals += after
    return x, finals


def _masked(
    graph: GraphBuilder, cell: Cell, options: LayerOptions, inputs: Masked[str], states: Sequence[str]
) -> tuple[str, list[str]]:
    x, mask = inputs
    assert mask is not None
    valid = graph.cast(mask, np.int64)  # [B, T]
    steps = graph.add("Shape", x, start=1, end=2)  # [1]
    count = graph.add("ReduceSum", valid, graph.ints(1), keepdims=0)  # [B]
    time = graph.add("Range", graph.integer(0), graph.add("Squeeze", steps), graph.integer(1))  # [T]
    masked = graph.add("Sub", graph.integer(1), valid)
    key = graph.add("Add", time, graph.add("Mul", masked, steps))  # [B, T]; distinct in a row
    _, order = graph.add_node("TopK", [key, steps], [graph.name(), graph.name()], axis=1, largest=0)
    x = graph.add("GatherND", x, graph.add("Unsqueeze", order, graph.ints(2)), batch_dims=1)  # [B, T, features]
    front = graph.add("Less", time, graph.add("Unsqueeze", count, graph.ints(1)))  # [B, T]
    zero = graph.constant(np.zeros((), graph.dtype))
    x = graph.add("Where", graph.add("Unsqueeze", front, graph.ints(2)), x, zero)  # what stood there may be NaN
    lengths = graph.cast(graph.add("Max", count, graph.integer(1)), np.int32)
    y, finals = _stack(graph, cell, graph.add("Transpose", x, perm=[1, 0, 2]), lengths, states)
    y = graph.add("Transpose", y, perm=[1, 0, 2])  # [B, T, units]

    some = graph.add("Unsqueeze", graph.add("Greater", count, graph.integer(0)), graph.ints(1))  # [B, 1]
    finals = [graph.add("Where", some, *pair) for pair in zip(finals, states, strict=True)]
    if options.return_sequences:
        place = graph.add("Sub", graph.add("CumSum", valid, graph.integer(1)), graph.integer(1))  # [B, T]
        shown = mask if options.zero_output_for_mask else graph.add("GreaterOrEqual", place, graph.integer(0))
    else:
        place = graph.add("Sub", graph.add("Unsqueeze", count, graph.ints(1)), graph.integer(1))  # [B, 1]
        shown = graph.add("Gather", mask, graph.ints(-1), axis=1) if options.zero_output_for_mask else some
    place = graph.add("Unsqueeze", graph.add("Max", place, graph.integer(0)), graph.ints(2))
    y = graph.add("GatherND", y, place, batch_dims=1)
    y = graph.add("Where", graph.add("Unsqueeze", shown, graph.ints(2)), y, zero)
    return y if options.return_sequences else graph.add("Squeeze", y, graph.ints(1)), finals


def _unrolled(
    graph: GraphBuilder, cell: Cell, options: LayerOptions, inputs: Masked[str], states: Sequence[str], steps: int
) -> tuple[str, list[str]]:
    """Keras's loop, written out: a masked step keeps the states and repeats the output before it."""
    x, mask = inputs
    zero = graph.constant(np.zeros((), graph.dtype))
    current, before, outputs = list(states), zero, []
    for t in range(steps):
        value = graph.add("Gather", x, graph.integer(t), axis=1)  # [B, features]
        rest, after = list(current), []
        for part in parts_of(cell):
            own = [rest.pop(0) for _ in part.state_names]
            if isinstance(part, DenseCell):
                value = _dense_step(graph, part, value)
                continue
            own = add_step(graph, part, value, own)
            value = own[0]
            after += own
        if mask is not None:
            live = graph.add("Gather", mask, graph.ints(t), axis=1)  # [B, 1]
            after = [graph.add("Where", live, *pair) for pair in zip(after, current, strict=True)]
            value = graph.add("Where", live, value, zero if options.zero_output_for_mask else before)
        current, before = after, value
        if options.return_sequences:
            outputs.append(graph.add("Unsqueeze", value, graph.ints(1)))
    if options.return_sequences:
        return graph.add("Concat", *outputs, axis=1), current
    return before, current


def _dense_step(graph: GraphBuilder, cell: DenseCell, x: str) -> str:
    y, _ = add_cell(graph, cell, x, None, [], [])
    return y


def is_operator(cell: Cell) -> bool:
    """Whether a cell becomes an operator of ONNX, whose states have an axis of directions."""
    return operator_activations(cell) is not None
