"""Frames that come together become one block, and every client is told its own."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from house import FEATURES, AddingEngine, Clock, Notes, loaded, opened, table
from rnnserve_models.options import LayerOptions
from rnnserve_server.blocks import Sessions
from rnnserve_server.intake import Frame, Intake, joined
from rnnserve_server.layout import signature
from rnnserve_server.replay import Limits
from rnnserve_server.resets import ResetRules
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.worker import Worker

SEQUENCES = LayerOptions(stateful=True, return_sequences=True)


def frame(sink, sessions, *, steps=1, value=1.0, first_steps=None, mask=None):
    """A chunk of so many steps for each session, on lanes 0 to N - 1 of the sink."""
    group = sessions[0].group
    slots = np.array([session.slot for session in sessions])
    x = np.full((len(slots), group.batch_size, steps, FEATURES), value, np.float32)
    first_steps = None if first_steps is None else np.array(first_steps, np.uint64)
    columns = Sessions(group, slots, group.generation[slots], first_steps)
    return Frame(sink, np.arange(len(slots)), columns, {"input": x}, mask)


class Column:
    """Sessions on lanes 0 to N - 1 of a sink that says them again and again, as a stream has them."""

    def __init__(self, sink, sessions, first_lane=0):
        self.sink, self.group = sink, sessions[0].group
        self.tags = np.arange(first_lane, first_lane + len(sessions))
        self.slots = np.array([session.slot for session in sessions])
        self.generations = self.group.generation[self.slots]

    def frame(self, x, first_step):
        """A chunk for each: x is [N, 1, T, features]; all begin at one step, or where they are."""
        first_steps = None if first_step is None else np.full(len(self.tags), first_step, np.uint64)
        sessions = Sessions(self.group, self.slots, self.generations, first_steps)
        return Frame(self.sink, self.tags, sessions, {"input": x}, None)


class Told(Notes):
    """What each lane was told, in order: where its chunk began and the outputs, or why not."""

    def __init__(self, **names):
        super().__init__(**names)
        self.of = {}

    def result(self, answers):
        for tag, step, y in zip(answers.tags.tolist(), answers.first_steps, answers.outputs["output"], strict=True):
            self.of.setdefault(tag, []).append((int(step), y.tobytes()))

    def failed(self, failures):
        for each in failures:
            self.of.setdefault(each.tag, []).append((each.first_step, each.error.reason))


def taken_in(intake, each):
    intake.add(each, signature(each.inputs, each.mask))


class House:
    """A worker whose engine counts its runs."""

    def __init__(self, **engine):
        self.engine, self.clock = AddingEngine(**engine), Clock()
        self.model, self.sessions = loaded(self.engine), table(self.clock)
        self.worker = Worker(self.model, Scheduler(64, 32), self.sessions, clock=self.clock, on_progress=lambda: None)

    def open(self, count, options=SEQUENCES, **kwargs):
        return [opened(self.sessions, self.model, options=options, **kwargs) for _ in range(count)]

    def take_in(self, *frames):
        for each in frames:
            self.worker.take_in(each, signature(each.inputs, each.mask))

    def state(self, session):
        return session.group.arena.gather(np.array([session.slot]))["sum"].tolist()

    async def idle(self):
        await self.worker.settle()


@pytest.fixture
async def house():
    house = House(finite=True)
    yield house
    await house.worker.close()
    assert len(house.worker) == 0
    assert house.worker.queued_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.booleans()), max_size=20))
def test_no_frame_overtakes_another_of_its_sink(arrivals):
    """Whatever the shapes and the order of arrival: every frame of a session comes out once, frames of one sink in
    their order and in different blocks, and only frames of one shape together.
    """
    sinks, intake = [Notes() for _ in range(4)], Intake()
    session = opened(table(), loaded())
    frames = [
        frame(sinks[sink], [session], steps=steps, first_steps=[0] if numbered else None)
        for sink, steps, numbered in arrivals
    ]
    for each in frames:
        taken_in(intake, each)
    assert len(intake) == len(frames)
    assert intake.queued_bytes == sum(x.nbytes for each in frames for x in each.inputs.values())
    piles = intake.empty()
    assert (len(intake), intake.queued_bytes, intake.empty()) == (0, 0, [])
    for pile, rounds in piles:
        assert rounds == 1
        assert len({each.sink for each in pile}) == len(pile)
        assert len({(each.inputs["input"].shape, each.sessions.first_steps is None) for each in pile}) == 1
    out = [each for pile, _ in piles for each in pile]
    for sink in sinks:
        assert [each for each in out if each.sink is sink] == [each for each in frames if each.sink is sink]


def test_frames_of_many_sinks_are_one_block():
    """The rows of a joined block are those of its frames, one after the other, and so are all its columns."""
    sinks, found, model = [Notes(), Notes()], table(), loaded()
    one, two, three = (opened(found, model, batch_size=2) for _ in range(3))
    mask = np.array([[[True, False, True]]])
    block = joined(
        [
            frame(sinks[0], [one, two], steps=3, value=1, mask=mask.repeat(2, axis=0)),
            frame(sinks[1], [three], steps=3, value=2, mask=mask),
        ]
    )
    assert block.sinks == [(sinks[0], 2), (sinks[1], 1)]
    assert block.tags.tolist() == [0, 1, 0]
    assert block.sessions.slots.tolist() == [one.slot, two.slot, three.slot]
    assert block.call.inputs["input"][:, :, 0].tolist() == [[1, 1, 1, 1, 2, 2]] * 2
    assert block.call.lengths.tolist() == [2] * 6
    assert block.call.timesteps == 3


@given(st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 5), min_size=1), st.integers(1, 2)), max_size=20))
def test_frames_of_one_sink_are_joined_where_they_are_of_other_sessions(arrivals):
    """Whatever sinks say of whatever sessions: no session has two chunks of one sink in one block, chunks of a session
    that are of one sink keep their order, and a sink's chunks stand together in a block, in the order of arrival.
    """
    sinks, intake, found, model = [Notes(), Notes()], Intake(), table(), loaded()
    sessions = [opened(found, model) for _ in range(6)]
    frames = [frame(sinks[sink], [sessions[i] for i in sorted(of)], steps=steps) for sink, of, steps in arrivals]
    for each in frames:
        taken_in(intake, each)
    piles = intake.empty()
    out = [each for pile, _ in piles for each in pile]
    assert sorted(map(id, out)) == sorted(map(id, frames))
    for sink in sinks:
        assert [each for each in out if each.sink is sink] == [each for each in frames if each.sink is sink]
    for pile, rounds in piles:
        assert rounds == 1
        for sink in sinks:
            slots = [slot for each in pile if each.sink is sink for slot in each.sessions.slots.tolist()]
            assert len(slots) == len(set(slots))
        whose = [each.sink for each in pile]
        assert whose == sorted(whose, key=whose.index)
        block = joined(pile)
        assert [sink for sink, _ in block.sinks] == list(dict.fromkeys(whose))
        assert sum(count for _, count in block.sinks) == len(block.tags)


async def test_many_small_frames_of_one_stream_are_one_run_and_one_answer(house):
    """64 frames of a session each cost what one of 64 does: they run once, and are answered together."""
    sink, sessions = Notes(), house.open(64)
    house.take_in(*(frame(sink, [session]) for session in sessions))
    await house.idle()
    assert house.engine.calls == [(1, [1] * 64)]
    assert [len(tags) for tags, _ in sink.results] == [64]
    house.take_in(*(frame(sink, [session]) for session in [*sessions, *reversed(sessions)]))
    await house.idle()
    assert [len(tags) for tags, _ in sink.results] == [64] * 3
    assert [session.step for session in sessions] == [3] * 64


async def test_streams_that_send_ahead_are_run_one_after_the_other(house):
    """Large frames of two streams, eight ahead each: a run takes several frames of one stream, no longer than is fair
    while the other waits, instead of one frame of each. Every frame is answered in its order.
    """
    sinks, sessions = [Notes(), Notes()], house.open(64)
    of = [sessions[:32], sessions[32:]]
    house.take_in(*(frame(sinks[i % 2], of[i % 2], value=1 + i % 2, first_steps=[i // 2] * 32) for i in range(16)))
    await house.idle()
    assert house.engine.calls == [(steps, [steps] * 32) for steps in (3, 3, 3, 3, 2, 2)]
    for i, sink in enumerate(sinks):
        assert not sink.errors
        assert sink.first_steps == [[step] * 32 for step in range(8)]
        assert [y[0, :, 0].tolist() for _, y in sink.results] == [[(1 + i) * step] * 32 for step in range(1, 9)]


_AHEAD = st.lists(
    st.tuples(
        st.integers(0, 1),  # which half of the lanes, or which stream
        st.integers(1, 2),  # time steps
        st.sampled_from([0] * 8 + [-3, -1, 1, None]),  # how far on it goes beforehand; None: it does not say its step
        st.sampled_from([1.0] * 8 + [np.nan, 7.0]),  # 7: the engine fails
        st.integers(0, 31),  # of which lane that number is
    ),
    min_size=1,
    max_size=24,
)


@given(_AHEAD, st.booleans(), st.sampled_from([SEQUENCES, LayerOptions(stateful=True)]), st.sampled_from([0, 3]))
async def test_what_is_sent_ahead_is_told_what_it_is_one_by_one(arrivals, together, options, every):
    """Whatever one or two streams send ahead in large frames (of any lengths, again, out of step, with numbers that the
    model forbids or fails at, to sessions with rules that reset): each lane is told of each chunk what it is told if
    every frame waits for the answer to the one before, and its session ends up the same.
    """
    told, ends = [], []
    for ahead in (True, False):
        house = House(finite=True)
        house.engine.poison = 7.0
        sessions = house.open(64, options, replay=Limits(4, 1 << 20), rules=ResetRules(every_steps=every))
        sinks = [Told()] * 2 if together else [Told(), Told()]
        columns = [Column(sinks[0], sessions[:32]), Column(sinks[1], sessions[32:], 32)]
        at = [0, 0]
        for stream, steps, on, number, lane in arrivals:
            x = np.ones((32, 1, steps, FEATURES), np.float32)
            x[lane] = number
            at[stream] = max(0, at[stream] + (on or 0))
            house.take_in(columns[stream].frame(x, None if on is None else at[stream]))
            at[stream] += steps
            if not ahead:
                await house.idle()
        await house.idle()
        assert (len(house.worker), house.worker.queued_bytes) == (0, 0)
        # What is forbidden is told at once, not in its turn.
        told += [{lane: sorted(of, key=repr) for lane, of in sink.of.items()} for sink in sinks]
        ends.append([(session.step, house.state(session)) for session in sessions])
        await house.worker.close()
    assert told[:2] == told[2:]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("lanes", "steps", "rounds"),
    [
        (32, [0, 1, 2, 3], [4]),
        (32, [None] * 4, [4]),
        (32, [0, 1, 1, 2, 5], [2, 2, 1]),  # sent again; ahead
        (31, [0, 1, 2, 3], [1] * 4),  # those of several streams are joined instead
    ],
)
def test_wide_frames_that_go_on_are_rounds_of_one_block(lanes, steps, rounds):
    """Frames of the same lanes that each begin where the one before it ends are laid out together as they come in."""
    found, model, intake = table(), loaded(), Intake()
    column = Column(Told(), [opened(found, model, options=SEQUENCES) for _ in range(lanes)])
    for number, step in enumerate(steps):
        x = np.full((lanes, 1, 1, FEATURES), number, np.float32)
        taken_in(intake, column.frame(x, step))
    gathered = intake.empty()
    assert [each for _, each in gathered] == rounds
    blocks = [joined(frames, each) for frames, each in gathered]
    assert [block.rounds for block in blocks] == rounds
    assert np.concatenate([block.call.inputs["input"][:, 0, 0] for block in blocks]).tolist() == list(range(len(steps)))


def test_rounds_are_laid_out_a_few_at_a_time(monkeypatch):
    """However many frames came, no more bytes of them are copied at once than everybody can wait for."""
    found, model, intake = table(), loaded(), Intake()
    column = Column(Told(), [opened(found, model, options=SEQUENCES) for _ in range(32)])
    x = np.zeros((32, 1, 1, FEATURES), np.float32)
    monkeypatch.setattr("rnnserve_server.intake._ROUNDS_BYTES", 3 * x.nbytes)
    for step in range(8):
        taken_in(intake, column.frame(x, step))
    assert [rounds for _, rounds in intake.empty()] == [3, 3, 2]


async def test_rounds_that_come_again(house):
    """A stream that lost its answers sends all of its frames again, and the next ones: those that the window holds are
    answered as before, those behind it refused, and the next ones run.
    """
    sink = Told()
    column = Column(sink, house.open(32, replay=Limits(4, 1 << 20)))
    frames = [column.frame(np.full((32, 1, 1, FEATURES), step, np.float32), step) for step in range(12)]
    house.take_in(*frames[:8])
    await house.idle()
    before, sink.of = sink.of, {}
    house.take_in(*frames)
    await house.idle()
    assert house.engine.calls == [(8, [8] * 32), (4, [4] * 32)]
    for lane, of in sink.of.items():
        assert of[:4] == [(step, "STEP_BEHIND") for step in range(4)]
        assert of[4:8] == before[lane][4:]
        assert [step for step, _ in of[8:]] == [8, 9, 10, 11]


async def test_rounds_of_a_stream_are_one_run_as_far_as_is_fair(house):
    """Forty large frames of one stream are taken along in runs that are no longer than others might be kept waiting
    for. A session that is closed in between is told so of all that was not committed; the others never notice.
    """
    sessions = house.open(32, replay=Limits(4, 1 << 20))
    sink = Told(names={3: sessions[3].id})
    column = Column(sink, sessions)
    for step in range(40):
        house.take_in(column.frame(np.ones((32, 1, 1, FEATURES), np.float32), step))
    house.engine.gate.clear()
    assert await asyncio.to_thread(house.engine.running.wait, 10)
    house.sessions.delete(sessions[3].id)
    house.engine.gate.set()
    await house.idle()
    assert house.engine.calls == [(8, [8] * 32), *[(8, [8] * 31)] * 4]
    for lane in range(32):
        steps, answers = zip(*sink.of[lane], strict=True)
        assert list(steps) == list(range(40))
        expected = (
            ["SESSION_CLOSED"] * 40 if lane == 3 else [np.full((1, 1, 2), n + 1, "f4").tobytes() for n in range(40)]
        )
        assert list(answers) == expected


async def test_every_sink_is_told_its_own(house):
    """Chunks of four streams run as one batch, and each stream gets its lanes, steps and outputs, told once a tick."""
    sinks, sessions = [Notes() for _ in range(4)], house.open(8)
    house.take_in(*(frame(sink, sessions[2 * i : 2 * i + 2], value=i + 1) for i, sink in enumerate(sinks)))
    await house.idle()
    assert house.engine.calls == [(1, [1] * 8)]
    for i, sink in enumerate(sinks):
        ((tags, y),) = sink.results
        assert (tags, y[0, :, 0].tolist(), sink.first_steps) == ([0, 1], [i + 1, i + 1], [[0, 0]])
        assert sink.flushes


async def test_one_sinks_fault_is_not_anothers(house):
    """Of frames that came together, those of a client that left, came late, sent NaN or miscounted fail alone."""
    sinks, sessions = [Notes(), Notes(), Notes(deadline=house.clock.now + 1), Notes(), Notes()], house.open(5)
    house.take_in(
        *(
            frame(sink, [session], value=np.nan if i == 3 else 1, first_steps=[4 if i == 4 else 0])
            for i, (sink, session) in enumerate(zip(sinks, sessions, strict=True))
        )
    )
    sinks[1].cancelled = True
    house.clock.now += 1
    await house.idle()
    assert [[error.reason for error in sink.errors.values()] for sink in sinks] == [
        [],
        ["CANCELLED"],
        ["DEADLINE_PASSED"],
        ["NOT_FINITE"],
        ["STEP_AHEAD"],
    ]
    assert [session.step for session in sessions] == [1, 0, 0, 0, 0]


@given(st.sets(st.integers(0, 19)), st.sampled_from([1, 40]), st.sampled_from([1, 5, 20]))
async def test_what_the_engine_fails_at_fails_alone(guilty, steps, each):
    """Of twenty chunks that came together, from one stream or several, those that the engine fails at (in their first
    slice or their second) fail, and no other one: those are answered, and so are the chunks behind them.
    """
    house = House()
    house.engine.poison = 7.0
    sessions = house.open(20)
    sinks = [Told() for _ in range(0, 20, each)]
    for first_step in (0, steps):
        for at, sink in enumerate(sinks):
            x = np.ones((each, 1, steps, FEATURES), np.float32)
            if not first_step:
                x[[i - at * each for i in guilty if at * each <= i < (at + 1) * each], :, -1] = house.engine.poison
            house.take_in(Column(sink, sessions[at * each : (at + 1) * each], at * each).frame(x, first_step))
    await house.idle()
    for at, session in enumerate(sessions):
        told = sinks[at // each].of[at]
        if at in guilty:
            assert told == [(0, "ENGINE_FAILED"), (steps, "STEP_AHEAD")]
            assert session.step == 0
        else:
            sums = np.arange(1, 2 * steps + 1, dtype=np.float32).repeat(FEATURES).reshape(2, -1)
            assert told == [(0, sums[0].tobytes()), (steps, sums[1].tobytes())]
            assert session.step == 2 * steps
    assert (len(house.worker), house.worker.queued_bytes) == (0, 0)
    assert not any(session.busy for session in sessions)
    await house.worker.close()


async def test_a_session_on_two_streams(house):
    """When two streams send a chunk for one session at the same time, one runs after the other."""
    sinks, (session,) = [Notes(), Notes()], house.open(1)
    house.take_in(*(frame(sink, [session]) for sink in sinks))
    await house.idle()
    assert [sink.results[0][1].tolist() for sink in sinks] == [[[[1, 1]]], [[[2, 2]]]]
    assert session.step == 2
    assert not any(sink.unsent for sink in sinks)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.sampled_from([1, 3, 32]))
async def test_sessions_on_several_streams(streams, lanes):
    """When several streams send chunks for the same sessions at the same time, these run in the order of their steps,
    and each is answered, and on its own stream.
    """
    house = House()
    sessions, sinks = house.open(lanes), [Notes() for _ in range(3)]
    house.take_in(*(frame(sinks[each], sessions, first_steps=[step] * lanes) for step, each in enumerate(streams)))
    await house.idle()
    for number, sink in enumerate(sinks):
        expected = [step for step, each in enumerate(streams) if each == number]
        assert sink.first_steps == [[step] * lanes for step in expected]
        assert [y[0, :, 0].tolist() for _, y in sink.results] == [[step + 1] * lanes for step in expected]
        assert not sink.unsent
    assert [session.step for session in sessions] == [len(streams)] * lanes
    await house.worker.close()


async def test_an_answer_that_cannot_be_given_is_one_sinks_own(house):
    """A bug where one sink is told is that sink's INTERNAL; those that shared its block have their results."""

    class Broken(Notes):
        def result(self, answers):
            raise RuntimeError("cannot be encoded")

    sinks, sessions = [Notes(), Broken(), Notes()], house.open(3)
    house.take_in(*(frame(sink, [session]) for sink, session in zip(sinks, sessions, strict=True)))
    await house.idle()
    assert [sink.told for sink in sinks] == [[0], [0], [0]]
    assert [sorted(error.reason for error in sink.errors.values()) for sink in sinks] == [[], ["INTERNAL"], []]
