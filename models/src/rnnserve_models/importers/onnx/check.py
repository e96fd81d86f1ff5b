"""Holding an imported graph against the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnserve_models.engine.base import EngineError
from rnnserve_models.engine.onnx import OnnxEngine
from rnnserve_models.errors import ModelError
from rnnserve_models.importers.onnx.axes import Array, Layout, random, to_graph
from rnnserve_models.importers.onnx.document import Document, dtype, first_line, session
from rnnserve_models.spec import GraphSpec

Arrays = Mapping[str, Array]

_TOLERANCE = {"float16": 4e-3}
_DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        sliceable: calls may be cut anywhere in time.
        findings: the measured errors, and why calls may not be cut.
    """

    sliceable: bool
    findings: list[str]


def check(
    document: Document,
    layout: Layout,
    graph: bytes,
    spec: GraphSpec,
    defaults: Arrays,
    *,
    restarts: bool,
    origin: str,
) -> Checked:
    """Runs both on random input.

    Args:
        document: the original.
        layout: its axes.
        graph: the new graph.
        spec: what its tensors mean.
        defaults: of its states.
        restarts: loops carry something that is no state and begins anew in each call.
        origin: the file, for messages.

    Raises:
        ModelError: the new graph differs from the original, or mixes its rows.
    """
    # Until it is known whether the graph looks ahead, no row is cut.
    engine = OnnxEngine(graph, spec.model_copy(update={"sliceable": False}), defaults=defaults, origin=origin)
    try:
        return _check(document, layout, engine, spec, restarts=restarts, origin=origin)
    except EngineError as error:
        raise ModelError(f"{origin}: the stateful graph does not run: {error}") from error


def _check(
    document: Document, layout: Layout, engine: OnnxEngine, spec: GraphSpec, *, restarts: bool, origin: str
) -> Checked:
    tolerance = max(_TOLERANCE.get(tensor.dtype.name, _DEFAULT_TOLERANCE) for tensor in engine.outputs)
    whole = _against_original(document, layout, engine, spec, origin)
    if not whole <= tolerance:
        raise ModelError(
            f"{origin}: the stateful graph differs from the original by {whole:.2g}, more than "
            f"{tolerance:g}; it is not used"
        )
    findings = [f"a whole sequence from the default state: differs from the original by at most {whole:.2g}"]
    _check_rows(engine, layout, tolerance, spec, origin)
    chunks = _chunked(engine, layout)
    if chunks <= tolerance and not restarts:
        findings.append(f"two calls that hand the states on: differ from one by at most {chunks:.2g}")
        return Checked(True, findings)
    if restarts:
        why = "at a masked step the graph repeats the output before, which begins at zero in each call"
    elif _looks_ahead(engine):
        why = "an output depends on later steps (a backward or bidirectional layer, or a window over time)"
    else:
        why = "an output depends on earlier steps not only by the states (such as a window or a mean over time)"
    findings.append(f"a call must hold a whole sequence, and is never cut: {why}")
    if restarts:
        findings.append(f"two calls without masked steps: differ from one by at most {chunks:.2g}")
    return Checked(False, findings)


def difference(a: Arrays, b: Arrays) -> float:
    """The largest absolute difference; infinity where shapes differ or one is not a number."""
    worst = 0.0
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape:
            return float("inf")
        if x.size:
            gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
            worst = max(worst, float(np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, gap).max()))
    return worst if worst == worst else float("inf")


