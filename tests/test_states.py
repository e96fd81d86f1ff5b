"""State in hand: seen, set, forked, carried to another server and taken back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from house import FEATURES, AddingEngine, Clock, Notes, chunks, loaded, table
from rnnserve.codec import decode_named, encode_named
from rnnserve.errors import from_rpc_error
from rnnserve.v1 import inference_pb2, inference_pb2_grpc, session_pb2, session_pb2_grpc
from rnnserve_models.load import load_model
from rnnserve_models.options import LayerOptions
from rnnserve_server.blob import Exported, pack, unpack
from rnnserve_server.config import Settings
from rnnserve_server.core import Core
from rnnserve_server.errors import BlobInvalid, SessionAged
from rnnserve_server.replay import Limits
from rnnserve_server.repository import Repository
from rnnserve_server.resets import ResetRules
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.worker import Worker
from serving import ZOO, running_server


class Served:
    """A server and stubs for it."""

    def __init__(self, server, channel):
        self.server = server
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)

    def create(self, model="lstm-4", **config):
        config = session_pb2.SessionConfig(model=model, **config)
        return self.sessions.CreateSession(session_pb2.CreateSessionRequest(config=config)).session.session_id

    def step(self, session_id, x, **fields):
        """A chunk [batch, time, features]: its output."""
        request = inference_pb2.PredictRequest(session_id=session_id, inputs=encode_named({"input": x}), **fields)
        return decode_named(self.inference.Predict(request, timeout=30).outputs)["output"]

    def states(self, session_id):
        response = self.sessions.GetState(session_pb2.GetStateRequest(session_id=session_id))
        return response.session.step, decode_named(response.states)

    def set(self, session_id, states):
        request = session_pb2.ResetSessionRequest(session_id=session_id, states=encode_named(states))
        return self.sessions.ResetSession(request)

    def fork(self, session_id, **fields):
        request = session_pb2.ForkSessionRequest(session_id=session_id, **fields)
        return list(self.sessions.ForkSession(request).sessions)

    def export(self, session_id):
        return self.sessions.ExportSession(session_pb2.ExportSessionRequest(session_id=session_id)).blob

    def bring(self, blob, session_id=""):
        request = session_pb2.ImportSessionRequest(blob=blob, session_id=session_id)
        return self.sessions.ImportSession(request).session

    def rewind(self, session_id, step):
        request = session_pb2.RewindSessionRequest(session_id=session_id, step=step)
        return self.sessions.RewindSession(request).session


def repository(*more):
    made = Repository(ZOO)
    for model in (loaded(AddingEngine()), *(load_model(ZOO / name / "1") for name in ("lstm-4", "lstm-32-64")), *more):
        made.put(model.name, model.version, model)
    return made


@contextmanager
def serving(made=None, **settings):
    with running_server(made or repository(), **settings) as server, grpc.insecure_channel(server.address) as channel:
        yield Served(server, channel)


@contextmanager
def refused(reason, match=""):
    """The call inside fails with a reason of error.proto."""
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    error = from_rpc_error(caught.value)
    assert error.reason == reason
    assert match in str(error)
    caught.metadata = error.metadata


@pytest.fixture(scope="module")
def served():
    with serving() as here:
        yield here


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = noise(12, 2, 3, 5)  # chunks of 3 steps for 2 rows


def test_states_are_seen_and_set(served):
    """What is seen is by name, [batch, ...], with the step of the same moment; what is set goes on from there."""
    one, two = served.create(batch_size=2), served.create(batch_size=2)
    step, states = served.states(one)
    assert (step, {name: state.any() for name, state in states.items()}) == (0, {"h": False, "c": False})
    y = served.step(one, X[0])
    step, states = served.states(one)
    assert (step, states["c"].shape) == (3, (2, 4))
    np.testing.assert_array_equal(states["h"], y)
    served.set(two, states)
    np.testing.assert_array_equal(served.step(two, X[1]), served.step(one, X[1]))
    with refused("SESSION_UNKNOWN"):
        served.states("nobody")


def test_forks_go_their_own_ways(served):
    """Forks have the session's step, options and states, and from then on each is a session like any other."""
    parent = served.create(batch_size=2, options={"return_sequences": True}, idle_lifetime={"seconds": 99})
    alone = served.create(batch_size=2, options={"return_sequences": True})
    first = served.step(parent, X[0])
    np.testing.assert_array_equal(served.step(alone, X[0]), first)
    made = served.fork(parent, session_ids=["left", "right"])
    assert [each.session_id for each in made] == ["left", "right"]
    assert all((each.step, each.batch_size, each.idle_lifetime.seconds) == (3, 2, 99) for each in made)
    assert all(each.options.return_sequences for each in made)
    left = served.step("left", X[1])
    np.testing.assert_array_equal(served.step("left", X[1], first_step=3), left)  # its window is its own
    np.testing.assert_array_equal(served.step(alone, X[1]), left)
    np.testing.assert_array_equal(served.step("right", X[2]), served.step(parent, X[2]))
    with refused("STEP_BEHIND"):
        served.step("right", X[0], first_step=0)
    assert [each.step for each in served.fork(parent)] == [6]
    assert len(served.fork(parent, count=3)) == 3


