"""One client and several replicas that share their sessions: where sessions are, and where they go."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import grpc
import numpy as np
import pytest

import rnnserve
from fake_server import failure, running
from redis_server import running_redis
from rnnserve import aio
from rnnserve._rendezvous import choose
from rnnserve._resolve import Replica, resolve
from rnnserve.v1.session_pb2 import GetStateRequest
from rnnserve.v1.session_pb2_grpc import SessionServiceStub
from serving import running_server
from test_resume import quick, row

DRAINING = failure("DRAINING", grpc.StatusCode.UNAVAILABLE)


@contextlib.contextmanager
def replicas(count, *, shared=True):
    """Fake servers that share their sessions, as real ones do with a store."""
    with contextlib.ExitStack() as stack:
        fakes = [stack.enter_context(running()) for _ in range(count)]
        for fake in fakes[1:] if shared else ():
            fake.sessions = fakes[0].sessions
        yield fakes


@pytest.fixture
def three():
    with replicas(3) as fakes:
        yield fakes


def home(fakes, session_id):
    target = choose([fake.target for fake in fakes], session_id)
    return next(fake for fake in fakes if fake.target == target)


def seen(fake):
    """The sessions that were stepped at a replica."""
    return {session for session, _ in fake.applied}


async def until(condition):
    """Lets the client go on until something is so."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  (nobody says so)
            await asyncio.sleep(0.005)


async def test_sessions_are_where_their_ids_say(three):
    """Every client that knows the replicas finds a session at the same one; new ones are spread over all."""
    targets = [fake.target for fake in three]
    async with aio.Client(targets, timeout=30) as client, aio.Client(targets[::-1], timeout=30) as other:
        sessions = [await client.session("sum") for _ in range(24)]
        for session in sessions:
            await session.step(row(1))
            again = await other.attach(session.session_id)
            np.testing.assert_array_equal(await again.step(row(1)), row(2))
    for fake in three:
        assert seen(fake) == {s.session_id for s in sessions if home(three, s.session_id) is fake}
        assert seen(fake)
        assert fake.streams == 2


async def test_a_group_is_a_frame_for_each_replica(three):
    """A step of sessions at several replicas is one frame to each, and one array, in the order of the group."""
    async with aio.Client([fake.target for fake in three], timeout=30) as client:
        group = await client.session_group("sum", 30)
        before = [len([r for r in fake.requests if r.frames]) for fake in three]
        x = np.arange(90, dtype="f4").reshape(30, 3)
        np.testing.assert_array_equal(await group.step(x), x)
        np.testing.assert_array_equal(await group.step(x), 2 * x)
    frames = [[len(f.lanes) for r in fake.requests for f in r.frames] for fake in three]
    assert before == [0, 0, 0]
    assert [len(each) for each in frames] == [2, 2, 2]
    assert sum(map(sum, frames)) == 60


@pytest.mark.parametrize("how", ["draining", "gone"])
async def test_sessions_of_a_lost_replica_go_on_elsewhere(how):
    """When a replica leaves, or vanishes, its sessions go on at the others with what was not answered, in one group as
    alone; nothing is applied twice."""
    with contextlib.ExitStack() as stack, replicas(2) as rest:
        lost = stack.enter_context(running())
        for fake in rest:
            fake.sessions = lost.sessions
        fakes = [lost, *rest]
        async with quick(aio.Client([fake.target for fake in fakes], timeout=30)) as client:
            sessions = [await client.session("sum") for _ in range(12)]
            group = await client.session_group("sum", 12)
            for session in sessions:
                await session.step(row(1))
            await group.step(np.ones((12, 3), "f4"))
            lost.hold()
            rows = lost.rows
            steps = [asyncio.create_task(session.step(row(1))) for session in sessions]
            steps.append(asyncio.create_task(group.step(np.ones((12, 3), "f4"))))
            mine = [s for s in [*(s.session_id for s in sessions), *group.session_ids] if home(fakes, s) is lost]
            await asyncio.to_thread(lost.wait_for_rows, rows + len(mine))
            if how == "draining":
                lost.serving = False
                lost.end_streams(DRAINING)
            else:
                await asyncio.to_thread(stack.close)
            *outputs, together = await asyncio.gather(*steps)
            np.testing.assert_array_equal(outputs, np.full((12, 3), 2.0))
            np.testing.assert_array_equal(together, np.full((12, 3), 2.0))
            elsewhere = {session for fake in rest for session, first in fake.applied if first == 1}
            assert set(mine) <= elsewhere
        assert mine
        applied = [each for fake in fakes for each in fake.applied]
        assert len(applied) == len(set(applied)) == 48


