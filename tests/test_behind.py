"""Ticks that run while others are stored: nobody sees more than is stored, and what cannot be stored was not."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import numpy as np
import pytest

from house import FEATURES, AddingEngine, Clock, Notes, chunks, loaded, table
from rnnserve_models.options import LayerOptions
from rnnserve_server.behind import Behind, Ran
from rnnserve_server.blocks import Block, Sessions
from rnnserve_server.errors import InternalError, SessionAway, SessionClosed, SessionTakenOver, StoreDown
from rnnserve_server.intake import Frame
from rnnserve_server.keeper import Keeper
from rnnserve_server.layout import signature
from rnnserve_server.replay import Limits
from rnnserve_server.repository import Repository
from rnnserve_server.resets import ResetRules
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.store import Head, Record, StoreUnavailable
from rnnserve_server.store.memory import MemoryStore
from rnnserve_server.store.tick import STEP
from rnnserve_server.worker import Worker


class GatedStore(MemoryStore):
    """Keeps ticks when it is let.

    Attributes:
        gate: what a commit waits for, before it is applied.
        asked: how many commits have begun.
        stored: the steps of sessions, as they are stored.
        fails: the next commit raises, and is applied or is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0
        self.stored: dict[str, int] = {}
        self.fails: bool | None = None

    async def commit_ticks(self, ticks):
        self.asked += 1
        await self.gate.wait()
        fails, self.fails = self.fails, None
        if fails is False:
            raise StoreUnavailable("the disk is full")
        applied = await super().commit_ticks(ticks)
        for tick, done in zip(ticks, applied, strict=True):
            steps = tick.numbers[:, STEP].tolist()
            self.stored |= {x: step for x, step, good in zip(tick.ids, steps, done, strict=True) if good}
        if fails is True:
            raise StoreUnavailable("the answer was lost")
        return applied


class Witness(Notes):
    """A sink that holds every answer against the store."""

    def __init__(self, store: GatedStore, names: list[str]) -> None:
        super().__init__(names=dict(enumerate(names)))
        self._store = store

    def result(self, answers):
        for tag, first_step in zip(answers.tags.tolist(), answers.first_steps.tolist(), strict=True):
            assert self._store.stored[self._names[tag]] >= first_step + answers.timesteps
        super().result(answers)


class House:
    """A worker whose answers wait for a store."""

    def __init__(self, tmp_path: Any) -> None:
        self.engine, self.clock, self.store = AddingEngine(), Clock(), GatedStore()
        self.model = loaded(self.engine)
        self.sessions = table(self.clock)
        self.repository = Repository(tmp_path)
        self.repository.put(self.model.name, self.model.version, self.model)
        self.keeper = Keeper(
            self.store, "step", self.sessions, self.repository, clock=self.clock, wall_clock=self.clock
        )
        self.scheduler = Scheduler(64, 8)
        self.worker = Worker(
            self.model,
            self.scheduler,
            self.sessions,
            clock=self.clock,
            on_progress=lambda: None,
            inline_seconds=1.0,
            keeper=self.keeper,
        )
        self.sinks: list[Witness] = []

    async def open(self, *ids: str, window: int = 4, rules: ResetRules | None = None) -> None:
        kept = {} if rules is None else {"rules": rules}
        group, slots, _ = self.sessions.create_many(
            self.model,
            1,
            LayerOptions(stateful=True),
            len(ids),
            initial_states=None,
            idle_lifetime=1e6,
            replay=Limits(window, 1 << 20),
            session_ids=ids,
            **kept,
        )
        assert all(await self.keeper.create(group, slots))

    def send(self, ids: str, first_step: int | None, value: float = 1.0, steps: int = 1) -> Witness:
        """A chunk of each session, at the same step."""
        found = [self.sessions.get(each) for each in ids]
        sink = Witness(self.store, list(ids))
        x = np.full((steps, len(ids), FEATURES), value, np.float32)
        firsts = None if first_step is None else [first_step] * len(ids)
        self.worker.submit(
            chunks(found[0].group, [each.slot for each in found], steps, sink=sink, first_steps=firsts, x=x)
        )
        self.sinks.append(sink)
        return sink

    def take_in(self, name: str, first_step: int) -> None:
        """A chunk of one session, as a stream's frame."""
        session = self.sessions.get(name)
        group, slots = session.group, np.array([session.slot])
        sink = Witness(self.store, [name])
        sessions = Sessions(group, slots, group.generation[slots], np.array([first_step], np.uint64))
        inputs = {"input": np.ones((1, 1, 1, FEATURES), np.float32)}
        self.worker.take_in(Frame(sink, np.zeros(1, np.int64), sessions, inputs, None), signature(inputs, None))
        self.sinks.append(sink)

    async def turns(self) -> None:
        """Until nothing goes on that does not wait for the store."""
        for _ in range(30):
            await asyncio.sleep(0.001)

    async def check_store(self, session_id: str) -> None:
        """What is in memory is what is stored."""
        session = self.sessions.get(session_id)
        (record,) = await self.store.take([session_id], self.clock())
        assert record is not None
        assert record.step == session.step
        assert record.revision == session.group.revision[session.slot]
        state = session.group.arena.gather(np.array([session.slot]))["sum"]
        assert record.states == state.tobytes()
        window = session.group.window.of(session.group, session.slot)
        assert [reply.first_step for reply in record.replies] == [int(r.first_steps[i]) for r, i in window]