def test_all_forks_are_made_or_none(served):
    """An id that is taken, one named twice, a wrong number of ids, or too little room: nothing is made."""
    with serving(max_sessions=4) as here:
        parent = here.create(session_id="parent")
        with refused("SESSION_EXISTS"):
            here.fork(parent, session_ids=["new", "parent"])
        for wrong in ({"session_ids": ["new", "new"]}, {"session_ids": ["new"], "count": 2}, {"session_ids": ["a b"]}):
            with refused("INVALID_REQUEST"):
                here.fork(parent, **wrong)
        with refused("SESSIONS_FULL"):
            here.fork(parent, count=4)
        with refused("SESSION_UNKNOWN"):
            here.fork("nobody")
        with refused("SESSION_UNKNOWN"):
            here.states("new")
        assert len(here.fork(parent, count=3)) == 3


def test_everything_waits_for_its_turn():
    """What is asked of a session behind a chunk that runs sees that chunk."""
    model = loaded(engine := AddingEngine())
    with serving(repository(model), inline_seconds=0.0) as here:
        session = here.create("adder")
        here.step(session, np.ones((1, 1, FEATURES), np.float32))
        worker = here.server.call(lambda: here.server.server.core.worker(model))
        stub, queued = here.sessions, 1
        engine.gate.clear()
        engine.running.clear()
        x = encode_named({"input": np.ones((1, 1, FEATURES), np.float32)})
        chunk = here.inference.Predict.future(inference_pb2.PredictRequest(session_id=session, inputs=x))
        assert engine.running.wait(30)
        asked = []
        for method, request in (
            (stub.GetState, session_pb2.GetStateRequest(session_id=session)),
            (stub.ForkSession, session_pb2.ForkSessionRequest(session_id=session)),
            (stub.ExportSession, session_pb2.ExportSessionRequest(session_id=session)),
            (stub.RewindSession, session_pb2.RewindSessionRequest(session_id=session, step=1)),
            (stub.GetState, session_pb2.GetStateRequest(session_id=session)),
        ):
            asked.append(method.future(request))
            queued += 1
            while here.server.call(lambda: len(worker)) < queued:
                pass
        assert not any(each.done() for each in asked)
        engine.gate.set()
        seen, forked, exported, rewound, after = [each.result(30) for each in asked]
        assert chunk.result(30).step == 2
        assert (seen.session.step, decode_named(seen.states)["sum"].tolist()) == (2, [[2, 2]])
        assert [each.step for each in forked.sessions] == [2]
        assert unpack(exported.blob).states["sum"].tolist() == [[2, 2]]
        assert (rewound.session.step, after.session.step) == (1, 1)
        assert decode_named(after.states)["sum"].tolist() == [[1, 1]]


