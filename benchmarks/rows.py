"""The kinds of rows that a table has. To add a row, add it to `table.ROWS`; for a new kind, derive a class from `Row`.

A row is opened once and measured again and again: round trips, one after the other, until the time is up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from time import perf_counter
from typing import ClassVar

from benchmarks import work
from benchmarks.client import Channel
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
    beside: Sample | None = None  # of the row's other streams, if it has some of another kind


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
        return self._open(address, stack, self)

    @staticmethod
    def _open(address: str, stack: AsyncExitStack, *kinds: StreamRow) -> Measure:
        """Opens the streams of one row, or of two in turn, on one channel."""
        channel = Channel(address)
        stack.callback(channel.close)
        turns = zip_longest(*[[row] * row.streams for row in kinds])
        streams = [_RoundTrips(row, channel) for row in chain.from_iterable(turns) if row is not None]
        channel.pump(lambda: any(stream.greeting for stream in streams))

        async def measure(seconds: float) -> Sample:
            started = perf_counter()
            for stream in streams:
                stream.begin(started + seconds)
            channel.pump(lambda: any(stream.sent for stream in streams))
            took, sample = perf_counter() - started, None
            for row in reversed(kinds):
                trips = chain.from_iterable(stream.trips for stream in streams if stream.row is row)
                sample = Sample(took, list(trips), sample)
            assert sample is not None
            return sample

        return measure

    @abstractmethod
    def greeting(self) -> tuple[pb.StreamRequest | pb.StreamResponse, int]:
        """What comes before the first frame, and how many lanes the answers to it open."""


class _RoundTrips:
    """The round trips of a stream.

    Attributes:
        row: whose they are.
        greeting: how many lanes are still to be opened.
        sent: when the frames left that were not answered yet.
        trips: seconds that each round trip took since `begin`.
    """

    def __init__(self, row: StreamRow, channel: Channel) -> None:
        self.sent: deque[float] = deque()
        self.trips: list[float] = []
        self.row = row
        self._until = 0.0
        self._step = 0
        self._answered = 0  # lanes of the oldest frames; one message may answer those of several
        x = work.numbers(row.lanes, 1, row.steps, work.FEATURES)
        frame = pb.StepFrame(lanes=range(row.lanes), inputs=encode_named({"input": x}))
        self._request = pb.StreamRequest(frames=[frame])
        self._first_steps = self._request.frames[0].first_steps
        self._stream = channel.stream(f"/{SERVICE}/{METHOD}", self._heard)
        greeting, self.greeting = row.greeting()
        self._stream.send(greeting.SerializeToString())

    def begin(self, until: float) -> None:
        """Sends the first frames of those that are sent until a time of `perf_counter`."""
        self._until = until
        self.trips = []
        for _ in range(self.row.depth):
            self._send()

    def _send(self) -> None:
        self._first_steps[:] = [self._step] * self.row.lanes
        self._step += self.row.steps
        self.sent.append(perf_counter())
        self._stream.send(self._request.SerializeToString())

    def _heard(self, message: bytes) -> None:
        response = pb.StreamResponse.FromString(message)
        if response.errors:
            raise RuntimeError(f"{self.row.name}: {response}")
        self.greeting -= len(response.opened)
        self._answered += sum(len(result.lanes) for result in response.frames)
        now = perf_counter()
        while self._answered >= self.row.lanes:
            self._answered -= self.row.lanes
            self.trips.append(now - self.sent.popleft())
            if now < self._until:
                self._send()


class EchoRow(StreamRow):
    """The bytes of rnnserve's requests and answers, and a server that does nothing."""

    part = "gRPC"
    server = "echo"

    def greeting(self) -> tuple[pb.StreamRequest | pb.StreamResponse, int]:
        y = work.numbers(self.lanes, 1, self.steps, work.UNITS)
        frame = pb.ResultFrame(lanes=range(self.lanes), timesteps=self.steps, outputs=encode_named({"output": y}))
        frame.first_steps.extend([1000] * self.lanes)
        return pb.StreamResponse(frames=[frame]), 0


class OpenedRow(StreamRow):
    """Of a server on which lanes are opened."""

    def greeting(self) -> tuple[pb.StreamRequest | pb.StreamResponse, int]:
        config = SessionConfig(model=work.MODEL, options=LayerOptions(return_sequences=True))
        opens = [pb.LaneOpen(lane=lane, create=config) for lane in range(self.lanes)]
        return pb.StreamRequest(opens=opens), self.lanes


class BareRow(OpenedRow):
    """The least that a server can do."""

    part = "bare server"
    server = "bare"


class ServerRow(OpenedRow):
    """rnnserve."""

    part = "rnnserve"
    server = "rnnserve"


@dataclass(frozen=True)
class MixedRow(ServerRow):
    """rnnserve, with streams of two kinds.

    Attributes:
        others: the streams of the other kind.
    """

    others: ServerRow = field(default_factory=ServerRow)

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        return self._open(address, stack, self, self.others)


def count(number: int, thing: str) -> str:
    """1 step, 20 steps."""
    return f"{number} {thing}{'s' * (number != 1)}"
