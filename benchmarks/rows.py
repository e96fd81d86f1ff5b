"""The rows of the table. To add one, add it to `ROWS`; for a new kind of row, derive a class from `Row`.

A row is opened once and measured again and again: round trips, one after the other, until the time is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import grpc
import numpy as np
import onnxruntime as ort

import rnnserve
from benchmarks import work
from benchmarks.echo import METHOD, SERVICE
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.options_pb2 import LayerOptions
from rnnserve.v1.session_pb2 import SessionConfig
from rnnserve_models.export import export_cell

Trip = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Sample:
    """One measurement of a row."""

    seconds: float
    trips: list[float]  # how long each round trip took


Measure = Callable[[float], Awaitable[Sample]]
"""Makes round trips for so many seconds."""


def one_by_one(trip: Callable[[], object]) -> Measure:
    """Measures a plain function."""

    async def measure(seconds: float) -> Sample:
        trips: list[float] = []
        now = started = perf_counter()
        while now < started + seconds:
            trip()
            then, now = now, perf_counter()
            trips.append(now - then)
        return Sample(now - started, trips)

    return measure


def side_by_side(each: list[Trip]) -> Measure:
    """Measures coroutine functions, each repeated by a task of its own."""

    async def measure(seconds: float) -> Sample:
        trips: list[float] = []
        started = perf_counter()

        async def repeat(trip: Trip) -> None:
            now = started
            while now < started + seconds:
                await trip()
                then, now = now, perf_counter()
                trips.append(now - then)

        await asyncio.gather(*map(repeat, each))
        return Sample(perf_counter() - started, trips)

    return measure


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: what it shows.
        streams: round trips under way at once.
        lanes: sessions of one round trip.
        steps: time steps of each of them.
    """

    name: str
    streams: int = 1
    lanes: int = 1
    steps: int = 1

    part: ClassVar[str]  # of the table
    server: ClassVar[str] = ""  # the one it talks to: "echo", "rnnserve" or none

    @property
    def work(self) -> tuple[int, int]:
        """What the engine does for it: sessions in all, and time steps of each."""
        return self.streams * self.lanes, self.steps

    @property
    def wire(self) -> tuple[int, int, int]:
        """What gRPC does for it: streams, lanes of a message, and time steps of each."""
        return self.streams, self.lanes, self.steps

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        """Readies all that is not to be measured, until the stack is closed."""
        raise NotImplementedError


class EngineRow(Row):
    """The model's graph, run in a bare loop."""

    part = "engine"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        graph, spec = export_cell(work.cell(), work.FEATURES)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        run = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run
        fetches = ["output", *(state.output for state in spec.states)]
        feeds = {"input": work.numbers(self.steps, self.lanes, work.FEATURES)}
        feeds["lengths"] = np.full(self.lanes, self.steps, np.int32)
        feeds |= {state.input: np.zeros((1, self.lanes, work.UNITS), np.float32) for state in spec.states}

        def trip() -> None:
            _, *states = run(fetches, feeds)
            feeds.update(zip((state.input for state in spec.states), states, strict=True))

        return one_by_one(trip)


class StreamRow(Row):
    """Frames on streams of one channel, without the SDK: each is sent when the one before it was answered."""

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        return side_by_side([await self._stream(channel, stack) for _ in range(self.streams)])

    async def _stream(self, channel: grpc.aio.Channel, stack: AsyncExitStack) -> Trip:
        call: Any = channel.stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=lambda sent: sent if isinstance(sent, bytes) else sent.SerializeToString(),
            response_deserializer=pb.StreamResponse.FromString,
        )()
        stack.callback(call.cancel)
        await self._greet(call)
        x = work.numbers(self.lanes, 1, self.steps, work.FEATURES)
        frame = pb.StepFrame(lanes=range(self.lanes), inputs=encode_named({"input": x}))
        request = pb.StreamRequest(frames=[frame])
        first_steps = request.frames[0].first_steps
        step = 0

        async def trip() -> None:
            nonlocal step
            first_steps[:] = [step] * self.lanes
            await call.write(request)
            await self._answered(call, lambda response: sum(len(result.lanes) for result in response.frames))
            step += self.steps

        return trip

    async def _answered(self, call: Any, lanes: Callable[[pb.StreamResponse], int]) -> None:
        """Reads until every lane was answered."""
        left = self.lanes
        while left:
            response = await call.read()
            if response is grpc.aio.EOF or response.errors:
                raise RuntimeError(f"{self.name}: {response}")
            left -= lanes(response)

    async def _greet(self, call: Any) -> None:
        raise NotImplementedError


