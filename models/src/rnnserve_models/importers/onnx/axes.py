"""Which axes of a graph's tensors are rows and which are time steps, found by running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from onnx import TensorProto

from rnnserve_models.errors import ModelError
from rnnserve_models.importers.onnx.document import Document, dims, dtype, first_line, session
from rnnserve_models.importers.onnx.slots import Memory, Slot
from rnnserve_models.spec import Axis

Axes = tuple[Axis, ...]
Array = np.ndarray[Any, np.dtype[Any]]

_BATCH_NAMES = ("batch", "batch_size", "n", "b", "rows")
_TIME_NAMES = ("time", "seq", "seq_len", "sequence", "sequence_length", "steps", "timesteps", "t", "frames")
_MOST_STEPS = 40  # when it is asked whether a graph runs with one number of steps only


@dataclass
class Probe:
    """One run of the original: rows, steps and what the tensors then held.

    ``tensors`` has the outputs, and what was asked for besides, by name.
    """

    rows: int
    steps: int
    tensors: dict[str, Array]


@dataclass
class Layout:
    """What the axes are.

    Attributes:
        inputs: the axes of each input that brings time steps.
        states: the axes of each input that brings a state already.
        lengths: the input that holds the rows' numbers of steps.
        rows: how many rows the original is bound to; None if to none.
        timed: whether a run takes many steps; else it takes one.
        probes: runs of the original.
    """

    inputs: dict[str, Axes]
    states: dict[str, Axes]
    lengths: str | None
    rows: int | None = None
    timed: bool = True
    probes: list[Probe] = field(default_factory=list)


class _Unfit(Exception):
    """A guess at the axes was wrong. ``fixed``: because the graph does a fixed number of steps."""

    def __init__(self, why: str, *, fixed: bool = False) -> None:
        super().__init__(why)
        self.fixed = fixed


def find_layout(document: Document, memory: Memory, origin: str) -> Layout:
    """Finds the axes of the inputs: guesses, runs the original with several numbers of rows and steps, and looks.

    Raises:
        ModelError: no guess fits, such as in a graph of a fixed number of steps; the message says what was seen.
    """
    lengths = _lengths(document, memory)
    states = {name: _state_axes(document, name, slots, origin) for name, slots in explicit(memory).items()}
    data = {name: value for name, value in document.inputs.items() if name not in states and name != lengths}
    if not data:
        raise ModelError(f"{origin}: every input of the graph is a state or lengths; none brings time steps")
    for name, value in data.items():
        if len(dims(value)) < 2:
            raise ModelError(
                f"{origin}: input {name!r} has shape {_shown(value)}: it has no batch axis beside its elements, and "
                "what it must hold is not known; make it a constant of the graph"
            )
        if value.type.tensor_type.elem_type == TensorProto.STRING:
            raise ModelError(f"{origin}: input {name!r} takes text; convert it to numbers outside the graph")
    run = _Runner(document, memory, states, lengths, origin)
    reasons: list[_Unfit] = []
    for guess in _guesses(data, origin):
        try:
            return _fit(run, guess, data, memory)
        except _Unfit as error:
            reasons.append(error)
    _refuse(run, list(_guesses(data, origin)), data, reasons, origin)
    raise AssertionError("unreachable")


def explicit(memory: Memory) -> dict[str, list[Slot]]:
    """The inputs of the graph that are states already, and of which slots."""
    found: dict[str, list[Slot]] = {}
    for slot in memory.slots:
        if slot.fed == "input":
            found.setdefault(slot.source, []).append(slot)
    return found


def to_graph(x: Array, axes: Axes) -> Array:
    """[time, batch, *features] (or without time, if the axes have none) to the graph's axes."""
    named = [axis for axis in ("time", "batch") if axis in axes]
    if len(named) == 1 and x.ndim == 2 + sum(isinstance(axis, int) for axis in axes):
        x = x[0]
    features = iter(range(len(named), x.ndim))
    seen = [axis for axis in axes if axis != "squeeze"]
    x = x.transpose([named.index(axis) if isinstance(axis, str) else next(features) for axis in seen])
    extents = iter(x.shape)
    return np.ascontiguousarray(x.reshape([1 if axis == "squeeze" else next(extents) for axis in axes]))


