"""Notices: what a client is told of its sessions before they end, and when they have, through both clients."""

from __future__ import annotations

import asyncio
import logging
import queue
import time

import grpc
import numpy as np
import pytest

import rnnserve
from house import AddingEngine, loaded
from rnnserve import aio
from rnnserve.v1 import inference_pb2, inference_pb2_grpc, session_pb2
from rnnserve_models.load import load_model
from rnnserve_server.repository import Repository
from serving import ZOO, running_server

X = np.ones(5, np.float32)


class Time:
    """The server's clocks, which stand still until they are put forward."""

    def __init__(self, server):
        self.server, self.passed = server, 0.0
        now, today = time.monotonic(), time.time()
        core = server.server.core
        core.clock = core.sessions._clock = lambda: now + self.passed
        core.wall_clock = core.sessions._wall_clock = lambda: today + self.passed
        if core.keeper is not None:
            core.keeper._clock, core.keeper._wall_clock = core.clock, core.wall_clock

    def passes(self, seconds):
        """So many seconds pass, and the server looks after its sessions."""
        self.passed += seconds
        self.server.call(self.server.server.core.sweep)


class Told:
    """A client that keeps what it is told."""

    def __init__(self, server, **options):
        self.notices = queue.Queue()
        self.client = rnnserve.Client(server.address, timeout=30, on_notice=self.notices.put, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def next(self):
        notice = self.notices.get(timeout=20)
        return notice.session_id, notice.reason, notice.ended

    def nothing(self):
        """Nothing was told before the answer to another question came."""
        with self.client.session("lstm-4") as session:
            session.step(X)
        assert self.notices.empty()


def repository():
    made = Repository(ZOO)
    made.put("lstm-4", "1", load_model(ZOO / "lstm-4" / "1"))
    made.put("adder", "1", loaded(AddingEngine()))
    return made


def test_an_idle_session_is_told_ahead_and_lives_on_if_it_is_used(caplog):
    """A tenth of the idle lifetime before the end, once; a step moves the end away and the next one is told again; in
    the end it has expired, and the step's error says the same.
    """
    with running_server(repository()) as server, Told(server) as told:
        clock = Time(server)
        session = told.client.session("lstm-4", idle_lifetime=100.0)
        mine = session.session_id
        clock.passes(85)
        told.nothing()
        clock.passes(6)
        assert told.next() == (mine, "expired", False)
        assert session.notice.time_left == pytest.approx(9.0)
        clock.passes(1)
        told.nothing()
        session.step(X)
        clock.passes(85)
        told.nothing()
        clock.passes(6)
        assert told.next() == (mine, "expired", False)
        clock.passes(10)
        assert told.next() == (mine, "expired", True)
        assert (session.notice.ended, session.notice.time_left) == (True, None)
        clock.passes(1)
        told.nothing()
        with pytest.raises(rnnserve.SessionExpired):
            session.step(X)
    lines = [record.getMessage() for record in caplog.records if record.name == "rnnserve"]
    assert any(mine in line and "expires unless it is used, in 9 s" in line for line in lines)


def test_a_session_that_ages_is_told_however_much_it_is_used():
    """Its lifetime runs out though it is in use."""
    with running_server(repository()) as server, Told(server) as told:
        clock = Time(server)
        session = told.client.session("lstm-4", lifetime=1000.0)
        clock.passes(900)
        session.step(X)
        told.nothing()
        clock.passes(45)  # a tenth would be 100 s, but it is told a minute before at most
        assert told.next() == (session.session_id, "aged", False)
        session.step(X)
        clock.passes(60)
        assert told.next() == (session.session_id, "aged", True)
        with pytest.raises(rnnserve.SessionAged):
            session.step(X)


def test_a_session_that_somebody_deletes_is_told_closed():
    """To those who have it, and not to who closes it."""
    with running_server(repository()) as server, Told(server) as told, Told(server) as other:
        clock = Time(server)
        group = told.client.session_group("lstm-4", 3)
        with other.client.attach(group.session_ids[1]) as session:
            session.close()
        clock.passes(0)
        assert told.next() == (group.session_ids[1], "closed", True)
        assert [notice and notice.reason for notice in group.notices] == [None, "closed", None]
        other.nothing()
        told.nothing()


def test_sessions_that_were_not_used_make_room_if_the_server_is_told_so():
    """They are told before, the longest idle one goes first, and one that is used stays; without the setting a full
    server refuses.
    """
    with running_server(repository(), max_sessions=2, evict_idle_seconds=50.0) as server, Told(server) as told:
        clock = Time(server)
        first, second = told.client.session("lstm-4"), told.client.session("lstm-4")
        clock.passes(30)
        with pytest.raises(rnnserve.ServerBusy):
            told.client.session("lstm-4")
        first.step(X)
        clock.passes(16)
        assert told.next() == (second.session_id, "evicted", False)
        clock.passes(10)
        third = told.client.session("lstm-4")
        clock.passes(0)
        assert told.next() == (second.session_id, "evicted", True)
        first.step(X)
        third.step(X)
        with pytest.raises(rnnserve.SessionEvicted):
            second.step(X)
        with pytest.raises(rnnserve.ServerBusy):
            told.client.session("lstm-4")


def test_sessions_hear_that_their_model_is_unloaded():
    """They go on, or end when they are told to, and then with a reason of their own."""
    with running_server(repository(), allow_deploy=True) as server, Told(server) as told:
        clock = Time(server)
        session, other = told.client.session("lstm-4"), told.client.session("adder")
        told.client.models.unload("lstm-4")
        clock.passes(0)
        assert told.next() == (session.session_id, "model_unloaded", False)
        assert session.notice.time_left is None
        session.step(X)
        told.client.models.unload("adder", end_sessions_after=30.0)
        clock.passes(1)
        assert told.next() == (other.session_id, "model_unloaded", False)
        assert other.notice.time_left == pytest.approx(29.0)
        other.step(np.ones(2, np.float32))
        fork = other.fork()
        clock.passes(1)
        assert told.next() == (fork.session_id, "model_unloaded", False)
        fork.close()
        clock.passes(40)
        assert told.next() == (other.session_id, "model_unloaded", True)
        with pytest.raises(rnnserve.SessionUnloaded):
            other.step(np.ones(2, np.float32))
        session.step(X)


def test_sessions_end_at_once_with_their_model():
    """With 0 seconds nothing of it is left when the call returns."""
    with running_server(repository(), allow_deploy=True) as server, Told(server) as told:
        session = told.client.session("lstm-4")
        with pytest.raises(rnnserve.InvalidRequest, match="end_sessions_after"):
            told.client.models.unload("lstm-4", end_sessions_after=-1.0)
        told.client.models.unload("lstm-4", end_sessions_after=0.0)
        with pytest.raises(rnnserve.SessionUnloaded):
            session.step(X)
        assert told.next() == (session.session_id, "model_unloaded", True)


def test_a_session_that_another_server_takes_is_told(tmp_path):
    """As soon as the server that had it learns of it, also to streams that did not ask."""
    store = f"sqlite:///{tmp_path}/s.db"
    with (
        running_server(repository(), store=store) as one,
        running_server(repository(), store=store) as two,
        Told(one) as told,
        Told(one) as other,
        rnnserve.Client(two.address, timeout=30) as elsewhere,
    ):
        clock = Time(one)
        session = told.client.session("lstm-4")
        session.step(X)
        also = other.client.attach(session.session_id)
        with elsewhere.attach(session.session_id) as taken:
            taken.step(X)
            with pytest.raises(rnnserve.SessionTakenOver):
                session.step(X)
            clock.passes(0)
            assert told.next() == other.next() == (session.session_id, "taken_over", True)
            assert also.notice.reason == "taken_over"


def test_a_session_at_rest_is_told_too(tmp_path):
    """It is not in memory any more: the store knows when it ends, and that it has."""
    with (
        running_server(repository(), store=f"sqlite:///{tmp_path}/s.db", rest_seconds=5.0) as server,
        Told(server) as told,
    ):
        clock = Time(server)
        session = told.client.session("lstm-4", idle_lifetime=100.0)
        session.step(X)
        clock.passes(10)
        assert len(server.server.core.sessions) == 0
        clock.passes(70)
        told.nothing()
        clock.passes(12)
        assert told.next() == (session.session_id, "expired", False)
        clock.passes(10)
        clock.passes(1)
        assert told.next() == (session.session_id, "expired", True)
        with pytest.raises(rnnserve.SessionExpired):
            session.step(X)


def test_a_server_that_shuts_down_says_so_first():
    """Before the stream ends, with the time that is left."""
    with running_server(repository(), drain_seconds=5.0) as server, Told(server, retry_for=0) as told:
        sessions = [told.client.session("lstm-4") for _ in range(2)]
        server.stop()
        assert {told.next(), told.next()} == {(each.session_id, "draining", False) for each in sessions}
        assert sessions[0].notice.time_left == 5.0


def test_a_callback_may_use_the_client_and_may_fail(caplog):
    """It runs beside the client's own thread; what it raises is logged, and the next notice is told all the same."""
    kept = queue.Queue()

    def keep(notice):
        if notice.ended:
            raise RuntimeError("too late")
        kept.put(sessions[notice.session_id].export())

    with running_server(repository()) as server:
        clock = Time(server)
        with rnnserve.Client(server.address, timeout=30, on_notice=keep) as client:
            made = [client.session("lstm-4", lifetime=200.0 + 100 * at) for at in range(2)]
            sessions = {each.session_id: each for each in made}
            clock.passes(185)
            assert b"rnnserve-session" in kept.get(timeout=20)
            clock.passes(95)
            assert b"rnnserve-session" in kept.get(timeout=20)
    assert any("on_notice failed" in record.getMessage() for record in caplog.records)


async def test_notices_asyncio(caplog):
    """The same under asyncio, with a function or a coroutine function."""
    caplog.set_level(logging.WARNING, "rnnserve")
    told = asyncio.Queue()
    with running_server(repository()) as server:
        clock = Time(server)
        async with (
            aio.Client(server.address, timeout=30, on_notice=told.put) as one,
            aio.Client(server.address, timeout=30, on_notice=told.put_nowait) as two,
        ):
            first = await one.session("lstm-4", idle_lifetime=200.0)
            second = await two.session("lstm-4", idle_lifetime=200.0)
            await asyncio.to_thread(clock.passes, 185.0)
            notices = [await asyncio.wait_for(told.get(), 20) for _ in range(2)]
            assert {(each.session_id, each.reason, each.ended) for each in notices} == {
                (each.session_id, "expired", False) for each in (first, second)
            }
            assert first.notice in notices
            await asyncio.to_thread(clock.passes, 20.0)
            assert (await asyncio.wait_for(told.get(), 20)).ended
    assert "expires unless it is used" in caplog.text


def test_many_lanes_are_one_notice_and_cost_nothing_before():
    """What is told of a thousand sessions is one message; until they come near their end they are not looked at."""
    with running_server(repository()) as server, grpc.insecure_channel(server.address) as channel:
        clock = Time(server)
        sent: queue.Queue = queue.Queue()
        stream = inference_pb2_grpc.InferenceServiceStub(channel).Stream(iter(sent.get, None))
        config = session_pb2.SessionConfig(model="lstm-4")
        config.idle_lifetime.FromSeconds(100)
        sent.put(
            inference_pb2.StreamRequest(opens=[inference_pb2.LaneOpen(lane=n, create=config) for n in range(1000)])
        )
        opened = 0
        while opened < 1000:
            opened += len(next(stream).opened)
        clock.passes(1)
        (look,) = server.server.core.watches
        watch = look.__self__._watch
        live, looked = watch._live, []
        watch._live = lambda *arguments: looked.append(1) or live(*arguments)
        for _ in range(5):
            clock.passes(10)
        assert not looked
        clock.passes(41)
        response = next(stream)
        (notice,) = response.notices
        assert (len(notice.lanes), notice.reason, notice.ended) == (1000, inference_pb2.NOTICE_REASON_EXPIRED, False)
        assert len(looked) == 1
        sent.put(None)
        list(stream)
