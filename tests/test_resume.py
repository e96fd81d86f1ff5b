"""Both clients when streams are lost: against the fake server, which replays."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import threading

import grpc
import numpy as np
import pytest

import rnnserve
from fake_server import failure, running
from rnnserve import aio
from rnnserve._lanes.numbers import ProtocolViolation
from rnnserve._link import Link
from rnnserve._retry import Retry
from rnnserve.v1 import error_pb2

INTERNAL, UNAVAILABLE = grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE

# How streams end when their server has gone: by a proxy, the server itself, somebody between, gRPC, and in good order.
LOSSES = {
    "internal": error_pb2.Status(code=13, message="upstream reset"),
    "unavailable": error_pb2.Status(code=14, message="connection reset"),
    "cancelled": error_pb2.Status(code=1, message="cancelled"),
    "removed": error_pb2.Status(code=2, message="Stream removed"),
    "ended": None,
}


@pytest.fixture
def server():
    with running() as fake:
        yield fake


@pytest.fixture
async def client(server):
    async with quick(aio.Client(server.target, timeout=30)) as made:
        yield made


async def link_of(client: aio.Client) -> Link:
    """The one link of a client of one server."""
    return (await client._connection.links()).any().link


def quick(client, faster=math.inf, **settings):
    """The client, with waits that are told to `client.waits` and take no time, or are so many times as short: what
    waits without end in a process of servers must leave them Python."""
    client.waits = []

    async def sleep(seconds):
        client.waits.append(seconds)
        await asyncio.sleep(seconds / faster)

    made = dataclasses.replace(client._connection.retry, sleep=sleep, **settings)
    client._connection.retry = made
    return client


def row(value, features=3):
    return np.full(features, value, "f4")


async def arrived(server, rows):
    await asyncio.to_thread(server.wait_for_rows, rows)


async def applied(server, count):
    await asyncio.to_thread(server.wait_for_applied, count)


def once(server):
    """Asserts that every session has taken every step once, in order."""
    for name in {name for name, _ in server.applied}:
        steps = [step for session, step in server.applied if session == name]
        assert steps == list(range(len(steps)))


# Sessions


async def test_a_chunk_that_breaks_every_stream_is_given_up(server, client):
    """It is tried so often, at last alone, and raises one exception that says so; meanwhile the other sessions' chunks
    are applied and answered, once each, and afterwards its own session goes on where the server has it.
    """
    server.poison = 666.0
    bad, *others = await asyncio.gather(*[client.session("sum") for _ in range(4)])
    await asyncio.gather(*[session.step(row(1)) for session in (bad, *others)])
    poisoned = asyncio.create_task(bad.step(row(666)))
    behind = asyncio.create_task(bad.step(row(1)))
    answers = await asyncio.gather(*[session.step(row(1)) for session in others for _ in range(3)])
    assert sorted(float(y[0]) for y in answers) == [2, 2, 2, 3, 3, 3, 4, 4, 4]
    with pytest.raises(rnnserve.ChunkLost, match=r"at step 1 .* 8 connections") as caught:
        await poisoned
    assert (caught.value.metadata["first_step"], caught.value.metadata["session_id"]) == ("1", bad.session_id)
    with pytest.raises(rnnserve.StepMismatch):
        await behind
    assert (server.poisoned, server.streams) == (8, 9)
    assert (await bad.step(row(1)))[0] == 2
    assert bad.next_step == 2
    once(server)


async def test_a_groups_chunk_that_breaks_every_stream_is_given_up(server, client):
    """All of its sessions are told, by their places, and can go on."""
    server.poison = 666.0
    group = await client.session_group("sum", 3)
    x = np.ones((3, 3))
    x[1] = 666
    with pytest.raises(rnnserve.GroupError) as caught:
        await group.step(x)
    assert {place: type(error) for place, error in caught.value.errors.items()} == dict.fromkeys(
        range(3), rnnserve.ChunkLost
    )
    np.testing.assert_array_equal(await group.step(np.ones((3, 3))), np.ones((3, 3)))


async def test_a_stateful_layer_forgets_a_chunk_that_was_given_up(server, client):
    """A call that raises is as if it had not been."""
    server.poison = 666.0
    async with client.RNN("sum", stateful=True) as layer:
        await layer(np.ones((1, 2, 3)))
        with pytest.raises(rnnserve.ChunkLost):
            await layer(np.full((1, 2, 3), 666))
        assert (await layer(np.ones((1, 2, 3))))[0, 0] == 4


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("lost", ["requests", "answers"])
async def test_a_lost_stream_is_a_pause(server, client, loss, lost):
    """However the stream ends, and whether the steps or their answers are lost with it: each step is applied once and
    answered, and what was asked for meanwhile comes after it."""
    sessions = await asyncio.gather(*[client.session("sum") for _ in range(3)])
    for session in sessions:
        await session.step(row(1))
    server.requests.clear()
    (server.hold if lost == "requests" else server.mute)()
    tasks = [asyncio.create_task(session.step(row(1))) for session in sessions for _ in range(2)]
    await arrived(server, 6)
    server.end_streams(loss)
    tasks += [asyncio.create_task(session.step(row(1))) for session in sessions]
    outputs = await asyncio.gather(*tasks)
    assert sorted(float(y[0]) for y in outputs) == [2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [session.next_step for session in sessions] == [4, 4, 4]
    assert server.streams == 2
    assert [len(request.opens) for request in server.requests if request.opens] == [3]
    once(server)
    await asyncio.gather(*[session.close() for session in sessions])
    assert not server.sessions


async def test_a_stream_of_steps_is_lost_again_and_again(server, client):
    """A pipelined stream of steps goes through many losses without a gap or a double."""

    def frames():
        for number in range(100):
            if number % 10 == 5:
                server.break_streams()
            yield row(1)

    async with client.session("sum") as session:
        got = [y[0] async for y in session.stream(frames(), window=7)]
    assert got == list(range(1, 101))
    once(server)


async def test_a_group_is_taken_up_whole(server, client):
    """A group's lanes are opened again in one message, and its step is applied once to each."""
    group = await client.session_group("sum", 5)
    await group.step(np.ones((5, 3)))
    server.requests.clear()
    server.mute()
    step = asyncio.create_task(group.step(np.ones((5, 3))))
    await applied(server, 10)
    server.break_streams()
    np.testing.assert_array_equal(await step, np.full((5, 3), 2))
    np.testing.assert_array_equal(await group.step(np.ones((5, 3))), np.full((5, 3), 3))
    assert [len(request.opens) for request in server.requests if request.opens] == [5]
    once(server)
    await group.close()


