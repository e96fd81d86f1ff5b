"""A fleet on one machine: replicas on one Redis are killed, added and rolled while sessions stream, and nobody notices.

Through a real Envoy with the configuration of deploy/, and without one, where the client spreads its sessions itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleet.envoy import Envoy, running_envoy
from fleet.traffic import Traffic
from redis_server import running_redis
from rnnserve import aio
from serving import ZOO
from torture.servers import ServerProcess

SESSIONS = 48


class Fleet:
    """Replicas in processes of their own."""

    def __init__(self, folder: Path, store: str) -> None:
        self._folder = folder
        self._settings = {"models": str(ZOO), "store": store, "drain_seconds": 10.0, "log_level": "info"}
        self.replicas: list[ServerProcess] = []

    def add(self) -> ServerProcess:
        replica = ServerProcess(self._settings, self._folder / f"replica{len(self.replicas)}.log")
        replica.start()
        self.replicas.append(replica)
        return replica

    @property
    def addresses(self) -> list[str]:
        return [replica.address for replica in self.replicas if replica.alive]

    def log(self) -> str:
        return "".join(replica.log() for replica in self.replicas)


@contextlib.contextmanager
def running_fleet(folder: Path, count: int) -> Iterator[Fleet]:
    with running_redis() as redis:
        fleet = Fleet(folder, redis.url)
        try:
            for _ in range(count):
                fleet.add()
            yield fleet
        finally:
            for replica in fleet.replicas:
                replica.close()
        assert "Traceback" not in fleet.log(), fleet.log()


async def harm(fleet: Fleet, traffic: Traffic, changed: Callable[[], None]) -> dict[str, float]:
    """Kills a replica, adds one, and rolls all, one after the other. Returns the longest pause of each."""
    pauses = {}

    async def told(what: str) -> None:
        await traffic.go_on(10)
        pauses[what] = traffic.longest
        print(f"{what}: longest pause {traffic.longest:.3f} s")
        traffic.mark()

    await told("start")
    await asyncio.to_thread(fleet.replicas[0].kill)
    await told("kill")
    await asyncio.to_thread(fleet.add)
    await asyncio.to_thread(changed)
    await told("add")
    for replica in [each for each in fleet.replicas if each.alive]:
        await asyncio.to_thread(replica.terminate)
        await asyncio.to_thread(replica.start)
        await asyncio.to_thread(changed)
    await told("roll")
    print(f"{traffic.done} steps of {SESSIONS} sessions, every one the oracle's")
    return pauses


@pytest.mark.timeout(90)
async def test_behind_envoy(tmp_path: Path) -> None:
    """Sessions on several streams through Envoy: every output is the oracle's and none is lost or doubled."""
    with running_fleet(tmp_path, 3) as fleet, running_envoy(tmp_path, fleet.addresses) as proxy:
        async with aio.Client(proxy.address, timeout=30, streams=6) as client:
            traffic = Traffic(client, SESSIONS, pause=0.02, steps=4000)
            async with traffic.flowing():
                pauses = await harm(fleet, traffic, lambda: proxy.set(fleet.addresses))
    assert pauses["kill"] < 2.0
    assert pauses["roll"] < 2.0


@pytest.mark.timeout(90)
async def test_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client spreads its sessions over the replicas that a name stands for: the same holds."""
    with running_fleet(tmp_path, 3) as fleet:
        async with aio.Client([*fleet.addresses], timeout=30) as client:
            traffic = Traffic(client, SESSIONS, pause=0.02, steps=4000)
            async with traffic.flowing():
                pauses = await harm(fleet, traffic, lambda: None)
    assert pauses["kill"] < 2.0
    assert pauses["roll"] < 2.0


__all__ = ["Envoy"]
