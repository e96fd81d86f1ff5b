"""From a stateless ONNX file to a stateful graph and its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rnnserve_models.errors import ModelError, reading
from rnnserve_models.importers.onnx.axes import (
    Array,
    Axes,
    Layout,
    explicit,
    find_layout,
    random,
    sized,
    varying,
)
from rnnserve_models.importers.onnx.check import Checked, check
from rnnserve_models.importers.onnx.document import Document, dtype, first_line, label, session
from rnnserve_models.importers.onnx.slots import Memory, Slot, find_memory
from rnnserve_models.importers.onnx.surgery import State, Surgeon
from rnnserve_models.options import LayerOptions
from rnnserve_models.spec import GraphInput, GraphSpec, GraphState, GraphTensor

WHOLE_CALLS_REFUSE = ("go_backwards", "zero_output_for_mask")
"""The options of a layer that a graph cannot have from outside if it must get calls as they come; nor can it a mask."""

_KINDS = ("float16", "float32", "float64", "int32", "int64", "bool", "uint8")


@dataclass(frozen=True)
class Imported:
    """A graph that remembers.

    Attributes:
        graph: the serialized ModelProto.
        spec: what its tensors mean.
        options: the layer's defaults, where they differ from Keras's.
        settable_options: what clients may choose.
        defaults: what the states start from, by name, where that is not zeros.
        findings: what was found, measured and left out, for people.
    """

    graph: bytes
    spec: GraphSpec
    options: dict[str, bool]
    settable_options: tuple[str, ...]
    defaults: dict[str, Array] = field(default_factory=dict)
    findings: tuple[str, ...] = ()


def import_onnx(content: bytes, *, origin: str = "graph", file: str = "model.onnx") -> Imported:
    """Makes a stateless graph stateful.

    The result computes, from its default states, what the original does; and in two calls, handing the states on, what
    the original does in one, unless a finding says that a call must hold a whole sequence. Both were checked on random
    input, in batches and row by row.

    Args:
        content: the ONNX file.
        origin: its name, for messages.
        file: what the description calls the new file.

    Raises:
        ModelError: the file is no graph, or none that can be made stateful; the message says why.
    """
    with reading(origin):
        return _imported(content, origin, file)


def _imported(content: bytes, origin: str, file: str) -> Imported:
    document = Document.parse(content, origin)
    memory = find_memory(document, origin)
    layout = find_layout(document, memory, origin)
    try:
        return _made(document, memory, layout, file, origin, bound=None)
    except ModelError:
        if layout.rows is None:
            raise
    return _made(document, memory, layout, file, origin, bound=layout.rows)


def _made(document: Document, memory: Memory, layout: Layout, file: str, origin: str, *, bound: int | None) -> Imported:
    """The stateful graph, for any number of rows or bound to those that the original is bound to."""
    findings = list(memory.notes)
    cuts = _cuts(memory, layout, origin)
    surgeon = Surgeon(document)
    states = [_state(surgeon, document, memory, slot, layout, origin) for slot in cuts]
    for state in states:
        surgeon.cut(state)
    states += _paired(surgeon, document, memory, layout, states, findings, origin)
    order = {id(slot): k for k, slot in enumerate(memory.slots)}
    states.sort(key=lambda state: order[id(state.slots[0])])
    if not states:
        raise ModelError(f"{origin}: no state of the graph can be brought out")

    kinds = {name: dtype(value) for name, value in document.inputs.items()}
    for name in layout.inputs:
        if kinds[name] not in _KINDS:
            raise ModelError(f"{origin}: input {name!r} is {kinds[name]}; a served model takes {', '.join(_KINDS)}")
    given = {name: axes for name, axes in layout.states.items() if any(state.input == name for state in states)}
    surgeon.declare_inputs({**layout.inputs, **given}, kinds, layout.lengths, bound)
    outputs = _outputs(surgeon, document, layout, states, kinds, findings, bound, origin)
    timed_output = "time" in next(iter(outputs.values()))[0]

    shown = {name: axes for name, (axes, _) in outputs.items()}
    surgeon.declare_outputs(
        {**shown, **{state.output: state.axes for state in states}},
        {**{name: kind for name, (_, kind) in outputs.items()}, **{state.output: state.dtype for state in states}},
    )
    spec = _spec(file, layout, kinds, outputs, states, bound)
    defaults = {state.name: state.default for state in states if state.default is not None}
    graph = surgeon.serialized()
    checked = check(document, layout, graph, spec, defaults, restarts=memory.restarts, origin=origin)
    kept = "defaults.safetensors" if defaults else None
    spec = spec.model_copy(update={"sliceable": checked.sliceable, "defaults": kept})
    findings += _told(spec, layout, states, checked)
    sequences = timed_output or not layout.timed
    closed = set() if sequences else {"return_sequences"}
    closed |= set() if checked.sliceable else set(WHOLE_CALLS_REFUSE)
    settable = [name for name in LayerOptions.__dataclass_fields__ if name not in closed]
    return Imported(
        graph=graph,
        spec=spec,
        options={"return_sequences": True} if sequences else {},
        settable_options=tuple(settable),
        defaults=defaults,
        findings=tuple(findings),
    )


def _cuts(memory: Memory, layout: Layout, origin: str) -> list[Slot]:
    """The slots that are to get an input of their own."""
    cuts = []
    for slot in memory.slots:
        if slot.fed == "computed" and _constant(slot, layout):
            slot.fed = "nothing"
        if slot.fed == "computed":
            raise ModelError(
                f"{origin}: the initial state {slot.role} of the {label(slot.node)} is computed from the input, so "
                "that a call cannot begin where the last one ended"
            )
        if slot.fed == "nothing" and not slot.nested:
            cuts.append(slot)
    if not cuts and all(slot.nested and slot.fed == "nothing" for slot in memory.slots):
        raise ModelError(
            f"{origin}: the {label(memory.slots[0].node)} stands in a branch of an If, which hands out no state and "
            "takes none; export the branch that is wanted"
        )
    return cuts


def _constant(slot: Slot, layout: Layout) -> bool:
    """Whether an initial state was the same for all rows in all runs, whatever the input."""
    values = [probe.tensors.get(slot.tensor) for probe in layout.probes]
    if any(value is None for value in values):
        return False
    rows = [np.moveaxis(value, 1 if slot.size else 0, 0) for value in values if value is not None]
    return all(np.array_equal(row, rows[0][0]) for value in rows for row in value)


def _state(surgeon: Surgeon, document: Document, memory: Memory, slot: Slot, layout: Layout, origin: str) -> State:
    values = [(p.rows, p.steps, p.tensors[slot.tensor]) for p in layout.probes] if slot.tensor else []
    if slot.size is not None:
        axes: Axes = ("squeeze" if slot.size[0] == 1 else slot.size[0], "batch", slot.size[1])
    else:
        found = varying([(rows, steps, value.shape) for rows, steps, value in values])
        if layout.rows is not None:
            found[[*values[0][2].shape].index(layout.rows)] = "batch"
        axes = tuple(axis for axis in found if axis is not None)
    several = len(memory.nodes) > 1
    name = f"{slot.index}.{slot.role}" if several else slot.role
    if name in layout.inputs or name in layout.states:
        name = f"{slot.index}.{slot.role}_state"
    kind = values[0][2].dtype.name if values else dtype(document.inputs[next(iter(layout.inputs))])
    if slot.size is not None and not kind.startswith("float"):
        kind = "float32"
    state = State(name, surgeon.unique(name), "", axes, kind, [slot])
    state.default = _default(slot, axes, [value for _, _, value in values], origin)
    return state


def _default(slot: Slot, axes: Axes, values: list[Array], origin: str) -> Array | None:
    """The frozen state: [*shape], or [rows, *shape] if each row has its own; None for zeros."""
    if not any(value.any() for value in values):
        return None
    batch = axes.index("batch")
    squeezed = tuple(k for k, axis in enumerate(axes) if axis == "squeeze")
    rows = [np.moveaxis(value, batch, 0) for value in values]
    if squeezed:
        rows = [value.squeeze(tuple(k + (k < batch) for k in squeezed)) for value in rows]
    if all(np.array_equal(row, rows[0][0]) for value in rows for row in value):
        return np.array(rows[0][0])
    if all(np.array_equal(value, rows[0]) for value in rows):
        return np.array(rows[0])
    raise ModelError(f"{origin}: the initial state of the {label(slot.node)} differs from run to run")


def _paired(
    surgeon: Surgeon,
    document: Document,
    memory: Memory,
    layout: Layout,
    cuts: list[State],
    findings: list[str],
    origin: str,
) -> list[State]:
    """The states that the graph takes already, each with the output that gives it; without one, a slot's own."""
    states: list[State] = []
    groups = explicit(memory)
    if not groups:
        return states
    nested = {name for name, slots in groups.items() if any(slot.nested for slot in slots)}
    finals = {name: [surgeon.final(slot) for slot in slots] for name, slots in groups.items() if name not in nested}
    run = session(surgeon.model, origin, outputs=[tensor for each in finals.values() for tensor in each])
    rows = layout.rows or 3
    steps = 4 if layout.timed else 1
    generator = np.random.default_rng(7)
    feeds: dict[str, Array] = {}
    for name, axes in (*layout.inputs.items(), *layout.states.items()):
        feeds[name] = random(dtype(document.inputs[name]), sized(axes, rows, steps), generator)
    for state in cuts:
        feeds[state.input] = random(state.dtype, sized(state.axes, rows, steps), generator)
    if layout.lengths:
        feeds[layout.lengths] = np.full(rows, steps, dtype(document.inputs[layout.lengths]))
    names = [value.name for value in run.get_outputs()]
    results = dict(zip(names, run.run(names, feeds), strict=True))
    taken: set[str] = {state.output for state in cuts}
    for name, slots in groups.items():
        axes, kind = layout.states[name], dtype(document.inputs[name])
        if name in nested:
            raise ModelError(
                f"{origin}: input {name!r} is the state of a recurrent node in a branch of an If; which output gives "
                "it back cannot be proven"
            )
        want = results[finals[name][0]] if len(slots) == 1 else np.concatenate([results[f] for f in finals[name]])
        shape = sized(axes, rows, steps)
        views = [want] if want.shape == shape else []
        if want.ndim == 3:
            views += [view for view in (np.moveaxis(want, 1, 0), want[0]) if view.shape == shape]
        output = next(
            (
                tensor
                for tensor in document.outputs
                if tensor not in taken and any(np.array_equal(results[tensor], view) for view in views)
            ),
            "",
        )
        if output:
            taken.add(output)
            states.append(State(name, name, output, axes, kind, slots))
            continue
        if len(slots) > 1 or slots[0].size is None or slots[0].tensor != name:
            raise ModelError(
                f"{origin}: input {name!r} is a state of {len(slots)} layers, but no output gives back what it became"
            )
        states.append(State(name, name, "", axes, kind, slots))
        surgeon.give(states[-1])
        findings.append(f"state {name}: the graph took it but did not give it back; it does now")
    return states