@pytest.fixture
async def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.store.gate.set()
    await house.worker.close()
    assert len(house.scheduler) == 0
    assert house.worker.queued_bytes == 0
    for sink in house.sinks:
        assert sorted(sink.told) == list(range(len(sink._names))), "each chunk is answered once"
        assert not sink.unsent


async def test_the_next_ticks_run_while_one_is_stored(house):
    """No answer leaves before its commit, though the chunk after it has run; what ran meanwhile is one write."""
    await house.open("a", "b")
    house.store.gate.clear()
    sinks = []
    for step in range(5):
        sinks.append(house.send("ab", step))
        await house.turns()
        assert len(house.engine.calls) == step + 1
    assert house.store.asked == 1
    assert not any(sink.told for sink in house.sinks)
    assert house.sessions.get("a").step == 0
    house.store.gate.set()
    await house.worker.settle()
    assert house.store.asked == 2
    assert [sink.results[0][1].tolist() for sink in sinks] == [[[k, k]] * 2 for k in range(1, 6)]
    assert all(sink.flushes for sink in sinks)
    await house.check_store("a")


async def test_answers_are_made_ready_while_they_are_stored(house):
    """What is told when a commit is known is made before, and once; it is told as it would be otherwise."""
    await house.open("a", "b")
    house.store.gate.clear()
    first = house.send("ab", 0)
    await house.turns()
    assert first.readied == [0, 1]
    assert not first.told
    house.store.gate.set()
    await house.worker.settle()
    assert first.readied == [0, 1]
    assert first.results[0][1].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("fails", ["when it is made", "when it is told"])
async def test_an_answer_that_cannot_be_made_ready(house, fails):
    """A bug where an answer is made is met where it is told, by that sink alone: its chunks are stored, and told as
    failed; what is behind them goes on.
    """
    await house.open("a", "b")

    class Broken(Witness):
        def result(self, answers):
            raise RuntimeError("cannot be encoded")

        def ready(self, answers):
            if fails == "when it is made":
                raise RuntimeError("cannot be encoded")
            return super().ready(answers)

    house.store.gate.clear()
    house.sinks.append(broken := Broken(house.store, ["a"]))
    a = house.sessions.get("a")
    house.worker.submit(chunks(a.group, [a.slot], 1, sink=broken, first_steps=[0], x=np.ones((1, 1, FEATURES))))
    await house.turns()
    other, behind = house.send("b", 0), house.send("a", 1)
    house.store.gate.set()
    await house.worker.settle()
    assert broken.errors[0].reason == "INTERNAL"
    assert other.results[0][1].tolist() == [[1, 1]]
    assert behind.results[0][1].tolist() == [[2, 2]]
    await house.check_store("a")


