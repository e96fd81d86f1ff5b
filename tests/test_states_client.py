"""State in hand, through both clients and a real server."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

import rnnserve
from rnnserve import aio
from rnnserve_server.api.sessions import SessionServicer
from serving import running_server


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture
def client(server):
    with rnnserve.Client(server.address, timeout=30) as made:
        yield made


@pytest.fixture
async def asyncio_client(server):
    async with aio.Client(server.address, timeout=30) as made:
        yield made


X = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)


def test_states_are_a_property(client):
    """They are nested as Keras nests them, and can be given to another session."""
    with client.session("lstm-32-64") as one, client.session("lstm-32-64", return_state=True) as two:
        for x in X[:4]:
            one.step(x)
        states = one.states
        assert [[state.shape for state in cell] for cell in states] == [[(1, 32)] * 2, [(1, 64)] * 2]
        two.states = states
        y, *after = two.step(X[4])
        np.testing.assert_array_equal(one.step(X[4]), y)
        for mine, theirs in zip(one.states, after, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        two.set_states(None)
        assert not np.any(two.get_states()[0][0])
        with pytest.raises(rnnserve.InvalidInput, match="nesting"):
            two.states = states[:1]


def test_forks(client):
    """One fork or many, from where the session is; each is a session that ends with its block."""
    with client.session("lstm-4") as session:
        for x in X[:3]:
            session.step(x)
        with session.fork() as fork:
            assert (fork.next_step, fork.options) == (3, session.options)
            others = session.fork(2)
            expected = [session.step(x) for x in X[3:]]
            for each in (fork, *others):
                np.testing.assert_array_equal([each.step(x) for x in X[3:]], expected)
            for each in others:
                each.close()
        with pytest.raises(rnnserve.SessionClosed):
            client.attach(fork.session_id)
        with pytest.raises(ValueError, match="at least 1"):
            session.fork(0)


def test_saved_and_restored(client, tmp_path):
    """A file, or bytes, is all that it takes to go on elsewhere."""
    path = tmp_path / "a.session"
    with client.session("lstm-4", return_sequences=True) as session:
        session(X[None, :5])
        session.save(path)
        blob, rest = session.export(), session(X[None, 5:])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    with running_server() as other, rnnserve.Client(other.address, timeout=30) as there:
        with there.restore(path) as moved, there.restore(blob, session_id="mine") as again:
            assert (moved.next_step, again.session_id) == (5, "mine")
            np.testing.assert_array_equal(moved(X[None, 5:]), rest)
            np.testing.assert_array_equal(again(X[None, 5:]), rest)
            with pytest.raises(rnnserve.SessionExists):
                there.restore(blob, session_id="mine")
        with pytest.raises(rnnserve.SessionClosed):
            there.attach("mine")
        path.write_bytes(blob[:-1])
        with pytest.raises(rnnserve.BlobInvalid, match="blob: expected"):
            there.restore(path)
        with pytest.raises(FileNotFoundError):
            there.restore(tmp_path / "none")


def test_back_and_forth(client):
    """After a rewind the session goes on from there; what it cannot go back to is a StepMismatch that says so."""
    with client.session("lstm-4") as session:
        said = list(session.stream(X[:6]))
        session.rewind(2)
        assert (session.next_step, session.info().step) == (2, 2)
        np.testing.assert_array_equal(list(session.stream(X[2:6])), said[2:])
        session.rewind(6)
        with pytest.raises(rnnserve.StepMismatch):
            session.rewind(7)
        session(X[None, 6:9])
        with pytest.raises(rnnserve.StepMismatch, match="cannot be taken back to 7"):
            session.rewind(7)
        assert session.next_step == 9
        with pytest.raises(ValueError, match="0 or more"):
            session.rewind(-1)
        session.step(X[0])


@pytest.mark.parametrize("lost", ["ForkSession", "ImportSession"])
def test_an_answer_that_is_lost(monkeypatch, lost):
    """What was done and not answered is not done again: the session that was made is found."""
    method, calls = getattr(SessionServicer, lost), []

    async def loses_the_first(self, request, context):
        calls.append(request)
        answer = await method(self, request, context)
        if len(calls) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        return answer

    monkeypatch.setattr(SessionServicer, lost, loses_the_first)
    with (
        running_server() as other,
        rnnserve.Client(other.address, timeout=30) as there,
        there.session("lstm-4") as session,
    ):
        session.step(X[0])
        with session.fork() if lost == "ForkSession" else there.restore(session.export()) as made:
            np.testing.assert_array_equal(made.step(X[1]), session.step(X[1]))
            assert len(list(there.sessions())) == len(calls) == 2


def test_a_lifetime(client):
    """A session, or each of a group, may be given an end."""
    with client.session("lstm-4", lifetime=1.5) as session, client.session_group("lstm-4", 2, lifetime=60) as group:
        assert (session.info().lifetime, client.attach(group.session_ids[1]).info().lifetime) == (1.5, 60)
        assert session.fork().info().lifetime == 1.5
    with client.session("lstm-4") as session:
        assert session.info().lifetime is None
    for wrong in (0, -1, float("nan"), 1e11):
        with pytest.raises(ValueError, match="lifetime"):
            client.session("lstm-4", lifetime=wrong)


async def test_the_same_for_asyncio(asyncio_client, tmp_path):
    """Every method, each behind the steps that were sent before it."""
    async with asyncio_client.session("lstm-4") as session, asyncio_client.session("lstm-4") as other:
        said = [y async for y in session.stream(X[:4])]
        await other.set_states(await session.get_states())
        fork = await session.fork()
        first, second = await session.fork(2)
        await session.save(tmp_path / "s")
        y = await session.step(X[4])
        async with asyncio_client.restore(tmp_path / "s") as restored:
            assert restored.next_step == 4
            for each in (other, fork, first, second, restored, await asyncio_client.restore(await first.export())):
                np.testing.assert_array_equal(await each.step(X[4]), y)
        async with fork:
            await fork.rewind(4)
            np.testing.assert_array_equal(await fork.step(X[4]), y)
        await session.rewind(1)
        np.testing.assert_array_equal(await session.step(X[1]), said[1])
        with pytest.raises(rnnserve.SessionClosed):
            await asyncio_client.attach(fork.session_id)
