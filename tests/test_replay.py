"""The replay window: what was answered is answered again, and nothing is applied twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from house import FEATURES, AddingEngine, Clock, Notes, chunks, loaded, table
from rnnserve_models.load import load_model
from rnnserve_models.options import LayerOptions
from rnnserve_server import replay
from rnnserve_server.replay import Limits, _Columns
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.worker import Worker
from serving import ZOO

SEQUENCES = LayerOptions(stateful=True, return_sequences=True)


class House:
    """A worker of sessions that remember."""

    def __init__(self, replies=4, nbytes=1 << 20):
        self.engine, self.clock, self.limits = AddingEngine(), Clock(), Limits(replies, nbytes)
        self.model, self.sessions = loaded(self.engine), table(self.clock)
        self.worker = Worker(self.model, Scheduler(64, 32), self.sessions, clock=self.clock, on_progress=lambda: None)

    def open(self, count=1, batch_size=1):
        group, slots, _ = self.sessions.create_many(
            self.model,
            batch_size,
            SEQUENCES,
            count,
            initial_states=None,
            idle_lifetime=60.0,
            replay=self.limits,
        )
        return group, slots.tolist()

    async def step(self, group, slots, first_steps, *, x=None, steps=1, value=1.0, mask=None):
        """Sends a chunk to each session, and waits for what they are told."""
        sink = Notes()
        if x is None:
            x = np.full((steps, len(slots) * group.batch_size, FEATURES), value, np.float32)
        self.worker.submit(chunks(group, slots, x=x, first_steps=first_steps, sink=sink, mask=mask))
        await self.idle()
        return sink

    async def idle(self):
        await self.worker.settle()


@pytest.fixture
async def house():
    house = House()
    yield house
    await house.worker.close()


async def test_the_same_chunk_gets_the_same_answer(house):
    """A chunk that is sent again, with whatever others, is answered as it was, bit for bit, and not applied again."""
    group, slots = house.open(3)
    rng = np.random.default_rng(1)
    xs = [rng.normal(size=(2, 3, FEATURES)).astype(np.float32) for _ in range(3)]
    said = [await house.step(group, slots, [2 * i] * 3, x=x) for i, x in enumerate(xs)]
    runs, state = len(house.engine.calls), group.arena.gather(np.array(slots))["sum"].tolist()
    again = [await house.step(group, slots[1:2], [2 * i], x=x[:, 1:2]) for i, x in enumerate(xs)]
    for first, second in zip(said, again, strict=True):
        assert second.results[0][1].tobytes() == first.results[0][1][:, 1:2].tobytes()
        assert second.first_steps == [[first.first_steps[0][1]]]
    assert len(house.engine.calls) == runs
    assert group.arena.gather(np.array(slots))["sum"].tolist() == state
    assert group.step[slots].tolist() == [6, 6, 6]


async def test_what_was_lost_and_what_is_new_may_be_sent_together(house):
    """After a lost connection a client sends all that was not answered: what was applied is answered, the rest is run,
    and the session ends up where it would be without the loss.
    """
    group, (slot,) = house.open()
    for step in range(2):
        await house.step(group, [slot], [step], value=step + 1)
    sink = Notes()
    for step in range(4):
        x = np.full((1, 1, FEATURES), step + 1, np.float32)
        house.worker.submit(chunks(group, [slot], x=x, first_steps=[step], sink=sink, tags=[step]))
    await house.idle()
    assert [y[0, 0, 0] for _, y in sink.results] == [1, 3, 6, 10]
    assert (sink.errors, int(group.step[slot])) == ({}, 4)


async def test_another_chunk_for_an_old_step_is_a_conflict(house):
    """Other numbers, another length or another mask at a step that was answered: an error, and nothing changes."""
    group, (slot,) = house.open()
    await house.step(group, [slot], [0], steps=2)
    mask = np.array([[True], [False]])
    for sink in (
        await house.step(group, [slot], [0], steps=2, value=2),
        await house.step(group, [slot], [0], steps=1),
        await house.step(group, [slot], [0], steps=2, mask=mask),
    ):
        assert (sink.errors[0].reason, sink.errors[0].metadata["expected_step"]) == ("STEP_CONFLICT", "2")
    inside = await house.step(group, [slot], [1])
    assert inside.errors[0].reason == "STEP_BEHIND"  # no chunk began there
    assert int(group.step[slot]) == 2


async def test_behind_the_window(house):
    """The window holds the last chunks, as many as asked for; the error for an older one names the oldest step."""
    group, (slot,) = house.open()
    for step in range(6):
        await house.step(group, [slot], [step])
    told = [await house.step(group, [slot], [step]) for step in range(6)]
    assert [bool(sink.errors) for sink in told] == [True, True, False, False, False, False]
    facts = told[0].errors[0].metadata
    assert (told[0].errors[0].reason, facts["expected_step"], facts["oldest_step"]) == ("STEP_BEHIND", "6", "2")


async def test_the_last_answer_is_kept_whatever_its_size():
    """A window of few bytes still holds the last answer, so that any chunk can be sent again once."""
    house = House(nbytes=40)
    group, (slot,) = house.open()
    for step in range(4):
        await house.step(group, [slot], [step * 4], steps=4)  # 32 bytes of answer
    told = [await house.step(group, [slot], [step * 4], steps=4) for step in range(4)]
    assert [bool(sink.errors) for sink in told] == [True, True, True, False]
    await house.step(group, [slot], [16], steps=30)
    assert (await house.step(group, [slot], [16], steps=30)).errors == {}
    await house.worker.close()


async def test_no_window():
    """With a window of 0 nothing is remembered, and the error says no oldest step."""
    house = House(replies=0)
    group, (slot,) = house.open()
    await house.step(group, [slot], [0])
    error = (await house.step(group, [slot], [0])).errors[0]
    assert (error.reason, "oldest_step" in error.metadata) == ("STEP_BEHIND", False)
    assert group.window.nbytes == 0
    await house.worker.close()


async def test_the_next_session_in_a_slot_has_no_past(house):
    """What a session was answered is forgotten with it, whoever has its slot next."""
    group, slots = house.open(2)
    for step in range(3):
        await house.step(group, slots, [step] * 2)
    house.sessions.delete_many(group, np.array(slots[:1]))
    group, (slot,) = house.open()
    assert slot == slots[0]
    error = (await house.step(group, [slot], [0])).errors
    assert error == {}
    assert (await house.step(group, [slot], [0])).errors == {}
    assert [int(r.first_steps[i]) for r, i in group.window.of(group, slot)] == [0]


async def test_sessions_that_rest_hold_little(house):
    """However long others go on, a window holds no more than its sessions' last answers, and a session that rests keeps
    its own.
    """
    group, slots = house.open(64)
    await house.step(group, slots, [0] * 64, value=5)
    one = group.window.nbytes / 64
    for step in range(1, 100):
        await house.step(group, slots[:2], [step] * 2)
    assert group.window.nbytes <= one * (62 + 2 * 4 * 4)
    assert (await house.step(group, slots[40:41], [0], value=5)).results[0][1].tolist() == [[[5, 5]]]
    house.sessions.trim_replays(0)
    assert group.window.nbytes == 0
    assert (await house.step(group, slots[40:41], [0], value=5)).errors[0].reason == "STEP_BEHIND"


async def test_start_states_go_before_answers():
    """When memory is short the states before chunks go first, those of the oldest chunks before others. They are most
    of what is held for a small LSTM: without them every chunk is still answered again, bit for bit, and the session can
    be taken back to the chunks whose start is left.
    """
    house = House(replies=16)
    house.model = load_model(ZOO / "lstm-32-64" / "1")
    house.worker = Worker(
        house.model, Scheduler(64, 32), house.sessions, clock=house.clock, on_progress=lambda: None, inline_seconds=1.0
    )
    group, slots = house.open(64)
    x = np.random.default_rng(0).normal(size=(16, 1, 64, 5)).astype(np.float32)
    said = [(await house.step(group, slots, [step] * 64, x=x[step])).results[0][1] for step in range(16)]
    window, full = group.window, group.window.nbytes
    began = lambda: [round_.began(index) is not None for round_, index in window.of(group, slots[5])]  # noqa: E731
    house.sessions.trim_replays(full * 3 // 4)
    assert full // 2 < window.nbytes <= full * 3 // 4
    assert began() == [False] * (kept := began().index(True)) + [True] * (16 - kept)
    house.sessions.trim_replays(full // 3)  # answers and inputs are a quarter of it
    assert full // 5 < window.nbytes <= full // 3
    for step in range(16):
        again = await house.step(group, slots, [step] * 64, x=x[step])
        np.testing.assert_array_equal(np.concatenate([y for _, y in again.results], axis=1), said[step])
    house.sessions.trim_replays(full // 8)  # and now answers go
    assert window.nbytes <= full // 8
    assert (await house.step(group, slots[:1], [0], x=x[0, :, :1])).errors[0].reason == "STEP_BEHIND"
    await house.worker.close()


async def test_chunks_that_were_run_together_lose_their_start_together(house):
    """They share it. What is counted as held stays what is held, also when some sessions have gone on."""
    group, slots = house.open(8)
    sinks = [Notes() for _ in range(3)]
    for step, sink in enumerate(sinks):
        x = np.full((1, 8, FEATURES), 1.0, np.float32)
        house.worker.submit(chunks(group, slots, x=x, first_steps=[step] * 8, sink=sink))
    await house.idle()
    for step in range(3, 40):
        await house.step(group, slots[:2], [step] * 2)
    window = group.window
    before = window.nbytes
    made = window.drop_starts(1)
    assert 0 < made == before - window.nbytes
    window.drop_starts(before)
    assert window.drop_starts(before) == 0
    assert window.nbytes == sum(round_.nbytes for round_ in window._rounds())
    while window.drop_oldest():
        pass
    assert (window.nbytes, window._thinned_bytes) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(st.data())
async def test_a_window_is_the_last_answers(data):
    """Whoever is stepped with whom, and whatever is asked again: the window holds each session's last chunks, as many
    as the limits allow and the last in any case, and no others.
    """
    replies, nbytes = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([8, 20, 1000]))
    house = House(replies, nbytes)
    group, slots = house.open(4)
    said = {slot: [] for slot in slots}  # (first step, time steps, answer)
    for _ in range(data.draw(st.integers(1, 25))):
        chosen = data.draw(st.lists(st.sampled_from(slots), min_size=1, unique=True))
        steps = data.draw(st.integers(1, 3))
        sink = await house.step(group, chosen, group.step[chosen].tolist(), steps=steps)
        for position, slot in enumerate(chosen):
            said[slot].append((sink.first_steps[0][position], steps, sink.results[0][1][:, position].tobytes()))
    for slot in slots:
        kept = []
        for first_step, steps, answer in reversed(said[slot]):
            if kept and (len(kept) == replies or sum(len(each[2]) for each in kept) + len(answer) > nbytes):
                break
            kept.append((first_step, steps, answer))
        for first_step, steps, answer in said[slot]:
            sink = await house.step(group, [slot], [first_step], steps=steps)
            assert bool(sink.errors) == ((first_step, steps, answer) not in kept)
            if not sink.errors:
                assert sink.results[0][1].tobytes() == answer
    await house.worker.close()


async def test_old_rounds_are_looked_at_a_few_at_a_time(house, monkeypatch):
    """However many small rounds a window holds: with each that is remembered few of the old ones are looked at, and
    when sessions have ended, few in each turn. What is looked at is all, in the end.
    """
    looked = []
    of = _Columns.of.__func__
    monkeypatch.setattr(
        _Columns, "of", classmethod(lambda cls, rounds: (looked.append(len(rounds)), of(cls, rounds))[1])
    )
    monkeypatch.setattr(replay, "_SLACK_ROUNDS", 64)
    group, slots = house.open(100)
    for step in range(12):
        for slot in slots:
            await house.step(group, [slot], [step])
    window = group.window
    assert looked
    assert max(looked) <= 16
    assert len(list(window._rounds())) <= 3 * 4 * 100 + 64  # 4 chunks of each, and what has not been looked at yet
    looked.clear()
    house.sessions.delete_many(group, np.array(slots[1:]))
    turns, more = 1, window.forget_ended(group)
    while more:
        turns, more = turns + 1, window.look_on(group)
    assert turns > 4
    assert max(looked) <= 64
    assert len(list(window._rounds())) == 4
    assert window.nbytes == sum(round_.nbytes for round_ in window._rounds())
    assert not window.forget_ended(group)


async def test_nothing_is_kept_of_sessions_that_have_ended(house):
    """Of those that were abandoned beside one that lives on, and what that one was answered is answered again."""
    group, slots = house.open(20)
    said = [await house.step(group, slots, [step] * 20) for step in range(3)]
    one = group.window.nbytes // 20
    house.sessions.delete_many(group, np.array(slots[1:]))
    group.window.forget_ended(group)
    assert one <= group.window.nbytes <= 1.2 * one
    again = await house.step(group, slots[:1], [1])
    assert again.results[0][1].tobytes() == said[1].results[0][1][:, :1].tobytes()
    house.sessions.delete_many(group, np.array(slots[:1]))
    assert house.sessions.held_bytes == 0
