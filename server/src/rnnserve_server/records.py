"""Sessions as a store keeps them: bytes of states, of answers, and what tells chunks apart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.options import LayerOptions
from rnnserve_models.spec import StateSpec
from rnnserve_server.replay import Limits
from rnnserve_server.resets import NO_RULES, ResetRules
from rnnserve_server.sessions import Group, Session
from rnnserve_server.store.base import Meta, StoreCorrupt
from rnnserve_server.store.tick import Rows

_LENGTH_BYTES = 4


def meta_of(session: Session) -> Meta:
    """What never changes in a session's life."""
    group = session.group
    return Meta(
        model=group.model.name,
        version=group.model.version,
        digest=group.model.digest,
        batch_size=group.batch_size,
        options=dict(vars(group.options)),
        create_time=session.create_time,
        idle_lifetime=session.idle_lifetime,
        lifetime=session.lifetime if session.lifetime < math.inf else None,
        window_replies=group.window.limits.replies,
        window_bytes=group.window.limits.bytes,
        reset_every_steps=(group.rules or NO_RULES).every_steps,
        reset_masked_steps=(group.rules or NO_RULES).masked_steps,
    )


def options_of(meta: Meta) -> LayerOptions:
    """The options of a stored session."""
    return LayerOptions(**{name: bool(value) for name, value in meta.options.items()})


def limits_of(meta: Meta) -> Limits:
    """The limits of a stored session's replay window."""
    return Limits(meta.window_replies, meta.window_bytes)


def rules_of(meta: Meta) -> ResetRules:
    """The reset rules of a stored session."""
    return ResetRules(meta.reset_every_steps, meta.reset_masked_steps)


def pack_states(group: Group, states: Mapping[str, Array], count: int) -> Rows:
    """The states of N sessions, each [N * batch_size, *shape], as bytes of each session: one state after the other."""
    return _rows([states[spec.name] for spec in group.states], count)


def unpack_states(specs: Sequence[StateSpec], batch_size: int, blob: bytes) -> Arrays:
    """The states of one session, each [batch_size, *shape].

    Raises:
        StoreCorrupt: the bytes are not those of such states.
    """
    states: Arrays = {}
    start = 0
    for spec in specs:
        shape = (batch_size, *spec.shape)
        stop = start + int(np.prod(shape)) * spec.dtype.itemsize
        if stop > len(blob):
            break
        states[spec.name] = np.frombuffer(blob[start:stop], spec.dtype).reshape(shape)
        start = stop
    if len(states) != len(specs) or start != len(blob):
        raise StoreCorrupt(f"{len(blob)} bytes are stored as the states of a session, which its model has not")
    return states


def pack_answers(outputs: Mapping[str, Array], states: Mapping[str, Array], *count: int) -> tuple[bytes, Rows]:
    """What N sessions are answered, or R times N, each as `Answers` has it, as bytes: what they begin with, which says
    what they hold, and what follows in each.

    Args:
        outputs: every output, [*count, ...].
        states: every state, [*count, ...].
        count: N, or R and N.

    Returns:
        What they begin with, and uint8 [*count, bytes].
    """
    arrays = [(kind, name, array) for kind, of in enumerate((outputs, states)) for name, array in of.items()]
    axes = len(count)
    head = _head(tuple([(kind, name, array.dtype.str, array.shape[axes:]) for kind, name, array in arrays]))
    return head, _rows([array for _, _, array in arrays], *count)


def unpack_answers(payloads: Sequence[bytes]) -> tuple[Arrays, Arrays]:
    """Outputs and states of N sessions, each [N, ...]: what `pack_answers` wrote, with the same beginning.

    Raises:
        StoreCorrupt: it wrote something else.
    """
    found: tuple[Arrays, Arrays] = ({}, {})
    try:
        what = answers_begin(payloads[0])
        start = len(what)
        content = np.frombuffer(b"".join([each[start:] for each in payloads]), np.uint8).reshape(len(payloads), -1)
        start = 0
        for kind, name, dtype, shape in json.loads(what[_LENGTH_BYTES:]):
            stop = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
            rows = np.ascontiguousarray(content[:, start:stop])
            found[kind][name] = rows.reshape(-1).view(dtype).reshape(len(payloads), *shape)
            start = stop
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise StoreCorrupt(f"a stored answer of {len(payloads[0])} bytes cannot be read: {error}") from error
    return found


def answers_begin(payload: bytes) -> bytes:
    """What `pack_answers` wrote first: it says what follows."""
    return payload[: _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")]


@lru_cache(maxsize=256)
def _head(arrays: tuple[tuple[int, str, str, tuple[int, ...]], ...]) -> bytes:
    what = json.dumps(arrays).encode()
    return len(what).to_bytes(_LENGTH_BYTES, "little") + what


def _rows(arrays: Sequence[Array], *count: int) -> Rows:
    """Arrays of equal parts as bytes: uint8 [*count, bytes of a part]."""
    parts = [np.ascontiguousarray(array).reshape(*count, -1).view(np.uint8) for array in arrays]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([*parts, np.zeros((*count, 0), np.uint8)], axis=-1)