async def test_a_stateful_layer_goes_on(server, client):
    """A stateful layer, and a stack of them, are called as if nothing had happened."""
    x = np.ones((2, 4, 3))
    stacked = []
    async with client.RNN("sum", stateful=True) as live, client.RNN(["sum", "wide"], stateful=True) as stack:
        for turn in range(3):
            np.testing.assert_array_equal(await live(x), np.full((2, 3), 8 * turn + 4))
            server.mute()
            call = asyncio.create_task(live(x))
            await applied(server, len(server.applied) + 1)
            server.break_streams()
            np.testing.assert_array_equal(await call, np.full((2, 3), 8 * turn + 8))
            server.break_streams()
            stacked.append((await stack(x))[0, 0])
        assert stacked == [np.cumsum(np.arange(1, 13))[last] for last in (3, 7, 11)]
    assert not server.sessions


@pytest.mark.parametrize("names", [["sum"], ["sum", "wide"]])
async def test_a_call_of_a_layer_that_is_not_answered_is_undone(server, client, names):
    """A call of a stateful layer that raises is as if it had not been, whether or not it was applied after all."""
    x = np.ones((1, 2, 3))
    live = client.RNN(names, stateful=True)
    expected = [await live(x) for _ in range(3)]
    await live.reset_states()
    for turn in range(3):
        server.hold()
        with pytest.raises(rnnserve.DeadlineExceeded):
            await live(x, timeout=0.05)
        server.release()
        np.testing.assert_array_equal(await live(x), expected[turn])
        call = asyncio.create_task(live(x * 7))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await live.reset_states()
    np.testing.assert_array_equal(await live(x), expected[0])
    await live.close()


