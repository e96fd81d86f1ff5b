"""What visitors do to a server. Each is a coroutine that comes, does one thing, and goes; none leaves anything open."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import grpc.aio
import numpy as np
from google.protobuf.duration_pb2 import Duration

import rnnserve
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import inference_pb2_grpc
from rnnserve.v1.session_pb2 import SessionConfig

Visit = Callable[[str, random.Random], Awaitable[int]]
"""Called with the server's address and dice; tells how many chunks it sent."""

BRIEF = 2  # seconds that sessions live on of which nobody asks any more
FEATURES = {"lstm-4": 5, "lstm-32-64": 5, "sunspots-lstm": 1}


def _chunk(model: str, steps: int, dice: random.Random) -> np.ndarray:
    return np.full((1, steps, FEATURES[model]), dice.random(), np.float32)


async def streams(address: str, dice: random.Random) -> int:
    """A few sessions, chunks of all lengths, ended in good order."""
    model, count, sent = dice.choice(list(FEATURES)), dice.randint(1, 20), 0
    async with rnnserve.aio.Client(address) as client:
        sessions = [await client.session(model, return_sequences=True) for _ in range(count)]
        for _ in range(dice.randint(1, 20)):
            steps = dice.choice([1, 1, 1, 7, 40])
            await asyncio.gather(*(session(_chunk(model, steps, dice)) for session in sessions))
            sent += count
        for session in sessions:
            await session.close()
    return sent


async def groups(address: str, dice: random.Random) -> int:
    """A group that steps together."""
    lanes = dice.randint(1, 128)
    async with rnnserve.aio.Client(address) as client, client.session_group("lstm-4", lanes) as group:
        for _ in range(10):
            await group.step(np.zeros((lanes, 5), np.float32))
    return 10 * lanes


async def abandons(address: str, dice: random.Random) -> int:
    """Sessions that nobody ends: they expire."""
    async with rnnserve.aio.Client(address) as client:
        for _ in range(dice.randint(1, 30)):
            session = await client.session("lstm-4", idle_lifetime=BRIEF)
            with contextlib.suppress(rnnserve.SessionExpired):  # already, on a machine that is very busy
                await session.step(np.zeros(5, np.float32))
            await session.detach()
    return 1


async def takes_up(address: str, dice: random.Random) -> int:
    """A session, copied, rewound, saved and taken up again by another client."""
    async with rnnserve.aio.Client(address) as client:
        session = await client.session("sunspots-lstm")
        for _ in range(5):
            await session.step(np.full(1, 50.0, np.float32))
        copies = await session.fork(3)
        blob = await session.export()
        await session.rollout(20)
        with contextlib.suppress(rnnserve.StepMismatch):  # it had come to rest, and what is stored has no way back
            await session.rewind(session.next_step - 1)
        session_id = session.session_id
        await session.detach()
        for each in copies:
            await each.close()
    async with rnnserve.aio.Client(address) as client:
        session = await client.attach(session_id)
        await session.step(np.full(1, 50.0, np.float32))
        await session.close()
        restored = await client.restore(blob)
        await restored.close()
    return 6


async def breaks_off(address: str, dice: random.Random) -> int:
    """A stream that is cancelled with answers under way."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Stream()
        lanes = range(dice.randint(1, 64))
        config = SessionConfig(model="lstm-4", idle_lifetime=Duration(seconds=BRIEF))
        await call.write(pb.StreamRequest(opens=[pb.LaneOpen(lane=lane, create=config) for lane in lanes]))
        inputs = rnnserve.codec.encode_named({"input": np.zeros((len(lanes), 1, 3, 5), np.float32)})
        for _ in range(8):
            await call.write(pb.StreamRequest(frames=[pb.StepFrame(lanes=lanes, inputs=inputs)]))
        if dice.random() < 0.5:
            await call.read()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call.wait_for_connection()
    return 8 * len(lanes)


async def errs(address: str, dice: random.Random) -> int:
    """Requests that are refused: each for another reason."""
    async with rnnserve.aio.Client(address, retry_for=0) as client:
        with contextlib.suppress(rnnserve.RnnserveError):
            await client.session("no-such-model")
        with contextlib.suppress(rnnserve.RnnserveError):
            await client.attach(f"{dice.getrandbits(128):032x}")
        session = await client.session("lstm-4")
        for wrong in (np.zeros((1, 1, 6), np.float32), np.zeros((1, 1, 5), np.int64), np.zeros((2, 1, 5), np.float32)):
            with contextlib.suppress(rnnserve.RnnserveError, ValueError, TypeError):
                await session(wrong)
        await session.close()
    async with grpc.aio.insecure_channel(address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Stream()
        await call.write(pb.StreamRequest(frames=[pb.StepFrame(lanes=[7, 8])]))
        await call.read()
        call.cancel()
    return 5


async def knocks(address: str, dice: random.Random) -> int:
    """Connections that say nothing, or nonsense, and hang up."""
    host, _, port = address.rpartition(":")
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", dice.randbytes(300)):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return 0


VISITS: tuple[Visit, ...] = (streams, groups, abandons, takes_up, breaks_off, errs, knocks)