def _outputs(
    surgeon: Surgeon,
    document: Document,
    layout: Layout,
    states: list[State],
    kinds: Mapping[str, str],
    findings: list[str],
    bound: int | None,
    origin: str,
) -> dict[str, tuple[Axes, str]]:
    """The axes and element types of the outputs that clients get: all but those that repeat states."""
    run = session(surgeon.model, origin)
    names = [value.name for value in run.get_outputs()]
    if bound is None:
        sizes = [(2, 5), (3, 5), (2, 4)] if layout.timed else [(2, 1), (3, 1)]
    else:
        sizes = [(bound, bound + 3), (bound, bound + 2)] if layout.timed else [(bound, 1)]
    runs = []
    for rows, steps in sizes:
        generator = np.random.default_rng(rows)
        feeds = {n: random(kinds[n], sized(axes, rows, steps), generator) for n, axes in layout.inputs.items()}
        feeds |= {s.input: random(s.dtype, sized(s.axes, rows, steps), generator) for s in states}
        if layout.lengths:
            feeds[layout.lengths] = np.full(rows, steps, kinds[layout.lengths])
        try:
            runs.append((rows, steps, dict(zip(names, run.run(names, feeds), strict=True))))
        except Exception as error:  # onnxruntime raises a dozen types of its own
            fixed = f"the graph is bound to {layout.rows} rows" if layout.rows else "the graph does not run"
            raise ModelError(
                f"{origin}: {fixed}, and with states of its own it does not run with {rows} rows and {steps} steps "
                f"({first_line(error)}); export it with a symbolic batch axis"
            ) from error
    finals = {s.output: runs[0][2][s.output] for s in states}
    outputs: dict[str, tuple[Axes, str]] = {}
    for position, name in enumerate(document.outputs):
        axes = varying([(rows, steps, tensors[name].shape) for rows, steps, tensors in runs])
        for size in (bound, "squeeze" if bound == 1 else None):
            if size is not None and size in axes and "batch" not in axes:
                axes[axes.index(size)] = "batch"
        if not layout.timed:  # the axis of the one step, where the input has it too
            like = next(iter(layout.inputs.values()))
            axes = ["squeeze" if (a, b) == (1, "squeeze") else a for a, b in zip(axes, like, strict=False)] + axes[
                len(like) :
            ]
        if position and (same := _repeats(runs[0][2][name], finals, name)):
            repeated = [s.name for s in states if s.output in same]
            findings.append(f"output {name} is the state {' and '.join(repeated)}: it is returned as state")
            continue
        if None in axes or axes.count("batch") != 1 or axes.count("time") > 1:
            shapes = ", ".join(f"{list(t[name].shape)} for {rows} rows and {steps} steps" for rows, steps, t in runs)
            if position:
                findings.append(f"output {name} is left out: it has shape {shapes}")
                continue
            raise ModelError(
                f"{origin}: output {name!r} has no axis for each row, or one that follows the steps but is not as "
                f"long: it has shape {shapes}"
            )
        outputs[name] = (tuple(axis for axis in axes if axis is not None), runs[0][2][name].dtype.name)
    return outputs