def _inputs(engine: OnnxEngine, rows: int, steps: int, seed: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {t.name: random(t.dtype.name, (steps, rows, *t.shape), generator) for t in engine.inputs}


def _random_states(engine: OnnxEngine, rows: int, seed: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {s.name: (random(s.dtype.name, (rows, *s.shape), generator) / 2).astype(s.dtype) for s in engine.states}


def _against_original(document: Document, layout: Layout, engine: OnnxEngine, spec: GraphSpec, origin: str) -> float:
    """The largest difference from the original; from the default states, and from others where it takes states."""
    run = session(document.model, origin)
    names = [tensor.tensor or tensor.name for tensor in spec.outputs]
    given = {state.name: state for state in spec.states if state.input in layout.states}
    worst = 0.0
    for seed, steps in enumerate((5, 8) if layout.timed else (1, 1)):
        rows = layout.rows or 3
        inputs = _inputs(engine, rows, steps, seed)
        if seed:  # a step of zeros, which a layer of Masking leaves out
            for x in inputs.values():
                x[-1, 0] = 0
        states = {s.name: s.initial(rows) for s in engine.states}
        states |= {name: state for name, state in _random_states(engine, rows, seed).items() if name in given}
        outputs, _ = engine.run(inputs, np.full(rows, steps), states)
        feeds = {t.tensor or t.name: to_graph(inputs[t.name], t.axes) for t in spec.inputs}
        feeds |= {state.input: to_graph(states[name], state.axes) for name, state in given.items()}
        if spec.lengths:
            feeds[spec.lengths] = np.full(rows, steps, dtype(document.inputs[spec.lengths]))
        try:
            results = run.run(names, feeds)
        except Exception as error:  # onnxruntime raises a dozen types of its own
            raise ModelError(f"{origin}: the original does not run: {first_line(error)}") from error
        for tensor, result in zip(spec.outputs, results, strict=True):
            y = outputs[tensor.name] if tensor.has_time else outputs[tensor.name][-1]
            worst = max(worst, difference({"": to_graph(y, tensor.axes)}, {"": np.asarray(result)}))
    return worst


def _check_rows(engine: OnnxEngine, layout: Layout, tolerance: float, spec: GraphSpec, origin: str) -> None:
    """Refuses a graph in which a row's results depend on the other rows, or stand in another row."""
    steps = np.array([3, 5, 2, 3, 5] if layout.timed else [1] * 5)
    inputs, states = _inputs(engine, len(steps), int(steps.max()), 11), _random_states(engine, len(steps), 12)
    try:
        y, after = engine.run(inputs, steps, states)
        for row, length in enumerate(steps):
            alone, alone_after = engine.run(
                {name: x[:length, row : row + 1] for name, x in inputs.items()},
                np.array([length]),
                {name: state[row : row + 1] for name, state in states.items()},
            )
            last = {t.name: t.has_time for t in spec.outputs}
            mine = {n: x[0 if last[n] else length - 1 : length, row : row + 1] for n, x in y.items()}
            alone = {n: x if last[n] else x[-1:] for n, x in alone.items()}
            outputs = difference(mine, alone)
            kept = difference({n: s[row : row + 1] for n, s in after.items()}, alone_after)
            if max(outputs, kept) > tolerance:
                raise _mixed(spec, origin, f"by {max(outputs, kept):.2g}")
    except EngineError as error:
        if spec.lengths:
            raise _mixed(spec, origin, f"({error})") from error
        raise ModelError(f"{origin}: the stateful graph does not run with other numbers of rows: {error}") from error


def _mixed(spec: GraphSpec, origin: str, detail: str) -> ModelError:
    if spec.lengths:
        return ModelError(
            f"{origin}: the sequences are packed: the graph puts the rows in another order around the recurrent node "
            f"(by {spec.lengths!r}), so that its states are not in the order of the call and differ {detail}; export "
            "the layer without pack_padded_sequence"
        )
    return ModelError(f"{origin}: a row's results depend on the other rows {detail}; such a graph cannot be batched")


def _chunked(engine: OnnxEngine, layout: Layout) -> float:
    """The difference between one call and the same steps in several."""
    steps: Sequence[int] = (2, 1, 4) if layout.timed else (1, 1, 1)
    rows = 3
    inputs, states = _inputs(engine, rows, sum(steps), 21), _random_states(engine, rows, 22)
    y, after = engine.run(inputs, np.full(rows, sum(steps)), states)
    parts: list[dict[str, Array]] = []
    done = 0
    for count in steps:
        part, states = engine.run(
            {name: x[done : done + count] for name, x in inputs.items()}, np.full(rows, count), states
        )
        parts.append(part)
        done += count
    timed = {tensor.name: tensor.has_time for tensor in engine.spec.outputs}
    joined = {
        name: np.concatenate([part[name] for part in parts]) if timed[name] or not layout.timed else parts[-1][name][-1]
        for name in y
    }
    whole = {name: value if timed[name] or not layout.timed else value[-1] for name, value in y.items()}
    return max(difference(whole, joined), difference(after, states))


def _looks_ahead(engine: OnnxEngine) -> bool:
    """Whether an output of one step changes with the input of a later one."""
    steps, rows = 6, 2
    inputs, states = _inputs(engine, rows, steps, 31), _random_states(engine, rows, 32)
    changed = {name: x.copy() for name, x in inputs.items()}
    for name, x in _inputs(engine, rows, steps, 33).items():
        changed[name][-1] = x[-1]
    lengths = np.full(rows, steps)
    before, after = engine.run(inputs, lengths, states)[0], engine.run(changed, lengths, states)[0]
    timed = [tensor.name for tensor in engine.spec.outputs if tensor.has_time]
    return any(not np.array_equal(before[name][:-1], after[name][:-1]) for name in timed)
