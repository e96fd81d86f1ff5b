"""The loop of one model: schedule, run, commit.

Everything but the run itself happens on the event loop's thread, so sessions, arenas and queues need no locks. The run
happens on the model's own thread, where onnxruntime and NumPy let go of the interpreter; but handing it over and back
costs more than a small run, so one that is known to be small is done where it is.

Where an answer waits for another process to store it, the next ticks run meanwhile: see `behind`. Only when that is
done is a chunk committed in memory and answered, so that nobody ever sees more than is stored.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import structlog

from rnnserve_models.engine.base import Array, Arrays, Engine, EngineError
from rnnserve_models.load import LoadedModel
from rnnserve_server.behind import Behind, Ran
from rnnserve_server.blocks import Barrier, Block, Failure, Sink
from rnnserve_server.errors import (
    Cancelled,
    DeadlinePassed,
    EngineFailed,
    InternalError,
    ServiceError,
    SessionAway,
    StepBehind,
    StepConflict,
    StoreDown,
)
from rnnserve_server.intake import Frame, Intake, joined
from rnnserve_server.keeper import Keeper
from rnnserve_server.layout import Signature, faults, same_lengths, to_wire
from rnnserve_server.meter import Meter
from rnnserve_server.observer import Observer, Ticked, some_sessions
from rnnserve_server.replay import Run
from rnnserve_server.resets import resets
from rnnserve_server.scheduler import Scheduler, Tick
from rnnserve_server.sessions import Group, SessionTable
from rnnserve_server.store.base import Applied, StoreError
from rnnserve_server.store.tick import Tick as Changes

log = structlog.get_logger(__name__)

_HELD_SECONDS = 0.01  # for which a commit is held back at most, whatever the disk did the last time
_NEAR_SECONDS = 0.005  # which a commit elsewhere may take to be waited for: less than two commits cost more than one

Batch = tuple[Arrays, Array, Arrays]
"""The arguments of `Engine.run`: inputs {name: [T, R, ...]}, lengths [R], states {name: [R, ...]}."""

Soon = Callable[[Callable[[], object]], object]
"""Has a function called on the event loop when what has come so far was taken in, in nobody's context."""

Shown = list[tuple[Block, Arrays, Arrays]]
"""The blocks that a finished one was made of, and the outputs and states of each, as `Answers` has them."""

Chained = list[tuple[Block, Shown]]
"""The blocks of a chain, and what they answer."""


class _Ready(NamedTuple):
    """A tick that can be run.

    Attributes:
        tick: what is left of it.
        batch: the arguments of the engine; None: it need not be asked.
        began_at: when it was ready, if anybody wants to know.
    """

    tick: Tick
    batch: Batch | None
    began_at: float


