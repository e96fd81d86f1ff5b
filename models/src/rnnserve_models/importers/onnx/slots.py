"""What a graph remembers within a run: the initial and final states of its recurrent nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rnnserve_models.errors import ModelError
from rnnserve_models.importers.onnx.document import INITIAL, LENGTHS, RECURRENT, Document, attribute, label, subgraphs
from rnnserve_models.importers.onnx.loops import LOOPS, carried

Fed = Literal["nothing", "input", "recurrent", "computed"]
"""Where an initial state comes from: from nothing (it is absent, constant, or made of a shape), from an input of the
graph that holds just that, from another recurrent node, or from an input by computation."""


@dataclass
class Slot:
    """One state of one node.

    Attributes:
        node: the recurrent operator, or the Loop or Scan.
        index: its position among the graph's recurrent nodes.
        role: "h", "c" or "state_<n>".
        initial: where the initial state stands among the node's inputs.
        final: where the final state stands among its outputs.
        size: [directions, hidden units] of an operator; None for a loop, whose states may have any shape.
        fed: where the initial state comes from.
        source: the graph's input that it is ``fed`` from.
        nested: whether the node stands in a branch of an If.
    """

    node: Any
    index: int
    role: str
    initial: int
    final: int
    size: tuple[int, int] | None
    fed: Fed = "nothing"
    source: str = ""
    nested: bool = False

    @property
    def tensor(self) -> str:
        """The initial state's tensor, "" if there is none."""
        return self.node.input[self.initial] if self.initial < len(self.node.input) else ""


@dataclass
class Memory:
    """All that a graph remembers.

    Attributes:
        slots: the states, in the graph's order.
        nodes: the recurrent nodes.
        sequences: what each recurrent operator takes as X [time, batch, features].
        lengths: what they take as ``sequence_lens``.
        restarts: loops carry something beside states, such as the previous output of a masked one, anew in each run.
        notes: for the findings.
    """

    slots: list[Slot] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    sequences: list[str] = field(default_factory=list)
    lengths: list[str] = field(default_factory=list)
    restarts: bool = False
    notes: list[str] = field(default_factory=list)


def find_memory(document: Document, origin: str) -> Memory:
    """Finds the recurrent nodes and their states.

    Raises:
        ModelError: there are none, or one that cannot be reached or understood; the message says which and why.
    """
    memory = Memory()
    for node in document.nodes():
        if node.op_type in RECURRENT:
            _add_operator(document, memory, node, len(memory.nodes), origin)
        elif node.op_type in LOOPS:
            _refuse_nested(node, origin)
            states, restarts = carried(document, node, origin)
            if not states:
                continue
            index = len(memory.nodes)
            memory.nodes.append(node)
            memory.restarts |= restarts
            memory.slots += [Slot(node, index, s.role, s.initial, s.final, None) for s in states]
            memory.notes.append(
                f"layer {index}: {label(node)} with {len(states)} state{'s' * (len(states) > 1)}"
                + (", whose previous output begins at zero in each call" if restarts else "")
            )
        else:
            for each in _operators(node):
                _add_operator(document, memory, each, len(memory.nodes), origin, inside=node)
    if not memory.slots:
        raise ModelError(
            f"{origin}: the graph has no recurrent node (LSTM, GRU, RNN, or a Loop or Scan that carries a state): "
            "either the recurrence was unrolled over a fixed number of steps, or there is none; "
            "export it without unrolling"
        )
    for slot in memory.slots:
        _trace(document, memory, slot)
    return memory


def _add_operator(
    document: Document, memory: Memory, node: Any, index: int, origin: str, inside: Any | None = None
) -> None:
    if len(node.input) < 3 or not node.output:
        raise ModelError(f"{origin}: the {label(node)} lacks its weights, or gives nothing")
    weights = document.constants.get(node.input[2])
    if attribute(node, "layout", 0):
        raise ModelError(f"{origin}: the {label(node)} has layout 1, which onnxruntime does not run")
    hidden = attribute(node, "hidden_size") or (None if weights is None else weights.shape[-1])
    if not isinstance(hidden, int):
        raise ModelError(f"{origin}: the {label(node)} says nowhere how many hidden units it has")
    direction = attribute(node, "direction", "forward")
    directions = 2 if direction == "bidirectional" else 1
    memory.nodes.append(node)
    memory.sequences.append(node.input[0])
    if len(node.input) > LENGTHS and node.input[LENGTHS]:
        memory.lengths.append(node.input[LENGTHS])
    roles = RECURRENT[node.op_type]
    nested = inside is not None
    memory.slots += [
        Slot(node, index, role, INITIAL + k, 1 + k, (directions, hidden), nested=nested) for k, role in enumerate(roles)
    ]
    text = f"layer {index}: {node.op_type} of {hidden} units"
    memory.notes.append(text + ("" if direction == "forward" else f", {direction}") + (", in an If" if inside else ""))


def _refuse_nested(node: Any, origin: str) -> None:
    for inner in _operators(node):
        raise ModelError(
            f"{origin}: the {label(inner)} stands inside the {label(node)}; its state cannot be brought out"
        )


def _operators(node: Any) -> Iterator[Any]:
    for subgraph in subgraphs(node):
        for inner in subgraph.node:
            if inner.op_type in RECURRENT:
                yield inner
            yield from _operators(inner)


def _trace(document: Document, memory: Memory, slot: Slot) -> None:
    """Says where a slot's initial state comes from."""
    inputs, nodes = document.origins(slot.tensor, lambda node: any(node is each for each in memory.nodes))
    source = document.moved_from(slot.tensor) if slot.tensor else None
    if source is not None:
        slot.fed, slot.source = "input", source
    elif inputs:
        slot.fed = "computed"
    elif nodes:
        slot.fed = "recurrent"
