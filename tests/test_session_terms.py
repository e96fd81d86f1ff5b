"""What a new session is given through both clients: lifetimes, a replay window and reset rules; and groups' states."""

from __future__ import annotations

import numpy as np
import pytest

import rnnserve
from house import AddingEngine, loaded
from rnnserve import ReplayWindow, aio
from rnnserve_server.repository import Repository
from serving import ZOO, running_server

TERMS = {
    "idle_lifetime": 50.0,
    "lifetime": 70.0,
    "replay_window": ReplayWindow(3, 4096),
    "reset_every": 4,
    "reset_after_masked": 2,
}
X = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
SEQUENCES = np.random.default_rng(2).normal(size=(3, 1, 6, 5)).astype(np.float32)  # [sessions, batch, time, features]


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


def shown(info):
    return {name: getattr(info, name) for name in TERMS}


def test_every_way_to_a_session_takes_them(client):
    """A session, a group and a stateful layer: the server holds what was asked for, and so do a fork and a restored
    one.
    """
    with client.session("lstm-4", **TERMS) as session, client.session_group("lstm-4", 2, **TERMS) as group:
        with session.fork() as fork, client.restore(session.export()) as restored:
            for each in (session, fork, restored):
                assert shown(each.info()) == TERMS
        assert [shown(each) for each in client.sessions() if each.session_id in group.session_ids] == [TERMS, TERMS]
    before = {each.session_id for each in client.sessions()}
    with client.RNN("lstm-4", stateful=True, **TERMS) as layer:
        layer(X[None])
        assert [shown(each) for each in client.sessions() if each.session_id not in before] == [TERMS]


async def test_every_way_to_a_session_takes_them_asyncio(asyncio_client):
    """The same under asyncio."""
    client = asyncio_client
    async with client.session("lstm-4", **TERMS) as session, client.session_group("lstm-4", 2, **TERMS) as group:
        assert shown(await session.info()) == TERMS
        found = [each async for each in client.sessions() if each.session_id in group.session_ids]
        assert [shown(each) for each in found] == [TERMS, TERMS]
    before = {each.session_id async for each in client.sessions()}
    async with client.RNN("lstm-4", stateful=True, **TERMS) as layer:
        await layer(X[None])
        found = [each async for each in client.sessions() if each.session_id not in before]
        assert [shown(each) for each in found] == [TERMS]


def test_what_is_not_given_is_the_servers(client):
    with client.session("lstm-4", replay_window=(2, None)) as session:
        info = session.info()
        assert info.replay_window == ReplayWindow(2, 1 << 20)
        assert (info.lifetime, info.reset_every, info.reset_after_masked) == (None, None, None)