def sized(axes: Axes, rows: int, steps: int) -> tuple[int, ...]:
    """The shape that axes have for so many rows and steps."""
    sizes = {"batch": rows, "time": steps, "squeeze": 1}
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)


def random(kind: str, shape: Sequence[int], generator: np.random.Generator) -> Array:
    """Values to try a graph with: floats around zero; 1 or 2 as integers, which any embedding has; true."""
    if kind == "bool":
        return np.ones(shape, bool)
    if kind.startswith(("int", "uint")):
        return generator.integers(1, 3, shape).astype(kind)
    return generator.standard_normal(shape).astype(kind)


def varying(shapes: Iterable[tuple[int, int, tuple[int, ...]]]) -> list[Axis | None]:
    """The axes of a tensor of which are given rows, steps and shape in several runs; None is an axis that is neither.

    An axis of size 1 that stands before the rows or the steps is one that clients do not see.
    """
    seen = list(shapes)
    if len({len(shape) for _, _, shape in seen}) != 1:
        return [None]
    axes: list[Axis | None] = []
    for axis in range(len(seen[0][2])):
        sizes = [shape[axis] for _, _, shape in seen]
        if sizes == [rows for rows, _, _ in seen] and len(set(sizes)) > 1:
            axes.append("batch")
        elif sizes == [steps for _, steps, _ in seen] and len(set(sizes)) > 1:
            axes.append("time")
        else:
            axes.append(sizes[0] if len(set(sizes)) == 1 else None)
    last = max((index for index, axis in enumerate(axes) if axis in ("batch", "time")), default=0)
    return ["squeeze" if axis == 1 and index < last else axis for index, axis in enumerate(axes)]


class _Runner:
    """Runs the original, with the inner tensors among its results that tell rows from steps."""

    def __init__(
        self, document: Document, memory: Memory, states: Mapping[str, Axes], lengths: str | None, origin: str
    ) -> None:
        self.document, self.states, self.lengths = document, states, lengths
        own = {output for node in document.nodes() for output in node.output} | set(document.inputs)
        own |= {tensor.name for tensor in document.model.graph.initializer}
        self.sequences = [name for name in memory.sequences if name in own]
        self.initials = [s.tensor for s in memory.slots if s.tensor in own and s.fed != "input"]
        inner = [name for name in dict.fromkeys([*self.sequences, *self.initials]) if name not in document.inputs]
        constant = {t.name for t in document.model.graph.initializer}
        self._constants = {name: document.constants[name] for name in inner if name in constant}
        self._names = list(dict.fromkeys([*document.outputs, *(n for n in inner if n not in constant)]))
        self._session = session(document.model, origin, outputs=self._names)

    def __call__(self, guess: Mapping[str, Axes], rows: int, steps: int, seed: int) -> Probe:
        generator = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        for name, axes in (*guess.items(), *self.states.items()):
            feeds[name] = random(dtype(self.document.inputs[name]), sized(axes, rows, steps), generator)
        if self.lengths:
            feeds[self.lengths] = np.full(rows, steps, dtype(self.document.inputs[self.lengths]))
        try:
            results = self._session.run(self._names, feeds)
        except Exception as error:  # onnxruntime raises a dozen types of its own
            raise _Unfit(first_line(error)) from error
        tensors = dict(zip(self._names, results, strict=True))
        return Probe(rows, steps, {**feeds, **tensors, **self._constants})