async def test_idle_sessions_are_taken_up_when_they_are_needed(server, client):
    """A client with nothing to say does not connect; its sessions are taken up by their next steps, together."""
    sessions = await asyncio.gather(*[client.session("sum") for _ in range(4)])
    await asyncio.gather(*[session.step(row(1)) for session in sessions])
    server.requests.clear()
    ended = asyncio.Event()
    link = await link_of(client)
    link._retry = dataclasses.replace(link._retry, sleep=lambda seconds: _set(ended))
    server.break_streams()
    await ended.wait()
    assert server.streams == 1
    np.testing.assert_array_equal(await asyncio.gather(*[each.step(row(1)) for each in sessions[:3]]), [row(2)] * 3)
    assert [len(request.opens) for request in server.requests if request.opens] == [3]


async def _set(event):
    event.set()


@pytest.mark.parametrize("when", ["open", "close"])
async def test_opening_and_closing_are_asked_again(server, client, when):
    """A create whose answer was lost makes one session, not two; a delete whose answer was lost is done."""
    if when == "open":
        server.mute()
        opening = asyncio.ensure_future(client.session("sum")._open())
        await asyncio.to_thread(server.wait_for_opens, 1)
        server.break_streams()
        session = await opening
        assert list(server.sessions) == [session.session_id]
        np.testing.assert_array_equal(await session.step(row(1)), row(1))
    else:
        session = await client.session("sum")
        server.mute()
        closing = asyncio.create_task(session.close())
        while server.sessions:
            await client.models()  # whatever was sent before is there by then
        server.break_streams()
        await closing
    assert len(server.sessions) == (when == "open")


async def test_an_id_of_ones_own(server, client):
    """A session with an id of one's own is made once through a loss; an id in use is an error."""
    server.mute()
    opening = asyncio.ensure_future(client.session("sum", session_id="mine")._open())
    await asyncio.to_thread(server.wait_for_opens, 1)
    server.break_streams()
    assert (await opening).session_id == "mine"
    with pytest.raises(rnnserve.SessionExists):
        await client.session("sum", session_id="mine")


async def test_a_server_that_has_forgotten(server, client):
    """Whoever waits hears that the session is gone, once, and so does the next; nobody tries for ever."""
    session = await client.session("sum")
    server.hold()
    steps = [asyncio.create_task(session.step(row(1))) for _ in range(3)]
    await arrived(server, 3)
    server.break_streams(forget=True)
    results = await asyncio.gather(*steps, return_exceptions=True)
    assert [type(each) for each in results] == [rnnserve.SessionNotFound] * 3
    with pytest.raises(rnnserve.SessionNotFound):
        await session.step(row(1))
    assert server.streams == 2
    await session.close()


async def test_what_cannot_be_retried(server, client):
    """A stream that is refused for a reason fails whoever waits with the reason; the next call starts where the server
    has the session."""
    session = await client.session("sum")
    server.mute()
    steps = [asyncio.create_task(session.step(row(1))) for _ in range(2)]
    await applied(server, 2)
    server.end_streams(failure("INVALID_REQUEST", grpc.StatusCode.INVALID_ARGUMENT))
    results = await asyncio.gather(*steps, return_exceptions=True)
    assert [type(each) for each in results] == [rnnserve.InvalidRequest] * 2
    assert client.waits == []
    np.testing.assert_array_equal(await session.step(row(1)), row(3))
    assert session.next_step == 3


async def test_somebody_else_stepped(server, client):
    """Another's step at the same place is told as a conflict, and the session goes on where it is."""
    session = await client.session("sum")
    async with aio.Client(server.target, timeout=30) as other:
        again = await other.attach(session.session_id)
        await again.step(row(5))
    with pytest.raises(rnnserve.StepConflict) as caught:
        await session.step(row(1))
    assert caught.value.expected_step == 1
    np.testing.assert_array_equal(await session.step(row(1)), row(6))


async def test_reset_is_asked_again(server, client):
    """A reset whose first try failed is made again, at the same step; one of a session that somebody else has stepped
    is made where that session is."""
    session = await client.session("sum")
    await session.step(row(1))
    server.failures.append(failure("DRAINING", UNAVAILABLE))
    await session.reset_states()
    assert [request.step for request in server.resets] == [1, 1]
    np.testing.assert_array_equal(await session.step(row(2)), row(2))
    async with aio.Client(server.target, timeout=30) as other:
        await (await other.attach(session.session_id)).step(row(1))
    await session.reset_states()
    assert [request.step for request in server.resets] == [1, 1, 2, 3]


