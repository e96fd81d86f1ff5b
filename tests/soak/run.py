"""A soak: visitors come and go as fast as the server bears it, and the sessions that they leave behind live for
seconds, not hours.

As many lifetimes pass in minutes as in days of use: what is lost with each shows.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import grpc.aio

from rnnserve.v1 import session_pb2, session_pb2_grpc
from serving import ZOO
from soak.past import fill, live_through
from soak.visits import VISITS
from soak.watch import Holdings, growth
from torture.servers import ServerProcess, server_process

_GONE = 60.0  # seconds after which the last session is, and gRPC has let go of the last connection that was broken off
FILES = 16  # descriptors more than before that may be open then: of the store's and the engine's threads


@dataclass
class Report:
    """What came of it.

    Attributes:
        visits: how many there were, by name.
        chunks: that were sent.
        before: the server, before anybody came, with a day behind it.
        during: every second.
        after: when all had gone, the last session had expired and the last connection was let go of.
        sessions: that were still there then.
    """

    seconds: float
    visits: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    before: Holdings | None = None
    during: list[Holdings] = field(default_factory=list)
    after: Holdings | None = None
    sessions: int = -1

    def memory_growth(self) -> float:
        """Bytes by which the last third of the time is above the second."""
        return growth([each.memory for each in self.during])

    def __str__(self) -> str:
        assert self.before is not None
        assert self.after is not None
        memory = [each.memory / 1e6 for each in self.during]
        third = len(memory) // 3
        return (
            f"{self.seconds:.0f} s, {sum(self.visits.values())} visits ({dict(self.visits)}), {self.chunks} chunks\n"
            f"memory: {self.before.memory / 1e6:.1f} MB before, {max(memory):.1f} at most, "
            f"{median(memory[third:-third]):.1f} in the second third, {median(memory[-third:]):.1f} in the last, "
            f"{self.after.memory / 1e6:.1f} after\n"
            f"memory, tenth by tenth: {', '.join(_tenths(memory))}\n"
            f"descriptors: {self.before.files} before, {_thirds([each.files for each in self.during])} at most in each "
            f"third, {self.after.files} after; threads: {self.before.threads} before, {self.after.threads} after\n"
            f"sessions left: {self.sessions}"
        )


def _thirds(figures: list[int]) -> str:
    """The most of each third."""
    third = max(len(figures) // 3, 1)
    return ", ".join(str(max(figures[start : start + third])) for start in (0, third, len(figures) - third))


def _tenths(figures: list[float]) -> list[str]:
    """The median of each tenth."""
    size = max(len(figures) // 10, 1)
    return [f"{median(figures[start : start + size]):.1f}" for start in range(0, len(figures) - size + 1, size)]


async def soak(
    seconds: float, folder: Path, *, store: bool = True, visitors: int = 6, pause: float = 0.0, seed: int = 0
) -> Report:
    """Runs a soak against a server of its own.

    Args:
        seconds: how long visitors come.
        folder: of the store and the log.
        store: whether there is a store.
        visitors: how many are there at a time.
        pause: seconds that each stays away between two visits: on a machine that has other things to do.
        seed: of chance.
    """
    settings = {"models": ZOO, "idle_lifetime": 30.0, "log_level": "error"}
    if store:
        await fill(folder / "sessions.db")
        settings |= {"store": f"sqlite:///{folder / 'sessions.db'}", "rest_seconds": 0.5, "durability": "interval"}
    with server_process(folder / "log", **settings) as server:
        report = Report(seconds)
        await live_through(server.address)
        await _sessions(server)
        report.before = Holdings.of(server.pid)
        until = time.monotonic() + seconds
        watcher = asyncio.create_task(_watch(server, report))
        try:
            async with asyncio.TaskGroup() as group:  # where one fails the others go, while there is a server to leave
                for number in range(visitors):
                    group.create_task(_visitor(server, report, until, pause, random.Random(seed + number)))
        finally:
            watcher.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_GONE):
                while report.sessions or Holdings.of(server.pid).files > report.before.files + FILES:
                    await asyncio.sleep(0.5)
                    report.sessions = await _sessions(server)
        report.after = Holdings.of(server.pid)
        assert server.alive, server.log()
    return report


async def _visitor(server: ServerProcess, report: Report, until: float, pause: float, dice: random.Random) -> None:
    while time.monotonic() < until:
        visit = dice.choice(VISITS)
        report.chunks += await visit(server.address, dice)
        report.visits[visit.__name__] += 1
        await asyncio.sleep(pause)


async def _watch(server: ServerProcess, report: Report) -> None:
    while True:
        report.during.append(Holdings.of(server.pid))
        await asyncio.sleep(0.5)


async def _sessions(server: ServerProcess) -> int:
    """How many sessions there are."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        listed = await session_pb2_grpc.SessionServiceStub(channel).ListSessions(session_pb2.ListSessionsRequest())
        return len(listed.sessions)