class EchoRow(StreamRow):
    """The bytes of rnnserve's requests and answers, and a server that does nothing."""

    part = "gRPC"
    server = "echo"

    async def _greet(self, call: Any) -> None:
        y = work.numbers(self.lanes, 1, self.steps, work.UNITS)
        frame = pb.ResultFrame(lanes=range(self.lanes), timesteps=self.steps, outputs=encode_named({"output": y}))
        frame.first_steps.extend([1000] * self.lanes)
        await call.write(pb.StreamResponse(frames=[frame]).SerializeToString())


class ServerRow(StreamRow):
    """rnnserve."""

    part = "rnnserve"
    server = "rnnserve"

    async def _greet(self, call: Any) -> None:
        config = SessionConfig(model=work.MODEL, options=LayerOptions(return_sequences=True))
        await call.write(pb.StreamRequest(opens=[pb.LaneOpen(lane=n, create=config) for n in range(self.lanes)]))
        await self._answered(call, lambda response: len(response.opened))


class SessionsRow(Row):
    """The SDK: tasks of one asyncio client, each with its session."""

    part = "SDK"
    server = "rnnserve"

    @property
    def wire(self) -> tuple[int, int, int]:
        """The client puts what its tasks ask for into one frame."""
        return 1, self.streams, self.steps

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        client = await stack.enter_async_context(rnnserve.aio.Client(address))
        x = work.numbers(work.FEATURES)

        sessions = [await stack.enter_async_context(client.session(work.MODEL)) for _ in range(self.streams)]
        return side_by_side([partial(session.step, x) for session in sessions])


class GroupRow(Row):
    """The SDK: a group of sessions that step together."""

    part = "SDK"
    server = "rnnserve"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        client = await stack.enter_async_context(rnnserve.aio.Client(address))
        opened = client.session_group(work.MODEL, self.lanes, return_sequences=True)
        group = await stack.enter_async_context(opened)
        x = work.numbers(self.lanes, 1, self.steps, work.FEATURES)
        return side_by_side([lambda: group(x)])


class BlockingRow(Row):
    """The SDK: a session of the client for threads."""

    part = "SDK"
    server = "rnnserve"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        session = stack.enter_context(stack.enter_context(rnnserve.Client(address)).session(work.MODEL))
        return one_by_one(partial(session.step, work.numbers(work.FEATURES)))


ROWS: list[Row] = [
    EngineRow("batch of 1, a step a run"),
    EngineRow("batch of 64, a step a run", lanes=64),
    EngineRow("batch of 64, 20 steps a run", lanes=64, steps=20),
    EchoRow("1 stream, messages as of one step"),
    EchoRow("64 streams, messages as of one step", streams=64),
    EchoRow("1 stream, messages as of 64 lanes", lanes=64),
    EchoRow("1 stream, messages as of 64 lanes x 20 steps", lanes=64, steps=20),
    ServerRow("1 session, a step a message"),
    ServerRow("64 streams of 1 session, a step a message", streams=64),
    ServerRow("1 stream, 64 lanes a frame", lanes=64),
    ServerRow("1 stream, 64 lanes a frame, chunks of 20 steps", lanes=64, steps=20),
    BlockingRow("Client: 1 session"),
    SessionsRow("aio.Client: 1 session"),
    SessionsRow("aio.Client: 64 tasks, a session each", streams=64),
    GroupRow("aio.Client: a group of 64 sessions", lanes=64),
    GroupRow("aio.Client: a group of 64 sessions, chunks of 20 steps", lanes=64, steps=20),
]
