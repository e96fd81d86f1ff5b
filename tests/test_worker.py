"""The loop of one model: schedule, run, commit."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from house import FEATURES, AddingEngine, Clock, Notes, chunks, loaded, opened, table
from rnnserve_models.masking import compact
from rnnserve_models.options import LayerOptions
from rnnserve_server.blocks import Barrier, Block
from rnnserve_server.resets import ResetRules
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.worker import Worker

SEQUENCES = LayerOptions(stateful=True, return_sequences=True)


class House:
    """A worker and its surroundings."""

    def __init__(self, *, rows=16, slice_steps=4, inline_seconds=0.0):
        self.engine, self.clock = AddingEngine(), Clock()
        self.model = loaded(self.engine)
        self.sessions = table(self.clock)
        self.progress = 0
        self.scheduler = Scheduler(rows, slice_steps)
        self.worker = Worker(
            self.model,
            self.scheduler,
            self.sessions,
            clock=self.clock,
            on_progress=self._on_progress,
            inline_seconds=inline_seconds,
        )

    def _on_progress(self):
        self.progress += 1

    def open(self, count=1, **kwargs):
        made = [opened(self.sessions, self.model, **kwargs) for _ in range(count)]
        return made[0].group, [session.slot for session in made], made

    def state(self, session):
        return session.group.arena.gather(np.array([session.slot]))["sum"][:, 0].tolist()

    def hold(self):
        """The next run of the engine waits until the gate is set."""
        self.engine.running.clear()
        self.engine.gate.clear()

    async def held(self):
        """Until the engine is in a run that waits."""
        assert await asyncio.to_thread(self.engine.running.wait, 10)

    async def idle(self):
        """Until nothing is queued."""
        await self.worker.settle()


@pytest.fixture
async def house():
    house = House()
    yield house
    house.engine.gate.set()
    await house.worker.close()
    assert len(house.scheduler) == 0
    assert house.worker.queued_bytes == 0


async def test_a_chunk_moves_its_session_on(house):
    """A chunk's outputs are told, its states written and its steps counted, all at once."""
    group, slots, made = house.open(2)
    sink = Notes()
    house.worker.submit(chunks(group, slots, 3, sink=sink, tags=[7, 9]))
    assert house.worker.queued_bytes == 3 * 2 * FEATURES * 4
    await house.idle()
    ((tags, y),) = sink.results
    assert tags == [7, 9]
    assert y.tolist() == [[3, 3], [3, 3]]
    assert [(session.step, house.state(session), session.busy) for session in made] == [(3, [3], False)] * 2
    assert sink.first_steps == [[0, 0]]
    assert house.progress == 1


async def test_nothing_is_written_before_the_whole_chunk_is_done(house):
    """Between the slices of a long chunk the session is where it was; after the last it is at the end."""
    group, slots, (session,) = house.open()
    sink = Notes()
    house.hold()
    house.worker.submit(chunks(group, slots, 9, sink=sink))
    await house.held()
    house.engine.gate.set()
    seen = set()
    while house.worker._task is not None:
        seen.add((session.step, house.state(session)[0], bool(sink.told)))
        await asyncio.sleep(0)
    seen.add((session.step, house.state(session)[0], bool(sink.told)))
    assert seen == {(0, 0.0, False), (9, 9.0, True)}
    assert [steps for steps, _ in house.engine.calls] == [4, 4, 1]


async def test_chunks_of_one_session_run_in_order(house):
    """Pipelined chunks each start where the one before them ended, and are answered in order."""
    group, slots, (session,) = house.open()
    sink = Notes()
    for tag, steps in enumerate((5, 1, 7, 2)):
        house.worker.submit(chunks(group, slots, steps, sink=sink, tags=[tag]))
    await house.idle()
    assert sink.told == [0, 1, 2, 3]
    assert sink.first_steps == [[0], [5], [6], [13]]
    assert (session.step, house.state(session)) == (15, [15])


