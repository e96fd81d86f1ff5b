"""The clients through a TCP proxy that cuts their connections, before the fake server and the real one."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

import rnnserve
from fake_server import running
from rnnserve import aio
from serving import running_server
from tcp_proxy import Plan, TcpProxy


def cuts(count):
    """The first connections are cut by chance; those that come after them live."""
    return lambda number, chance: Plan.by_chance(number, chance) if number < count else Plan()


@contextmanager
def sums():
    """The fake server, and what its sessions must have made of ones."""
    with running() as fake:
        yield fake.target, "sum", np.ones((60, 3), "f4"), np.cumsum(np.ones((60, 3), "f4"), axis=0)
        for name in {name for name, _ in fake.applied}:
            steps = [step for session, step in fake.applied if session == name]
            assert steps == list(range(len(steps)))


@contextmanager
def lstms(**settings):
    """The real server, and what its sessions must give: the bits of one call over the whole sequence."""
    x = np.random.default_rng(0).standard_normal((60, 5), np.float32)
    with running_server(**settings) as real:
        with rnnserve.Client(real.address, timeout=30) as client:
            y = client.RNN("lstm-32-64", return_sequences=True)(x[None])[0]
        yield real.address, "lstm-32-64", x, y


def forgetful():
    """The real server when it remembers a single answer of a session: clients ask for no more than that at once."""
    return lstms(replay_chunks=1)


SERVERS = [sums, lstms, forgetful]


@pytest.mark.parametrize("served", SERVERS)
@pytest.mark.parametrize("seed", range(4))
async def test_cut_at_random_bytes(served, seed):
    """Wherever connections are cut, and however: every session of tasks, of streams and of a group gets every output,
    each the right one."""
    with served() as (target, model, x, y):
        async with (
            TcpProxy(target, cuts(12), seed) as proxy,
            aio.Client(proxy.address, timeout=60, retry_for=None) as client,
        ):
            sessions = [await client.session(model) for _ in range(4)]

            async def steps(session):
                return [await session.step(frame) for frame in x]

            async def stream(session):
                return [output async for output in session.stream(x, window=8)]

            async def group():
                async with client.session_group(model, 3) as made:
                    return [(await made.step(np.stack([frame] * 3))) for frame in x]

            outputs = await asyncio.gather(
                *[steps(session) for session in sessions[:2]], *[stream(session) for session in sessions[2:]], group()
            )
            for each in outputs[:4]:
                np.testing.assert_array_equal(each, y)
            np.testing.assert_array_equal(outputs[4], np.stack([y] * 3, axis=1))
            assert proxy.cuts > 2
            await asyncio.gather(*[session.close() for session in sessions])


@pytest.mark.parametrize("served", SERVERS)
async def test_threads_through_cuts(served):
    """Threads see nothing of it either."""
    with served() as (target, model, x, y):
        async with TcpProxy(target, cuts(8), 5) as proxy:

            def work():
                with rnnserve.Client(proxy.address, timeout=60, retry_for=None) as client:
                    made = [client.session(model) for _ in range(4)]
                    outputs = [None] * 4
                    threads = [
                        threading.Thread(
                            target=lambda at: outputs.__setitem__(at, list(made[at].stream(x))), args=(at,)
                        )
                        for at in range(4)
                    ]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    return outputs

            for each in await asyncio.to_thread(work):
                np.testing.assert_array_equal(each, y)
            assert proxy.cuts > 2


@pytest.mark.parametrize("kept", [False, True])
async def test_the_real_server_restarts(kept, tmp_path):
    """A server that drains, ends and comes back is a pause, if it keeps its sessions; else they are told to be gone."""
    store = {"store": f"sqlite:///{tmp_path}/sessions"} if kept else {}
    x = np.random.default_rng(1).standard_normal((6, 5), np.float32)
    with running_server(**store) as server:
        port = int(server.address.rpartition(":")[2])
        client = aio.Client(server.address, timeout=60)
        y = (await client.RNN("lstm-32-64", return_sequences=True)(x[None]))[0]
        session = await client.session("lstm-32-64")
        got = [await session.step(frame) for frame in x[:3]]
        steps = [asyncio.create_task(session.step(frame)) for frame in x[3:5]]
        await asyncio.to_thread(server.stop)
    last = asyncio.create_task(session.step(x[5]))
    with running_server(port=port, **store):
        got += [await step for step in steps]
        if kept:
            np.testing.assert_array_equal([*got, await last], y)
            await session.close()
        else:
            with pytest.raises(rnnserve.SessionNotFound):
                await last
        await client.close()


async def test_a_server_that_is_away_for_a_while():
    """While connections are refused the client's own policy says when to try, and gRPC's 20 s are not waited for."""
    with running() as server:
        async with TcpProxy(server.target) as proxy, aio.Client(proxy.address, timeout=60) as client:
            waits = []
            tried = asyncio.Event()

            async def sleep(seconds):
                waits.append(seconds)
                if len(waits) == 6:
                    tried.set()
                    await back.wait()

            back = asyncio.Event()
            object.__setattr__(client._connection.retry, "sleep", sleep)
            session = await client.session("sum")
            await session.step(np.ones(3))
            proxy.refuse()
            proxy.cut()
            step = asyncio.create_task(session.step(np.ones(3)))
            await tried.wait()
            await proxy.accept()
            object.__setattr__(client._connection.retry, "sleep", asyncio.sleep)
            started = time.monotonic()
            back.set()
            np.testing.assert_array_equal(await step, np.full(3, 2))
            assert time.monotonic() - started < 10


async def test_what_is_held_back_is_not_lost():
    """A proxy that passes nothing for a while is a pause too; what waits in it is sent on or sent again, once."""
    with running() as server:
        async with TcpProxy(server.target) as proxy, aio.Client(proxy.address, timeout=60) as client:
            session = await client.session("sum")
            for how in ("close", "reset"):
                proxy.passing.clear()
                step = asyncio.create_task(session.step(np.ones(3)))
                await asyncio.sleep(0)
                proxy.cut(how)
                proxy.passing.set()
                await step
            assert session.next_step == 2
            assert [step for _, step in server.applied] == [0, 1]


async def test_the_proxy_itself():
    """It passes as many bytes as it is told, on each way, and then does what it is told; the same for the same seed."""

    async def echo(reader, writer):
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    plans = [Plan(), Plan(up=5), Plan(down=5), Plan(up=5, how="half"), Plan(down=5, how="reset"), Plan(up=0)]
    got = []
    async with server, TcpProxy(target, lambda number, chance: plans[number]) as proxy:
        for plan in plans:
            reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
            writer.write(b"0123456789")
            if plan == Plan():
                writer.write_eof()
            try:
                got.append(await reader.read(-1))
            except ConnectionResetError:
                got.append("reset")
            writer.close()
        assert got[0] == b"0123456789"
        assert got[2] == b"01234"
        assert got[3] == b"01234"
        assert got[4] in ("reset", b"01234")
        assert got[1] in (b"", b"01234")
        assert got[5] == b""
        assert (proxy.connections, proxy.cuts) == (6, 5)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*proxy.address.split(":"))
        plans.append(Plan())
        await proxy.accept()
        _, writer = await asyncio.open_connection(*proxy.address.split(":"))
        await proxy.wait_for(lambda it: it.connections == 7)
        writer.close()
    assert Plan.by_chance(0, random.Random(3)) == Plan.by_chance(0, random.Random(3))


QUICK = (
    ("grpc.keepalive_time_ms", 1100),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
)


@pytest.mark.parametrize("options", [QUICK, pytest.param((), marks=pytest.mark.slow)], ids=["quick", "defaults"])
async def test_a_silent_peer_is_noticed(options):
    """Packets are dropped and nobody says so: within the time of a sign of life, 15 s unless it is set otherwise, the
    client takes the connection for lost and tries another; steps that waited are applied once and answered.
    """
    with lstms() as (target, model, x, y):
        async with TcpProxy(target) as proxy, aio.Client(proxy.address, timeout=60, options=options) as client:
            session = await client.session(model)
            outputs = [await session.step(frame) for frame in x[:3]]
            proxy.passing.clear()
            started = time.monotonic()
            waiting = [asyncio.create_task(session.step(frame)) for frame in x[3:]]
            await proxy.wait_for(lambda proxy: proxy.connections == 2)
            assert time.monotonic() - started < (8 if options else 20)
            proxy.passing.set()
            outputs += await asyncio.gather(*waiting)
            np.testing.assert_array_equal(outputs, y)
            await session.close()


async def test_signs_of_life_are_welcome():
    """A stream that is silent for long, but for its client asking whether the server is there, no more often than it
    may, is no abuse to the server: it stays.
    """
    with lstms(min_ping_seconds=0.5) as (target, model, x, _):
        async with TcpProxy(target) as proxy, aio.Client(proxy.address, timeout=60, options=QUICK) as client:
            session = await client.session(model)
            heard = proxy.heard
            await proxy.wait_for(lambda proxy: proxy.heard >= heard + 6)
            await session.step(x[0])
            assert proxy.connections == 1
            await session.close()