# Deadlines and limits


async def test_a_deadline_in_the_pause(server, client):
    """A call whose deadline passes while there is no server raises once, saying where it stands; it keeps its place,
    so that the next one follows it, though the caller has written to its buffer meanwhile."""
    session = await client.session("sum")
    await session.step(row(1))
    buffer = row(10)
    server.hold()
    with pytest.raises(rnnserve.DeadlineExceeded, match=r"step 1 keeps its place .* go on with the next") as caught:
        await session.step(buffer, timeout=0.05)
    assert caught.value.metadata["first_step"] == "1"
    buffer[:] = 99
    await arrived(server, 2)
    server.break_streams()
    np.testing.assert_array_equal(await session.step(row(1)), row(12))
    once(server)


async def test_an_answer_that_comes_while_the_client_is_closed(server, client, monkeypatch):
    """It is told although the message with it breaks the contract further on: nobody waits for their deadline."""
    session = await client.session("sum")
    server.hold()
    step = asyncio.create_task(session.step(row(1), timeout=20))
    await arrived(server, 1)
    lanes = (await link_of(client)).lanes
    receive = lanes._receive_frame

    def broken(frame):
        receive(frame)
        raise ProtocolViolation("something else is wrong")

    monkeypatch.setattr(lanes, "_receive_frame", broken)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    server.release()
    async with asyncio.timeout(10):
        np.testing.assert_array_equal(await step, row(1))
        await closing


async def test_a_cancelled_step_keeps_its_place(server, client):
    """So does a call that is cancelled."""
    session = await client.session("sum")
    server.hold()
    buffer = row(10)
    step = asyncio.create_task(session.step(buffer))
    await arrived(server, 1)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    buffer[:] = 99
    server.break_streams()
    np.testing.assert_array_equal(await session.step(row(1)), row(11))
    once(server)


async def test_giving_up():
    """When there was no server for as long as `retry_for` says, everybody who waits is told; the chunks keep their
    places, and the next call tries again."""
    with running() as server:
        client = quick(aio.Client(server.target, retry_for=10.0))
        session, gone = await client.session("sum"), await client.session("sum")
        await session.step(row(1))
    client.waits.clear()
    now = [0.0]
    link = await link_of(client)
    link._retry = dataclasses.replace(link._retry, clock=lambda: now[0], sleep=lambda seconds: _pass(now, seconds))
    calls = [session.step(row(2)), session.step(row(3)), gone.close(), session.reset_states(), client.session("sum")]
    tasks = [asyncio.ensure_future(call) for call in calls[:-1]] + [asyncio.ensure_future(calls[-1]._open())]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in results] == [rnnserve.Unavailable] * 5
    assert len({id(each) for each in results}) == 5
    assert 9 < now[0] <= 10.5
    assert "keeps its place" in str(results[0])
    assert session.next_step == 3
    assert not link.lanes.put_off
    with pytest.raises(rnnserve.Unavailable):
        await session.step(row(4))
    assert now[0] > 19
    await client.close()


async def _pass(now, seconds):
    now[0] += seconds
    await asyncio.sleep(0)


async def test_without_resume(server):
    """With `retry_for=0` a loss is told at once, and the next call starts where the server has the session."""
    async with aio.Client(server.target, timeout=30, retry_for=0) as client:
        sessions = await asyncio.gather(*[client.session("sum") for _ in range(3)])
        server.hold()
        tasks = [asyncio.create_task(session.step(row(1))) for session in sessions]
        await arrived(server, 3)
        server.break_streams()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in results] == [rnnserve.Unavailable] * 3
        outputs = await asyncio.gather(*[session.step(row(1)) for session in sessions])
        np.testing.assert_array_equal(outputs, [row(1)] * 3)
        assert [session.next_step for session in sessions] == [1, 1, 1]
        assert server.streams == 2
        await asyncio.gather(*[session.close() for session in sessions])
    assert not server.sessions