async def test_a_chunk_at_the_wrong_step_leaves_no_trace(house):
    """Of a block, chunks ahead or behind fail with the step that was expected; the others run."""
    group, slots, made = house.open(3)
    sink = Notes()
    house.worker.submit(chunks(group, slots, 1))
    house.worker.submit(chunks(group, slots, 1, sink=sink, first_steps=[1, 2, 0]))
    await house.idle()
    assert {tag: error.reason for tag, error in sink.errors.items()} == {1: "STEP_AHEAD", 2: "STEP_BEHIND"}
    assert [session.step for session in made] == [2, 1, 1]
    assert [house.state(session) for session in made] == [[2], [1], [1]]


async def test_a_failed_chunk_fails_what_was_sent_behind_it(house):
    """A chunk that counts on one that failed is ahead of its session, so that no step is ever left out."""
    group, slots, (session,) = house.open()
    first, second = Notes(), Notes()
    first.cancelled = True
    house.worker.submit(chunks(group, slots, 2, sink=first, first_steps=[0]))
    house.worker.submit(chunks(group, slots, 2, sink=second, first_steps=[2]))
    await house.idle()
    assert (first.errors[0].reason, second.errors[0].reason) == ("CANCELLED", "STEP_AHEAD")
    assert session.step == 0


@pytest.mark.parametrize("why", ["CANCELLED", "DEADLINE_PASSED"])
async def test_dropped_before_a_batch_is_formed(house, why):
    """Work that is cancelled or too late when its turn comes never reaches the engine and changes nothing."""
    group, slots, made = house.open(3)
    sink = Notes(deadline=house.clock.now + 5)
    house.hold()
    house.worker.submit(chunks(group, slots[:1], 1))
    await house.held()
    house.worker.submit(chunks(group, slots[1:2], 1, sink=sink))
    house.worker.submit(chunks(group, slots[2:], 1))
    if why == "CANCELLED":
        sink.cancelled = True
    else:
        house.clock.now += 5
    house.engine.gate.set()
    await house.idle()
    assert sink.errors[0].reason == why
    assert [session.step for session in made] == [1, 0, 1]
    assert [len(lengths) for _, lengths in house.engine.calls] == [1, 1]


@pytest.mark.parametrize("why", ["CANCELLED", "DEADLINE_PASSED", "SESSION_CLOSED"])
async def test_dropped_between_slices(house, why):
    """A long chunk whose caller, time or session is gone is not computed to its end, and leaves no trace."""
    group, slots, (session,) = house.open()
    sink = Notes(deadline=house.clock.now + 5, names={0: session.id})
    house.hold()
    house.worker.submit(chunks(group, slots, 400, sink=sink))
    await house.held()
    if why == "CANCELLED":
        sink.cancelled = True
    elif why == "DEADLINE_PASSED":
        house.clock.now += 6
    else:
        house.sessions.delete(session.id)
    house.engine.gate.set()
    await house.idle()
    assert sink.errors[0].reason == why
    assert len(house.engine.calls) == 1
    assert (session.step, house.state(session), sink.results) == (0, [0], [])


async def test_a_session_deleted_while_its_chunk_runs(house):
    """Its chunk fails with NOT_FOUND, and neither its own slot nor the session that has it next is written."""
    group, slots, made = house.open(2)
    sink = Notes(names=dict(enumerate(session.id for session in made)))
    house.hold()
    house.worker.submit(chunks(group, slots, 2, sink=sink))
    await house.held()
    house.sessions.delete(made[0].id)
    heir = opened(house.sessions, house.model, states={"sum": np.full((1, FEATURES), 50, np.float32)})
    assert heir.slot == slots[0]
    after = Notes()
    house.worker.submit(chunks(group, [heir.slot], 1, sink=after, first_steps=[0]))
    house.engine.gate.set()
    await house.idle()
    assert {tag: error.reason for tag, error in sink.errors.items()} == {0: "SESSION_CLOSED"}
    assert made[0].id in str(sink.errors[0])
    assert [tags for tags, _ in sink.results] == [[1]]
    assert made[1].step == 2
    assert after.results[0][1].tolist() == [[51, 51]]
    assert (heir.step, house.state(heir)) == (1, [51])