async def test_sessions_come_home():
    """When a replica is back, its sessions return to it between two steps; those that are busy wait for that."""
    with replicas(2) as fakes:
        away = fakes[0]
        async with quick(aio.Client([fake.target for fake in fakes], timeout=30)) as client:
            sessions = [await client.session("sum") for _ in range(24)]
            mine = [session for session in sessions if home(fakes, session.session_id) is away]
            for session in sessions:
                await session.step(row(1))
            away.serving = False
            away.end_streams(DRAINING)
            links = await client._connection.links()
            await until(lambda: all(links.holding(s._live.lane()).name == fakes[1].target for s in mine))
            for session in sessions:
                np.testing.assert_array_equal(await session.step(row(1)), row(2))
            before = len(away.applied)
            away.serving = True
            await until(lambda: all(links.holding(s._live.lane()).name == away.target for s in mine))
            for session in sessions:
                np.testing.assert_array_equal(await session.step(row(1)), row(3))
            assert len(away.applied) - before == len(mine) > 0


@pytest.mark.parametrize("well", [False, True])
async def test_a_replica_that_hangs(monkeypatch, well):
    """A replica that answers neither what it was asked nor that it serves has lost its sessions; one that only takes
    its time has not."""
    monkeypatch.setattr("rnnserve._links._SILENT_AFTER", 0.05)
    with replicas(2) as fakes:
        async with quick(aio.Client([fake.target for fake in fakes], timeout=30)) as client:
            sessions = [await client.session("sum") for _ in range(8)]
            slow = home(fakes, sessions[0].session_id)
            slow.serving = well
            slow.hold()
            steps = [asyncio.create_task(session.step(row(1))) for session in sessions]
            if well:
                await until(lambda: client.waits.count(0.05 / 3) > 100)
                assert not steps[0].done()
                slow.release()
            np.testing.assert_array_equal(await asyncio.gather(*steps), np.ones((8, 3)))
            assert bool(seen(slow)) == well
            slow.mute()  # opens too
            slow.serving = False
            more = await asyncio.gather(*[client.session("sum") for _ in range(8)])
            assert len(more) == 8


async def test_a_cut_connection_moves_nobody():
    """A replica whose stream broke and that takes another keeps its sessions: without a store no other has them."""
    with replicas(2, shared=False) as fakes:
        async with quick(aio.Client([fake.target for fake in fakes], timeout=30)) as client:
            sessions = [await client.session("sum") for _ in range(8)]
            for fake in fakes:
                fake.break_streams()
            for session in sessions:
                np.testing.assert_array_equal(await session.step(row(1)), row(1))
        for fake in fakes:
            assert seen(fake) == {s.session_id for s in sessions if home(fakes, s.session_id) is fake}


async def test_sessions_do_not_go_where_they_are_not_known():
    """A replica that came later and shares no store gets new sessions only."""
    with replicas(2, shared=False) as fakes:
        old, new = fakes
        async with quick(aio.Client([old.target], timeout=30)) as client:
            sessions = [await client.session("sum") for _ in range(24)]
            links = await client._connection.links()
            links.set({fake.target: Replica(fake.target) for fake in fakes})
            await asyncio.to_thread(wait_for_key, new, "GetSession")
            for session in sessions:
                np.testing.assert_array_equal(await session.step(row(1)), row(1))
            later = [await client.session("sum") for _ in range(24)]
            for session in later:
                await session.step(row(1))
        assert seen(new) == {s.session_id for s in later if home(fakes, s.session_id) is new}
        assert seen(new)


def wait_for_key(fake, method):
    event = threading.Event()
    for _ in range(3000):
        if any(name == method for name, _ in fake.keys):
            return
        event.wait(0.01)
    raise AssertionError(f"no {method} came")


