"""The kinds of rows that a table has. To add a row, add it to `table.ROWS`; for a new kind, derive a class from `Row`.

A row is opened once and measured again and again: round trips, one after the other, until the time is up.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Any, ClassVar

import grpc

from benchmarks import work
from benchmarks.echo import METHOD, SERVICE
from benchmarks.engine import Engine
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.options_pb2 import LayerOptions
from rnnserve.v1.session_pb2 import SessionConfig


@dataclass(frozen=True)
class Sample:
    """One measurement of a row."""

    seconds: float
    trips: list[float]  # seconds that each round trip took


Measure = Callable[[float], Awaitable[Sample]]
"""Makes round trips for so many seconds."""


@dataclass(frozen=True)
class Row(ABC):
    """A line of the table.

    Attributes:
        streams: streams, tasks or threads, each with round trips of its own.
        lanes: sessions of one round trip.
        steps: time steps of each of them.
        depth: round trips that a stream has under way at once.
    """

    streams: int = 1
    lanes: int = 1
    steps: int = 1
    depth: int = 1

    part: ClassVar[str]  # of the table

    @property
    def server(self) -> str:
        """The one it talks to: "echo", "bare", "rnnserve", one of `stores.SERVERS`, "triton" or none."""
        return ""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it shows."""

    @property
    def sessions(self) -> int:
        """How many take part in all."""
        return self.streams * self.lanes

    @property
    def engine(self) -> Row:
        """The row of the engine doing the same work."""
        return EngineRow(lanes=self.sessions, steps=self.steps)

    @property
    def echo(self) -> Row:
        """The row of gRPC carrying the same bytes."""
        return EchoRow(self.streams, self.lanes, self.steps, self.depth)

    @property
    def bare(self) -> Row:
        """The row of the least server doing the same work."""
        return BareRow(self.streams, self.lanes, self.steps, self.depth)

    @abstractmethod
    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        """Readies all that is not to be measured, until the stack is closed."""


class EngineRow(Row):
    """The model's graph, run in a bare loop."""

    part = "engine"

    @property
    def name(self) -> str:
        return f"batch of {self.lanes}, {count(self.steps, 'step')} a run"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        engine = Engine(self.lanes, self.steps)
        x = work.numbers(self.steps, self.lanes, work.FEATURES)

        async def measure(seconds: float) -> Sample:
            trips: list[float] = []
            now = started = perf_counter()
            while now < started + seconds:
                engine.run(x)
                then, now = now, perf_counter()
                trips.append(now - then)
            return Sample(now - started, trips)

        return measure


class StreamRow(Row):
    """Frames on streams of one channel, without the SDK. For each answer that comes the next frame leaves."""

    @property
    def name(self) -> str:
        frames = f", {self.depth} under way" if self.depth > 1 else ""
        return f"{count(self.streams, 'stream')} of {count(self.lanes, 'lane')}, {count(self.steps, 'step')}{frames}"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        unlimited = [("grpc.max_receive_message_length", -1)]  # the answer to a chunk of 10,000 steps is 5 MB
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, unlimited))
        streams = [await self._stream(channel, stack) for _ in range(self.streams)]

        async def measure(seconds: float) -> Sample:
            started = perf_counter()
            each = await asyncio.gather(*(stream(started + seconds) for stream in streams))
            return Sample(perf_counter() - started, list(chain.from_iterable(each)))

        return measure

    async def _stream(self, channel: grpc.aio.Channel, stack: AsyncExitStack) -> Callable[[float], Any]:
        """A stream: called with a time, it makes round trips until then, and tells how long each took."""
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

        async def round_trips(until: float) -> list[float]:
            nonlocal step
            trips: list[float] = []
            sent: deque[float] = deque()
            answered = 0  # lanes of the oldest frames; one message may answer those of several
            while perf_counter() < until or sent:
                while len(sent) < self.depth and perf_counter() < until:
                    first_steps[:] = [step] * self.lanes
                    step += self.steps
                    sent.append(perf_counter())
                    await call.write(request)
                while answered < self.lanes:
                    response = await self._read(call)
                    answered += sum(len(result.lanes) for result in response.frames)
                now = perf_counter()
                while answered >= self.lanes:
                    answered -= self.lanes
                    trips.append(now - sent.popleft())
            return trips

        return round_trips

    async def _read(self, call: Any) -> pb.StreamResponse:
        response = await call.read()
        if response is grpc.aio.EOF or response.errors:
            raise RuntimeError(f"{self.name}: {response}")
        read: pb.StreamResponse = response
        return read

    @abstractmethod
    async def _greet(self, call: Any) -> None:
        """Says what comes before the first frame, and hears the answer."""


class EchoRow(StreamRow):
    """The bytes of rnnserve's requests and answers, and a server that does nothing."""

    part = "gRPC"
    server = "echo"

    async def _greet(self, call: Any) -> None:
        y = work.numbers(self.lanes, 1, self.steps, work.UNITS)
        frame = pb.ResultFrame(lanes=range(self.lanes), timesteps=self.steps, outputs=encode_named({"output": y}))
        frame.first_steps.extend([1000] * self.lanes)
        await call.write(pb.StreamResponse(frames=[frame]).SerializeToString())


class OpenedRow(StreamRow):
    """Of a server on which lanes are opened."""

    async def _greet(self, call: Any) -> None:
        config = SessionConfig(model=work.MODEL, options=LayerOptions(return_sequences=True))
        await call.write(pb.StreamRequest(opens=[pb.LaneOpen(lane=n, create=config) for n in range(self.lanes)]))
        opened = 0
        while opened < self.lanes:
            opened += len((await self._read(call)).opened)


class BareRow(OpenedRow):
    """The least that a server can do."""

    part = "bare server"
    server = "bare"


class ServerRow(OpenedRow):
    """rnnserve."""

    part = "rnnserve"
    server = "rnnserve"


def count(number: int, thing: str) -> str:
    """1 step, 20 steps."""
    return f"{number} {thing}{'s' * (number != 1)}"