@pytest.mark.parametrize(
    ("term", "value"),
    [
        ("lifetime", 0.0),
        ("idle_lifetime", -1.0),
        ("replay_window", (-1, None)),
        ("replay_window", (None, 0)),
        ("reset_every", 0),
        ("reset_after_masked", 1 << 32),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_sent(client, term, value):
    with pytest.raises(ValueError, match=term):
        client.session("lstm-4", **{term: value})


def test_a_session_is_reset_by_itself(client):
    """Every four steps it starts anew, and after two masked ones; a stateful layer does too."""
    with client.session("lstm-4") as plain, client.session("lstm-4", reset_every=4) as ruled:
        expected = []
        for at, x in enumerate(X):
            if at % 4 == 0:
                plain.reset_states()
            expected.append(plain.step(x))
        np.testing.assert_array_equal([ruled.step(x) for x in X], expected)
    mask = np.array([[True, True, False, False, True, True]])
    with client.RNN("lstm-4", stateful=True, reset_after_masked=2) as layer, client.session("lstm-4") as plain:
        np.testing.assert_array_equal(layer(X[None, :6], mask=mask), plain(X[None, 4:6]))


def test_a_model_that_wants_chunks_whole_takes_no_rules():
    """The error names the field and the way around, and no session is made."""

    class Whole(AddingEngine):
        whole = True

    repository = Repository(ZOO)
    repository.put("adder", "1", loaded(Whole()))
    with running_server(repository) as server, rnnserve.Client(server.address, timeout=30) as client:
        with pytest.raises(rnnserve.OptionUnsupported, match=r"reset_rules: .* between chunks"):
            client.session("adder", reset_every=3)
        assert not list(client.sessions())


def test_a_group_has_its_states_in_hand(client, tmp_path):
    """Seen, set, forked, rewound, saved and restored, rolled out: each session of a group as a session alone."""
    alone = [client.session("lstm-4", return_sequences=True) for _ in range(3)]
    with client.session_group("lstm-4", 3, return_sequences=True) as group:
        first = group(SEQUENCES)
        for session, x, y in zip(alone, SEQUENCES, first, strict=True):
            np.testing.assert_array_equal(session(x), y)
        for mine, theirs in zip(group.states, zip(*[each.states for each in alone], strict=True), strict=True):
            assert mine.shape == (3, 1, 4)
            np.testing.assert_array_equal(mine, theirs)
        states, blobs = group.states, group.export()
        group.save(tmp_path / "group")
        with pytest.raises(FileExistsError):
            group.save(tmp_path / "group")
        with group.fork() as fork:
            assert fork.next_steps == [6, 6, 6]
            second = fork(SEQUENCES)
            np.testing.assert_array_equal(group(SEQUENCES), second)
            assert not np.array_equal(first, second)
        group.rewind(6)
        np.testing.assert_array_equal(group(SEQUENCES), second)
        group.rewind([0, 6, 6])
        np.testing.assert_array_equal(group(SEQUENCES), [first[0], second[1], second[2]])
        group.states = states
        np.testing.assert_array_equal(group(SEQUENCES), second)
        for source in (blobs, tmp_path / "group"):
            with client.restore_group(source) as restored:
                np.testing.assert_array_equal(restored(SEQUENCES), second)
    for session in alone:
        session.close()


def test_a_group_rolls_out(client):
    """Each session by its own forecasts, from where it is or from what it is given."""
    years = np.array([[10.0], [50.0], [150.0]], np.float32)
    with client.session_group("sunspots-lstm", 3) as group:
        group.step(years)
        rolled = group.rollout(4)
        alone = []
        for year in years:
            with client.session("sunspots-lstm") as session:
                session.step(year)
                alone.append(session.rollout(4).outputs)
        np.testing.assert_array_equal(rolled.outputs, alone)
        assert group.rollout(2, years[:, None, None]).outputs.shape == (3, 1, 2, 1)
        with pytest.raises(rnnserve.InvalidInput, match="leading axis of 3"):
            group.rollout(2, years[:2, None, None])


def test_a_group_error_tells_which(client):
    """What is done with a group that has lost a session fails for that one, by its place, and makes nothing."""
    with client.session_group("lstm-4", 3) as group:
        group(SEQUENCES)
        with client.attach(group.session_ids[1]) as other:
            other.close()
        before = len(list(client.sessions()))
        for action in (group.get_states, group.export, group.fork, lambda: group.rewind(0)):
            with pytest.raises(rnnserve.GroupError, match="1 of 3") as caught:
                action()
            assert {place: type(error) for place, error in caught.value.errors.items()} == {1: rnnserve.SessionClosed}
        assert len(list(client.sessions())) == before
        with pytest.raises(rnnserve.InvalidInput, match="leading axis"):
            group.set_states([np.zeros((2, 1, 4), np.float32)] * 2)


def test_sessions_of_two_kinds_are_no_group(client):
    with client.session("lstm-4") as one, client.session("lstm-32-64") as other:
        with pytest.raises(rnnserve.InvalidInput, match="sessions like"):
            client.restore_group([one.export(), other.export()])
        assert {each.session_id for each in client.sessions()} == {one.session_id, other.session_id}
        with pytest.raises(ValueError, match="at least one"):
            client.restore_group([])


async def test_a_group_has_its_states_in_hand_asyncio(asyncio_client, tmp_path):
    """The same under asyncio."""
    client = asyncio_client
    async with client.session_group("lstm-4", 3, return_sequences=True) as group:
        first = await group(SEQUENCES)
        states = await group.get_states()
        await group.save(tmp_path / "group")
        async with await group.fork() as fork:
            second = await fork(SEQUENCES)
        await group.rewind(0)
        np.testing.assert_array_equal(await group(SEQUENCES), first)
        await group.set_states(states)
        np.testing.assert_array_equal(await group(SEQUENCES), second)
        async with client.restore_group(tmp_path / "group") as restored:
            np.testing.assert_array_equal(await restored(SEQUENCES), second)
        assert len(await group.export()) == 3
    async with client.session_group("sunspots-lstm", 2) as group:
        await group.step(np.array([[10.0], [50.0]], np.float32))
        assert (await group.rollout(3)).outputs.shape == (2, 1, 3, 1)
