"""Rollouts: a model goes on by itself, each output becoming the next input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from rnnserve_models.engine.base import Array, Arrays, Engine
from rnnserve_models.options import LayerOptions
from rnnserve_models.spec import TensorSpec
from rnnserve_server.calls import Call
from rnnserve_server.core import Core
from rnnserve_server.errors import InvalidRequest, TooLarge
from rnnserve_server.layout import check_call
from rnnserve_server.resets import NO_RULES
from rnnserve_server.sessions import Group, Session
from rnnserve_server.states import states_of


class Rule(Enum):
    """How an input is made of an output; see FeedbackRule."""

    COPY = "copy"
    ARGMAX = "argmax"
    SAMPLE = "sample"
    SAMPLE_LOGITS = "sample_logits"


@dataclass(frozen=True, slots=True)
class Feedback:
    """Which output becomes which input, and how; empty names for the only ones."""

    output: str = ""
    input: str = ""
    rule: Rule = Rule.COPY
    temperature: float = 1.0


Feed = Callable[[Arrays, np.random.Generator], Arrays]
"""Makes every input, [batch, *shape], of every output, [batch, *shape]."""


async def rollout(
    core: Core,
    session_id: str,
    steps: int,
    inputs: Arrays,
    feedback: Sequence[Feedback],
    seed: int | None,
    deadline: float | None,
    take: Callable[[int], None] | None = None,
) -> tuple[Arrays, Arrays]:
    """Lets a session's model go on by itself; see Rollout for the rules.

    Args:
        core: the house.
        session_id: whose states to start from.
        steps: how many.
        inputs: what to take before, as for a chunk of the session; empty for nothing.
        feedback: how inputs are made of outputs; empty for the only output becoming the only input.
        seed: what chance starts from.
        deadline: the time of the clock after which nobody needs the answer, or None.
        take: lets so many rows of time steps in, or raises ServiceError; None: all of them.

    Returns:
        Every output and every input, [batch, steps, *shape] ([steps, batch, *shape] with time_major).

    Raises:
        ServiceError: as Rollout says.
    """
    session = await core.session(session_id, sure=True)
    group = session.group
    engine = group.model.engine
    feed = feed_of(engine, feedback or [Feedback()])
    _check_size(core, group, steps)
    if take is not None:
        take(steps * group.batch_size)
    if inputs:
        whole = {name: x[None] for name, x in inputs.items()}
        check_call(engine, group.options, whole, None, batch_size=group.batch_size)
    async with core.turn(session):
        states, step = states_of(session), session.step
        output = {} if inputs else _last_output(session)
    if inputs:
        output, states = await _run(core, group, group.options, inputs, states, step, deadline)
        step += next(iter(inputs.values())).shape[0 if group.options.time_major else 1]
    options = replace(group.options, time_major=False)
    chance = np.random.default_rng(seed)
    ys: list[Arrays] = []
    xs: list[Arrays] = []
    for at in range(step, step + steps):
        xs.append(feed(output, chance))
        x = {name: value[:, None] for name, value in xs[-1].items()}  # [batch, 1, *shape]
        output, states = await _run(core, group, options, x, states, at, deadline)
        ys.append(output)
    axis = 0 if group.options.time_major else 1
    return _stacked(ys, axis), _stacked(xs, axis)


def feed_of(engine: Engine, feedback: Sequence[Feedback]) -> Feed:
    """What makes a model's inputs of its outputs.

    Raises:
        InvalidRequest: an input has no source or several, or an output cannot become it.
    """
    makers: dict[str, tuple[str, Callable[[Array, np.random.Generator], Array]]] = {}
    for index, each in enumerate(feedback):
        field = f"feedback[{index}]"
        source = _named(f"{field}.output", each.output, engine.outputs)
        target = _named(f"{field}.input", each.input, engine.inputs)
        if target.name in makers:
            raise InvalidRequest(f"{field}.input", "each input once", f"{target.name!r} twice")
        makers[target.name] = source.name, _maker(field, each, source, target)
    for spec in engine.inputs:
        if spec.name not in makers:
            raise InvalidRequest("feedback", f"an output that becomes input {spec.name!r}", "none")
    if engine.timesteps not in (None, 1):
        raise InvalidRequest("session_id", "a model that takes a step at a time", f"one of {engine.timesteps} steps")
    return lambda outputs, chance: {name: make(outputs[of], chance) for name, (of, make) in makers.items()}


def _maker(
    field: str, feedback: Feedback, source: TensorSpec, target: TensorSpec
) -> Callable[[Array, np.random.Generator], Array]:
    described = [f"{spec.name!r} of {spec.dtype.name} {list(spec.shape)}" for spec in (source, target)]
    if feedback.rule is Rule.COPY:
        if (source.dtype, source.shape) != (target.dtype, target.shape):
            raise InvalidRequest(
                field, f"an output like input {described[1]}", described[0], "choose among classes with another rule"
            )
        return lambda y, chance: y
    if not 0 < feedback.temperature < np.inf:
        raise InvalidRequest(f"{field}.temperature", "a positive number", str(feedback.temperature))
    classes = source.shape[0] if len(source.shape) == 1 else 0
    one_hot = target.shape == (classes,)
    if not classes or not (one_hot or target.shape in ((), (1,))):
        raise InvalidRequest(field, "an output [K], and an input [K], [1] or []", " and ".join(described))
    if not one_hot and np.array(classes - 1).astype(target.dtype) != classes - 1:
        raise InvalidRequest(field, f"an input that can hold {classes - 1}", described[1])

    def make(y: Array, chance: np.random.Generator) -> Array:
        chosen = np.argmax(y, axis=1) if feedback.rule is Rule.ARGMAX else _sampled(field, y, feedback, chance)
        if one_hot:
            hot: Array = chosen[:, None] == np.arange(classes)
            return hot.astype(target.dtype)
        return chosen.astype(target.dtype).reshape(-1, *target.shape)

    return make


def _sampled(field: str, y: Array, feedback: Feedback, chance: np.random.Generator) -> Array:
    """A class for each row of weights [batch, K]: int64 [batch]."""
    weights = y.astype(np.float64)
    if feedback.rule is Rule.SAMPLE:
        if not (weights >= 0).all():
            raise InvalidRequest(field, "probabilities", f"{weights.min()}", "for logits, ask for SAMPLE_LOGITS")
        with np.errstate(divide="ignore"):
            weights = np.log(weights)
    largest = weights.max(axis=1, keepdims=True)  # [batch, 1]
    if not np.isfinite(largest).all():
        raise InvalidRequest(field, "a class that can be chosen", "weights that are all zero or not finite")
    sums = np.cumsum(np.exp((weights - largest) / feedback.temperature), axis=1)  # [batch, K]
    points = chance.random((len(y), 1)) * sums[:, -1:]
    chosen: Array = np.minimum((sums <= points).sum(axis=1), y.shape[1] - 1)
    return chosen


def _named(field: str, name: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    found = [spec for spec in specs if name in (spec.name, "")]
    if len(found) != 1:
        raise InvalidRequest(field, f"one of {[spec.name for spec in specs]}", repr(name[:200]))
    return found[0]


def _check_size(core: Core, group: Group, steps: int) -> None:
    if steps < 1:
        raise InvalidRequest("steps", "at least 1", str(steps))
    if steps > core.settings.max_rollout_steps:
        raise TooLarge("steps", core.settings.max_rollout_steps, steps)
    engine = group.model.engine
    one = sum(spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in (*engine.inputs, *engine.outputs))
    if (nbytes := one * steps * group.batch_size) > core.settings.max_message_bytes:
        raise TooLarge("bytes of the result", core.settings.max_message_bytes, nbytes)


def _last_output(session: Session) -> Arrays:
    """Every output of the session's last step: [batch, *shape].

    Raises:
        InvalidRequest: it is not known.
    """
    group = session.group
    places = group.window.of(group, session.slot)
    if not places:
        hint = "the session has taken no step that the server remembers"
        raise InvalidRequest("inputs", "inputs to begin with", "none", hint)
    round_, index = places[-1]
    outputs, _ = round_.shown(index)
    return {name: _last(y[0], group.options) for name, y in outputs.items()}


async def _run(
    core: Core,
    group: Group,
    options: LayerOptions,
    inputs: Arrays,
    states: Arrays,
    first_step: int,
    deadline: float | None,
) -> tuple[Arrays, Arrays]:
    """A chunk: every output of its last step, and every state after it, [batch, *shape]."""
    call = Call(deadline)
    core.submit_call(
        group.model,
        replace(options, return_state=True),
        inputs,
        None,
        states,
        call,
        rules=group.rules or NO_RULES,
        first_step=first_step,
    )
    answers = await call.answer()
    outputs = {name: _last(y[0], options) for name, y in answers.outputs.items()}
    return outputs, {name: state[0] for name, state in answers.states.items()}


def _last(y: Array, options: LayerOptions) -> Array:
    if not options.return_sequences:
        return y
    last: Array = y[-1] if options.time_major else y[:, -1]
    return last


def _stacked(steps: Sequence[Arrays], axis: int) -> Arrays:
    return {name: np.stack([each[name] for each in steps], axis) for name in steps[0]}
