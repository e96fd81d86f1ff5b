"""The loop of one model: schedule, run, commit.

Everything but the run itself happens on the event loop's thread, so sessions, arenas and queues need no locks. The run
happens on the model's own thread, where onnxruntime and NumPy let go of the interpreter; but handing it over and back
costs more than a small run, so one that is known to be small is done where it is.

What is finished is answered (`answering`), at once or, where an answer promises that it is stored, when it is
(`storing`).
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import numpy as np
import structlog

from rnnserve_models.engine.base import Array, Arrays, Engine, EngineError
from rnnserve_models.load import LoadedModel
from rnnserve_server.answering import Answering, internal_error
from rnnserve_server.blocks import Barrier, Block, Sink, sinks_of
from rnnserve_server.errors import EngineFailed, StoreDown
from rnnserve_server.intake import Frame, Intake, joined
from rnnserve_server.keeper import Keeper
from rnnserve_server.layout import Signature, faults, same_lengths
from rnnserve_server.meter import Meter
from rnnserve_server.observer import Observer, Ticked
from rnnserve_server.resets import resets
from rnnserve_server.scheduler import Scheduler, Tick
from rnnserve_server.sessions import Group, SessionTable
from rnnserve_server.storing import Storing

log = structlog.get_logger(__name__)

Batch = tuple[Arrays, Array, Arrays]
"""The arguments of `Engine.run`: inputs {name: [T, R, ...]}, lengths [R], states {name: [R, ...]}."""

Soon = Callable[[Callable[[], object]], object]
"""Has a function called on the event loop when what has come so far was taken in, in nobody's context."""


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
        self._answering = Answering(model, scheduler, sessions, clock)
        self._storing: Storing | None = None
        if keeper is not None and keeper.durability == "step":
            self._storing = Storing(
                keeper,
                self._answering,
                scheduler,
                sessions,
                clock=clock,
                go_on=self._go_on,
                on_progress=on_progress,
                observer=observer,
            )

    @property
    def replayed(self) -> int:
        """How many chunks were answered as they were answered before."""
        return self._answering.replayed

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
        return not self._due and self._task is None and not (self._storing and self._storing.under_way)

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

    def _go_on(self) -> None:
        """There may be something to run, if there is anything at all."""
        if len(self):
            self._wake()

    def _next_turn(self, callback: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_soon(callback, context=self._context)

    async def settle(self) -> None:
        """Waits for what is queued."""
        while not self.idle:
            if self._task is not None:
                await self._task
            elif self._due or self._storing is None:
                await asyncio.sleep(0)
            else:
                await self._storing.wait()

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
        sinks = sinks_of(tick.blocks)
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
                    sinks = sinks_of(tick.blocks)
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
        log.exception("tick failed", **self._answering.facts(tick.blocks))
        for block in filter(self._scheduler.holds, tick.blocks):
            self._answering.drop(block, internal_error())

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
        if self._storing is not None and self._storing.holds_back(self._intake.queued_bytes):
            return None  # what comes meanwhile is lined up together
        self.line_up()
        if self._storing is not None and self._storing.comes_first():
            return None
        return self._scheduler.next_tick()

    def line_up(self) -> None:
        """Puts the frames that were taken in into the queue, where their sessions show as busy."""
        since = self._intake.since
        for frames, rounds in self._intake.empty():
            block = joined(frames, rounds)
            if since is not None:
                block.queued_at, self._intake.since = since, None
                block.traces = [frame.trace for frame in frames if frame.trace is not None]
            if self._guarded and faults(self._guarded, block.call, block.batch_size):
                for each in block.each():
                    if (fine := self._without_faults(each)) is not None:
                        self._scheduler.submit(fine)
            else:
                self._scheduler.submit(block)

    def _without_faults(self, block: Block) -> Block | None:
        """Those of the chunks of a block that hold nothing that the model forbids; the others are told."""
        wrong = faults(self._guarded, block.call, block.batch_size)
        if not wrong:
            return block
        block.fail(wrong.items())
        left = np.delete(np.arange(len(block.tags)), list(wrong))
        return block.take(left) if len(left) else None

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
            changed = self._scheduler.absorb(block, lambda block: not self._answering.gone(block))
            if block.rounds > 1:
                tick = Tick(tick.blocks, block.steps)
            if changed and self._resetting:
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
            elif alive := self._answering.alive(block):  # a session may have ended while its chunk was run
                finished.append(alive)
        if self._resetting:
            for block in finished:
                if block.resets is not None:
                    block.states = block.states | block.resets.remembered
        kept: list[Block] = []
        if self._storing is not None:
            kept = [block for block in finished if block.sessions is not None]
            finished = [block for block in finished if block.sessions is None]
        if watched is not None:
            watched.finished = finished
        if self._storing is not None and kept:
            self._watched = None  # it is over when they are stored
            self._storing.add(kept, watched)
        for block in finished:
            self._answering.commit(block, self._answering.shown(block), stored=False)

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
        if any(self._answering.gone(each) for each in block.parts):
            self._scheduler.part(block)  # whoever waits for one of the others has it run by itself
            self._scheduler.requeue(block)
            return None
        if block.onto is not None and not block.begun:
            self._start(block, block.onto.states)
        if gone := self._answering.gone(block):
            kept = np.delete(np.arange(len(block.tags)), [position for position, _ in gone])
            block.fail(gone)
            if not len(kept):
                self._scheduler.finish(block)
                return None
            block = self._scheduler.narrow(block, kept)
        if block.sessions is None:
            return block
        if block.begun:
            return self._answering.alive(block)
        checked = self._answering.checked(block)
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

    def _engine_failed(self, blocks: list[Block], error: EngineError) -> None:
        """Runs what failed together again in ever smaller parts, so that only the chunks to blame fail: the blocks of a
        tick one by one, the rounds of a block, its halves.
        """
        if not blocks[0].solo:
            log.warning("engine failed", error=str(error), **self._answering.facts(blocks))
        for block in blocks:
            if block.rounds > 1:
                self._scheduler.part(block)
            elif len(blocks) == 1:
                if len(block.tags) == 1:
                    self._answering.drop(block, EngineFailed(str(error)))
                    return
                block = self._scheduler.halve(block)
            block.solo = True
            self._scheduler.requeue(block)


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