def _fit(run: _Runner, guess: dict[str, Axes], data: Mapping[str, Any], memory: Memory) -> Layout:
    """Tries a guess."""
    rows = _fixed_rows(run, guess, data)
    timed = any("time" in axes for axes in guess.values())
    if timed:
        sizes = [(2, 5), (3, 4), (3, 5)] if rows is None else [(rows, rows + 3), (rows, rows + 2)]
    else:
        sizes = [(2, 1), (3, 1)] if rows is None else [(rows, 1), (rows, 1)]
    probes = [run(guess, r, t, seed) for seed, (r, t) in enumerate(sizes)]
    evidence = False
    for probe in probes:
        for name in run.sequences:
            shape = probe.tensors[name].shape
            if len(shape) != 3 or shape[1] != probe.rows:
                raise _Unfit(f"{name!r} has shape {list(shape)} for {probe.rows} rows and {probe.steps} steps")
            if not timed and shape[0] != 1:
                raise _Unfit(f"a run always does {shape[0]} steps", fixed=True)
            evidence = True
    for slot in memory.slots:
        if slot.size is not None or slot.fed == "input":
            continue
        if not timed:
            raise _Unfit("a loop does a fixed number of steps", fixed=True)
        axes = varying([(p.rows, p.steps, p.tensors[slot.tensor].shape) for p in probes])
        if rows is None and (axes.count("batch") != 1 or "time" in axes or None in axes):
            raise _Unfit(f"the state {slot.tensor!r} does not have one row for each of the batch")
        if rows is not None and (None in axes or rows not in axes):
            raise _Unfit(f"the state {slot.tensor!r} has no axis of {rows} rows")
        evidence = True
    if not (evidence or all(slot.nested or slot.fed == "input" for slot in memory.slots)):
        raise _Unfit("nothing in the graph tells rows from steps")
    return Layout(dict(guess), dict(run.states), run.lengths, rows, timed, probes)


def _fixed_rows(run: _Runner, guess: Mapping[str, Axes], data: Mapping[str, Any]) -> int | None:
    """The number of rows that the graph's inputs declare, if any does."""
    declared = set()
    for name, axes in (*guess.items(), *run.states.items()):
        size = dims(run.document.inputs[name])[axes.index("batch")]
        declared |= {size} if isinstance(size, int) else set()
    if len(declared) > 1:
        raise _Unfit(f"the inputs declare different numbers of rows: {sorted(declared)}")
    return next(iter(declared), None)


def _guesses(data: Mapping[str, Any], origin: str) -> Iterator[dict[str, Axes]]:
    """The axes that the inputs may have, the likeliest first; either all have time or none has."""
    choices = [sorted(_axes_of(value), key=partial(_unlikeliness, value)) for value in data.values()]
    for together in product(*choices):
        if len({"time" in axes for axes in together}) == 1:
            yield dict(zip(data, together, strict=True))


def _axes_of(value: Any) -> Iterator[Axes]:
    declared = dims(value)
    open_axes = [k for k, size in enumerate(declared) if not isinstance(size, int)]
    for batch, time in product(range(len(declared)), (*range(len(declared)), None)):
        if batch == time or any(k not in (batch, time) for k in open_axes):
            continue
        if time is not None and time not in open_axes and declared[time] != 1:
            continue
        axes: list[Axis] = [0 if size is None or isinstance(size, str) else size for size in declared]
        axes[batch] = "batch"
        if time is not None:
            axes[time] = "time" if time in open_axes else "squeeze"
        yield tuple(axes)


def _unlikeliness(value: Any, axes: Axes) -> tuple[bool, int, int]:
    """Sorts what the names of the axes speak against behind; else batch first, then time, then features."""
    wrong = 0
    for axis, size in zip(axes, dims(value), strict=True):
        name = size.lower() if isinstance(size, str) else ""
        wrong += (axis == "batch" and name in _TIME_NAMES) + (axis == "time" and name in _BATCH_NAMES)
        wrong += axis == "batch" and isinstance(size, int)
    return "time" not in axes, wrong, axes.index("batch")


