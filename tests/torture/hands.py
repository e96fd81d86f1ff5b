"""What is done to sessions beside their steps, while servers are ended: they are looked at, forked, and taken back."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc

from rnnserve.codec import decode_named, encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import inference_pb2_grpc, session_pb2, session_pb2_grpc
from torture.history import Fault
from torture.plan import digest
from torture.track import AGAIN, WINDOW, Track, Trial
from torture.wire import channel, frame, reason

_SECONDS = 10.0
_MARGIN = 3 * WINDOW
"""Chunks that are still to be sent of a session that is taken back: more than it can be taken back, so that it comes to
its end all the same.
"""
_FAR = 8  # chunks that a session is taken back, at most
_NUMBERS = itertools.count()


async def take_in_hand(trial: Trial, tracks: list[Track]) -> None:
    """Does one after the other to sessions that somebody steps, until all is over."""
    while not trial.over:
        await asyncio.sleep(trial.chance.uniform(0, 0.02))
        at_hand = [track for track in tracks if track.created and track.total - track.high > _MARGIN]
        if not at_hand:
            continue
        track = trial.chance.choice(at_hand)
        doings = [_look, _fork, *[_take_back] * 4] if track.taken_back else [_look, _fork]
        async with channel(trial.chance.choice(trial.addresses())) as connection:
            try:
                await trial.chance.choice(doings)(trial, track, connection)
            except grpc.aio.AioRpcError as error:
                why = reason(error)
                trial.counts[f"in hand: {why.lower()}"] += 1
                if not why.startswith("status") and why not in AGAIN | {"STEP_BEHIND"}:
                    track.fault("refused", f"in hand: {why}")


async def _look(trial: Trial, track: Track, connection: grpc.aio.Channel) -> None:
    stub, known = session_pb2_grpc.SessionServiceStub(connection), track.frontier
    found = await stub.GetState(session_pb2.GetStateRequest(session_id=track.plan.name), timeout=_SECONDS)
    if (number := track.stands(found.session.step, known)) is not None:
        trial.counts["looks"] += 1
        track.seen.append((number, digest({}, decode_named(found.states, "states"))))


async def _fork(trial: Trial, track: Track, connection: grpc.aio.Channel) -> None:
    """The fork takes a chunk as the session would, is taken back, and taken away."""
    stub, known = session_pb2_grpc.SessionServiceStub(connection), track.frontier
    name = f"{track.plan.name}-fork-{next(_NUMBERS)}"
    asked = session_pb2.ForkSessionRequest(session_id=track.plan.name, session_ids=[name])
    (fork,) = (await stub.ForkSession(asked, timeout=_SECONDS)).sessions
    number = track.stands(fork.step, known)
    if number is None:
        return
    trial.counts["forks"] += 1
    for _ in range(2):
        track.forked.append((number, await _predict(connection, track, number, name)))
        await stub.RewindSession(session_pb2.RewindSessionRequest(session_id=name, step=fork.step), timeout=_SECONDS)
    await stub.DeleteSession(session_pb2.DeleteSessionRequest(session_id=name), timeout=_SECONDS)


async def _predict(connection: grpc.aio.Channel, track: Track, number: int, name: str) -> bytes:
    x, mask = track.plan.chunk(number)
    inputs, start = encode_named({"input": x}), track.plan.starts[number]
    request = pb.PredictRequest(session_id=name, inputs=inputs, first_step=start)
    if mask is not None:
        request.mask.CopyFrom(frame([0], None, x, mask).mask)
    stub: Any = inference_pb2_grpc.InferenceServiceStub(connection)
    response = await stub.Predict(request, timeout=_SECONDS)
    return digest(decode_named(response.outputs, "outputs"), decode_named(response.states, "states"))


async def _take_back(trial: Trial, track: Track, connection: grpc.aio.Channel) -> None:
    """The session forgets its last chunks: whoever steps it is told that it is ahead, and steps it again."""
    stub = session_pb2_grpc.SessionServiceStub(connection)
    number = max(0, track.frontier - trial.chance.randint(1, _FAR))
    request = session_pb2.RewindSessionRequest(session_id=track.plan.name, step=track.plan.starts[number])
    await stub.RewindSession(request, timeout=_SECONDS)
    trial.counts["taken back"] += 1


def check_seen(tracks: list[Track]) -> list[Fault]:
    """What is wrong with the states that were seen, and with what forks answered."""
    faults = []
    for track in tracks:
        plan, numbers = track.plan, [number for number, _ in [*track.seen, *track.forked]]
        before = plan.states_between(max(numbers, default=0))
        faults += [
            Fault("wrong states", plan.name, f"were seen behind chunk {number}")
            for number, what in track.seen
            if what != digest({}, before[number])
        ]
        faults += [
            Fault("wrong answer", plan.name, f"of a fork, to chunk {number}")
            for number, what in track.forked
            if what != plan.answer(number, before[number])[0]
        ]
    return faults