async def test_what_was_answered_is_let_go_of_at_once(house):
    """Blocks that ran on from one another, or were put together, hold on to nobody: their arrays are free for the next
    ones, and do not wait for the garbage collector.
    """
    gc.collect()
    gc.disable()
    try:
        await house.open("a", "b")
        house.store.gate.clear()
        for step in (0, 1):  # one is stored, and one runs on from it
            house.send("ab", step)
            await house.turns()
        for step in range(2, 6):  # put together, they run on from that
            house.send("ab", step)
        await house.turns()
        house.store.gate.set()
        await house.worker.settle()
        assert len(house.engine.calls) == 3
        assert [each for each in gc.get_objects() if isinstance(each, Block)] == []
    finally:
        gc.enable()
    assert all(len(sink.results) == 1 for sink in house.sinks)


async def test_other_sessions_do_not_wait_for_a_commit(house):
    """What is of other sessions is run meanwhile, and stored with the next commit."""
    await house.open("a", "b", "c")
    house.store.gate.clear()
    house.send("a", 0)
    await house.turns()
    house.send("b", 0)
    house.send("c", 0, steps=3)
    await house.turns()
    assert len(house.engine.calls) == 3
    house.store.gate.set()
    await house.worker.settle()
    assert house.store.asked == 2
    assert house.store.stored == {"a": 1, "b": 1, "c": 3}


async def test_what_is_not_of_the_very_same_sessions_waits(house):
    """A chunk runs on only behind a whole block of the same sessions, right where that ends."""
    await house.open("a", "b")
    house.store.gate.clear()
    house.send("ab", 0)
    await house.turns()
    alone, both, late = house.send("a", 1), house.send("ab", 2), house.send("b", 1)
    await house.turns()
    assert len(house.engine.calls) == 1
    house.store.gate.set()
    await house.worker.settle()
    assert alone.results
    assert set(both.errors) == {1}  # b was at step 1 only
    assert late.results
    await house.check_store("a")


async def test_a_refused_commit_fails_what_ran_ahead(house):
    """A session that was taken over takes along all that was run of it, and nothing else; the store is as its new
    owner has it.
    """
    await house.open("a", "b")
    house.store.gate.clear()
    sinks = [house.send("ab", step) for step in range(2)]
    await house.turns()
    sinks.append(house.send("ab", 2))
    await house.turns()
    (taken,) = await house.store.take(["a"], house.clock())
    house.store.gate.set()
    await house.worker.settle()
    for sink in sinks:
        assert isinstance(sink.errors[0], SessionTakenOver)
        assert [tags for tags, _ in sink.results] == [[1]]
    assert "a" not in house.sessions
    assert (await house.store.peek(["a"]))[0] == head_of(taken)
    assert house.sessions.get("b").step == 3
    await house.check_store("b")


@pytest.mark.parametrize("when", ["before it is asked why", "while it is asked why"])
async def test_a_session_that_is_found_gone_by_two_at_once(house, monkeypatch, when):
    """A commit finds that a session was taken over, and so does who looks for it at that moment: it ends once, and the
    session that has its slot by then goes on.
    """
    await house.open("a")
    gone = house.sessions.get("a")
    begin, ended = house.store.begin_commit, house.store.ended

    def give_away() -> None:
        house.sessions.lose(gone.group, np.array([gone.slot]), SessionTakenOver)
        options = LayerOptions(stateful=True)
        house.sessions.create(house.model, 1, options, initial_states=None, idle_lifetime=1e6, session_id="b")

    def begin_commit(ticks, told):
        def told_of(applied):
            told(applied)
            if when == "before it is asked why":
                give_away()

        begin(ticks, told_of)

    async def asked(ids, now):
        give_away()
        return await ended(ids, now)

    monkeypatch.setattr(house.store, "begin_commit", begin_commit)
    if when == "while it is asked why":
        monkeypatch.setattr(house.store, "ended", asked)
    await house.store.take(["a"], house.clock())
    sink = house.send("a", 0)
    await house.worker.settle()
    assert isinstance(sink.errors[0], SessionTakenOver)
    assert [session.id for session in house.sessions.after(0)] == ["b"]
    assert len(house.sessions) == 1


