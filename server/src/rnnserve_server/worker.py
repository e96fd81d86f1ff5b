"""The loop of one model: schedule, run, commit.

Everything but the run itself happens on the event loop's thread, so sessions, arenas and queues need no locks. The run
happens on the model's own thread, where onnxruntime and NumPy let go of the interpreter; but handing it over and back
costs more than a small run, so one that is known to be small is done where it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog

from rnnserve_models.engine.base import Array, Arrays, Engine, EngineError
from rnnserve_models.load import LoadedModel
from rnnserve_server.blocks import Barrier, Block
from rnnserve_server.errors import Cancelled, DeadlinePassed, EngineFailed, InternalError, ServiceError
from rnnserve_server.scheduler import Scheduler, Tick
from rnnserve_server.sessions import SessionTable

log = structlog.get_logger(__name__)

Batch = tuple[Arrays, Array, Arrays]
"""The arguments of `Engine.run`: inputs {name: [T, R, ...]}, lengths [R], states {name: [R, ...]}."""


class Worker:
    """Runs what is queued for one model.

    Args:
        model: what it runs.
        scheduler: its queue.
        sessions: where states are committed.
        clock: monotonic seconds.
        on_progress: called when queued work got less.
        inline_seconds: a run that is expected to take less is not handed over to the model's thread.
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
    ) -> None:
        self.model = model
        self._engine = model.engine
        self._scheduler = scheduler
        self._sessions = sessions
        self._clock = clock
        self._on_progress = on_progress
        self._inline_seconds = inline_seconds
        self._expected: dict[tuple[int, int], float] = {}  # seconds of a run, by the magnitudes of its rows and steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._task: asyncio.Task[None] | None = None

    @property
    def queued_bytes(self) -> int:
        """Bytes of input that wait or run."""
        return self._scheduler.queued_bytes

    @property
    def idle(self) -> bool:
        """Whether nothing is queued."""
        return self._task is None

    def submit(self, work: Block | Barrier) -> None:
        """Queues work. Called on the event loop's thread."""
        self._scheduler.submit(work)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._loop())

    async def close(self) -> None:
        """Waits for what is queued, and ends the model's thread."""
        if self._task is not None:
            await self._task
        self.shutdown()

    def shutdown(self) -> None:
        """Ends the model's thread, which must be idle."""
        self._thread.shutdown()

    async def _loop(self) -> None:
        """Ticks for as long as something is ready."""
        try:
            while tick := self._scheduler.next_tick():
                try:
                    await self._tick(tick)
                except Exception:  # a bug; no one is left waiting for it
                    log.exception("tick failed", blocks=len(tick.blocks))
                    for block in filter(self._scheduler.holds, tick.blocks):
                        self._drop(block, InternalError("the server failed; its log has the cause"))
                self._on_progress()
        finally:
            self._task = None

    async def _tick(self, tick: Tick) -> None:
        tick.blocks[:] = filter(None, map(self._begin, tick.blocks))
        if tick.steps and tick.blocks:
            try:
                outputs, states = await self._run(_assemble(tick), tick.steps)
            except EngineError as error:
                self._engine_failed(tick.blocks, error)
                return
            _advance(tick, outputs, states)
        for block in tick.blocks:
            if block.done < block.steps:
                self._scheduler.requeue(block)
            else:
                self._commit(block)

    async def _run(self, batch: Batch, steps: int) -> tuple[Arrays, Arrays]:
        magnitude = (len(batch[1]).bit_length(), steps.bit_length())
        before = self._expected.get(magnitude)
        if before is not None and before < self._inline_seconds:
            result, seconds = self._timed(batch)
            await asyncio.sleep(0)  # small runs one after the other must not keep the loop from reading and writing
        else:
            loop = asyncio.get_running_loop()
            result, seconds = await loop.run_in_executor(self._thread, self._timed, batch)
        self._expected[magnitude] = seconds if before is None else before + 0.2 * (seconds - before)
        return result

    def _timed(self, batch: Batch) -> tuple[tuple[Arrays, Arrays], float]:
        start = self._clock()
        result = self._engine.run(*batch)
        return result, self._clock() - start

    def _begin(self, block: Block) -> Block | None:
        """Readies a block for its next slice: what is left of it to run, or None."""
        sink = block.sink
        if sink.cancelled:
            self._drop(block, Cancelled("the call ended before its turn came"))
            return None
        if sink.deadline is not None and self._clock() >= sink.deadline:
            self._drop(block, DeadlinePassed("the deadline passed before its turn came"))
            return None
        if block.sessions is None:
            return block
        checked = self._checked(block)
        if checked is not None and checked.sessions is not None and not checked.begun:
            checked.states = checked.sessions.group.arena.gather(checked.sessions.slots)
            checked.begun = True
        return checked

    def _commit(self, block: Block) -> None:
        """Moves the sessions of a block on, and answers."""
        if block.sessions is not None:
            checked = self._checked(block)  # a session may have ended while its chunk was run
            if checked is None:
                return
            block = checked
        options = block.options
        outputs = {
            name: block.call.expand(
                y, return_sequences=options.return_sequences, zero_output_for_mask=options.zero_output_for_mask
            )
            for name, y in _joined(block, self._engine).items()
        }
        if block.sessions is not None:
            self._sessions.commit(block.sessions, block.states, block.call.timesteps)
        block.sink.result(block, outputs, block.states)
        self._scheduler.finish(block)  # after the answer, so that a lane is never closed before its chunks are answered

    def _checked(self, block: Block) -> Block | None:
        """The part of a block whose chunks fit their sessions; the others are told."""
        assert block.sessions is not None
        kept, errors = self._sessions.check(block.sessions, lambda index: block.sink.session_id(int(block.tags[index])))
        if kept is None:
            return block
        block.sink.failed(block, errors)
        if not len(kept):
            self._scheduler.finish(block)
            return None
        return self._checked(self._scheduler.narrow(block, kept))

    def _drop(self, block: Block, error: ServiceError) -> None:
        try:
            block.sink.failed(block, [(index, error) for index in range(len(block.tags))])
        finally:
            self._scheduler.finish(block)

    def _engine_failed(self, blocks: list[Block], error: EngineError) -> None:
        """Runs the blocks of a failed batch again one by one, so that only the one to blame fails."""
        log.warning("engine failed", error=str(error), blocks=len(blocks))
        for block in blocks:
            if len(blocks) == 1:
                self._drop(block, EngineFailed(str(error)))
            else:
                block.solo = True
                self._scheduler.requeue(block)


def _assemble(tick: Tick) -> Batch:
    """One batch of the next steps of every block's live rows."""
    inputs: list[Arrays] = []
    lengths: list[Array] = []
    states: list[Arrays] = []
    for block in tick.blocks:
        live, start, stop = block.live, block.done, block.done + tick.steps
        if live is None or len(live) == block.rows:
            inputs.append({name: x[start:stop] for name, x in block.call.inputs.items()})
            lengths.append(block.call.lengths)
            states.append(block.states)
        else:
            inputs.append({name: x[start:stop, live] for name, x in block.call.inputs.items()})
            lengths.append(block.call.lengths[live])
            states.append({name: state[live] for name, state in block.states.items()})
        lengths[-1] = np.minimum(lengths[-1] - start, tick.steps)
    if len(tick.blocks) == 1:
        return inputs[0], lengths[0], states[0]
    return (
        {name: np.concatenate([part[name] for part in inputs], axis=1) for name in inputs[0]},
        np.concatenate(lengths),
        {name: np.concatenate([part[name] for part in states]) for name in states[0]},
    )


def _advance(tick: Tick, outputs: Arrays, states: Arrays) -> None:
    """Gives every block its part of a batch's results."""
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
