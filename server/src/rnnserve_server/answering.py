"""What becomes of blocks that were run, or cannot be: they are checked, committed in memory and answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import structlog

from rnnserve_models.engine.base import Arrays, Engine
from rnnserve_models.load import LoadedModel
from rnnserve_server.blocks import Answers, Block, Failure, Sessions, ShownRound, Sink, Tell
from rnnserve_server.errors import (
    Cancelled,
    DeadlinePassed,
    InternalError,
    ServiceError,
    StepBehind,
    StepConflict,
    StepMismatch,
)
from rnnserve_server.layout import to_wire
from rnnserve_server.observer import some_sessions
from rnnserve_server.replay import Run
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.sessions import SessionTable

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Shown:
    """What chunks that are alike, R of each of N sessions one after the other, are answered.

    Attributes:
        blocks: which have R rounds of N chunks in all.
        timesteps: of each chunk.
        outputs: every output of theirs, [R, N, ...]: of each as `Answers` has it.
        states: every state, alike.
    """

    blocks: Sequence[Block]
    timesteps: int
    outputs: Arrays
    states: Arrays

    @property
    def count(self) -> int:
        """R."""
        return sum([each.rounds for each in self.blocks])

    @cached_property
    def rounds(self) -> list[ShownRound]:
        """The rounds, one after the other."""
        of = [(block, first_steps) for block in self.blocks for first_steps in block.first_steps()]
        return [
            ShownRound(
                block,
                first_steps,
                {name: y[position] for name, y in self.outputs.items()},
                {name: state[position] for name, state in self.states.items()},
            )
            for position, (block, first_steps) in enumerate(of)
        ]


class Ready(NamedTuple):
    """What a sink is told of a block, made before it is known that the block is stored.

    Attributes:
        sink: it.
        answers: the answers.
        tell: tells them.
    """

    sink: Sink
    answers: Sequence[Answers]
    tell: Tell


class Answering:
    """Commits and answers the blocks of one model.

    Args:
        model: it.
        scheduler: its queue.
        sessions: where states are committed.
        clock: monotonic seconds.

    Attributes:
        replayed: how many chunks were answered as they were answered before.
    """

    def __init__(
        self, model: LoadedModel, scheduler: Scheduler, sessions: SessionTable, clock: Callable[[], float]
    ) -> None:
        self.replayed = 0
        self._model = model
        self._engine = model.engine
        self._scheduler = scheduler
        self._sessions = sessions
        self._clock = clock

    def alive(self, block: Block) -> Block | None:
        """The part of a block that was begun whose sessions have not ended since; the others are told."""
        sessions = block.sessions
        return block if sessions is None or sessions.ended == sessions.group.ended else self.checked(block)

    def gone(self, block: Block) -> list[tuple[int, ServiceError]]:
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

    def ready(self, block: Block, shown: Sequence[Shown]) -> list[Ready]:
        """Readies what a finished block answers, for `commit`."""
        shares: dict[Sink, list[Answers]] = {}
        for some in shown:
            for each in some.rounds:
                for sink, answers in each.shares():
                    shares.setdefault(sink, []).append(answers)
        return [Ready(sink, answers, sink.ready(answers)) for sink, answers in shares.items()]

    def commit(
        self, block: Block, shown: Sequence[Shown], *, stored: bool, ready: Sequence[Ready] | None = None
    ) -> None:
        """Moves the sessions of a block on, and answers: with what `ready` has made of it, if it has."""
        if block.sessions is not None:  # first: whoever has the answer may look at the session
            self._sessions.commit(block.sessions, block.states, block.call.timesteps, stored=stored)
        if ready is None:
            for some in shown:
                for each in some.rounds:
                    for sink, answers in each.shares():
                        self._tell(sink, (answers,), partial(sink.result, answers))
        else:
            for sink, shares, tell in ready:
                self._tell(sink, shares, tell)
        for sink in block.all_sinks:  # an answer is on its way while the rest is done
            sink.flush()
        if block.sessions is not None:
            self._remember(block, block.sessions, shown)
        self._scheduler.finish(block)  # after the answer, so that a lane is never closed before its chunks are answered

    def _remember(self, block: Block, sessions: Sessions, shown: Sequence[Shown]) -> None:
        """Puts the answers of a block of sessions into their replay window."""
        run, start, window = Run(block.call, block.initial), 0, sessions.group.window
        for some in shown:
            window.remember(sessions, run, start, some.timesteps, some.rounds)
            start += some.timesteps * len(some.rounds)

    def shown(self, block: Block) -> list[Shown]:
        """What a finished block, or those that it was made of, answers."""
        ys, pieces = _joined(block, self._engine), block.pieces
        if len(pieces) == 1 or len({each.round_steps for each in pieces}) == 1:
            return [self._shown(pieces, ys, block)]
        shown, start = [], 0
        for each in pieces:
            part = {name: y[start : start + each.steps] for name, y in ys.items()}
            shown.append(self._shown([each], part, block))
            start += each.steps
        return shown

    def _shown(self, blocks: Sequence[Block], ys: Arrays, whole: Block) -> Shown:
        """That of blocks whose chunks are alike; the states are those of the whole."""
        block, options, count = blocks[0], whole.options, sum([each.rounds for each in blocks])
        outputs = {}
        for name, y in ys.items():
            if count > 1:  # no step is masked: see `Block`
                y = y.reshape(count, block.round_steps, *y.shape[1:])  # [R, T, N * batch, ...]
                outputs[name] = y if options.return_sequences else y[:, -1]
            else:
                outputs[name] = block.call.expand(
                    y, return_sequences=options.return_sequences, zero_output_for_mask=options.zero_output_for_mask
                )[None]
        states = {}
        if options.return_state:
            names = whole.states if whole.resets is None else [spec.name for spec in self._engine.states]
            states = {name: whole.states[name][None] for name in names}
        return Shown(blocks, block.round_steps, *to_wire(outputs, states, options, len(block.tags)))

    def _tell(self, sink: Sink, answers: Sequence[Answers], tell: Tell) -> None:
        """Has a sink told its answers."""
        try:
            tell()
        except Exception:  # a bug, or an answer that cannot be encoded; the other sinks have nothing to do with it
            log.exception("an answer could not be given", model=self._model.name, version=self._model.version)
            tags = [tag for each in answers for tag in each.tags.tolist()]
            sink.failed([Failure(tag, None, internal_error()) for tag in tags])

    def checked(self, block: Block) -> Block | None:
        """The part of a block whose chunks fit their sessions; the others are told."""
        assert block.sessions is not None
        kept, errors = self._sessions.check(
            block.sessions,
            lambda position: block.sink_of(position).session_id(int(block.tags[position])),
            ahead=block.onto is not None,
        )
        if kept is None:
            return block
        if block.rounds > 1 and not block.begun and any(isinstance(error, StepMismatch) for _, error in errors):
            self._scheduler.part(block)  # its rounds are told, or replayed, each by itself
            return self.checked(block)
        block.fail(self._not_replayed(block, errors))
        if not len(kept):
            self._scheduler.finish(block)
            return None
        return self.checked(self._scheduler.narrow(block, kept))

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

    def facts(self, blocks: Sequence[Block]) -> dict[str, object]:
        """What a line of the log says of blocks."""
        return {
            "model": self._model.name,
            "version": self._model.version,
            "chunks": sum(len(block.tags) for block in blocks),
            "sessions": some_sessions(blocks),
        }

    def drop(self, block: Block, error: ServiceError) -> None:
        """Tells those who wait for a block that it fails, and takes it out of the queue."""
        try:
            block.fail((position, error) for position in range(len(block.tags)))
        finally:
            self._scheduler.finish(block)


def internal_error() -> InternalError:
    """What is told of a bug."""
    return InternalError("the server failed; its log has the cause")


def _joined(block: Block, engine: Engine) -> Arrays:
    """The block's outputs of all slices, each [T', R, *shape]."""
    if len(block.outputs) == 1:
        return block.outputs[0]
    if not block.outputs:  # every step was masked
        return {spec.name: np.zeros((0, block.rows, *spec.shape), spec.dtype) for spec in engine.outputs}
    return {name: np.concatenate([part[name] for part in block.outputs]) for name in block.outputs[0]}