def head_of(record: Record) -> Head:
    return Head(record.id, record.meta, record.epoch, record.revision, record.step, record.last_used)


@pytest.mark.parametrize("applied", [False, True])
async def test_a_store_that_fails_takes_back_what_ran_ahead(house, applied):
    """Whether a commit was applied is not known when it fails: the sessions leave memory with all that was run, and
    come back as they are stored.
    """
    await house.open("a")
    house.store.gate.clear()
    first = house.send("a", 0)
    await house.turns()
    second = house.send("a", 1)
    await house.turns()
    third = house.send("a", 5)  # waits behind them
    await house.turns()
    house.store.fails = applied
    house.store.gate.set()
    await house.worker.settle()
    assert isinstance(first.errors[0], StoreDown)
    assert isinstance(second.errors[0], SessionAway)
    assert isinstance(third.errors[0], SessionAway)
    assert "a" not in house.sessions
    assert await house.keeper.attach(["a"], lambda group: None) == {}
    assert house.sessions.get("a").step == int(applied)
    again = [house.send("a", step) for step in range(2)]
    await house.worker.settle()
    assert [sink.results[0][1].tolist() for sink in again] == [[[1, 1]], [[2, 2]]]
    await house.check_store("a")


async def test_a_commit_that_meets_a_bug_leaves_nobody_waiting(house, monkeypatch):
    """Who waits for it is told, nothing is taken for stored, and the sessions go on."""
    await house.open("a", "b")

    def begin_commit(ticks, told):
        monkeypatch.undo()
        raise AssertionError("a bug")

    monkeypatch.setattr(house.store, "begin_commit", begin_commit)
    first, other = house.send("a", 0), house.send("b", 0)
    await house.worker.settle()
    assert isinstance(first.errors[0], InternalError)
    assert isinstance(other.errors[0], InternalError)
    assert house.sessions.get("a").step == 0
    again = house.send("ab", 0)
    await house.worker.settle()
    assert again.results[0][1].tolist() == [[1, 1], [1, 1]]
    await house.check_store("a")


async def test_a_chunk_sent_again_waits_for_the_commit_of_the_first(house):
    """It is answered as the first was, and not before."""
    await house.open("a")
    house.store.gate.clear()
    first = house.send("a", 0)
    await house.turns()
    ahead = house.send("a", 1)
    await house.turns()
    again, other = house.send("a", 0), house.send("a", 1, value=2.0)
    await house.turns()
    assert not again.told
    house.store.gate.set()
    await house.worker.settle()
    assert again.results[0][1].tolist() == first.results[0][1].tolist() == [[1, 1]]
    assert ahead.results
    assert other.errors[0].reason == "STEP_CONFLICT"
    assert house.worker.replayed == 1


async def test_a_turn_waits_for_the_commit(house):
    """Whoever looks at a session or changes it in its turn finds what is stored."""
    await house.open("a")
    session = house.sessions.get("a")
    house.store.gate.clear()
    house.send("a", 0)
    await house.turns()
    house.send("a", 1)

    async def look() -> tuple[int, int]:
        async with house.worker.turn(session.group, session.slot):
            return session.step, house.store.stored["a"]

    looking = asyncio.create_task(look())
    await house.turns()
    behind = house.send("a", 2)
    await house.turns()
    assert not looking.done()
    assert len(house.engine.calls) == 2
    house.store.gate.set()
    assert await looking == (2, 2)
    await house.worker.settle()
    assert behind.results