async def test_what_waits_for_a_deleted_session_is_told_first(house):
    """A barrier behind the chunk of a deleted session takes its turn after the chunk was answered, reused slot or not:
    a lane is closed only when its chunks are answered.
    """
    group, slots, (session,) = house.open()
    sink = Notes()
    house.hold()
    house.worker.submit(chunks(group, slots, 1, sink=sink))
    await house.held()
    house.sessions.delete(session.id)
    opened(house.sessions, house.model)
    order = []
    house.worker.submit(Barrier(group, slots[0], lambda: order.append(list(sink.told))))
    house.engine.gate.set()
    await house.idle()
    assert order == [[0]]


async def test_a_barrier_acts_after_the_answer(house):
    """What waits behind a chunk is done when the chunk was answered, not just before."""
    group, slots, _ = house.open()
    sink, order = Notes(), []
    house.worker.submit(chunks(group, slots, 6, sink=sink))
    house.worker.submit(Barrier(group, slots[0], lambda: order.append(list(sink.told))))
    await house.idle()
    assert order == [[0]]


async def test_an_engine_failure_is_one_blocks_own(house):
    """When a batch fails its blocks run again by themselves: only the one to blame fails, with ENGINE_FAILED."""
    group, slots, made = house.open(3)
    sinks = [Notes(), Notes(), Notes()]
    house.hold()
    house.worker.submit(chunks(group, slots, 1))
    await house.held()
    for slot, sink, value in zip(slots, sinks, (1, house.engine.poison, 3), strict=True):
        x = np.full((6, 1, FEATURES), value, np.float32)
        house.worker.submit(chunks(group, [slot], sink=sink, x=x))
    house.engine.gate.set()
    await house.idle()
    assert [list(sink.errors) for sink in sinks] == [[], [0], []]
    assert sinks[1].errors[0].reason == "ENGINE_FAILED"
    assert "does not like" in str(sinks[1].errors[0])
    assert [house.state(session) for session in made] == [[7], [1], [19]]
    assert [session.step for session in made] == [7, 1, 7]


async def test_a_bug_fails_only_its_tick(house):
    """An engine that raises anything else fails the blocks of that tick with INTERNAL, keeps its text to itself, and
    the worker goes on.
    """
    group, slots, made = house.open(3)
    first, second = Notes(), Notes()
    house.hold()
    house.engine.bug = RuntimeError("secret")
    house.worker.submit(chunks(group, slots[:2], 1, sink=first))
    await house.held()
    house.worker.submit(chunks(group, slots[1:], 1, sink=second))
    house.engine.gate.set()
    await house.idle()
    assert {tag: error.reason for tag, error in first.errors.items()} == {0: "INTERNAL", 1: "INTERNAL"}
    assert "secret" not in str(first.errors[0])
    assert second.errors == {}
    assert [session.step for session in made] == [0, 1, 1]


async def test_a_sink_that_fails_does_not_stop_the_worker(house):
    """A bug where results are told leaves nobody waiting: the chunk is told as failed, and what follows it runs."""

    class Broken(Notes):
        def result(self, answers):
            raise RuntimeError("cannot be encoded")

    group, slots, (session,) = house.open()
    broken, after = Broken(), Notes()
    house.worker.submit(chunks(group, slots, 1, sink=broken))
    house.worker.submit(chunks(group, slots, 1, sink=after))
    await house.idle()
    assert broken.errors[0].reason == "INTERNAL"
    assert after.told == [0]
    assert session.step == 2


async def test_masked_chunks(house):
    """A wholly masked row keeps its state, a wholly masked chunk is not computed at all; both count their steps."""
    group, slots, made = house.open(3, options=SEQUENCES)
    house.worker.submit(chunks(group, slots, 2))
    await house.idle()
    house.engine.calls.clear()
    sink = Notes()
    mask = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1]], bool)
    house.worker.submit(chunks(group, slots, x=np.full((3, 3, FEATURES), 10, np.float32), mask=mask, sink=sink))
    await house.idle()
    assert house.engine.calls == [(2, [2, 1])]
    assert [house.state(session) for session in made] == [[22], [2], [12]]
    assert [session.step for session in made] == [5, 5, 5]
    assert sink.results[0][1][:, :, 0].T.tolist() == [[12, 12, 22], [0, 0, 0], [0, 0, 12]]
    house.worker.submit(chunks(group, slots, 3, mask=np.zeros((3, 3), bool), sink=sink))
    await house.idle()
    assert len(house.engine.calls) == 1
    assert sink.results[1][1].tolist() == np.zeros((3, 3, FEATURES)).tolist()
    assert [session.step for session in made] == [8, 8, 8]


