"""Which of the tensors that a Loop or a Scan carries are states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx

from rnnserve_models.errors import ModelError
from rnnserve_models.importers.onnx.document import Document, attribute, label, subgraphs

LOOPS = ("Loop", "Scan")

_SHAPES = frozenset({"Shape", "Size"})
_SELECTS = frozenset(
    {
        *("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Where", "Expand", "Tile", "Slice"),
        *("Gather", "Concat", "Split", "Flatten", "If"),
    }
)
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Max", "Min", "Sum", "Mean", "Abs", "Sqrt", "Pow"})
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)

_COMPARES = frozenset({"Not", "And", "Or", "Xor", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"})

_NONE, _SELECTED, _GATED, _COMPUTED, _MIXED = range(5)
"""How a tensor depends on a carried one: not; by choosing among elements; by a product with zeros and ones, which is
half of a choice (tf2onnx writes ``mask * new + (1 - mask) * old``); by arithmetic; by MatMul, Tanh or another operator
that only a recurrence has."""


@dataclass(frozen=True)
class Carried:
    """A state: where it stands among the node's inputs and outputs."""

    role: str
    initial: int
    final: int


def carried(document: Document, node: Any, origin: str) -> tuple[list[Carried], bool]:
    """The states of a Loop or a Scan.

    A carried float is a state if it feeds itself by MatMul, Tanh and the like, or reaches a state. What is handed on
    unchanged (weights), counters, and what only chooses between itself and something new (the previous output of a
    masked layer) are none.

    Returns:
        The states, and whether there is something else that begins anew in each run.

    Raises:
        ModelError: the number of steps depends on values, or a carried tensor can be neither shown to be a state nor
            shown not to be.
    """
    body = next(subgraphs(node), None)
    before, after, initial = ([], [], 0) if body is None else _signature(node, body)
    if body is None or len(before) != len(after) or (node.op_type == "Loop" and not body.output):
        raise ModelError(f"{origin}: the body of the {label(node)} does not give back what it takes")
    reach = {name: _reach(body, name) for name in before}
    floats = [
        k
        for k, (old, new) in enumerate(zip(before, after, strict=True))
        if _is_float(body, old) and not _unchanged(body, old, new)
    ]
    if node.op_type == "Loop":
        _check_condition(body, [before[k] for k in floats], reach, node, origin)
    states = {k for k in floats if reach[before[k]].get(after[k], _NONE) == _MIXED}
    core = set(states)
    while more := {k for k in floats if any(reach[before[k]].get(after[s], _NONE) for s in states)} - states:
        states |= more
    rest = [k for k in floats if k not in states]
    for k in rest:
        if states and reach[before[k]].get(after[k], _NONE) == _COMPUTED:
            raise ModelError(
                f"{origin}: the {label(node)} adds up {before[k]!r} from step to step, which is neither a state of a "
                "recurrent layer nor a choice between old and new; whether to keep it between calls cannot be told"
            )
    ordered = sorted(states)
    roles = [f"state_{n}" for n in range(len(ordered))]
    if len(ordered) == 1:
        roles = ["h"]
    elif len(ordered) == 2 and [k in core for k in ordered] == [True, False]:
        roles = ["h", "c"]
    found = [Carried(role, initial + k, k) for role, k in zip(roles, ordered, strict=True)]
    return found, any(reach[before[k]].get(after[k], _NONE) for k in rest)


def _signature(node: Any, body: Any) -> tuple[list[str], list[str], int]:
    """The body's names of what is carried, before and after a step, and where the first stands among node.input."""
    if node.op_type == "Loop":
        count = len(body.input) - 2
        return [v.name for v in body.input[2:]], [v.name for v in body.output[1 : 1 + count]], 2
    scanned = attribute(node, "num_scan_inputs")
    count = len(body.input) - (scanned if isinstance(scanned, int) else 0)
    return [v.name for v in body.input[:count]], [v.name for v in body.output[:count]], 0


def _is_float(body: Any, name: str) -> bool:
    return any(v.name == name and v.type.tensor_type.elem_type in _FLOATS for v in body.input)


def _unchanged(body: Any, old: str, new: str) -> bool:
    """Whether the value after a step is the one before."""
    producers = {output: node for node in body.node for output in node.output}
    while new != old:
        node = producers.get(new)
        if node is None or node.op_type != "Identity":
            return False
        new = node.input[0]
    return True


def _reach(body: Any, source: str) -> dict[str, int]:
    """How each tensor of the body depends on one that is carried into it; those that do not are left out."""
    levels = {source: _SELECTED}
    binary = _binary(body)
    for node in body.node:  # a graph's nodes are in order
        if node.op_type in _SHAPES:
            continue
        level = max((levels.get(name, _NONE) for name in _uses(node)), default=_NONE)
        if not level:
            continue
        if node.op_type == "Mul" and level <= _GATED and any(name in binary for name in node.input):
            level = _GATED
        elif node.op_type == "Add" and level == _GATED:
            level = _SELECTED
        else:
            level = max(level, _kind(node))
        levels.update(dict.fromkeys(node.output, level))
    return levels


def _binary(body: Any) -> set[str]:
    """The tensors of the body that hold truth values, or zeros and ones made of them."""
    found = {v.name for v in body.input if v.type.tensor_type.elem_type == onnx.TensorProto.BOOL}
    for node in body.node:
        if node.op_type in _COMPARES:
            found.update(node.output)
        if node.op_type in ("Not", "And", "Or", "Xor"):
            found.update(node.input)
    for node in body.node:
        if node.op_type in _SELECTS and node.op_type not in ("Where", "If", "Concat") and node.input[0] in found:
            found.update(node.output)
    return found


def _kind(node: Any) -> int:
    own = _SELECTED if node.op_type in _SELECTS else _COMPUTED if node.op_type in _ARITHMETIC else _MIXED
    return max([own, *(_kind(inner) for subgraph in subgraphs(node) for inner in subgraph.node)])


def _uses(node: Any) -> Iterator[str]:
    yield from node.input
    for subgraph in subgraphs(node):
        yield from (value.name for value in subgraph.output)
        for inner in subgraph.node:
            yield from _uses(inner)


def _check_condition(body: Any, floats: list[str], reach: dict[str, dict[str, int]], node: Any, origin: str) -> None:
    """Refuses a Loop that decides by what it computes when to stop."""
    condition = body.output[0].name
    for name in floats:
        if reach[name].get(condition, _NONE):
            raise ModelError(
                f"{origin}: the {label(node)} decides by the values of {name!r} when to stop; "
                "a graph whose number of steps depends on values cannot be cut into calls"
            )