@pytest.mark.parametrize("when", ["before it runs on", "when it has"])
async def test_a_session_that_ends_meanwhile(house, when):
    """Its chunks are told, and the others of their blocks go on."""
    await house.open("a", "b", "c")
    house.store.gate.clear()
    sinks = [house.send("abc", 0)]
    await house.turns()
    if when == "when it has":
        sinks.append(house.send("abc", 1))
        await house.turns()
        house.sessions.delete("b")
    else:
        house.engine.gate.clear()
        sinks.append(house.send("abc", 1))
        house.sessions.delete("b")
        house.engine.gate.set()
    await house.turns()
    house.store.gate.set()
    await house.worker.settle()
    for sink in sinks:
        assert isinstance(sink.errors[1], SessionClosed)
        assert [tags for tags, _ in sink.results] == [[0, 2]]
    await house.check_store("a")
    await house.check_store("c")


async def test_a_chunk_that_is_given_up_before_it_runs_on(house):
    """It leaves no trace; what comes behind it is told at which step the session is."""
    await house.open("a", "b")
    house.store.gate.clear()
    house.send("ab", 0)
    await house.turns()
    session = house.sessions.get("a")
    slots = [house.sessions.get(each).slot for each in "ab"]
    gone, stays = Witness(house.store, ["a"]), Witness(house.store, ["b", "b"])
    stays._names = {1: "b"}
    block = chunks(session.group, slots, first_steps=[1, 1], tags=[0, 1])
    block.sinks = [(gone, 1), (stays, 1)]
    gone.cancelled = True
    house.worker.submit(block)
    await house.turns()
    assert len(house.engine.calls) == 2
    assert session.busy
    behind, again = house.send("ab", 2), house.send("a", 1)
    await house.turns()
    house.store.gate.set()
    await house.worker.settle()
    assert again.results[0][1].tolist() == [[2, 2]]
    assert gone.errors[0].reason == "CANCELLED"
    assert stays.results[0][1].tolist() == [[2, 2]]
    assert set(behind.errors) == {0}
    assert behind.results[0][1].tolist() == [[3, 3]]
    assert house.sessions.get("a").step == 2
    await house.check_store("a")
    await house.check_store("b")


async def test_an_engine_that_fails_ahead(house):
    """Fails that chunk and what is behind it, not what is being stored."""
    await house.open("a")
    house.store.gate.clear()
    good = house.send("a", 0)
    await house.turns()
    bad, behind = house.send("a", 1, value=house.engine.poison), house.send("a", 2)
    await house.turns()
    assert bad.errors[0].reason == "ENGINE_FAILED"
    assert house.sessions.get("a").busy
    again = house.send("a", 1)
    await house.turns()
    house.store.gate.set()
    await house.worker.settle()
    assert good.results
    assert behind.errors[0].reason == "STEP_AHEAD"
    assert again.results[0][1].tolist() == [[2, 2]]
    await house.check_store("a")