async def test_calls_go_where_the_session_is(three):
    """Calls for a session go to its replica, under the key of its stream; others take turns; the group of replicas is
    well as long as one is."""
    async with aio.Client([fake.target for fake in three], timeout=30) as client:
        for _ in range(6):
            session = await client.session("sum")
            await session.info()
            fake = home(three, session.session_id)
            assert fake.keys[-1] == ("GetSession", next(key for name, key in fake.keys if name == "Stream"))
        assert all(key in fake.sessions for fake in three for name, key in fake.keys)
        for _ in range(6):
            await client.RNN("sum")(np.ones((1, 2, 3), "f4"))
        assert [len(fake.predicts) for fake in three] == [2, 2, 2]
        three[0].serving = three[1].serving = False
        assert await client.health()
        three[2].serving = False
        assert not await client.health()


async def test_a_call_that_no_session_needs_goes_to_one_that_answers():
    """Where a replica is not there, a call goes to the next at once."""
    with socket.socket() as nobody, running() as fake:
        nobody.bind(("127.0.0.1", 0))
        targets = [f"127.0.0.1:{nobody.getsockname()[1]}", fake.target]
        async with aio.Client(targets, timeout=30) as client:
            for _ in range(4):
                await client.RNN("sum")(np.ones((1, 2, 3), "f4"))
            sessions = [await client.session("sum") for _ in range(8)]
            assert [float((await s.step(row(1)))[0]) for s in sessions] == [1.0] * 8


async def test_no_replica_at_all():
    """With none there, whoever waits is told so after `retry_for`, and what was sent keeps its place."""
    with contextlib.ExitStack() as stack:
        fakes = stack.enter_context(replicas(2))
        client = aio.Client([fake.target for fake in fakes], retry_for=0.3)
        session = await client.session("sum")
        await session.step(row(1))
        stack.close()
        with pytest.raises(rnnserve.Unavailable):
            await session.step(row(1))
        assert session.next_step == 2
        await client.close()


async def test_streams_through_one_target():
    """Behind a proxy a client may have several streams: each has the key of its first session, and so have the calls
    for its sessions."""
    with running() as fake:
        async with aio.Client(fake.target, timeout=30, streams=4) as client:
            sessions = [await client.session("sum") for _ in range(80)]
            streams = [key for name, key in fake.keys if name == "Stream"]
            assert fake.streams == len(set(streams)) == 4
            for session in sessions:
                await session.step(row(1))
                await session.info()
            asked = [key for name, key in fake.keys if name == "GetSession"]
            assert set(asked) == set(streams) <= set(fake.sessions)
            lone = [s for s in sessions if s.session_id in streams]
            assert len(lone) == 4
            fake.break_streams()
            for session in sessions:
                await session.step(row(1))
            again = [key for name, key in fake.keys if name == "Stream"]
            assert sorted(again[4:]) == sorted(streams)  # a stream keeps its key, and so its replica


def test_a_client_for_threads(three):
    """The client for threads does all of that too."""
    with rnnserve.Client([fake.target for fake in three], timeout=30) as client:
        with client.session_group("sum", 60) as group:
            np.testing.assert_array_equal(group.step(np.ones((60, 3), "f4")), np.ones((60, 3)))
        with client.session("sum") as session:
            assert list(map(float, (y[0] for y in session.stream(np.ones((20, 3), "f4"))))) == [*range(1, 21)]
            assert session.info().step == 20
    assert all(fake.streams for fake in three)


@pytest.mark.parametrize("wrong", [[], ["localhost"], ["a:b"], [":1"]])
def test_what_is_no_list_of_replicas(wrong):
    with pytest.raises(ValueError, match="replica"):
        aio.Client(wrong)


def test_streams_are_for_one_target():
    with pytest.raises(ValueError, match="single target"):
        aio.Client(["a:1", "b:1"], streams=2)
    with pytest.raises(ValueError, match="at least 1"):
        aio.Client("a:1", streams=0)