def _state_axes(document: Document, name: str, slots: Sequence[Slot], origin: str) -> Axes:
    """The axes of an input that is a state: as ONNX's operators have them, or with the rows first."""
    declared = dims(document.inputs[name])
    sizes = [slot.size for slot in slots if slot.size is not None]
    if sizes:
        count, hidden = sum(size[0] for size in sizes), sizes[0][1]
        outer: Axis = "squeeze" if count == 1 else count
        options: list[Axes] = [(outer, "batch", hidden), ("batch", outer, hidden)]
        if count == 1:
            options.append(("batch", hidden))
        for fixed in (False, True):  # rather an axis of no fixed size
            for axes in options:
                if _matches(axes, declared, fixed=fixed):
                    return axes
    else:
        open_axes = [k for k, size in enumerate(declared) if not isinstance(size, int)]
        if len(open_axes) <= 1 and declared:
            batch = open_axes[0] if open_axes else 0
            found: list[Axis] = [size if isinstance(size, int) else 0 for size in declared]
            found[batch] = "batch"
            return tuple(found)
    raise ModelError(
        f"{origin}: input {name!r} is a state of shape {_shown(document.inputs[name])}, whose batch axis cannot be told"
    )


def _matches(axes: Axes, declared: Sequence[int | str | None], *, fixed: bool) -> bool:
    if len(axes) != len(declared):
        return False
    for axis, size in zip(axes, declared, strict=True):
        if axis == "batch":
            if isinstance(size, int) and not fixed:
                return False
        elif isinstance(size, int) and size != (1 if axis == "squeeze" else axis):
            return False
    return True


def _lengths(document: Document, memory: Memory) -> str | None:
    """The input that holds the rows' numbers of steps: what recurrent operators take as such, or is so called."""
    for tensor in memory.lengths:
        if name := document.moved_from(tensor):
            return str(name)
        inputs, _ = document.origins(tensor, lambda node: False)
        for name in sorted(inputs):
            if len(dims(document.inputs[name])) == 1:
                return name
    for name, value in document.inputs.items():
        if len(dims(value)) == 1 and dtype(value) in ("int32", "int64") and "len" in name.lower():
            return str(name)
    return None


def _refuse(
    run: _Runner, guesses: list[dict[str, Axes]], data: Mapping[str, Any], reasons: list[_Unfit], origin: str
) -> None:
    shapes = ", ".join(f"{name!r} {_shown(value)}" for name, value in data.items())
    for name, value in data.items():
        if sum(not isinstance(size, int) for size in dims(value)) > 2:
            raise ModelError(
                f"{origin}: the batch and time axes of input {name!r} {_shown(value)} cannot be told: more than two "
                "axes have no size; give its features a fixed one"
            )
    advice = "export it with a symbolic time axis (dynamic_axes, dynamic_shapes, or a shape of None)"
    timed = [guess for guess in guesses if any("time" in axes for axes in guess.values())]
    if any(reason.fixed for reason in reasons) or not timed:
        detail = next((f": {reason}" for reason in reasons if reason.fixed), "")
        raise ModelError(f"{origin}: the number of time steps is fixed (the graph declares {shapes}){detail}; {advice}")
    for guess in timed:
        works = [steps for steps in range(1, _MOST_STEPS + 1) if _runs(run, guess, data, steps)]
        if len(works) == 1:
            raise ModelError(
                f"{origin}: the number of time steps is fixed: the graph declares {shapes}, but runs with {works[0]} "
                f"steps only; {advice}"
            )
    kinds = {len({k for k, size in enumerate(dims(value)) if not isinstance(size, int)}) for value in data.values()}
    if 0 in kinds or len(kinds) > 1:
        raise ModelError(
            f"{origin}: some inputs have a time axis and some have none ({shapes}); a served graph takes the same "
            "steps of each"
        )
    raise ModelError(
        f"{origin}: the batch and time axes of {shapes} cannot be told: no choice of them runs with other numbers of "
        f"rows and steps ({reasons[0] if reasons else 'none is possible'})"
    )


def _runs(run: _Runner, guess: dict[str, Axes], data: Mapping[str, Any], steps: int) -> bool:
    try:
        rows = _fixed_rows(run, guess, data) or 3
        probe = run(guess, rows, steps, 0)
    except _Unfit:
        return False
    shape = probe.tensors[run.document.outputs[0]].shape
    return rows in shape and (len(shape) < 3 or steps in shape)


def _shown(value: Any) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in dims(value))}]"