async def test_the_servers_hint_is_heeded(server, client):
    """A server that drains says how long to wait at least."""
    session = await client.session("sum")
    server.hold()
    step = asyncio.create_task(session.step(row(1)))
    await arrived(server, 1)
    server.end_streams(failure("DRAINING", UNAVAILABLE, retry_after=1.0))
    np.testing.assert_array_equal(await step, row(1))
    assert [1.0 <= wait <= 1.05 for wait in client.waits] == [True]


async def test_a_session_that_cannot_be_opened_now(server, client):
    """A session that the server will not open yet is asked for again; the others go on meanwhile."""
    first, second = await client.session("sum"), await client.session("sum")
    await asyncio.gather(first.step(row(1)), second.step(row(1)))
    server.hold()
    steps = [asyncio.create_task(each.step(row(1))) for each in (first, second)]
    await arrived(server, 4)
    server.failures += [failure("DRAINING", UNAVAILABLE) for _ in range(2)]
    server.break_streams()
    np.testing.assert_array_equal(await asyncio.gather(*steps), [row(2)] * 2)
    assert server.streams == 2


async def test_calls_are_made_again(server, client):
    """Calls that may be made twice are made again when the server is away, until their deadline; health says no."""
    away = failure("DRAINING", UNAVAILABLE)
    server.failures += [away, away]
    np.testing.assert_array_equal(await client.RNN("sum")(np.ones((1, 2, 3))), np.full((1, 3), 2))
    assert len(server.predicts) == 3
    later = failure("DRAINING", UNAVAILABLE, retry_after=20.0)
    server.failures.append(later)
    with pytest.raises(rnnserve.DeadlineExceeded, match="told to fail"):
        await client.RNN("sum")(np.ones((1, 2, 3)), timeout=10.0)
    server.failures.append(failure("DRAINING", UNAVAILABLE, retry_after=31.0))
    with pytest.raises(rnnserve.Unavailable):
        await client.RNN("sum")(np.ones((1, 2, 3)))


# Memory


async def test_memory_is_bounded(server):
    """At the limit steps wait in line, and go when there is room; one that gives up there was never sent."""
    async with aio.Client(server.target, timeout=30, replay_bytes=1) as client:
        one, two = await client.session("sum"), await client.session("sum")
        server.hold()
        first = asyncio.create_task(one.step(row(1)))
        await arrived(server, 1)
        lanes = (await link_of(client)).lanes
        held = lanes.account.held
        with pytest.raises(rnnserve.DeadlineExceeded, match="not sent") as caught:
            await two.step(row(5), timeout=0.05)
        assert "first_step" not in caught.value.metadata
        waiting = [asyncio.create_task(each.step(row(1))) for each in (one, two)]
        cancelled = asyncio.create_task(two.step(row(7)))
        reset = asyncio.create_task(one.reset_states([row(4)[None]]))
        await asyncio.sleep(0)
        assert len((await client._connection.links())._line) == 4
        cancelled.cancel()
        assert (lanes.account.held, one.next_step, two.next_step) == (held, 1, 0)
        server.release()
        np.testing.assert_array_equal(await first, row(1))
        np.testing.assert_array_equal(await asyncio.gather(*waiting), [row(2), row(1)])
        await reset
        np.testing.assert_array_equal(await one.step(row(1)), row(5))
        assert lanes.account.held == 0
        once(server)


@pytest.mark.parametrize("live", [False, True])
async def test_a_full_client_holds_streams_back(server, live):
    """At the limit a stream of steps takes no further frame, and goes on when there is room."""
    taken = []

    def plain():
        for number in range(20):
            taken.append(number)
            yield row(1)

    async def source():
        for frame in plain():
            yield frame

    async with aio.Client(server.target, timeout=30, replay_bytes=3000) as client:
        session = await client.session("sum")
        server.hold()
        outputs = session.stream(source() if live else plain(), window=15)
        first = asyncio.ensure_future(anext(outputs))
        await arrived(server, 3)
        await client.models()  # whatever was ready has run by now
        assert len(taken) <= 5
        server.release()
        np.testing.assert_array_equal(await first, row(1))
        assert [y[0] async for y in outputs] == list(range(2, 21))


