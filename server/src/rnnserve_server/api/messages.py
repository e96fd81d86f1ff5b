"""Between the house's own types and the messages of the contract."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from rnnserve.codec import data_type, decode_named
from rnnserve.v1 import model_pb2, options_pb2, session_pb2
from rnnserve_models.engine.base import Array
from rnnserve_models.load import LoadedModel
from rnnserve_models.spec import TensorSpec
from rnnserve_server.access.caller import caller
from rnnserve_server.core import Core
from rnnserve_server.errors import InvalidRequest, SessionExists, SessionsFull
from rnnserve_server.records import limits_of, rules_of
from rnnserve_server.replay import Limits
from rnnserve_server.resets import NO_RULES, ResetRules
from rnnserve_server.sessions import Group, Session
from rnnserve_server.store.base import Head

Item = TypeVar("Item")

_MESSAGES_AT_ONCE = 32  # a session's takes some thirty microseconds


def options_message(options: object) -> options_pb2.LayerOptions:
    """Layer options, every field set."""
    return options_pb2.LayerOptions(**vars(options))


def asked_options(message: options_pb2.LayerOptions) -> dict[str, bool]:
    """The options that a client set."""
    return {field.name: value for field, value in message.ListFields()}


def model_message(model: LoadedModel) -> model_pb2.Model:
    """A model's description."""
    engine, spec = model.engine, model.spec
    return model_pb2.Model(
        name=model.name,
        version=model.version,
        digest=model.digest,
        description=spec.description,
        engine=engine.name,
        inputs=[_tensor_message(tensor) for tensor in engine.inputs],
        outputs=[_tensor_message(tensor) for tensor in engine.outputs],
        states=[
            model_pb2.StateSpec(name=s.name, data_type=data_type(s.dtype), shape=s.shape, path=s.path)
            for s in engine.states
        ],
        default_options=options_message(spec.default_options),
        settable_options=spec.settable_options,
        bit_identical=engine.bit_identical,
        masking=spec.masking,
    )


def session_message(session: Session | Head) -> session_pb2.Session:
    """A session as it is, or as it is stored."""
    if isinstance(session, Head):
        return _head_message(session)
    group = session.group
    return _session_message(
        session.id,
        group.model.name,
        group.model.version,
        group.model.digest,
        group.batch_size,
        options_message(group.options),
        session.step,
        session.create_time,
        session.idle_lifetime,
        session.lifetime if session.lifetime < math.inf else None,
        group.window.limits,
        group.rules or NO_RULES,
    )


async def session_messages(sessions: Iterable[Session | Head]) -> list[session_pb2.Session]:
    """Many sessions, as `session_message`, a few in each turn of the event loop: others wait for theirs. One that ends
    meanwhile is left out.
    """
    told: list[session_pb2.Session] = []
    for number, session in enumerate(sessions):
        if number and number % _MESSAGES_AT_ONCE == 0:
            await asyncio.sleep(0)
        if isinstance(session, Head) or session.live:
            told.append(session_message(session))
    return told


def _head_message(head: Head) -> session_pb2.Session:
    meta = head.meta
    return _session_message(
        head.id,
        meta.model,
        meta.version,
        meta.digest,
        meta.batch_size,
        options_pb2.LayerOptions(**meta.options),
        head.step,
        meta.create_time,
        meta.idle_lifetime,
        meta.lifetime,
        limits_of(meta),
        rules_of(meta),
    )


def _session_message(
    session_id: str,
    model: str,
    version: str,
    digest: str,
    batch_size: int,
    options: options_pb2.LayerOptions,
    step: int,
    create_time: float,
    idle_lifetime: float,
    lifetime: float | None,
    replay: Limits,
    rules: ResetRules,
) -> session_pb2.Session:
    created = Timestamp()
    created.FromNanoseconds(int(create_time * 1e9))
    return session_pb2.Session(
        session_id=caller().shown(session_id),
        model=model,
        version=version,
        digest=digest,
        batch_size=batch_size,
        options=options,
        step=step,
        create_time=created,
        idle_lifetime=duration(idle_lifetime),
        lifetime=None if lifetime is None else duration(lifetime),
        replay_window=session_pb2.ReplayWindow(max_chunks=replay.replies, max_bytes=replay.bytes),
        reset_rules=None
        if rules == NO_RULES
        else session_pb2.ResetRules(every_steps=rules.every_steps, masked_steps=rules.masked_steps),
    )