async def test_a_bug_in_storing_leaves_nothing_half_done(house, monkeypatch):
    """What was run behind it is not committed on top of what was not."""
    await house.open("a")
    house.store.gate.clear()
    first = house.send("a", 0)
    await house.turns()
    second = house.send("a", 1)
    await house.turns()

    def bug(*arguments: Any, **more: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug")

    monkeypatch.setattr(house.worker._answering, "commit", bug)
    house.store.gate.set()
    await house.worker.settle()
    assert first.errors[0].reason == "INTERNAL"
    assert second.errors[0].reason == "STEP_AHEAD"


async def test_rules_hold_for_what_runs_on(house):
    """Resets by themselves fall where they would."""
    await house.open("a", rules=ResetRules(every_steps=2))
    house.store.gate.clear()
    sinks = []
    for step in range(5):
        sinks.append(house.send("a", step))
        await house.turns()
    house.store.gate.set()
    await house.worker.settle()
    assert [sink.results[0][1][0, 0] for sink in sinks] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(("commit_ms", "run_ms", "commits"), [(0, 0, 3), (3, 1, 1), (3, 11, 1), (3, 13, 2)])
async def test_a_commit_of_this_process_waits_for_what_is_ready(house, monkeypatch, commit_ms, run_ms, commits):
    """Where commits are the server's own work, what waits is run first and stored along; but the answers wait for no
    longer than four commits take.
    """
    await house.open("a", "b", "c")
    house.store.embedded = True
    house.store.gate.clear()
    house.send("a", 0)
    await house.turns()
    house.clock.now += commit_ms / 1000
    house.store.gate.set()
    await house.worker.settle()
    run = house.engine.run

    def timed(*args):
        house.clock.now += run_ms / 1000
        return run(*args)

    monkeypatch.setattr(house.engine, "run", timed)
    sinks = [house.send("a", 1), house.send("b", 0, steps=2), house.send("c", 0, steps=5)]  # three ticks
    await house.worker.settle()
    assert len(house.engine.calls) == 4
    assert house.store.asked == 1 + commits
    assert all(sink.results for sink in sinks)


async def test_a_commit_elsewhere_is_waited_for_while_it_is_quick(house, monkeypatch):
    """What comes meanwhile is one tick and one commit. After a slow one, and when one does not end, it runs at once."""
    monkeypatch.setattr("rnnserve_server.storing._HELD_SECONDS", 60.0)
    await house.open("a", "b", "c")

    async def runs_during_a_commit():
        """How often the engine runs, while one commit is under way, for what comes in two turns."""
        calls = len(house.engine.calls)
        house.store.gate.clear()
        house.send("a", house.sessions.get("a").step)
        await house.turns()
        for name in "bc":
            house.send(name, house.sessions.get(name).step)
            await house.turns()
        return len(house.engine.calls) - calls - 1

    assert await runs_during_a_commit() == 0
    house.store.gate.set()
    await house.worker.settle()
    assert (house.store.asked, len(house.engine.calls)) == (2, 2)
    house.store.gate.clear()
    house.send("a", 1)
    await house.turns()
    house.clock.now += 1.0
    house.store.gate.set()
    await house.worker.settle()
    assert await runs_during_a_commit() == 2
    house.store.gate.set()
    await house.worker.settle()
    monkeypatch.setattr("rnnserve_server.storing._HELD_SECONDS", 0.0)
    assert await runs_during_a_commit() == 2


async def test_what_comes_during_a_commit_is_lined_up_together(house):
    """However many turns of the loop it takes until a commit is over, what came meanwhile is one block then."""
    await house.open("a", "b", "c")
    house.store.embedded = True
    house.store.gate.clear()
    house.send("a", 0)
    await house.turns()
    for name in "bc":
        house.take_in(name, 0)
        await house.turns()
    assert (len(house.scheduler), len(house.worker)) == (1, 3)
    house.store.gate.set()
    blocks: list[Block] = []
    submit = house.scheduler.submit
    house.scheduler.submit = lambda block: (blocks.append(block), submit(block))
    await house.worker.settle()
    assert [len(block.sinks) for block in blocks] == [2]
    assert all(sink.results for sink in house.sinks)
    assert house.store.asked == 2


@pytest.mark.parametrize(("embedded", "frames", "runs"), [(False, 3, 0), (False, 4, 1), (True, 4, 0)])
async def test_far_more_than_is_being_stored_runs_meanwhile(house, monkeypatch, embedded, frames, runs):
    """While one frame is stored elsewhere, four times as much runs, and is stored next; less waits, and runs as one."""
    monkeypatch.setattr("rnnserve_server.storing._HELD_SECONDS", 60.0)
    await house.open("a", "b", "c", "d", "e")
    house.store.embedded = embedded
    house.store.gate.clear()
    house.take_in("a", 0)
    await house.turns()
    calls = len(house.engine.calls)
    for name in "bcde"[:frames]:
        house.take_in(name, 0)
    await house.turns()
    assert len(house.engine.calls) == calls + runs
    assert house.store.asked == 1
    house.store.gate.set()
    await house.worker.settle()
    assert len(house.engine.calls) == calls + 1
    assert house.store.asked == 2
    assert all(sink.results for sink in house.sinks)


@pytest.mark.parametrize(("embedded", "near"), [(False, 0.0), (False, 1.0), (True, 0.0)])
@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_every_answer_is_the_oracles(tmp_path, monkeypatch, seed, embedded, near):
    """Frames of any sessions, sent ahead, to a store that is slow, fails and loses sessions: each answer is the sum of
    what the session was sent, and in the end memory is what is stored.
    """
    monkeypatch.setattr("rnnserve_server.storing._NEAR_SECONDS", near)
    house, rng = House(tmp_path), random.Random(seed)
    house.store.embedded = embedded
    names = "abcde"
    await house.open(*names, window=300)  # a client is never further ahead than it is remembered
    totals = {name: [0.0] for name in names}  # by step
    sent = dict.fromkeys(names, 0)  # the step that comes next
    todo: list[tuple[str, int, float, Witness]] = []

    def look() -> None:
        for ids, first_step, value, sink in todo:
            for tags, y in sink.results:
                for tag, row in zip(tags, y, strict=True):
                    before = totals[ids[tag]]
                    assert len(before) > first_step
                    expected = before[first_step] + value
                    if len(before) == first_step + 1:
                        before.append(expected)
                    assert before[first_step + 1] == row[0] == expected
            assert not any(error.reason == "INTERNAL" for error in sink.errors.values())
            assert not sink.unsent
        todo.clear()

    for _ in range(300):
        what = rng.random()
        if what < 0.6:
            ids = names if rng.random() < 0.6 else "".join(sorted(rng.sample(names, rng.randrange(1, 5))))
            step = sent[ids[0]]
            ids = "".join(each for each in ids if sent[each] == step)
            value = float(1 + step % 3)  # the same when it is sent again
            if all(each in house.sessions for each in ids):
                todo.append((ids, step, value, house.send(ids, step, value)))
                sent |= dict.fromkeys(ids, step + 1)
        elif what < 0.7:
            house.store.gate.clear()
        elif what < 0.85:
            house.store.gate.set()
        elif what < 0.9:
            house.store.fails = rng.random() < 0.5
            house.store.gate.set()
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        house.clock.now += 0.001
        if what > 0.93:
            house.store.gate.set()
            await house.worker.settle()
            look()
            away = [each for each in names if each not in house.sessions]
            assert await house.keeper.attach(away, lambda group: None) == {}
            for name in names:
                sent[name] = len(totals[name]) - 1  # and what was not answered is sent again
    house.store.gate.set()
    await house.worker.settle()
    look()
    assert await house.keeper.attach(names, lambda group: None) == {}
    for name in names:
        step = house.sessions.get(name).step
        assert step >= len(totals[name]) - 1  # what was answered is there
        await house.check_store(name)
    assert sum(map(len, totals.values())) > 60
    await house.worker.close()


def test_what_can_be_stored_together() -> None:
    """Blocks of the very same sessions are a chain; what overlaps otherwise waits for the next commit."""
    model, sessions = loaded(), table()
    group, _, _ = sessions.create_many(
        model, 1, LayerOptions(stateful=True), 4, initial_states=None, idle_lifetime=1e6, session_ids=list("abcd")
    )

    def block(slots: list[int], step: int) -> Any:
        return chunks(group, slots, first_steps=[step] * len(slots))

    behind = Behind()
    ticks = [
        [block([0, 1], 0), block([2], 0)],
        [block([0, 1], 1)],
        [block([3], 0), block([2], 1)],
        [block([0], 2)],
        [block([1], 2)],
    ]
    for tick in ticks:
        behind.add(Ran(tick, None))
    taken, chains = behind.take()
    assert [each.blocks for each in taken] == ticks[:3]
    assert chains == [[ticks[0][0], ticks[1][0]], [ticks[0][1], ticks[2][1]], [ticks[2][0]]]
    taken, chains = behind.take()
    assert [each.blocks for each in taken] == ticks[3:]
    assert chains == [[ticks[3][0]], [ticks[4][0]]]
    assert not behind