async def test_a_chunk_without_steps_beside_one_that_is_refused(house):
    """The engine is not run for no rows when a block's only chunk with steps to run is dropped."""
    group, slots, made = house.open(2, options=SEQUENCES)
    sink = Notes()
    mask = np.array([[1, 0], [1, 0], [1, 0]], bool)
    house.worker.submit(chunks(group, slots, 3, mask=mask, sink=sink, first_steps=[7, 0]))
    await house.idle()
    assert sink.errors[0].reason == "STEP_AHEAD"
    ((tags, y),) = sink.results
    assert (tags, y.any()) == ([1], False)
    assert house.engine.calls == []
    assert [(session.step, house.state(session)) for session in made] == [(0, [0]), (3, [0])]


async def test_a_short_chunk_beside_one_whose_session_ends(house):
    """Nor when the session of the longest chunk ends between two slices; what the others ran by then is kept."""
    group, slots, (long, short) = house.open(2, options=SEQUENCES)
    sink = Notes(names={0: long.id})
    mask = np.ones((9, 2), bool)
    mask[3:, 1] = False
    house.hold()
    house.worker.submit(chunks(group, slots, 9, mask=mask, sink=sink))
    await house.held()
    house.sessions.delete(long.id)
    house.engine.gate.set()
    await house.idle()
    assert sink.errors[0].reason == "SESSION_CLOSED"
    ((tags, y),) = sink.results
    assert (tags, y[:, 0, 0].tolist()) == ([1], [1, 2, 3, 3, 3, 3, 3, 3, 3])
    assert house.engine.calls == [(4, [4, 3])]
    assert (short.step, house.state(short)) == (9, [3])


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("masked", [False, True])
async def test_slices_equal_one_run(sequences, masked):
    """A long chunk cut in slices, among strangers, gives the bits of one uncut run."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(37, 6, FEATURES)).astype(np.float32)
    mask = rng.random((37, 6)) < 0.6 if masked else None
    told = []
    for slice_steps in (64, 5):
        house = House(slice_steps=slice_steps, rows=8)
        options = LayerOptions(stateful=True, return_sequences=sequences)
        group, slots, made = house.open(3, batch_size=2, options=options)
        sink = Notes()
        house.worker.submit(chunks(group, slots, x=x, mask=mask, sink=sink))
        if slice_steps == 5:
            _, others, _ = house.open(2, batch_size=2, options=options)
            for steps in (3, 9, 21):
                house.worker.submit(chunks(group, others, steps))
        await house.idle()
        told.append((sink.results[0][1].tobytes(), [house.state(session) for session in made]))
        await house.worker.close()
    assert told[0] == told[1]


async def test_only_the_last_slice_is_kept_without_sequences(house):
    """A long chunk that returns its last output only does not hold on to the outputs of all its slices."""
    group, slots, _ = house.open()
    block = chunks(group, slots, 400)
    house.worker.submit(block)
    kept = set()
    while house.worker._task is not None:
        kept.add(len(block.outputs))
        await asyncio.sleep(0)
    assert kept <= {0, 1}


async def test_calls_without_a_session(house):
    """A stateless call starts from the states it brings, and shares a batch with sessions."""
    group, slots, (session,) = house.open()
    sink = Notes()
    call = compact({"input": np.ones((2, 2, FEATURES), np.float32)}, None, go_backwards=False)
    states = {"sum": np.array([[10, 10], [20, 20]], np.float32)}
    house.worker.submit(chunks(group, slots, 2))
    house.worker.submit(Block(call, 2, LayerOptions(), [(sink, 1)], np.zeros(1, np.int64), states=states))
    await house.idle()
    assert sink.results[0][1].tolist() == [[12, 12], [22, 22]]
    assert house.engine.calls == [(2, [2, 2, 2])]
    assert house.state(session) == [2]
    assert states["sum"].tolist() == [[10, 10], [20, 20]]


async def test_close_finishes_what_is_queued(house):
    """Closing the worker answers everything that it was given before."""
    group, slots, (session,) = house.open()
    sink = Notes()
    for tag in range(5):
        house.worker.submit(chunks(group, slots, 3, sink=sink, tags=[tag]))
    await house.worker.close()
    assert sink.told == [0, 1, 2, 3, 4]
    assert session.step == 15


@pytest.mark.parametrize(("seconds", "stays"), [(0.1, [False, True, True]), (2.0, [False, False, False])])
async def test_a_run_that_is_known_to_be_small_stays_on_the_loops_thread(seconds, stays):
    """A run is handed over to the model's thread unless the last ones of its size took less than the setting says."""
    house = House(inline_seconds=1.0)
    group, slots, _ = house.open(1)
    run, found = house.engine.run, []

    def timed(*batch):
        found.append(threading.current_thread() is threading.main_thread())
        house.clock.now += seconds
        return run(*batch)

    house.engine.run = timed
    for _ in range(3):
        house.worker.submit(chunks(group, slots, 1, sink=Notes(), tags=[0]))
        await house.idle()
    assert found == stays
    await house.worker.close()