class Worker:
    """Runs what is queued for one model.

    Args:
        model: what it runs.
        scheduler: its queue.
        sessions: where states are committed.
        clock: monotonic seconds.
        on_progress: called when queued work got less.
        inline_seconds: a run that is expected to take less is not handed over to the model's thread.
        keeper: what keeps the sessions in a store, if there is one.
        meter: who is told of each run, if anybody is.
        observer: who is told of each tick, if anybody is.
        soon: what has it tick when there is work; None: the event loop's next turn.

    Attributes:
        model: what it runs.
        replayed: how many chunks were answered as they were answered before.
    """

    def __init__(
        self,
        model: LoadedModel,
        scheduler: Scheduler,
        sessions: SessionTable,
        *,
        clock: Callable[[], float],
        on_progress: Callable[[], None],
        inline_seconds: float = 0.0,
        keeper: Keeper | None = None,
        meter: Meter | None = None,
        observer: Observer | None = None,
        soon: Soon | None = None,
    ) -> None:
        self.model = model
        self.replayed = 0
        self._engine = model.engine
        self._guarded = [spec for spec in model.engine.inputs if spec.finite or spec.bounds is not None]
        self._scheduler = scheduler
        self._intake = Intake()
        self._sessions = sessions
        self._clock = clock
        self._on_progress = on_progress
        self._inline_seconds = inline_seconds
        self._keeper = keeper
        self._resetting = False  # there was a block with resets
        self._meter = meter
        self._observer = observer
        self._watched: Ticked | None = None  # the tick that runs, if anybody watches
        self._expected: dict[tuple[int, int], float] = {}  # seconds of a run, by the magnitudes of its rows and steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._context = contextvars.Context()  # what it logs and traces is not of the call that happened to wake it
        self._soon = soon or self._next_turn
        self._due = False  # it is about to tick
        self._task: asyncio.Task[None] | None = None  # what ticks, where that has to wait
        self._behind = Behind()
        self._storing = False  # a commit is under way
        self._storing_long = False  # for so long that nothing waits for it any more
        self._storing_at = 0.0  # since then
        self._all_stored = asyncio.Event()  # none is
        self._held: asyncio.TimerHandle | None = None  # says when that is
        self._losing: asyncio.Task[None] | None = None  # held on to, or it might be collected
        self._ran_at = 0.0  # when the first of what is behind was run
        self._commit_seconds = 0.0  # what the last commit took, as far as it shall count

    @property
    def queued_bytes(self) -> int:
        """Bytes of input that wait or run."""
        return self._intake.queued_bytes + self._scheduler.queued_bytes

    def __len__(self) -> int:
        """Frames, blocks and barriers that wait or run."""
        return len(self._intake) + len(self._scheduler)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued."""
        return not self._due and self._task is None and not self._storing

    def take_in(self, frame: Frame, signature: Signature) -> None:
        """Queues a frame. Called on the event loop's thread; frames of one turn of the loop are joined."""
        if self._observer is not None and self._intake.since is None:
            self._intake.since = self._clock()
        self._intake.add(frame, signature)
        self._wake()

    def submit(self, work: Block | Barrier) -> None:
        """Queues work behind what was queued before. Called on the event loop's thread."""
        self.line_up()
        if isinstance(work, Block) and work.resets is not None:
            self._resetting = True
        if self._observer is not None and isinstance(work, Block):
            work.queued_at = self._clock()
        self._scheduler.submit(work)
        self._wake()

    @asynccontextmanager
    async def turn(self, group: Group, slot: int) -> AsyncIterator[None]:
        """Waits for a session's chunks that were queued before, and has those that come later wait."""
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def begin() -> None:
            if not begun.cancelled():
                begun.set_result(None)

        barrier = Barrier(group, slot, begin, held=True)
        self.submit(barrier)
        try:
            await begun
            yield
        finally:
            if begun.done() and not begun.cancelled():
                self._scheduler.finish(barrier)
                self._wake()
            else:  # nobody waits for its turn any more
                barrier.held = False

    def _wake(self) -> None:
        if self._task is None and not self._due:
            self._due = True
            self._soon(self._turn)

    def _next_turn(self, callback: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_soon(callback, context=self._context)

    async def settle(self) -> None:
        """Waits for what is queued."""
        while not self.idle:
            if self._task is not None:
                await self._task
            elif self._storing:
                await self._all_stored.wait()
            else:
                await asyncio.sleep(0)

    async def close(self) -> None:
        """Waits for what is queued, and ends the model's thread."""
        await self.settle()
        self.shutdown()

    def shutdown(self) -> None:
        """Ends the model's thread, which must be idle."""
        self._thread.shutdown()

    def _turn(self) -> None:
        """Ticks once, here and now if nothing has to be waited for; else a task does, as long as something is ready."""
        self._due = False
        tick = self._next_tick()
        if tick is None:
            return
        if self._ahead(tick.blocks):
            self._begin_loop(self._loop(tick))
            return
        self._begins()
        sinks = _sinks(tick.blocks)
        try:
            ready = self._ready(tick)
            if not self._is_short(ready):
                self._begin_loop(self._loop(tick, ready, sinks))
                return
            self._ran(ready, None if ready.batch is None else self._compute(ready.batch))
        except Exception:
            self._failed(tick)
        self._ends(sinks)
        if len(self):  # small runs one after the other must not keep the loop from reading and writing
            self._due = True
            self._next_turn(self._turn)

    def _begin_loop(self, loop: Coroutine[None, None, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(loop, context=contextvars.Context())

    async def _loop(self, tick: Tick | None, ready: _Ready | None = None, sinks: Collection[Sink] = ()) -> None:
        """Ticks for as long as something is ready, beginning with a tick that may be ready too."""
        try:
            while tick is not None:
                if ready is None:
                    self._begins()
                    sinks = _sinks(tick.blocks)
                try:
                    if ready is None:
                        if self._keeper is not None and (ahead := self._ahead(tick.blocks)):
                            with suppress(StoreDown):
                                await self._keeper.verify(ahead)
                        ready = self._ready(tick)
                    if ready.batch is None or self._is_short(ready):
                        result = None if ready.batch is None else self._compute(ready.batch)
                    else:
                        run_in_thread = asyncio.get_running_loop().run_in_executor
                        result = await run_in_thread(self._thread, self._compute, ready.batch)
                    self._ran(ready, result)
                except Exception:
                    self._failed(tick)
                self._ends(sinks)
                if len(self):  # as in `_turn`
                    await asyncio.sleep(0)
                tick, ready = self._next_tick(), None
        finally:
            self._task = None

    def _begins(self) -> None:
        """A tick begins."""
        if self._observer is not None:
            self._watched = Ticked(self.model, self._clock())

    def _failed(self, tick: Tick) -> None:
        """A tick has met a bug: no one is left waiting for it."""
        log.exception("tick failed", **self._facts(tick.blocks))
        for block in filter(self._scheduler.holds, tick.blocks):
            self._drop(block, _internal())

    def _ends(self, sinks: Collection[Sink]) -> None:
        """A tick is over."""
        for sink in sinks:
            sink.flush()
        if self._observer is not None and self._watched is not None:
            self._watched.ended_at = self._clock()
            self._observer.ticked(self._watched)
        self._on_progress()

    def _next_tick(self) -> Tick | None:
        """What is to be run next; nothing as long as what was run is stored before."""
        self.line_up()
        if self._keeper is not None and self._stores_first(self._keeper):
            return None
        return self._scheduler.next_tick()

    def line_up(self) -> None:
        """Puts the frames that were taken in into the queue, where their sessions show as busy."""
        since = self._intake.since
        for frames in self._intake.empty():
            block = joined(frames)
            if since is not None:
                block.queued_at, self._intake.since = since, None
                block.traces = [frame.trace for frame in frames if frame.trace is not None]
            if self._guarded and (wrong := faults(self._guarded, block.call, block.batch_size)):
                block.fail(wrong.items())
                left = np.delete(np.arange(len(block.tags)), list(wrong))
                if not len(left):
                    continue
                block = block.take(left)
            self._scheduler.submit(block)

    def _ahead(self, blocks: Sequence[Block]) -> list[str]:
        """The sessions for which chunks come from further on than they are here, where there is a store: another server
        may have moved them on, and it is to be verified that they are still ours.
        """
        if self._keeper is None:
            return []
        found: list[str] = []
        for block in blocks:
            sessions = block.sessions
            if sessions is None or sessions.first_steps is None or block.begun or block.onto is not None:
                continue
            group, slots = sessions.group, sessions.slots
            ahead = (sessions.first_steps > group.step[slots]) & (group.generation[slots] == sessions.generations)
            if ahead.any():
                found += [group.ids[slot] for slot in slots[ahead].tolist()]
        return found

    def _ready(self, tick: Tick) -> _Ready:
        """Begins the blocks of a tick that have not begun, and puts together what the engine is to run."""
        tick.blocks[:] = [begun for block in tick.blocks if (begun := self._begin(block))]
        if len(tick.blocks) == 1 and not tick.blocks[0].done:
            block = tick.blocks[0]
            self._scheduler.absorb(block, lambda block: not self._gone(block))
            if block.rounds:
                tick = Tick(tick.blocks, block.steps)
                if self._resetting:
                    self._plan_resets(block)
        if self._resetting:
            tick = self._cut(tick)
        if not (tick.steps and tick.blocks):
            return _Ready(tick, None, 0.0)
        watched = self._watched
        began_at = 0.0 if self._meter is None and watched is None else self._clock()
        if watched is not None:
            watched.runs(tick.blocks, tick.steps, began_at)
        return _Ready(tick, _assemble(tick), began_at)

    def _ran(self, ready: _Ready, result: tuple[Arrays, Arrays] | EngineError | None) -> None:
        """Goes on with a tick when the engine has run it: commits and answers the blocks that are done."""
        tick, watched = ready.tick, self._watched
        if isinstance(result, EngineError):
            self._engine_failed(tick.blocks, result)
            return
        if result is not None:
            if self._meter is not None:
                self._meter.ran(self.model, tick.blocks, ready.began_at, self._clock())
            if watched is not None:
                watched.ran_at = self._clock()
            _advance(tick, *result)
            if self._resetting:
                self._reset(tick.blocks)
        finished = []
        for block in tick.blocks:
            if block.done < block.steps:
                self._scheduler.requeue(block)
            elif alive := self._alive(block):  # a session may have ended while its chunk was run
                finished.append(alive)
        if self._resetting:
            for block in finished:
                if block.resets is not None:
                    block.states = block.states | block.resets.remembered
        if self._keeper is not None and self._keeper.durability == "step":
            finished = self._store(finished, self._keeper)
        if watched is not None:
            watched.finished = finished
        for block in finished:
            self._commit(block, self._shown(block), stored=False)

    def _store(self, blocks: list[Block], keeper: Keeper) -> list[Block]:
        """Has a store keep what blocks of sessions change, and returns the others. Meanwhile the next may run on."""
        sessions = [block for block in blocks if block.sessions is not None]
        if not sessions:
            return blocks
        if not self._behind:
            self._ran_at = self._clock()
        self._behind.add(Ran(sessions, self._watched))
        self._watched = None  # it is over when they are stored
        for block in sessions:
            self._scheduler.ran(block)
        if not self._storing and not self._waits(keeper):
            self._begin_storing(keeper)
        return [block for block in blocks if block.sessions is None]

    def _stores_first(self, keeper: Keeper) -> bool:
        """Whether what was run is to be stored before anything else is run, where commits are waited for; begins it.

        A commit costs the same for many frames as for one. So what is waiting is run first, and stored along with what
        was run before, which thereby waits for as long as the last commit took at most. What comes meanwhile is one
        tick; if another process does not answer, there may be work that is not for the store.
        """
        if not self._waits(keeper):
            return False
        if not self._storing:
            if not self._behind:
                return False
            if self._scheduler.has_ready and self._clock() < self._ran_at + self._commit_seconds:
                return False
            self._begin_storing(keeper)
        return self._storing and not self._storing_long

    def _waits(self, keeper: Keeper) -> bool:
        """Whether nothing is run during a commit: where it is this process's own work anyway, or is over so soon that
        to make two commits of what would be one is a loss.
        """
        return keeper.store.embedded or self._commit_seconds < _NEAR_SECONDS

    def _begin_storing(self, keeper: Keeper) -> None:
        """Has what was run stored and answered, and then what is run meanwhile."""
        while self._behind and not self._storing:
            ran, chains = self._behind.take()
            living: list[Chained] = []
            ticks: list[Changes] = []
            try:
                for chain in chains:  # a session may have ended while others were stored
                    blocks = [checked for block in chain if (checked := self._checked(block))]
                    if blocks:
                        living.append([(block, self._shown(block)) for block in blocks])
                ticks = [
                    keeper.tick([x for x, _ in chain], [x for _, shown in chain for x in shown]) for chain in living
                ]
            except Exception:
                self._storing_failed(ran)
                ticks = []
            if not ticks:
                self._is_stored(ran, None, ())
                continue
            self._storing, self._storing_long, self._storing_at = True, False, self._clock()
            self._all_stored.clear()
            if not keeper.store.embedded:
                loop = asyncio.get_running_loop()
                self._held = loop.call_later(_HELD_SECONDS, self._wait_no_longer, context=self._context)
            told = partial(self._kept, keeper, ran, living)
            try:
                keeper.store.begin_commit(ticks, told)
            except Exception as error:  # a bug
                told(error)

    def _wait_no_longer(self) -> None:
        """A commit takes long: what is not for the store need not wait for it."""
        self._storing_long = True
        self._wake()

    def _kept(
        self, keeper: Keeper, ran: Sequence[Ran], living: Sequence[Chained], applied: Applied | Exception
    ) -> None:
        """The store says what it has kept of chains: they are answered."""
        self._commit_seconds = min(self._clock() - self._storing_at, _HELD_SECONDS)
        if self._held is not None:
            self._held.cancel()
        stored_at = None if self._observer is None else self._clock()
        answered: list[Block] = []
        try:
            if isinstance(applied, StoreError):
                self._not_kept([block for chain in living for block, _ in chain], applied)
            elif isinstance(applied, Exception):
                raise applied
            elif lost := self._moved_on(living, applied):
                coroutine = self._lose(keeper, ran, living, lost)
                self._losing = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
                return
            else:
                answered = self._answer_kept(living)
        except Exception:
            self._storing_failed(ran)
        self._go_on(keeper, ran, stored_at, answered)

    async def _lose(
        self, keeper: Keeper, ran: Sequence[Ran], living: Sequence[Chained], lost: Sequence[tuple[Group, Array]]
    ) -> None:
        """Some of the sessions of chains are not ours any more; the others are answered."""
        answered: list[Block] = []
        try:
            for group, slots in lost:
                await keeper.lose(group, slots)
            answered = self._answer_kept(living)
        except Exception:
            self._storing_failed(ran)
        self._go_on(keeper, ran, None if self._observer is None else self._clock(), answered)

    def _moved_on(self, living: Sequence[Chained], applied: Sequence[Sequence[bool]]) -> list[tuple[Group, Array]]:
        """Moves the revisions of what was kept on: the slots of sessions that were not, of each chain that has any."""
        lost: list[tuple[Group, Array]] = []
        for ((block, _), *_), each in zip(living, applied, strict=True):
            assert block.sessions is not None
            group, slots = block.sessions.group, block.sessions.slots
            if all(each) and block.sessions.ended == group.ended:
                group.revision[block.sessions.at] += 1
                continue
            good = np.array(each)
            alive = group.generation[slots] == block.sessions.generations
            group.revision[slots[good & alive]] += 1
            if len(gone := slots[~good & alive]):
                lost.append((group, gone))
        return lost

    def _answer_kept(self, living: Sequence[Chained]) -> list[Block]:
        """Commits and answers the blocks of chains that are stored: those whose sessions live."""
        answered: list[Block] = []
        for chain in living:
            for block, shown in chain:
                if alive := self._alive(block):
                    self._commit(alive, shown if alive is block else self._shown(alive), stored=True)
                    answered.append(alive)
        return answered

    def _not_kept(self, blocks: Sequence[Block], error: StoreError) -> None:
        """The store does not answer. Whether blocks were written is not known: what is stored is what counts."""
        log.warning("the store does not answer", error=str(error), **self._facts(blocks))
        living = [alive for block in blocks if (alive := self._alive(block))]
        for block in living:
            if block.onto is None and block.sessions is not None:
                self._sessions.lose(block.sessions.group, block.sessions.slots, SessionAway)
        for block in living:
            self._drop(block, StoreDown(error))

    def _storing_failed(self, ran: Sequence[Ran]) -> None:
        """What was to be stored has met a bug: no one is left waiting for it."""
        blocks = [block for tick in ran for block in tick.blocks]
        log.exception("storing a tick failed", **self._facts(blocks))
        for block in filter(self._scheduler.holds, blocks):
            self._drop(block, _internal())

    def _go_on(self, keeper: Keeper, ran: Sequence[Ran], stored_at: float | None, answered: Sequence[Block]) -> None:
        """A commit is over."""
        self._storing = False
        self._is_stored(ran, stored_at, answered)
        self._begin_storing(keeper)
        if not self._storing:
            self._all_stored.set()
        if len(self):
            self._wake()

    def _is_stored(self, ran: Sequence[Ran], stored_at: float | None, answered: Sequence[Block]) -> None:
        """Ticks are over, and whoever waits for them is told."""
        blocks = [block for tick in ran for block in tick.blocks]
        for sink in {sink for block in blocks for each in block.rounds or (block,) for sink, _ in each.sinks}:
            sink.flush()
        for tick in ran:
            self._watch(tick, stored_at, answered)
        self._on_progress()

    def _watch(self, ran: Ran, stored_at: float | None, answered: Sequence[Block]) -> None:
        """Tells who watches that a tick is over."""
        if (watched := ran.watched) is None or self._observer is None:
            return
        numbers = {block.number for block in ran.blocks}
        watched.finished = [*watched.finished, *(block for block in answered if block.number in numbers)]
        watched.stored_at, watched.ended_at = stored_at, self._clock()
        self._observer.ticked(watched)

    def _is_short(self, ready: _Ready) -> bool:
        """Whether the run of a tick is expected to take less than to hand it over."""
        if ready.batch is None:
            return True
        expected = self._expected.get((len(ready.batch[1]).bit_length(), ready.tick.steps.bit_length()))
        return expected is not None and expected < self._inline_seconds

    def _compute(self, batch: Batch) -> tuple[Arrays, Arrays] | EngineError:
        """Runs the engine, here: what it gave, or why it could not."""
        inputs, lengths, states = batch
        steps, rows = len(next(iter(inputs.values()))), len(lengths)
        if not rows:  # those that had steps left were dropped, and no engine need compute nothing
            return _nothing(self._engine, steps), states
        began_at = self._clock()
        try:
            result = self._engine.run(inputs, lengths, states)
        except EngineError as error:
            return error
        seconds, magnitude = self._clock() - began_at, (rows.bit_length(), steps.bit_length())
        before = self._expected.get(magnitude)
        self._expected[magnitude] = seconds if before is None else before + 0.2 * (seconds - before)
        return result

    def _begin(self, block: Block) -> Block | None:
        """Readies a block for its next slice: what is left of it to run, or None."""
        if block.onto is not None and not block.begun:
            self._start(block, block.onto.states)
        if gone := self._gone(block):
            kept = np.delete(np.arange(len(block.tags)), [position for position, _ in gone])
            block.fail(gone)
            if not len(kept):
                self._scheduler.finish(block)
                return None
            block = self._scheduler.narrow(block, kept)
        if block.sessions is None:
            return block
        if block.begun:
            return self._alive(block)
        checked = self._checked(block)
        if checked is not None and checked.sessions is not None:
            self._start(checked, checked.sessions.group.arena.gather(checked.sessions.at))
        return checked

    def _start(self, block: Block, states: Arrays) -> None:
        """Has a block of sessions begin from given states."""
        block.states = block.initial = states
        block.begun = True
        if block.sessions is not None and block.sessions.group.rules is not None:
            self._plan_resets(block)

    def _plan_resets(self, block: Block) -> None:
        """Finds out where the rows of a block of sessions that has just begun are reset."""
        sessions = block.sessions
        if sessions is None or (rules := sessions.group.rules) is None:
            return
        assert sessions.first_steps is not None
        self._resetting = True
        block.resets = resets(rules, block.call, sessions.first_steps, block.initial)
        block.states = {spec.name: block.initial[spec.name] for spec in self._engine.states}
        self._reset([block])

    def _cut(self, tick: Tick) -> Tick:
        """A tick that ends where the first row of its blocks is reset."""
        left = [block.resets.left(block.done) for block in tick.blocks if block.resets is not None]
        return Tick(tick.blocks, min([tick.steps, *left]))

    def _reset(self, blocks: list[Block]) -> None:
        """Resets the rows of blocks that are reset where the blocks are."""
        for block in blocks:
            if block.resets is not None:
                block.states = block.resets.apply(block.done, block.states, self._engine.states, block.batch_size)

    def _alive(self, block: Block) -> Block | None:
        """The part of a block that was begun whose sessions have not ended since; the others are told."""
        sessions = block.sessions
        return block if sessions is None or sessions.ended == sessions.group.ended else self._checked(block)

    def _gone(self, block: Block) -> list[tuple[int, ServiceError]]:
        """The positions of the chunks that nobody waits for any more, and why."""
        gone: list[tuple[int, ServiceError]] = []
        start = 0
        for sink, count in block.sinks:
            if sink.cancelled:
                error: ServiceError = Cancelled("the call ended before its turn came")
            elif sink.deadline is not None and self._clock() >= sink.deadline:
                error = DeadlinePassed("the deadline passed before its turn came")
            else:
                start += count
                continue
            gone += [(position, error) for position in range(start, start + count)]
            start += count
        return gone

    def _commit(self, block: Block, shown: Shown, *, stored: bool) -> None:
        """Moves the sessions of a block on, and answers."""
        if block.sessions is not None:
            self._sessions.commit(block.sessions, block.states, block.call.timesteps, stored=stored)
        for each, outputs, states in shown:
            self._answer(each, outputs, states)
        for sink, _ in block.sinks:  # an answer is on its way while the rest is done
            sink.flush()
        if block.sessions is not None:
            self._remember(block, shown)
        self._scheduler.finish(block)  # after the answer, so that a lane is never closed before its chunks are answered

    def _remember(self, block: Block, shown: Shown) -> None:
        """Puts the answers of a block of sessions into their replay window."""
        run, start = Run(block.call, block.initial), 0
        for each, outputs, states in shown:
            assert each.sessions is not None
            each.sessions.group.window.remember(each.sessions, each.call.timesteps, run, start, outputs, states)
            start += each.call.timesteps

    def _shown(self, block: Block) -> Shown:
        """What a finished block answers."""
        ys = _joined(block, self._engine)
        if not block.rounds:
            return [(block, *self._wire(block, ys, block))]
        shown, start = [], 0
        for each in block.rounds:
            part = {name: y[start : start + each.steps] for name, y in ys.items()}
            shown.append((each, *self._wire(each, part, block)))
            start += each.steps
        return shown

    def _wire(self, block: Block, ys: Arrays, whole: Block) -> tuple[Arrays, Arrays]:
        """The outputs and states of a block, as `Answers` has them; the states are those of the whole."""
        options = block.options
        outputs = {
            name: block.call.expand(
                y, return_sequences=options.return_sequences, zero_output_for_mask=options.zero_output_for_mask
            )
            for name, y in ys.items()
        }
        states = whole.states
        if whole.resets is not None:
            states = {spec.name: states[spec.name] for spec in self._engine.states}
        return to_wire(outputs, states, options, len(block.tags))

    def _answer(self, block: Block, outputs: Arrays, states: Arrays) -> None:
        """Gives the answers of a block."""
        for sink, answers in block.shares(outputs, states):
            try:
                sink.result(answers)
            except Exception:  # a bug, or an answer that cannot be encoded; the other sinks have nothing to do with it
                log.exception("an answer could not be given", **self._facts([block]))
                sink.failed([Failure(int(tag), None, _internal()) for tag in answers.tags])

    def _checked(self, block: Block) -> Block | None:
        """The part of a block whose chunks fit their sessions; the others are told."""
        assert block.sessions is not None
        kept, errors = self._sessions.check(
            block.sessions,
            lambda position: block.sink_of(position).session_id(int(block.tags[position])),
            ahead=block.onto is not None,
        )
        if kept is None:
            return block
        block.fail(self._not_replayed(block, errors))
        if not len(kept):
            self._scheduler.finish(block)
            return None
        return self._checked(self._scheduler.narrow(block, kept))

    def _not_replayed(self, block: Block, errors: list[tuple[int, ServiceError]]) -> Iterator[tuple[int, ServiceError]]:
        """Answers the chunks that were applied before as they were answered then, and leaves the other errors."""
        sessions, chunks = block.sessions, len(block.tags)
        assert sessions is not None
        assert sessions.first_steps is not None or all(not isinstance(error, StepBehind) for _, error in errors)
        behind = np.array([position for position, error in errors if isinstance(error, StepBehind)], np.int64)
        window, found = sessions.group.window, {}
        if len(behind) and window.limits.replies:
            assert sessions.first_steps is not None
            columns = sessions.slots[behind], sessions.generations[behind], sessions.first_steps[behind]
            found = window.find(sessions.group, *columns)
        answered = dict(zip(behind[list(found)].tolist(), found.values(), strict=True))
        for position, error in errors:
            if isinstance(error, StepBehind):
                here, first_step = int(error.metadata["expected_step"]), int(error.metadata["got"])
                if position not in answered:
                    remembered = window.of(sessions.group, int(sessions.slots[position]))
                    oldest = int(remembered[0][0].first_steps[remembered[0][1]]) if remembered else None
                    error = StepBehind(here, first_step, oldest)
                else:
                    then, at = answered[position]
                    if then.is_of(at, block.call, position, chunks):
                        tags = block.tags[position : position + 1]
                        block.sink_of(position).result(then.answers(at, tags))
                        self.replayed += 1
                        continue
                    error = StepConflict(here, first_step)
            yield position, error

    def _facts(self, blocks: Sequence[Block]) -> dict[str, object]:
        """What a line of the log says of blocks."""
        return {
            "model": self.model.name,
            "version": self.model.version,
            "chunks": sum(len(block.tags) for block in blocks),
            "sessions": some_sessions(blocks),
        }

    def _drop(self, block: Block, error: ServiceError) -> None:
        try:
            block.fail((position, error) for position in range(len(block.tags)))
        finally:
            self._scheduler.finish(block)

    def _engine_failed(self, blocks: list[Block], error: EngineError) -> None:
        """Runs the blocks of a failed batch again one by one, so that only the one to blame fails."""
        log.warning("engine failed", error=str(error), **self._facts(blocks))
        for block in blocks:
            if block.rounds:
                self._scheduler.part(block)
                block.solo = True
                self._scheduler.requeue(block)
            elif len(blocks) == 1:
                self._drop(block, EngineFailed(str(error)))
            else:
                block.solo = True
                self._scheduler.requeue(block)


def _sinks(blocks: Sequence[Block]) -> Collection[Sink]:
    """The sinks of blocks, each once."""
    if len(blocks) == 1 and len(blocks[0].sinks) == 1:
        return (blocks[0].sinks[0][0],)
    return {sink for block in blocks for sink, _ in block.sinks}


def _internal() -> InternalError:
    return InternalError("the server failed; its log has the cause")


def _assemble(tick: Tick) -> Batch:
    """One batch of the next steps of every block's live rows."""
    first = tick.blocks[0]
    if len(tick.blocks) == 1 and first.steps == tick.steps and first.call.mask is None:  # the whole of it, as it is
        return dict(first.call.inputs), same_lengths(first.rows, tick.steps), first.states
    inputs: list[Arrays] = []
    lengths: list[Array] = []
    states: list[Arrays] = []
    for block in tick.blocks:
        live, start, stop = block.live, block.done, block.done + tick.steps
        if live is None:
            inputs.append({name: x[start:stop] for name, x in block.call.inputs.items()})
            lengths.append(same_lengths(block.rows, tick.steps))
            states.append(block.states)
        else:
            inputs.append({name: x[start:stop, live] for name, x in block.call.inputs.items()})
            lengths.append(np.minimum(block.call.lengths[live] - start, tick.steps))
            states.append({name: state[live] for name, state in block.states.items()})
    if len(tick.blocks) == 1:
        return inputs[0], lengths[0], states[0]
    return (
        {name: np.concatenate([part[name] for part in inputs], axis=1) for name in inputs[0]},
        np.concatenate(lengths),
        {name: np.concatenate([part[name] for part in states]) for name in states[0]},
    )


def _nothing(engine: Engine, steps: int) -> Arrays:
    """The outputs of no rows: [T, 0, *shape]."""
    return {spec.name: np.zeros((steps, 0, *spec.shape), spec.dtype) for spec in engine.outputs}


def _advance(tick: Tick, outputs: Arrays, states: Arrays) -> None:
    """Gives every block its part of a batch's results."""
    if len(tick.blocks) == 1:
        tick.blocks[0].advance(tick.steps, outputs, states)
        return
    start = 0
    for block in tick.blocks:
        live = block.live
        stop = start + (block.rows if live is None else len(live))
        block.advance(
            tick.steps,
            {name: y[:, start:stop] for name, y in outputs.items()},
            {name: state[start:stop] for name, state in states.items()},
        )
        start = stop


def _joined(block: Block, engine: Engine) -> Arrays:
    """The block's outputs of all slices, each [T', R, *shape]."""
    if len(block.outputs) == 1:
        return block.outputs[0]
    if not block.outputs:  # every step was masked
        return {spec.name: np.zeros((0, block.rows, *spec.shape), spec.dtype) for spec in engine.outputs}
    return {name: np.concatenate([part[name] for part in block.outputs]) for name in block.outputs[0]}