def duration(seconds: float) -> Duration:
    """Seconds as the contract has them."""
    made = Duration()
    made.FromNanoseconds(int(seconds * 1e9))
    return made


def _seconds(config: session_pb2.SessionConfig, field: str) -> float | None:
    """A duration that a client may have left out."""
    if not config.HasField(field):  # type: ignore[arg-type]
        return None
    nanoseconds: int = getattr(config, field).ToNanoseconds()
    return nanoseconds / 1e9


async def create_sessions(
    core: Core, config: session_pb2.SessionConfig, session_ids: Sequence[str]
) -> tuple[Group, Array, SessionsFull | None]:
    """Makes the sessions that a client asks for, alike but for their ids: see `Core.create_sessions`.

    Args:
        core: where.
        config: what they are; its id does not count.
        session_ids: the id of each, scope and all, either all of them empty or none.

    Raises:
        ServiceError, TensorError: as CreateSession says.
    """
    window = config.replay_window
    asked = Limits(
        window.max_chunks if window.HasField("max_chunks") else core.settings.replay_chunks,
        window.max_bytes if window.HasField("max_bytes") else core.settings.replay_bytes,
    )
    return await core.create_sessions(
        config.model,
        config.version,
        config.batch_size,
        asked_options(config.options),
        len(session_ids),
        initial_states=decode_named(config.initial_states, "initial_states"),
        idle_lifetime=_seconds(config, "idle_lifetime"),
        lifetime=_seconds(config, "lifetime"),
        replay=asked,
        rules=ResetRules(config.reset_rules.every_steps, config.reset_rules.masked_steps),
        session_ids=session_ids if session_ids[0] else (),
        scope=caller().scope,
    )


async def create_session(core: Core, config: session_pb2.SessionConfig) -> Session:
    """Makes the session that a client asks for.

    Raises:
        ServiceError, TensorError: as CreateSession says.
    """
    session_id = caller().scope + config.session_id if config.session_id else ""
    group, slots, full = await create_sessions(core, config, [session_id])
    if full is not None:
        raise full
    if not (await core.keep(group, slots)).all():
        raise SessionExists(session_id)
    return core.sessions.at(group, int(slots[0]))


def page(items: Iterable[Item], size: int, default: int, token_of: Callable[[Item], str]) -> tuple[Sequence[Item], str]:
    """The first ``size`` items, or ``default`` if it is 0, and the token of the next page, empty if there is none.

    Raises:
        InvalidRequest: the size is negative.
    """
    if size < 0:
        raise InvalidRequest("page_size", "0 or more", str(size))
    most = min(size or default, default)
    taken: list[Item] = []
    for item in items:
        if len(taken) == most:
            return taken, token_of(taken[-1])
        taken.append(item)
    return taken, ""


def page_number(token: str) -> int:
    """The number in a page token; 0 for an empty one.

    Raises:
        InvalidRequest: the token is not one of ours.
    """
    if token and not (token.isascii() and token.isdecimal() and len(token) < 19):
        raise InvalidRequest("page_token", "a next_page_token of this method", repr(token[:80]))
    return int(token or 0)


def rows_of(inputs: Mapping[str, Array], axes: int) -> int:
    """Rows of time steps in inputs whose first axes are batch and time, and N in front of a frame's."""
    x = next(iter(inputs.values()), None)
    return 0 if x is None else math.prod(x.shape[:axes])


def _tensor_message(tensor: TensorSpec) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(
        name=tensor.name, data_type=data_type(tensor.dtype), shape=tensor.shape, finite=tensor.finite
    )