@pytest.mark.parametrize("settings", [{"retry_for": -1.0}, {"replay_bytes": 0}, {"retry_for": float("nan")}])
def test_wrong_settings(settings):
    """Limits that make no sense are refused."""
    with pytest.raises(ValueError, match="must be"):
        aio.Client("nowhere", **settings)


# The log, and the client's end


async def test_the_log(server, client, caplog):
    """A loss and its end are told once each, with what they concerned."""
    caplog.set_level(logging.INFO, "rnnserve")
    session = await client.session("sum")
    server.hold()
    steps = [asyncio.create_task(session.step(row(1))) for _ in range(2)]
    await arrived(server, 2)
    server.break_streams()
    await asyncio.gather(*steps)
    lost, back = [each.getMessage() for each in caplog.records]
    assert lost.endswith("told to break; 2 chunks of 1 sessions wait")
    assert back.endswith("sending 2 chunks of 1 sessions")


async def _fall_asleep(asleep):
    asleep.set()
    await asyncio.Event().wait()


async def test_closing_in_the_pause():
    """A client that is closed while there is no server tells whoever waits, at once."""
    with running() as server:
        client = aio.Client(server.target)
        session = await client.session("sum")
    step = asyncio.create_task(session.step(row(1)))
    asleep = asyncio.Event()
    link = await link_of(client)
    link._retry = dataclasses.replace(link._retry, sleep=lambda seconds: _fall_asleep(asleep))
    await asleep.wait()
    await client.close()
    with pytest.raises(rnnserve.ClientClosed):
        await step


# The client for threads


@pytest.fixture
def threaded(server):
    with quick(rnnserve.Client(server.target, timeout=30)) as made:
        yield made


def test_threads(server, threaded):
    """Threads see a pause: every step is applied once, in order, whatever is lost."""
    sessions = [threaded.session("sum") for _ in range(8)]
    outputs = {}

    def work(number):
        outputs[number] = [float(sessions[number].step(row(1))[0]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for count in range(20, 160, 20):
        server.wait_for_applied(count)
        server.break_streams()
    for thread in threads:
        thread.join()
    assert all(outputs[number] == list(range(1, 21)) for number in range(8))
    once(server)


def test_a_stream_of_a_thread(server, threaded):
    """A stream of steps of a thread goes through losses."""

    def frames():
        for number in range(50):
            if number % 10 == 5:
                server.break_streams()
            yield row(1)

    with threaded.session("sum") as session, threaded.session_group("sum", 3) as group:
        assert [y[0] for y in session.stream(frames(), window=7)] == list(range(1, 51))
        np.testing.assert_array_equal(group.step(np.ones((3, 3))), np.ones((3, 3)))
    once(server)


def test_a_deadline_of_a_thread(server, threaded):
    """A call of a thread whose deadline passes keeps its place."""
    session = threaded.session("sum")
    server.hold()
    buffer = row(10)
    with pytest.raises(rnnserve.DeadlineExceeded, match="step 0 keeps its place"):
        session.step(buffer, timeout=0.05)
    buffer[:] = 99
    server.wait_for_rows(1)
    server.break_streams()
    np.testing.assert_array_equal(session.step(row(1)), row(11))
    once(server)


def test_a_full_client_holds_threads_back(server):
    """At the limit a thread's step waits, and one that gives up was never sent; a stream takes no further frame."""
    taken = []

    def frames():
        for number in range(20):
            taken.append(number)
            if number == 3:
                server.release()
            yield row(1)

    with rnnserve.Client(server.target, timeout=30, replay_bytes=1) as client:
        one, two = client.session("sum"), client.session("sum")
        server.hold()
        thread = threading.Thread(target=one.step, args=(row(1),))
        thread.start()
        server.wait_for_rows(1)
        with pytest.raises(rnnserve.DeadlineExceeded, match="not sent"):
            two.step(row(5), timeout=0.05)
        with pytest.raises(rnnserve.DeadlineExceeded, match="not sent"):
            list(two.stream(frames(), window=10, timeout=0.05))
        assert taken == [0]
        server.release()
        thread.join()
        assert [y[0] for y in two.stream(frames(), window=10)] == list(range(1, 21))
        once(server)


def test_the_policy_is_the_clients():
    """`retry_for` is the policy's limit."""
    client = aio.Client("nowhere", retry_for=None)
    assert client._connection.retry == Retry(None)