class Names:
    """What names stand for, as a test says."""

    def __init__(self, monkeypatch):
        self.addresses = {}
        self.asked = 0
        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", self._get)

    async def _get(self, host, port, **_):
        self.asked += 1
        if host not in self.addresses:
            raise socket.gaierror("unknown")
        return [
            (socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in self.addresses[host]
        ]


async def test_a_name_stands_for_its_addresses(monkeypatch):
    """Each address of a name is a replica, those of IPv4 if there are some; what has one address, or cannot be looked
    up, stands for itself."""
    names = Names(monkeypatch)
    names.addresses = {"many": ["10.0.0.2", "10.0.0.1", "fd00::1"], "one": ["10.0.0.3"], "six": ["fd00::1", "fd00::2"]}
    assert await resolve(["many:5", "one:5", "nobody:5", "10.0.0.9:5", "unix:/x"]) == [
        Replica("10.0.0.1:5", "many:5"),
        Replica("10.0.0.2:5", "many:5"),
        Replica("one:5"),
        Replica("nobody:5"),
        Replica("10.0.0.9:5"),
        Replica("unix:/x"),
    ]
    assert [each.target for each in await resolve(["six:5"])] == ["[fd00::1]:5", "[fd00::2]:5"]


async def test_replicas_that_come_and_go(monkeypatch):
    """The name is looked up again and again: a replica that comes gets its share of the sessions, and one that goes
    keeps none."""
    names = Names(monkeypatch)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(running_redis()).url
        first = stack.enter_context(running_server(host="127.0.0.2", store=store))
        port = first.server.port
        for n in (3, 4):  # one port, several addresses, as behind a name
            stack.enter_context(running_server(host=f"127.0.0.{n}", port=port, store=store))
        names.addresses["fleet"] = ["127.0.0.2", "127.0.0.3"]
        client = quick(aio.Client([f"fleet:{port}"], timeout=30), faster=100)
        x = np.random.default_rng(0).standard_normal((3, 24, 5), np.float32)
        sessions = [await client.session("lstm-4") for _ in range(24)]
        y = [np.stack([await s.step(each) for s, each in zip(sessions, x[0], strict=True)])]
        links = await client._connection.links()

        def at(n):
            return sum(links.holding(s._live.lane()).name == f"127.0.0.{n}:{port}" for s in sessions)

        assert at(2) + at(3) == 24
        names.addresses["fleet"] = ["127.0.0.3", "127.0.0.4"]
        await until(lambda: at(2) == 0 and at(4) > 0)
        y.append(np.stack([await s.step(each) for s, each in zip(sessions, x[1], strict=True)]))
        await asyncio.to_thread(first.stop)
        y.append(np.stack([await s.step(each) for s, each in zip(sessions, x[2], strict=True)]))
        whole = await client.RNN("lstm-4", return_sequences=True)(x.swapaxes(0, 1))
        np.testing.assert_array_equal(np.stack(y, 1), whole)
        await client.close()


async def test_a_call_that_a_proxy_took_elsewhere():
    """A proxy that has got another replica sends calls for a session there, which takes it over: its stream follows."""
    with (
        running_redis() as redis,
        running_server(store=redis.url) as old,
        running_server(store=redis.url) as new,
        grpc.insecure_channel(new.address) as channel,
    ):
        async with aio.Client(old.address, timeout=30) as client:
            session, other = await client.session("lstm-4"), await client.session("lstm-4")
            x = np.random.default_rng(0).standard_normal((4, 5), np.float32)
            y = [await session.step(x[0])]
            await session.info()
            await asyncio.to_thread(
                SessionServiceStub(channel).GetState, GetStateRequest(session_id=session.session_id), timeout=30
            )
            y += [await session.step(x[1])]
            # Whoever else takes it over is not fought.
            await other.step(x[0])
            await asyncio.to_thread(
                SessionServiceStub(channel).GetState, GetStateRequest(session_id=other.session_id), timeout=30
            )
            with pytest.raises(rnnserve.RequestError, match="taken over"):
                await other.step(x[1])
            whole = await client.RNN("lstm-4", return_sequences=True)(x[None, :2])
            np.testing.assert_array_equal(y, whole[0])


async def test_forks_and_restored_sessions_without_a_store():
    """What is made of a session is where it was made: replicas that share no store have forks and restored sessions."""
    with running_server() as one, running_server() as two:
        async with aio.Client([one.address, two.address], timeout=30) as client:
            x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
            session = await client.session("lstm-4")
            await session.step(x[0])
            copies = [*await session.fork(6), *[await client.restore(await session.export()) for _ in range(6)]]
            y = await session.step(x[1])
            for copy in copies:
                np.testing.assert_array_equal(await copy.step(x[1]), y)
