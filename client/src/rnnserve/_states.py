"""State in hand: what the sessions of both clients do with their states. Runs on the event loop.

Everything waits until the chunks submitted so far are answered, so that it is of the moment at which it was asked for.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rnnserve import nest
from rnnserve._connection import Connection
from rnnserve._live import Live
from rnnserve.codec import Array, decode_named, encode_named
from rnnserve.errors import SessionExists
from rnnserve.v1 import inference_pb2, session_pb2
from rnnserve.v1.inference_pb2_grpc import InferenceServiceStub
from rnnserve.v1.session_pb2_grpc import SessionServiceStub

if TYPE_CHECKING:
    from rnnserve.v1.session_pb2_grpc import SessionServiceAsyncStub


_RULES = {
    "copy": inference_pb2.FEEDBACK_RULE_COPY,
    "argmax": inference_pb2.FEEDBACK_RULE_ARGMAX,
    "sample": inference_pb2.FEEDBACK_RULE_SAMPLE,
    "sample_logits": inference_pb2.FEEDBACK_RULE_SAMPLE_LOGITS,
}


async def get_states(live: Live, limit: float | None) -> list[nest.Nest]:
    """The states, each [batch_size, ...], nested as Keras nests them."""
    states = await named_states(live, 0, limit)
    return nest.pack(live.signature.model.states, lambda spec: states[spec.name])


async def named_states(live: Live, place: int, limit: float | None) -> dict[str, Array]:
    """The states of one of its sessions by name, each [batch_size, ...]."""
    await live.connection.limited(live.settled(), limit)
    request = session_pb2.GetStateRequest(session_id=live.session_ids[place])
    response = await live.connection.unary(_stub(live.connection).GetState, request, limit)
    return decode_named(response.states, "states")


async def fork(live: Live, count: int, limit: float | None) -> list[Live]:
    """New sessions that go on where this one is."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    ids = await forked(live, 0, count, limit)
    return await asyncio.gather(*[Live.attach(live.connection, each, limit) for each in ids])


async def forked(live: Live, place: int, count: int, limit: float | None) -> list[str]:
    """The ids of new sessions that go on where one of its sessions is."""
    await live.connection.limited(live.settled(), limit)
    # Ids of ours make it safe to ask again when the answer is lost: what exists then, we have made.
    ids = [uuid.uuid4().hex for _ in range(count)]
    request = session_pb2.ForkSessionRequest(session_id=live.session_ids[place], session_ids=ids)
    with suppress(SessionExists):
        await live.connection.unary(_stub(live.connection).ForkSession, request, limit)
    return ids


async def export(live: Live, limit: float | None, place: int = 0) -> bytes:
    """One of its sessions as a blob."""
    await live.connection.limited(live.settled(), limit)
    request = session_pb2.ExportSessionRequest(session_id=live.session_ids[place])
    return (await live.connection.unary(_stub(live.connection).ExportSession, request, limit)).blob


async def save(live: Live, path: str | os.PathLike[str], limit: float | None) -> None:
    """Writes the session to a file, which is there whole or not at all."""
    blob = await export(live, limit)
    await asyncio.to_thread(write, Path(path), blob)


async def restore(
    connection: Connection, source: str | os.PathLike[str] | bytes, session_id: str, limit: float | None
) -> Live:
    """A new session that goes on where a saved or exported one was."""
    blob = source if isinstance(source, bytes) else await asyncio.to_thread(Path(source).read_bytes)
    return await Live.attach(connection, await imported(connection, blob, session_id, limit), limit)


async def imported(connection: Connection, blob: bytes, session_id: str, limit: float | None) -> str:
    """The id of a new session that goes on where an exported one was."""
    request = session_pb2.ImportSessionRequest(blob=blob, session_id=session_id or uuid.uuid4().hex)
    try:
        await connection.unary(_stub(connection).ImportSession, request, limit, retry=not session_id)
    except SessionExists:
        if session_id:  # else it is ours: a first answer was lost
            raise
    return request.session_id


async def delete(connection: Connection, session_id: str, limit: float | None) -> None:
    """Ends a session that nobody has a lane for."""
    await connection.unary(
        _stub(connection).DeleteSession, session_pb2.DeleteSessionRequest(session_id=session_id), limit
    )


async def rewind(live: Live, step: int, limit: float | None, place: int = 0) -> None:
    """Takes one of its sessions back to where a chunk began."""
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    await live.connection.limited(live.settled(), limit)
    request = session_pb2.RewindSessionRequest(session_id=live.session_ids[place], step=step)
    response = await live.connection.unary(_stub(live.connection).RewindSession, request, limit)
    live.moved(place, response.session.step)


class Rollout(NamedTuple):
    """What a model made of itself.

    Attributes:
        outputs: [batch, steps, ...] ([steps, batch, ...] with time_major); a mapping by name for several outputs.
        inputs: alike: the one at each step was made of the output of the step before.
    """

    outputs: Any
    inputs: Any


async def rollout(
    live: Live,
    steps: int,
    x: Any,
    feedback: Mapping[str, str] | None,
    rule: str,
    temperature: float | None,
    seed: int | None,
    limit: float | None,
    place: int = 0,
) -> Rollout:
    """Lets the model go on by itself from where one of its sessions is."""
    number = _RULES.get(rule)
    if number is None:
        raise ValueError(f"rule must be one of {list(_RULES)}, got {rule!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    await live.connection.limited(live.settled(), limit)
    signature = live.signature
    pairs = {"": ""} if feedback is None else feedback
    request = inference_pb2.RolloutRequest(
        session_id=live.session_ids[place],
        steps=steps,
        inputs=[] if x is None else encode_named(signature.call(x)[0]),
        feedback=[
            inference_pb2.Feedback(input=name, output=output, rule=number, temperature=temperature)
            for name, output in pairs.items()
        ],
        seed=seed,
    )
    response = await live.connection.unary(InferenceServiceStub(live.connection.channel()).Rollout, request, limit)
    return Rollout(_bare(decode_named(response.outputs, "outputs")), _bare(decode_named(response.inputs, "inputs")))


def _bare(arrays: dict[str, Array]) -> Any:
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _stub(connection: Connection) -> SessionServiceAsyncStub:
    return SessionServiceStub(connection.channel())


def write(path: Path, blob: bytes) -> None:
    """Writes a file, which is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(blob)
    part.replace(path)