def test_a_session_moves_to_another_server(served, tmp_path):
    """What one server exports goes on on another, bit for bit, as often as it is imported."""
    session = served.create("lstm-32-64", batch_size=2, options={"return_sequences": True})
    for x in X[:4]:
        served.step(session, x)
    blob = served.export(session)
    here = [served.step(session, x) for x in X[4:]]
    with serving(store=f"sqlite:///{tmp_path / 's.db'}", max_idle_lifetime=60.0) as there:
        first, second = there.bring(blob), there.bring(blob, "mine")
        assert (first.step, second.session_id, first.idle_lifetime.seconds) == (12, "mine", 60)
        for moved in (first.session_id, "mine"):
            np.testing.assert_array_equal([there.step(moved, x) for x in X[4:]], here)
        with refused("SESSION_EXISTS"):
            there.bring(blob, "mine")


def test_a_blob_for_another_model(served):
    """A session goes on with the very model it had, or not at all."""
    session = served.create("adder")
    blob = served.export(session)
    with serving(repository(replace(loaded(), digest="sha256:other"))) as there:
        with refused("MODEL_CHANGED", "sha256:other"):
            there.bring(blob)
        for model, version, reason in (("none", "1", "MODEL_UNKNOWN"), ("adder", "7", "VERSION_UNKNOWN")):
            with refused(reason):
                there.bring(pack(replace(unpack(blob), model=model, version=version), 0.0))
    for wrong, reason in (
        ({"states": {"sum": np.zeros((1, 3), np.float32)}}, "INVALID_INPUT"),
        ({"states": {}}, "INVALID_INPUT"),
        ({"options": {"stateful": False}}, "INVALID_REQUEST"),
        ({"options": {"other": True}}, "BLOB_INVALID"),
        ({"batch_size": 1 << 40}, "INVALID_INPUT"),
        ({"idle_lifetime": -1.0}, "BLOB_INVALID"),
        ({"idle_lifetime": float("nan")}, "BLOB_INVALID"),
        ({"batch_size": 0}, "BLOB_INVALID"),
    ):
        with refused(reason):
            served.bring(pack(replace(unpack(blob), **wrong), 0.0))
    with refused("BLOB_INVALID"):
        served.bring(blob[:-1])


EXPORTED = Exported(
    "m",
    "1",
    "sha256:0",
    2,
    vars(LayerOptions(stateful=True)),
    7,
    60.0,
    None,
    Limits(4, 100),
    {"h": noise(2, 3), "n": np.arange(2)},
)
BLOB = pack(EXPORTED, 1.7e9)


def test_a_blob_says_what_it_is():
    """It is a safetensors file, and what is read is what was written."""
    found = unpack(BLOB)
    assert replace(found, states={}) == replace(EXPORTED, states={})
    for name, state in EXPORTED.states.items():
        np.testing.assert_array_equal(found.states[name], state)
        assert found.states[name].dtype == state.dtype


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_blob_with_a_wrong_byte_is_refused(place, change):
    """Whichever byte is another."""
    wrong = bytearray(BLOB)
    wrong[place] ^= change
    with pytest.raises(BlobInvalid):
        unpack(bytes(wrong))