@pytest.mark.parametrize("sequences", [False, True])
async def test_waiting_chunks_of_a_session_run_as_one(house, sequences):
    """Chunks that a client sent ahead run in one go, and each is answered as if it had run alone: its own outputs, at
    its own step.
    """
    options = LayerOptions(stateful=True, return_sequences=sequences)
    group, slots, made = house.open(2, options=options)
    sink = Notes()
    house.hold()
    house.worker.submit(chunks(group, slots, 1))
    await house.held()
    for tag, first_step in enumerate((1, 2, 4)):
        numbered = None if first_step == 2 else [first_step] * 2
        house.worker.submit(chunks(group, slots, [1, 2, 1][tag], sink=sink, tags=[tag, tag], first_steps=numbered))
    house.engine.gate.set()
    await house.idle()
    assert house.engine.calls == [(1, [1, 1]), (4, [4, 4])]
    assert sink.first_steps == [[1, 1], [2, 2], [4, 4]]
    last = [y[-1] if sequences else y for _, y in sink.results]
    assert [y[:, 0].tolist() for y in last] == [[2, 2], [4, 4], [5, 5]]
    assert [len(y) for _, y in sink.results] == ([1, 2, 1] if sequences else [2, 2, 2])
    assert [(session.step, house.state(session), session.busy) for session in made] == [(5, [5], False)] * 2


async def test_a_session_on_two_streams(house):
    """Chunks that run in one go may have come on several streams: each of these has its answers sent."""
    group, slots, _ = house.open()
    sinks = [Notes(), Notes()]
    house.hold()
    house.worker.submit(chunks(group, slots))
    await house.held()
    for first_step, sink in enumerate(sinks, 1):
        house.worker.submit(chunks(group, slots, sink=sink, first_steps=[first_step]))
    house.engine.gate.set()
    await house.idle()
    assert house.engine.calls == [(1, [1]), (2, [2])]
    assert [(sink.first_steps, sink.unsent) for sink in sinks] == [([[1]], 0), ([[2]], 0)]


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("gone", [0, 1])
async def test_one_of_two_streams_of_a_session_goes_amid_a_run(house, gone, said):
    """Of chunks that run in one go, but not in one piece, those that nobody waits for any more leave nothing of
    themselves: what came before them is answered, and what came behind them is as if they had not been sent.
    """
    house.scheduler.slice_steps = 8
    group, slots, (session,) = house.open(rules=ResetRules(every_steps=3))
    sinks = [Notes(), Notes()]
    house.hold()
    house.worker.submit(chunks(group, slots))
    await house.held()
    for number, sink in enumerate(sinks):
        first_steps = [1 + 4 * number] if said else None
        house.worker.submit(chunks(group, slots, 4, sink=sink, first_steps=first_steps))
    run = house.engine.run

    def during(*batch):
        sinks[gone].cancelled = True
        return run(*batch)

    house.engine.run = during
    house.engine.gate.set()
    await house.idle()
    assert house.engine.calls[1] == (2, [2]), "up to the reset"
    reasons = [[error.reason for error in sink.errors.values()] for sink in sinks]
    told = [sink.first_steps for sink in sinks]
    assert not any(sink.unsent for sink in sinks)
    if gone == 1:
        assert (reasons, told, session.step) == ([[], ["CANCELLED"]], [[[1]], []], 5)
    elif said:
        assert (reasons, told, session.step) == ([["CANCELLED"], ["STEP_AHEAD"]], [[], []], 1)
    else:
        assert (reasons, told, session.step) == ([["CANCELLED"], []], [[], [[1]]], 5)
    assert house.state(session) == [session.step % 3]
    assert not session.busy