def _repeats(value: Array, finals: Mapping[str, Array], name: str) -> list[str]:
    """The final states that an output is, or is joined from."""
    for tensor, final in finals.items():
        if tensor == name or (value.size == final.size and _flat_equal(value, final)):
            return [tensor]
    for last in range(2, len(finals) + 1):
        for first in range(last - 1):
            for part in (list(finals)[first:last], list(finals)[first:last:2]):
                same = len({finals[tensor].shape for tensor in part}) == 1
                if len(part) > 1 and same and _flat_equal(value, np.concatenate([finals[tensor] for tensor in part])):
                    return part
    return []


def _flat_equal(a: Array, b: Array) -> bool:
    return a.size == b.size and (
        np.array_equal(a.ravel(), b.ravel()) or (b.ndim > 1 and np.array_equal(a.ravel(), np.moveaxis(b, 1, 0).ravel()))
    )


def _spec(
    file: str,
    layout: Layout,
    kinds: Mapping[str, str],
    outputs: Mapping[str, tuple[Axes, str]],
    states: list[State],
    bound: int | None,
) -> GraphSpec:
    names = _client_names([*layout.inputs, *outputs])
    typed: Any = dict
    return GraphSpec(
        file=file,
        inputs=tuple(
            GraphInput(**typed(name=names[name], tensor=name, dtype=kinds[name], axes=axes))
            for name, axes in layout.inputs.items()
        ),
        outputs=tuple(
            GraphTensor(**typed(name=names[name], tensor=name, dtype=kind, axes=axes))
            for name, (axes, kind) in outputs.items()
        ),
        states=tuple(
            GraphState(**typed(name=s.name, input=s.input, output=s.output, dtype=s.dtype, axes=s.axes)) for s in states
        ),
        lengths=layout.lengths,
        rows=bound,
    )