@given(st.binary(max_size=200) | st.integers(0, len(BLOB)).map(lambda n: BLOB[:n] or b"") | st.just(BLOB + b"0"))
def test_what_is_no_blob_is_refused(wrong):
    """Whatever comes, cut or made up: BlobInvalid, and nothing else."""
    if wrong != BLOB:
        with pytest.raises(BlobInvalid):
            unpack(wrong)


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b"[]", b"{}", b'{"__metadata__": 1}', b'{"__metadata__": {"format": "rnnserve-session"}}'],
)
def test_a_blob_of_a_strange_header(header):
    with pytest.raises(BlobInvalid):
        unpack(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("key", ["model", "version", "batch_size", "step", "lifetime", "replay_chunks"])
@pytest.mark.parametrize("value", [b"-1e999", b"1", b"null", b"[]", b'{"a": 1}'])
def test_what_is_no_text_is_refused(key, value):
    """Though the checksum is right. A number without an end was once an error of the server's own."""
    metadata = {"format": "rnnserve-session", "version": "1", "checksum": "0" * 64, key: "here"}
    header = json.dumps({"__metadata__": metadata}).encode().replace(b'"here"', value)
    wrong = len(header).to_bytes(8, "little") + header
    wrong = wrong.replace(b"0" * 64, hashlib.sha256(wrong).hexdigest().encode())
    with pytest.raises(BlobInvalid, match=f"texts.*{key}"):
        unpack(wrong)


@pytest.mark.parametrize("key", ["format", "version", "model", "options", "checksum"])
def test_half_a_character_is_refused(key):
    """JSON can say a surrogate on its own, which is in no text that can be sent or stored: refused wherever it is."""
    metadata = {"format": "rnnserve-session", "version": "1", "checksum": "0" * 64} | {key: "\ud800"}
    header = json.dumps({"__metadata__": metadata}).encode()
    wrong = len(header).to_bytes(8, "little") + header
    wrong = wrong.replace(b"0" * 64, hashlib.sha256(wrong).hexdigest().encode())
    with pytest.raises(BlobInvalid) as refused:
        unpack(wrong)
    str(refused.value).encode()


def test_a_newer_blob_is_refused(monkeypatch):
    """The error says which version is understood, and that a newer server wrote it."""
    monkeypatch.setattr("rnnserve_server.blob.VERSION", 3)
    newer = pack(replace(EXPORTED, rules=ResetRules(9)), 0.0)
    monkeypatch.undo()
    with pytest.raises(BlobInvalid, match="a newer server"):
        unpack(newer)


def test_back_and_forth(served):
    """A session that was taken back gives the same again; what it did since is forgotten, and may be done otherwise."""
    session = served.create(batch_size=2)
    said = [served.step(session, x) for x in X[:6]]
    assert served.rewind(session, 18).step == 18
    assert served.rewind(session, 6).step == 6
    assert served.states(session)[0] == 6
    with refused("STEP_AHEAD"):
        served.step(session, X[3], first_step=9)
    np.testing.assert_array_equal(served.step(session, X[1], first_step=3), said[1])  # still remembered
    np.testing.assert_array_equal([served.step(session, x) for x in X[2:6]], said[2:])
    served.rewind(session, 0)
    other = served.create(batch_size=2)
    for x in X[6:9]:
        np.testing.assert_array_equal(served.step(session, x), served.step(other, x))
    with refused("STEP_CONFLICT"):
        served.step(session, X[1], first_step=3)
    with refused("STEP_AHEAD"):
        served.rewind(session, 10)
    with refused("STEP_BEHIND", "at 0, 3, 6") as told:
        served.rewind(session, 4)
    assert told.metadata["oldest_step"] == "0"


def test_a_reset_is_taken_back_too(served):
    """Where a chunk began are the states that it began with, whatever was set before or after."""
    session, given = served.create(batch_size=2), {"h": noise(2, 4, seed=5), "c": noise(2, 4, seed=6)}
    served.step(session, X[0])
    served.set(session, given)
    y = served.step(session, X[1])
    served.set(session, {})
    served.rewind(session, 3)
    np.testing.assert_array_equal(served.states(session)[1]["h"], given["h"])
    np.testing.assert_array_equal(served.step(session, X[1]), y)


def test_beyond_the_window(served):
    """What the window has forgotten cannot be gone back to, and the error says what can."""
    with serving(replay_chunks=2) as here:
        session = here.create(batch_size=2)
        for x in X[:4]:
            here.step(session, x)
        with refused("STEP_BEHIND") as told:
            here.rewind(session, 3)
        assert told.metadata["oldest_step"] == "6"
        assert here.rewind(session, 6).step == 6
    with serving(replay_chunks=0) as here:
        session = here.create(batch_size=2)
        here.step(session, X[0])
        with refused("STEP_BEHIND", "of no chunk"):
            here.rewind(session, 0)


@given(st.data())
async def test_chunks_that_ran_together_are_taken_back_one_by_one(data):
    """Wherever a chunk began that is in the window, and however it was run and with whom, the states from there can be
    told, and the chunks from there on give the same.
    """
    replies = data.draw(st.integers(1, 5))
    model, sessions = loaded(AddingEngine()), table(Clock())
    worker = Worker(model, Scheduler(64, 8), sessions, clock=Clock(), on_progress=lambda: None)
    options = LayerOptions(stateful=True, return_sequences=True)
    group, slots, _ = sessions.create_many(
        model, 2, options, 3, initial_states=None, idle_lifetime=60.0, replay=Limits(replies, 1 << 20)
    )
    sums = {(slot, 0): np.zeros((2, FEATURES), np.float32) for slot in slots.tolist()}  # where each chunk began
    ends = dict.fromkeys(slots.tolist(), 0)
    value = 0
    for _ in range(data.draw(st.integers(1, 6))):  # bursts
        for _ in range(data.draw(st.integers(1, 5))):  # of chunks that are sent ahead
            chosen = data.draw(st.lists(st.sampled_from(slots.tolist()), min_size=1, unique=True))
            steps, value = data.draw(st.integers(1, 3)), value + 1
            x = np.full((steps, len(chosen) * 2, FEATURES), value, np.float32)
            worker.submit(chunks(group, chosen, x=x, first_steps=[ends[slot] for slot in chosen], sink=Notes()))
            for slot in chosen:
                sums[slot, ends[slot] + steps] = sums[slot, ends[slot]] + steps * value
                ends[slot] += steps
        await worker.settle()
    for slot in slots.tolist():
        places = group.window.of(group, slot)
        assert len(places) == min(replies, len([at for each, at in sums if each == slot]) - 1)
        for round_, index in places:
            states, ran = round_.began(index)
            if ran is not None:
                _, states = model.engine.run(ran.inputs, ran.lengths, states)
            np.testing.assert_array_equal(states["sum"], sums[slot, int(round_.first_steps[index])])
    await worker.close()


@contextmanager
def crashed(served, tmp_path, name):
    """A server on what the store holds now, as if the other had been killed."""
    shutil.copytree(tmp_path / "live", tmp_path / name)
    with serving(store=f"sqlite:///{tmp_path / name / 's.db'}") as again:
        yield again


def test_what_was_done_survives_a_crash(tmp_path):
    """Once answered, a fork, a reset, a rewind and an import are in the store."""
    (tmp_path / "live").mkdir()
    with serving(store=f"sqlite:///{tmp_path / 'live' / 's.db'}") as here:
        session = here.create(batch_size=2, session_id="parent")
        said = [here.step(session, x) for x in X[:4]]
        here.fork(session, session_ids=["fork"])
        with crashed(here, tmp_path, "forked") as again:
            assert again.states("fork")[0] == 12
            np.testing.assert_array_equal(again.states("fork")[1]["c"], here.states(session)[1]["c"])
        here.rewind(session, 6)
        with crashed(here, tmp_path, "rewound") as again:
            assert again.states(session)[0] == 6
            np.testing.assert_array_equal(again.step(session, X[1], first_step=3), said[1])
            with refused("STEP_BEHIND", "came from the store") as told:
                again.rewind(session, 3)
            assert "oldest_step" not in told.metadata
            np.testing.assert_array_equal([again.step(session, x) for x in X[2:4]], said[2:])
            assert again.rewind(session, 6).step == 6
        here.set(session, {"h": noise(2, 4), "c": noise(2, 4)})
        here.bring(here.export(session), "moved")
        with crashed(here, tmp_path, "moved") as again:
            for each in (session, "moved"):
                assert again.states(each)[0] == 6
                np.testing.assert_array_equal(again.states(each)[1]["h"], noise(2, 4))
        with refused("SESSION_EXISTS"):
            here.bring(here.export(session), "fork")
        np.testing.assert_array_equal(here.step("fork", X[4]), here.step("fork", X[4], first_step=12))


def test_forks_of_which_the_store_has_one_already(tmp_path):
    """Ids are unique in the store: when one is another server's, no fork is made."""
    store = f"sqlite:///{tmp_path / 's.db'}"
    with serving(store=store) as one, serving(store=store) as two:
        two.create(session_id="theirs")
        parent = one.create()
        with refused("SESSION_EXISTS", "theirs"):
            one.fork(parent, session_ids=["ours", "theirs"])
        with refused("SESSION_CLOSED"):
            two.states("ours")
        assert two.states("theirs")[0] == 0


def test_lifetimes(tmp_path):
    """What a session asks for is cut to the server's maximum, is shown, and is inherited by what is made of it."""
    store = f"sqlite:///{tmp_path / 's.db'}"
    with serving(store=store, max_lifetime=50.0) as here:
        for asked, given in ((None, 50), (20, 20), (80, 50)):
            session = here.create(**({} if asked is None else {"lifetime": {"seconds": asked}}))
            shown = here.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session)).session
            assert shown.lifetime.seconds == given
            assert here.fork(session)[0].lifetime.seconds == given
            assert here.bring(here.export(session)).lifetime.seconds == given
        for wrong in (0, -1, 10**11):
            with refused("INVALID_REQUEST"):
                here.create(lifetime={"seconds": wrong})
    with serving(store=store) as again:
        listed = again.sessions.ListSessions(session_pb2.ListSessionsRequest()).sessions
        assert sorted(each.lifetime.seconds for each in listed) == [20] * 3 + [50] * 6
        assert again.states(session)[0] == 0
        assert not again.bring(again.export(again.create())).HasField("lifetime")


