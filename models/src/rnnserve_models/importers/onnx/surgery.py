"""Cutting a graph open: initial states become inputs, final states become outputs, fixed rows become free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from rnnserve_models.importers.onnx.axes import Array, Axes
from rnnserve_models.importers.onnx.document import Document, subgraphs
from rnnserve_models.importers.onnx.slots import Slot


@dataclass
class State:
    """A state that the new graph takes and gives.

    Attributes:
        name: for clients.
        input: the graph's input.
        output: the graph's output; "" while it is not known.
        axes: of both.
        dtype: NumPy's name of the element type.
        slots: whose state it is.
        default: what a session starts from, [*shape], or [rows, *shape] where an export froze a state for each row;
            None is zeros.
    """

    name: str
    input: str
    output: str
    axes: Axes
    dtype: str
    slots: Sequence[Slot]
    default: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The feature axes."""
        return tuple(axis for axis in self.axes if isinstance(axis, int))


class Surgeon:
    """A copy of a graph, to change.

    Attributes:
        model: the copy.
    """

    def __init__(self, document: Document) -> None:
        self.model = document.copy()
        self._names = set(_names(self.model.graph))
        self._nodes = {_key(node): node for node in self.model.graph.node}

    def unique(self, name: str) -> str:
        """A tensor's name that is not taken yet."""
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def cut(self, state: State) -> None:
        """Feeds a slot from a new input, and brings its final state out."""
        (slot,) = state.slots
        node = self._nodes[_key(slot.node)]
        while len(node.input) <= slot.initial:
            node.input.append("")
        node.input[slot.initial] = state.input
        self.model.graph.input.append(_value(state.input, state.dtype, state.axes))
        self.give(state)

    def give(self, state: State) -> None:
        """Brings the final state of a slot out."""
        state.output = self.final(state.slots[0])
        if state.output not in {value.name for value in self.model.graph.output}:
            self.model.graph.output.append(_value(state.output, state.dtype, state.axes))

    def final(self, slot: Slot) -> str:
        """The tensor of a slot's final state, which it may be the first to ask for."""
        node = self._nodes[_key(slot.node)]
        while len(node.output) <= slot.final:
            node.output.append("")
        if not node.output[slot.final]:
            node.output[slot.final] = self.unique(f"{slot.index}.{slot.role}_out")
        name: str = node.output[slot.final]
        return name

    def declare_inputs(
        self, axes: Mapping[str, Axes], kinds: Mapping[str, str], lengths: str | None, rows: int | None
    ) -> None:
        """Declares the inputs' axes as found, the rows free or bound, and forgets what was said of inner tensors."""
        if rows is not None:
            axes = {name: tuple(rows if axis == "batch" else axis for axis in each) for name, each in axes.items()}
        graph = self.model.graph
        used = {name for node in graph.node for name in _reads(node)} | {value.name for value in graph.output}
        for value in list(graph.input):
            if value.name in axes:
                value.CopyFrom(_value(value.name, kinds[value.name], axes[value.name]))
            elif value.name == lengths:
                value.CopyFrom(_value(value.name, kinds[value.name], ("batch",)))
            elif value.name not in used:
                graph.input.remove(value)
        del graph.value_info[:]
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
        for node in graph.node:
            for body in subgraphs(node):
                _forget(body)

    def declare_outputs(self, axes: Mapping[str, Axes], kinds: Mapping[str, str]) -> None:
        """Keeps just these outputs, declares them, and leaves out what nothing needs any more."""
        graph = self.model.graph
        del graph.output[:]
        graph.output.extend(_value(name, kinds[name], each) for name, each in axes.items())
        needed = set(axes)
        kept = []
        for node in reversed(graph.node):
            if any(name in needed for name in node.output):
                needed.update(_reads(node))
                kept.append(node)
        kept.reverse()
        copies = [type(node)() for node in kept]
        for copy, node in zip(copies, kept, strict=True):
            copy.CopyFrom(node)
        del graph.node[:]
        graph.node.extend(copies)
        stored = [tensor.name for tensor in graph.initializer]
        for tensor in list(graph.initializer):
            if tensor.name not in needed:
                graph.initializer.remove(tensor)
        for value in list(graph.input):
            if value.name in stored and value.name not in needed:
                graph.input.remove(value)

    def serialized(self) -> bytes:
        """The ModelProto's bytes."""
        content: bytes = self.model.SerializeToString(deterministic=True)
        return content


def _value(name: str, kind: str, axes: Axes) -> Any:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return helper.make_tensor_value_info(name, element, [1 if axis == "squeeze" else axis for axis in axes])


def _key(node: Any) -> str:
    """What tells a node from the others of its graph, in any copy of it: the first tensor that it makes."""
    return next(str(name) for name in node.output if name)


def _names(graph: Any) -> set[str]:
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)}
    for node in graph.node:
        names.update(node.input)
        names.update(node.output)
        for body in subgraphs(node):
            names |= _names(body)
    return names


def _reads(node: Any) -> set[str]:
    """What a node takes, what its subgraphs take from around them too."""
    names = set(node.input)
    for body in subgraphs(node):
        names.update(value.name for value in body.output)
        for inner in body.node:
            names |= _reads(inner)
    return names


def _forget(body: Any) -> None:
    del body.value_info[:]
    for value in (*body.input, *body.output):
        if len(value.type.tensor_type.shape.dim):  # a scalar stays one
            value.type.tensor_type.ClearField("shape")
    for node in body.node:
        for inner in subgraphs(node):
            _forget(inner)