def _client_names(tensors: list[str]) -> dict[str, str]:
    """The tensors' names without TensorFlow's ``:0``, where that leaves them different."""
    short = {tensor: tensor.removesuffix(":0") for tensor in tensors}
    return short if len(set(short.values())) == len(set(short)) else {tensor: tensor for tensor in tensors}


def _told(spec: GraphSpec, layout: Layout, states: list[State], checked: Checked) -> list[str]:
    """The findings about what was made."""
    lines = [f"input {t.name}: {t.dtype} [{', '.join(map(str, t.axes))}]" for t in spec.inputs]
    for output in spec.outputs:
        end = "" if output.has_time or not layout.timed else ", of the last step"
        lines.append(f"output {output.name}: {output.dtype} [{', '.join(map(str, output.axes))}]{end}")
    for state in states:
        start = "zeros"
        if state.default is not None:
            own = state.default.ndim > len(state.shape)
            start = "what the file froze" + (f", for each of {len(state.default)} rows" if own else "")
        lines.append(f"state {state.name}: {state.dtype} [{', '.join(map(str, state.axes))}], starts from {start}")
    if spec.lengths:
        lines.append(f"lengths: {spec.lengths}")
    if layout.rows is not None:
        how = "" if spec.rows is None else ", which it runs in such parts"
        count = "1 row" if layout.rows == 1 else f"{layout.rows} rows"
        lines.append(f"the file was bound to {count}; the model takes any number{how}")
    if not layout.timed:
        lines.append("a run of the graph takes one time step")
    if not checked.sliceable:
        lines.append("the model takes no mask, and no go_backwards: its calls reach the graph as they come")
    return lines + checked.findings