def test_a_lifetime_goes_on_in_the_store(tmp_path):
    """It is counted from when the session was made, whatever server has it, and its end is told apart."""
    store, now = f"sqlite:///{tmp_path / 's.db'}", [1e9]

    @contextmanager
    def at(seconds):
        now[0] = 1e9 + seconds
        settings = Settings(models=ZOO, port=0, store=store)
        core = Core(settings, repository(), clock=lambda: now[0] - 5e8, wall_clock=lambda: now[0])
        yield core

    async def run():
        with at(0) as core:
            await core.open_store()
            for name in ("taken", "left"):
                group, slots, _ = await core.create_sessions("adder", "", 1, {}, lifetime=100.0, session_ids=[name])
                await core.keep(group, slots)
            await core.close()
        with at(90) as core:
            await core.open_store()
            assert (await core.session("taken")).lifetime == 100
            assert await core.sweep() == 0
            now[0] += 11
            assert await core.sweep() == 1
            for name in ("taken", "left"):
                with pytest.raises(SessionAged):
                    await core.session(name)
            await core.close()
        with at(102) as core:
            await core.open_store()
            with pytest.raises(SessionAged):
                await core.session("taken")
            await core.close()

    asyncio.run(run())


def test_a_session_may_ask_for_a_smaller_window(served):
    """What it asks for is shown, and no more than the server's; its forks and exports have the same."""
    session = served.create(batch_size=2, replay_window={"max_chunks": 2})
    shown = served.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session)).session
    assert (shown.replay_window.max_chunks, shown.replay_window.max_bytes) == (2, 1 << 20)
    for x in X[:4]:
        served.step(session, x)
    served.step(session, X[2], first_step=6)
    with refused("STEP_BEHIND"):
        served.step(session, X[1], first_step=3)
    assert served.fork(session)[0].replay_window == served.bring(served.export(session)).replay_window
    assert served.fork(session)[0].replay_window == shown.replay_window
    large = served.create(replay_window={"max_chunks": 999, "max_bytes": 7})
    shown = served.sessions.GetSession(session_pb2.GetSessionRequest(session_id=large)).session
    assert (shown.replay_window.max_chunks, shown.replay_window.max_bytes) == (16, 7)
    none = served.create(batch_size=2, replay_window={"max_chunks": 0})
    served.step(none, X[0])
    with refused("STEP_BEHIND"):
        served.step(none, X[0], first_step=0)
