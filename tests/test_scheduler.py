"""The scheduler: given what waits, what runs next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from house import Notes, chunks, loaded, opened, table
from rnnserve_models.masking import compact
from rnnserve_models.options import LayerOptions
from rnnserve_server.blocks import Barrier, Block
from rnnserve_server.scheduler import Scheduler


def group_of(sessions, batch_size=1):
    found = table()
    return next(iter([opened(found, loaded(), batch_size=batch_size) for _ in range(sessions)])).group


def alone(block):
    """The same block, each of its chunks from another sink."""
    block.sinks = [(Notes(), 1) for _ in block.tags]
    return block


def run(scheduler, tick, seen=None):
    """Does what the worker does, without an engine: each block moves on by the tick's steps."""
    for block in tick.blocks:
        if seen is not None:
            for tag in block.tags.tolist():
                seen.append((tag, block.done, block.done + tick.steps))
        block.done += tick.steps
        if block.done < block.steps:
            scheduler.requeue(block)
        else:
            scheduler.finish(block)


def drain(scheduler):
    seen = []
    while tick := scheduler.next_tick():
        run(scheduler, tick, seen)
    return seen


frames = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True), st.integers(1, 40)), max_size=25
)


@settings(deadline=None)
@given(frames, st.integers(1, 12), st.integers(1, 9), st.integers(1, 3), st.lists(st.booleans(), max_size=25))
def test_any_blocks(frames, most, slice_steps, batch_size, between):
    """Whatever is queued, and ticks between: every chunk is run whole and once, a session's chunks in their order,
    at most max_batch_rows rows a tick unless one chunk alone has more, nothing padded, and nothing is left behind.
    """
    scheduler, group = Scheduler(most, slice_steps), group_of(10, batch_size)
    order: dict[int, list[int]] = {slot: [] for slot in range(10)}
    length: dict[int, int] = {}
    slot_of: dict[int, int] = {}
    seen: list[tuple[int, int, int]] = []

    def one() -> bool:
        tick = scheduler.next_tick()
        if tick is None:
            return False
        rows = sum(block.rows for block in tick.blocks)
        assert rows <= most or (len(tick.blocks) == 1 and len(tick.blocks[0].tags) == 1)
        assert 0 < tick.steps <= slice_steps
        for block in tick.blocks:
            assert tick.steps <= block.steps - block.done
        left = [min(slice_steps, block.steps - block.done) for block in tick.blocks]
        assert max(left).bit_length() == min(left).bit_length()
        assert tick.steps in (min(left), max(1, int(1.6 * most) // rows))
        slots = [int(slot) for block in tick.blocks for slot in block.sessions.slots]
        assert len(slots) == len(set(slots))
        run(scheduler, tick, seen)
        return True

    for number, (slots, steps) in enumerate(frames):
        tags = np.arange(len(slots)) + 100 * number
        for tag, slot in zip(tags.tolist(), slots, strict=True):
            order[slot].append(tag)
            length[tag], slot_of[tag] = steps, slot
        block = chunks(group, slots, steps, tags=tags)
        scheduler.submit(alone(block) if number % 2 else block)
        assert (scheduler.queued_bytes > 0) == bool(len(scheduler))
        if number < len(between) and between[number]:
            one()
    while one():
        pass
    done: dict[int, list[int]] = {slot: [] for slot in range(10)}
    position = dict.fromkeys(length, 0)
    for tag, start, stop in seen:
        assert start == position[tag]
        position[tag] = stop
        if tag not in done[slot_of[tag]]:
            assert all(position[before] == length[before] for before in done[slot_of[tag]])
            done[slot_of[tag]].append(tag)
    assert position == length
    assert done == order
    assert len(scheduler) == 0
    assert scheduler.queued_bytes == 0
    assert (group.tail == -1).all()


@pytest.mark.parametrize(
    ("rows", "options", "together"),
    [(32, {}, 1), (31, {}, 2), (32, {"return_state": True}, 2)],
    ids=["wide", "narrow", "with states"],
)
def test_a_block_with_more_behind_it_runs_alone_if_that_saves_runs(rows, options, together):
    """A block of many rows leaves its tick to those that follow it; one of few, or one that none may be taken along
    with, shares it with others.
    """
    scheduler, found, model = Scheduler(256, 32), table(), loaded()
    made = [opened(found, model, options=LayerOptions(stateful=True, **options)) for _ in range(2 * rows)]
    group, slots = made[0].group, [session.slot for session in made]
    for of in (slots[:rows], slots[rows:]) * 2:
        scheduler.submit(chunks(group, of))
    assert len(scheduler.next_tick().blocks) == together


@pytest.mark.parametrize("longs", [1, 3])
def test_a_short_chunk_waits_for_one_slice_of_each_long_one(longs):
    """A short chunk that comes while long ones run is run before any of them has had two more slices."""
    scheduler, group = Scheduler(1, 8), group_of(longs + 1)
    for slot in range(longs):
        scheduler.submit(chunks(group, [slot], 8000, tags=[slot]))
    for _ in range(50):
        run(scheduler, scheduler.next_tick())
    tick = scheduler.next_tick()
    scheduler.submit(chunks(group, [longs], 1, tags=[99]))
    run(scheduler, tick)
    before = []
    while 99 not in before:
        tick = scheduler.next_tick()
        before += tick.blocks[0].tags.tolist()
        run(scheduler, tick)
    assert len(before) == len(set(before)) <= longs + 1


def test_many_long_chunks_leave_short_ones_their_share():
    """Of 32 clients with chunks of one step and 32 with chunks of 20, each kind gets through more than 0.85 of what
    half of 64 of its kind would. Each client sends its next chunk when it has its answer, and the server
    reads what was sent between two ticks. Times are as measured: 150 us a tick, 40 a chunk and 2.2 a step of a row.
    """

    def chunks_a_second(*kinds: tuple[int, int]) -> list[float]:
        scheduler, group = Scheduler(256, 32), group_of(64)
        done = dict.fromkeys((steps for _, steps in kinds), 0)
        first, coming, seconds = 0, {}, 0.0
        for count, steps in kinds:
            coming[steps] = list(range(first, first + count))
            first += count
        for _ in range(2000):
            for steps, slots in coming.items():
                if slots:
                    scheduler.submit(alone(chunks(group, slots, steps)))
            tick = scheduler.next_tick()
            seconds += 150e-6 + 2.2e-6 * tick.steps * sum(block.rows for block in tick.blocks)
            coming = dict.fromkeys(done, ())
            for block in tick.blocks:
                if block.done + tick.steps == block.steps:
                    seconds += 40e-6 * block.rows
                    done[block.steps] += block.rows
                    coming[block.steps] = (*coming[block.steps], *block.sessions.slots.tolist())
            run(scheduler, tick)
        return [count / seconds for count in done.values()]

    (short,), (long,) = chunks_a_second((64, 1)), chunks_a_second((64, 20))
    some_short, some_long = chunks_a_second((32, 1), (32, 20))
    assert some_short > 0.85 * short / 2
    assert some_long > 0.85 * long / 2


def test_only_chunks_of_different_sinks_are_run_apart():
    """What one client sends together is answered together: among others, it is cut in time and not in pieces."""
    scheduler, group, other = Scheduler(8, 32), group_of(9), group_of(1)
    scheduler.submit(chunks(other, [0], 1))
    block = chunks(group, list(range(9)), 4)
    block.sinks = [(Notes(), 6), (Notes(), 3)]
    scheduler.submit(block)
    ticks = []
    while tick := scheduler.next_tick():
        ticks.append((sum(block.rows for block in tick.blocks), tick.steps))
        run(scheduler, tick)
    assert ticks == [(1, 1), (6, 2), (3, 4), (6, 2)]


def test_a_short_chunk_is_not_run_beside_long_ones_for_long():
    """Chunks much shorter than others are not batched with them, so that neither is padded or cut to bits."""
    scheduler, group = Scheduler(100, 32), group_of(4)
    scheduler.submit(chunks(group, [0, 1], 32))
    scheduler.submit(chunks(group, [2], 1))
    scheduler.submit(chunks(group, [3], 31))
    ticks = []
    while tick := scheduler.next_tick():
        ticks.append((sorted(int(slot) for block in tick.blocks for slot in block.sessions.slots), tick.steps))
        run(scheduler, tick)
    assert ticks == [([0, 1], 32), ([2], 1), ([3], 31)]


def test_ready_chunks_share_a_tick():
    """Chunks of one magnitude that are ready run together, from as many frames as fit."""
    scheduler, group = Scheduler(6, 32), group_of(8)
    for slot in range(8):
        scheduler.submit(chunks(group, [slot], 4))
    sizes = []
    while tick := scheduler.next_tick():
        sizes.append(len(tick.blocks))
        run(scheduler, tick)
    assert sizes == [6, 2]


def test_a_tick_has_so_many_blocks_at_most():
    """However little their rows are together: what is done for each keeps the event loop, whoever waits for it."""
    scheduler, group = Scheduler(64, 32), group_of(40)
    for slot in range(40):
        scheduler.submit(chunks(group, [slot], 1))
    sizes = []
    while tick := scheduler.next_tick():
        sizes.append(len(tick.blocks))
        run(scheduler, tick)
    assert sizes == [16, 16, 8]


def test_partial_overlap_is_split():
    """Of a frame that shares one session with a block that waits, only that session's chunk waits for it."""
    scheduler, group = Scheduler(100, 4), group_of(4)
    scheduler.submit(chunks(group, [0, 1], 400, tags=[10, 11]))
    scheduler.submit(chunks(group, [1, 2, 3], 4, tags=[21, 22, 23]))
    scheduler.submit(chunks(group, [2], 4, tags=[32]))
    done = drain(scheduler)
    ended = [tag for tag, _, stop in done if stop in (4, 400) and (stop == 400 or tag >= 20)]
    assert set(ended[:3]) == {22, 23, 32}
    assert ended.index(32) > ended.index(22)
    assert ended[-1] == 21


def test_a_session_on_two_lanes_of_one_frame():
    """Two chunks of one session in one block are not run side by side, but one behind the other, in their order."""
    scheduler, group = Scheduler(100, 4), group_of(3)
    scheduler.submit(chunks(group, [1, 0, 1, 2, 1], 1, tags=[10, 11, 12, 13, 14]))
    ticks = []
    while tick := scheduler.next_tick():
        ticks.append([tag for block in tick.blocks for tag in block.tags.tolist()])
        run(scheduler, tick)
    assert ticks == [[10, 11, 13], [12], [14]]


def test_chunk_wider_than_a_tick():
    """A chunk of more rows than a tick may have is run by itself; a frame of many is cut into ticks."""
    scheduler, group = Scheduler(5, 4), group_of(4, batch_size=3)
    scheduler.submit(chunks(group, [0, 1, 2], 1))
    assert [len(scheduler.next_tick().blocks[0].tags) for _ in range(3)] == [1, 1, 1]
    scheduler = Scheduler(2, 4)
    scheduler.submit(chunks(group, [0], 1))
    scheduler.submit(chunks(group, [3], 1))
    tick = scheduler.next_tick()
    assert [block.rows for block in tick.blocks] == [3]


def test_calls_without_a_session_wait_for_nobody():
    """Stateless calls are batched with chunks and follow nothing."""
    scheduler, group = Scheduler(10, 4), group_of(1)
    scheduler.submit(chunks(group, [0], 2))
    scheduler.submit(chunks(group, [0], 2))
    call = compact({"input": np.ones((2, 3, 2), np.float32)}, None, go_backwards=False)
    scheduler.submit(Block(call, 3, LayerOptions(), [(Notes(), 1)], np.zeros(1, np.int64)))
    tick = scheduler.next_tick()
    assert [block.rows for block in tick.blocks] == [1, 3]
    run(scheduler, tick)
    assert [block.rows for block in scheduler.next_tick().blocks] == [1]


def test_barriers_take_their_turn():
    """A barrier acts at once if its session is idle, else after the chunks before it and before those after it."""
    scheduler, group = Scheduler(10, 2), group_of(2)
    log: list[str] = []
    scheduler.submit(Barrier(group, 0, lambda: log.append("idle")))
    assert log == ["idle"]
    scheduler.submit(chunks(group, [0, 1], 6))
    scheduler.submit(Barrier(group, 0, lambda: log.append("first")))
    scheduler.submit(Barrier(group, 0, lambda: log.append("second")))
    scheduler.submit(chunks(group, [0], 1))
    scheduler.submit(Barrier(group, 1, lambda: log.append("other")))
    for _ in range(3):
        assert log == ["idle"]
        run(scheduler, scheduler.next_tick())
    assert sorted(log) == ["first", "idle", "other", "second"]
    assert log.index("first") < log.index("second")
    scheduler.submit(Barrier(group, 0, lambda: log.append("third")))
    assert "third" not in log
    run(scheduler, scheduler.next_tick())
    assert log[-1] == "third"
    assert len(scheduler) == 0


def test_any_number_of_barriers():
    """Thousands of barriers behind one chunk are done, in order, whatever the interpreter's recursion limit."""
    scheduler, group = Scheduler(10, 2), group_of(1)
    log: list[int] = []
    scheduler.submit(chunks(group, [0], 1))
    for number in range(5000):
        scheduler.submit(Barrier(group, 0, lambda number=number: log.append(number)))
    run(scheduler, scheduler.next_tick())
    assert log == list(range(5000))
    assert len(scheduler) == 0


def test_narrow():
    """Going on with some of a block's chunks frees the others' sessions, and what followed the block follows it."""
    scheduler, group = Scheduler(10, 4), group_of(4)
    scheduler.submit(chunks(group, [0, 1, 2], 1, tags=[10, 11, 12]))
    (block,) = scheduler.next_tick().blocks
    scheduler.submit(chunks(group, [0], 1, tags=[20]))
    queued = scheduler.queued_bytes
    rest = scheduler.narrow(block, np.array([0, 2]))
    assert rest.tags.tolist() == [10, 12]
    assert scheduler.holds(rest)
    assert not scheduler.holds(block)
    assert scheduler.queued_bytes == queued - block.nbytes // 3
    assert group.tail[1] == -1
    scheduler.submit(chunks(group, [1], 1, tags=[21]))
    tick = scheduler.next_tick()
    assert [each.tags.tolist() for each in tick.blocks] == [[21]]
    run(scheduler, tick)
    assert scheduler.next_tick() is None
    scheduler.finish(rest)
    assert drain(scheduler) == [(20, 0, 1)]
    assert scheduler.queued_bytes == 0


def test_solo_blocks_are_run_by_themselves():
    """A block marked solo shares its tick with no other."""
    scheduler, group = Scheduler(10, 4), group_of(4)
    scheduler.submit(chunks(group, [0, 1, 2, 3], 1))
    (block,) = scheduler.next_tick().blocks
    block.solo = True
    scheduler.requeue(block)
    other = group_of(1)
    scheduler.submit(chunks(other, [0], 1))
    assert [len(scheduler.next_tick().blocks) for _ in range(2)] == [1, 1]


def test_a_fully_masked_chunk_takes_a_tick_of_no_steps():
    """A chunk whose every step is masked has its turn like any other, with nothing to compute."""
    scheduler, group = Scheduler(10, 4), group_of(1)
    x = np.ones((3, 1, 2), np.float32)
    scheduler.submit(chunks(group, [0], x=x, mask=np.zeros((3, 1), bool)))
    tick = scheduler.next_tick()
    assert tick.steps == 0
    scheduler.finish(tick.blocks[0])
    assert scheduler.queued_bytes == 0
