"""The rows of the SDK: what a user writes.

The client puts what its tasks or threads ask for into one frame, so the echo beside these rows is of such a frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from itertools import chain
from time import perf_counter

import rnnserve
from benchmarks import work
from benchmarks.rows import EchoRow, Measure, Row, Sample, count

_PAUSE_SECONDS = 0.05


class SdkRow(Row):
    part = "SDK"
    server = "rnnserve"

    @property
    def echo(self) -> Row:
        return EchoRow(lanes=self.sessions, steps=self.steps)


class TasksRow(SdkRow):
    """Tasks of one asyncio client, each with its session."""

    @property
    def name(self) -> str:
        return f"aio.Client: {count(self.streams, 'task')}, a session each"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        client = await stack.enter_async_context(rnnserve.aio.Client(address))
        x = work.numbers(work.FEATURES)
        sessions = [await stack.enter_async_context(client.session(work.MODEL)) for _ in range(self.streams)]
        return _side_by_side([lambda session=session: session.step(x) for session in sessions])  # type: ignore[misc]


class GroupRow(SdkRow):
    """A group of sessions that step together."""

    @property
    def name(self) -> str:
        return f"aio.Client: a group of {self.lanes}, {count(self.steps, 'step')}"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        client = await stack.enter_async_context(rnnserve.aio.Client(address))
        opened = client.session_group(work.MODEL, self.lanes, return_sequences=True)
        group = await stack.enter_async_context(opened)
        x = work.numbers(self.lanes, 1, self.steps, work.FEATURES)
        return _side_by_side([lambda: group(x)])


class VisitsRow(SdkRow):
    """One who opens a session, steps it once and closes it, again and again, with pauses in between."""

    name = "aio.Client: a session that comes and goes"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        client = await stack.enter_async_context(rnnserve.aio.Client(address))
        x = work.numbers(work.FEATURES)

        async def visit() -> None:
            async with client.session(work.MODEL) as session:
                await session.step(x)
            await asyncio.sleep(_PAUSE_SECONDS)

        return _side_by_side([visit])


class ThreadsRow(SdkRow):
    """Threads of one client, each with its session."""

    @property
    def name(self) -> str:
        return f"Client: {count(self.streams, 'thread')}, a session each"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        client = stack.enter_context(rnnserve.Client(address))
        sessions = [stack.enter_context(client.session(work.MODEL)) for _ in range(self.streams)]
        threads = stack.enter_context(ThreadPoolExecutor(self.streams))
        x = work.numbers(work.FEATURES)

        async def measure(seconds: float) -> Sample:
            started = perf_counter()

            def repeat(session: rnnserve.Session) -> list[float]:
                trips: list[float] = []
                now = started
                while now < started + seconds:
                    session.step(x)
                    then, now = now, perf_counter()
                    trips.append(now - then)
                return trips

            each = list(threads.map(repeat, sessions))  # blocks this event loop, which has nothing else to do
            return Sample(perf_counter() - started, list(chain.from_iterable(each)))

        return measure


def _side_by_side(each: list[Callable[[], Awaitable[object]]]) -> Measure:
    """Measures coroutine functions, each repeated by a task of its own."""

    async def measure(seconds: float) -> Sample:
        trips: list[float] = []
        started = perf_counter()

        async def repeat(trip: Callable[[], Awaitable[object]]) -> None:
            now = started
            while now < started + seconds:
                await trip()
                then, now = now, perf_counter()
                trips.append(now - then)

        await asyncio.gather(*map(repeat, each))
        return Sample(perf_counter() - started, trips)

    return measure
