"""Holding a converted model against the graph that Triton runs, fed as Triton feeds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from rnnserve_models.engine.base import Array, Arrays, EngineError
from rnnserve_models.engine.onnx import OnnxEngine
from rnnserve_models.errors import ModelError
from rnnserve_models.spec import GraphSpec

_ROWS, _STEPS, _REQUESTS = 2, 6, 3
_TOLERANCE = {"float16": 4e-3}
_DEFAULT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        sliceable: calls may be cut anywhere in time.
        findings: the measured errors.
    """

    sliceable: bool
    findings: list[str]


def check(
    original: bytes, content: bytes, spec: GraphSpec, defaults: Mapping[str, Array], *, batched: bool, origin: str
) -> Checked:
    """Runs both for a sequence of three requests of random numbers.

    Args:
        original: Triton's graph.
        content: ours, which may have a batch axis more.
        spec: what its tensors mean.
        defaults: what its states start from; zeros for the others.
        batched: whether Triton's tensors have a batch axis.
        origin: the file, for messages.

    Raises:
        ModelError: they differ, or one does not run.
    """
    engine = OnnxEngine(content, spec.model_copy(update={"sliceable": False}), defaults=dict(defaults), origin=origin)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    triton = _Triton(ort.InferenceSession(original, options, providers=["CPUExecutionProvider"]), spec, batched=batched)
    rng = np.random.default_rng(7)
    rows, timed = _ROWS if batched else 1, spec.inputs[0].has_time
    steps = _STEPS if timed else 1
    states = {each.name: each.initial(rows) for each in engine.states}
    theirs = {state.name: states[state.name] for state in spec.states}
    requests: list[Arrays] = []
    worst, tolerance = 0.0, max(_TOLERANCE.get(each.dtype.name, _DEFAULT_TOLERANCE) for each in engine.outputs)
    try:
        for number in range(_REQUESTS):
            inputs = {each.name: _random(each.dtype, (steps, rows, *each.shape), rng) for each in engine.inputs}
            for control in spec.controls:
                if control.kind == "end":
                    inputs[control.tensor][:] = control.values[number == _REQUESTS - 1]
            requests.append(inputs)
            y, states = engine.run(inputs, np.full(rows, steps), states)
            expected, theirs = triton.run(inputs, theirs, start=number == 0, end=number == _REQUESTS - 1)
            worst = max(worst, *(_apart(y[name], expected[name]) for name in expected))
            worst = max([worst, *(_apart(states[name], theirs[name]) for name in theirs)])
    except EngineError as error:
        raise ModelError(f"{origin}: the graph does not run as config.pbtxt describes it: {error}") from error
    if not worst <= tolerance:
        raise ModelError(f"{origin}: what was converted differs from the original by {worst:.2g}; it is not used")
    findings = [f"a sequence of {_REQUESTS} requests: differs from the original by at most {worst:.2g}"]
    if not timed:
        return Checked(True, findings)
    sliceable, apart = _cut(engine, requests[0], rows)
    if sliceable <= tolerance:
        return Checked(True, findings)
    return Checked(False, [*findings, f"{apart}: requests are computed whole, as Triton does"])


class _Triton:
    """The graph as Triton feeds it: one request after the other, what a state gave last going back in."""

    def __init__(self, session: ort.InferenceSession, spec: GraphSpec, *, batched: bool) -> None:
        self._session = session
        self._spec = spec
        self._batched = batched

    def run(self, inputs: Arrays, states: Arrays, *, start: bool, end: bool) -> tuple[Arrays, Arrays]:
        """One request: inputs [T, R, *shape], states [R, *shape]."""
        spec, rows = self._spec, len(next(iter(states.values()))) if states else next(iter(inputs.values())).shape[1]
        feeds: dict[str, Any] = {}
        for each in spec.inputs:
            x = np.moveaxis(inputs[each.name], 0, 1)  # [R, T, *shape]
            if not each.has_time:
                x = x[:, 0]
            elif (at := each.axes.index("time")) != 1:
                x = np.moveaxis(x, 1, at - sum(axis == "squeeze" for axis in each.axes[:at]))
            feeds[each.name] = np.expand_dims(x, [n for n, axis in enumerate(each.axes) if axis == "squeeze"])
        for state in spec.states:
            feeds[state.input] = states[state.name]
        truths = {"start": start, "end": end, "ready": True}
        for control in spec.controls:
            value = 0 if control.kind == "corrid" else control.values[truths[control.kind]]
            feeds[control.tensor] = np.full((rows, *control.shape), value, control.dtype)
        if not self._batched:
            feeds = {name: x[0] for name, x in feeds.items()}
        names = [each.tensor or each.name for each in spec.outputs] + [state.output for state in spec.states]
        results = dict(zip(dict.fromkeys(names), self._session.run([*dict.fromkeys(names)], feeds), strict=True))
        if not self._batched:
            results = {name: y[None] for name, y in results.items()}
        outputs: Arrays = {}
        for output in spec.outputs:
            y = results[output.name].squeeze(tuple(n for n, axis in enumerate(output.axes) if axis == "squeeze"))
            kept = [axis for axis in output.axes if axis != "squeeze"]
            outputs[output.name] = np.moveaxis(y, kept.index("time"), 0) if output.has_time else y
        return outputs, {state.name: results[state.output] for state in spec.states}


def _cut(engine: OnnxEngine, inputs: Arrays, rows: int) -> tuple[float, str]:
    """How far a request that is cut in two is from the whole one."""
    first = {each.name: each.initial(rows) for each in engine.states}
    whole, after = engine.run(inputs, np.full(rows, _STEPS), first)
    at, states, parts = _STEPS // 2 - 1, first, []
    try:
        for start, stop in ((0, at), (at, _STEPS)):
            y, states = engine.run(
                {name: x[start:stop] for name, x in inputs.items()}, np.full(rows, stop - start), states
            )
            parts.append(y)
    except EngineError as error:
        return np.inf, f"a request cannot be cut ({error})"
    worst = 0.0
    for spec, described in zip(engine.outputs, engine.spec.outputs, strict=True):
        mine, theirs = [part[spec.name] for part in parts], whole[spec.name]
        if described.has_time:
            worst = max(worst, _apart(np.concatenate(mine), theirs))
        else:
            worst = max(worst, _apart(mine[-1][-1], theirs[-1]))
    worst = max([worst, *(_apart(states[name], after[name]) for name in after)])
    return worst, f"a request cut in two differs from the whole one by {worst:.2g}"


def _apart(a: Array, b: Array) -> float:
    a = a[-1] if a.ndim == b.ndim + 1 else a  # an output of the last step
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _random(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if dtype.kind in "iu":
        return rng.integers(1, 3, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.ones(shape, dtype)