@pytest.mark.parametrize("why", ["states", "mask", "step", "sessions", "long"])
async def test_what_does_not_go_on_runs_by_itself(house, why):
    """A chunk is not run with the one before it if its states are asked for, steps are masked, it is at another step
    or of other sessions, or both together are longer than a tick.
    """
    group, slots, _ = house.open(2, options=LayerOptions(stateful=True, return_state=why == "states"))
    first, second = Notes(), Notes()
    house.hold()
    house.worker.submit(chunks(group, slots, 1))
    await house.held()
    house.worker.submit(chunks(group, slots, 1, sink=first))
    mask = np.array([[True, False]]) if why == "mask" else None
    followers = slots[:1] if why == "sessions" else slots
    first_steps = [3, 3] if why == "step" else None
    house.worker.submit(
        chunks(group, followers, 4 if why == "long" else 1, sink=second, mask=mask, first_steps=first_steps)
    )
    house.engine.gate.set()
    await house.idle()
    assert house.engine.calls[1] == (1, [1, 1])
    assert first.told == [0, 1]
    assert len(second.told) == len(followers)
    assert {error.reason for error in second.errors.values()} == ({"STEP_AHEAD"} if why == "step" else set())


async def test_an_engine_failure_among_chunks_that_ran_as_one(house):
    """Of chunks that were run in one go only the one to blame fails, those before it are answered, and those behind it
    are ahead of their session.
    """
    group, slots, (session,) = house.open()
    sink = Notes()
    house.hold()
    house.worker.submit(chunks(group, slots, 1))
    await house.held()
    for tag, value in enumerate((1, 1, house.engine.poison, 1)):
        x = np.full((1, 1, FEATURES), value, np.float32)
        house.worker.submit(chunks(group, slots, sink=sink, tags=[tag], x=x, first_steps=[1 + tag]))
    house.engine.gate.set()
    await house.idle()
    assert [tags for tags, _ in sink.results] == [[0], [1]]
    assert {tag: error.reason for tag, error in sink.errors.items()} == {2: "ENGINE_FAILED", 3: "STEP_AHEAD"}
    assert (session.step, house.state(session), session.busy) == (3, [3], False)


async def test_a_session_that_ends_while_its_chunks_run_as_one(house):
    """Every chunk of a session that was deleted meanwhile is told so; the other sessions have theirs."""
    group, slots, made = house.open(2)
    sinks = [Notes(names=dict(enumerate(session.id for session in made))) for _ in range(2)]
    house.hold()
    house.worker.submit(chunks(group, slots, 1))
    await house.held()
    for sink in sinks:
        house.worker.submit(chunks(group, slots, 1, sink=sink))
    run = house.engine.run

    def during(*batch):
        house.sessions.delete(made[0].id)
        return run(*batch)

    house.engine.run = during
    house.engine.gate.set()
    await house.idle()
    assert house.engine.calls[1:] == [(2, [2, 2])]
    assert [list(sink.errors) for sink in sinks] == [[0], [0]]
    assert [[tags for tags, _ in sink.results] for sink in sinks] == [[[1]], [[1]]]
    assert (made[1].step, house.state(made[1])) == (3, [3])


async def test_a_barrier_is_not_overtaken_by_chunks_that_run_as_one(house):
    """What waits between two chunks of a session is done between them."""
    group, slots, (session,) = house.open()
    seen = []
    house.hold()
    house.worker.submit(chunks(group, slots, 1))
    await house.held()
    house.worker.submit(chunks(group, slots, 1))
    house.worker.submit(Barrier(group, slots[0], lambda: seen.append(session.step)))
    house.worker.submit(chunks(group, slots, 1))
    house.engine.gate.set()
    await house.idle()
    assert (seen, session.step) == ([2], 3)
