"""A fleet on one machine: replicas on one Redis are killed, added and rolled while sessions stream, and nobody notices.

Through a real Envoy and a real HAProxy with the configurations of deploy/, and without a proxy, where the client
spreads its sessions itself. tests/docker/fleet.sh does the same in a Docker Engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleet.envoy import running_envoy
from fleet.haproxy import running_haproxy
from fleet.traffic import Traffic
from redis_server import running_redis
from rnnserve import aio
from serving import ZOO
from torture.servers import ServerProcess

SESSIONS = 36
NEW_STREAMS = 96
STREAMS = 24  # enough that each replica has some
GOAL = 2.0  # seconds that a pause may take, beside five times what an answer takes when nothing happens


class Fleet:
    """Replicas in processes of their own."""

    def __init__(self, folder: Path, store: str) -> None:
        self._folder = folder
        self._settings = {"models": str(ZOO), "store": store, "drain_seconds": 10.0, "log_level": "info"}
        self.replicas: list[ServerProcess] = []

    def add(self, count: int = 1) -> None:
        for _ in range(count):
            self.replicas.append(ServerProcess(self._settings, self._folder / f"replica{len(self.replicas)}.log"))
            self.replicas[-1].start(wait=False)
        for replica in self.replicas[-count:]:
            replica.wait_until_ready()

    @property
    def alive(self) -> list[ServerProcess]:
        return [replica for replica in self.replicas if replica.alive]

    @property
    def addresses(self) -> list[str]:
        return [replica.address for replica in self.alive]

    def log(self) -> str:
        return "".join(replica.log() for replica in self.replicas)


@contextlib.contextmanager
def running_fleet(folder: Path, count: int) -> Iterator[Fleet]:
    with running_redis() as redis:
        fleet = Fleet(folder, redis.url)
        try:
            fleet.add(count)
            yield fleet
        finally:
            for replica in fleet.replicas:
                replica.close()
        assert "Traceback" not in fleet.log(), fleet.log()


async def harm(fleet: Fleet, client: aio.Client, changed: Callable[[], None] | None) -> None:
    """Kills a replica, adds one if `changed` has it known, and rolls all, while sessions stream."""
    traffic = Traffic(client, SESSIONS, pause=0.04, steps=3000)

    most = float("inf")

    async def told(what: str) -> float:
        await traffic.go_on(5)
        phase = traffic.mark()
        print(f"{what}: {phase}")
        assert phase.longest < most, what
        return phase.longest

    async with traffic.flowing():
        most = GOAL + 5 * await told("nothing happens")
        await asyncio.to_thread(fleet.replicas[0].kill)
        await told("SIGKILL of 1 of 3 replicas")
        if changed is None:
            await asyncio.to_thread(fleet.replicas[0].start)
        else:
            await asyncio.to_thread(fleet.add)
            await asyncio.to_thread(changed)
        await told("another replica")
        for replica in fleet.alive:
            await asyncio.to_thread(replica.terminate)
            await asyncio.to_thread(replica.start)
            if changed is not None:
                await asyncio.to_thread(changed)
        await told("SIGTERM and start of each in its turn")
    print(f"{traffic.done} steps of {SESSIONS} sessions, every one the oracle's")
    ends = fleet.log().count("stopped")
    assert ends == 3, f"{ends} of 3 replicas drained to the end"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_behind_envoy(tmp_path: Path) -> None:
    """Sessions on several streams through Envoy: every output is the oracle's and none is lost or doubled."""
    with running_fleet(tmp_path, 3) as fleet, running_envoy(tmp_path, fleet.addresses) as proxy:
        async with aio.Client(proxy.address, timeout=60, streams=STREAMS) as client:
            await harm(fleet, client, lambda: proxy.set(fleet.addresses))
        assert all(count > 0 for count in proxy.requests().values()), proxy.requests()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_behind_haproxy(tmp_path: Path) -> None:
    """The same through HAProxy."""
    with running_fleet(tmp_path, 3) as fleet, running_haproxy(tmp_path, fleet.addresses) as address:
        async with aio.Client(address, timeout=60, streams=STREAMS) as client:
            await harm(fleet, client, None)


async def lose_hosts(fleet: Fleet, address: str) -> None:
    """Streams begin through a proxy while three of five replicas, a moment ago well, are gone with their hosts."""

    async def seconds(client: aio.Client) -> float:
        started = time.monotonic()
        await client.session("lstm-4")
        return time.monotonic() - started

    with contextlib.ExitStack() as hosts:
        for replica in fleet.replicas[:3]:
            replica.kill()
            hosts.enter_context(replica.silent())
        async with aio.Client(address, timeout=30, streams=NEW_STREAMS) as client:
            slowest = max(await asyncio.gather(*[seconds(client) for _ in range(3 * NEW_STREAMS)]))
    print(f"{NEW_STREAMS} streams begin while 3 of 5 hosts are gone: the slowest answer took {slowest:.2f} s")
    assert slowest < GOAL


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_hosts_vanish_behind_envoy(tmp_path: Path) -> None:
    """No stream is kept trying a host that is gone, long before health checks tell: Envoy leaves out whatever takes no
    connection. Hosts that say nothing are what killed containers leave, where a process that ends is refused at once.
    """
    with running_fleet(tmp_path, 5) as fleet, running_envoy(tmp_path, fleet.addresses) as proxy:
        await lose_hosts(fleet, proxy.address)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_hosts_vanish_behind_haproxy(tmp_path: Path) -> None:
    """The same holds for HAProxy."""
    with running_fleet(tmp_path, 5) as fleet, running_haproxy(tmp_path, fleet.addresses) as address:
        await lose_hosts(fleet, address)


@pytest.mark.timeout(300)
async def test_without_a_proxy(tmp_path: Path) -> None:
    """The client spreads its sessions over the replicas itself: the same holds."""
    with running_fleet(tmp_path, 3) as fleet:
        async with aio.Client(fleet.addresses, timeout=60) as client:
            await harm(fleet, client, None)
