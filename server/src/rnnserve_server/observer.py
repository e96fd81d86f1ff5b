"""What is told of ticks to those who watch: metrics, traces, the log of slow ones.

Without an observer a worker does nothing of this. With one, a tick takes a few readings of the clock and makes one
record, however many sessions, rows and streams it had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from rnnserve_models.load import LoadedModel
from rnnserve_server.blocks import Block

log = structlog.get_logger(__name__)

_SHOWN = 4  # sessions that a line of the log names


@dataclass(slots=True, eq=False)
class Ticked:
    """A tick that is over. Times are seconds of the worker's clock.

    Attributes:
        model: whose tick it was.
        began_at: when it was taken out of the line.
        ended_at: when its answers were on their way.
        blocks: what was run, if anything was.
        steps: time steps of the run.
        queued_at: when the oldest of its chunks that had not run before were queued; None if there were none.
        run_at: when the engine was asked; None if it was not.
        ran_at: when it had answered; None if it failed.
        stored_at: when the store had answered, which is asked when the engine has and the ticks before are stored;
            None if it was not.
        finished: what was answered.
    """

    model: LoadedModel
    began_at: float
    ended_at: float = 0.0
    blocks: Sequence[Block] = ()
    steps: int = 0
    queued_at: float | None = None
    run_at: float | None = None
    ran_at: float | None = None
    stored_at: float | None = None
    finished: Sequence[Block] = field(default=())

    def runs(self, blocks: Sequence[Block], steps: int, now: float) -> None:
        """The engine is about to run blocks."""
        self.blocks, self.steps, self.run_at = blocks, steps, now
        for block in blocks:
            if not block.done and (self.queued_at is None or block.queued_at < self.queued_at):
                self.queued_at = block.queued_at

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended_at - self.began_at

    @property
    def queue_seconds(self) -> float | None:
        """How long the oldest of its new chunks had waited for it."""
        return None if self.queued_at is None else max(0.0, self.began_at - self.queued_at)

    @property
    def engine_seconds(self) -> float | None:
        """How long the engine took, and the way to its thread and back."""
        return None if self.run_at is None or self.ran_at is None else self.ran_at - self.run_at

    @property
    def store_seconds(self) -> float | None:
        """How long the store took, and the wait for what it was given before."""
        return None if self.stored_at is None or self.ran_at is None else self.stored_at - self.ran_at

    @property
    def rows(self) -> int:
        """Rows of the run."""
        return sum([block.rows for block in self.blocks])


class Observer(Protocol):
    """Watches ticks. Called on the event loop's thread, between one tick and the next."""

    def ticked(self, tick: Ticked) -> None:
        """A tick is over. Takes microseconds, and keeps nothing of the blocks."""


class Observers:
    """Several observers as one. What one of them raises is logged, and harms neither the tick nor the others."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def ticked(self, tick: Ticked) -> None:
        """See `Observer`."""
        for observer in self._observers:
            try:
                observer.ticked(tick)
            except Exception:  # a bug; work goes on
                log.exception("an observer failed", observer=type(observer).__name__)


class SlowTicks:
    """Logs ticks that took long, one a second at most, and how many it left out.

    Args:
        seconds: how long is long.
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._silent_until = -1.0
        self._left_out = 0

    def ticked(self, tick: Ticked) -> None:
        """See `Observer`."""
        if tick.seconds < self._seconds:
            return
        now = self._clock()
        if now < self._silent_until:
            self._left_out += 1
            return
        log.warning(
            "slow tick",
            model=tick.model.name,
            version=tick.model.version,
            seconds=_rounded(tick.seconds),
            queue_seconds=_rounded(tick.queue_seconds),
            engine_seconds=_rounded(tick.engine_seconds),
            store_seconds=_rounded(tick.store_seconds),
            rows=tick.rows,
            steps=tick.steps,
            sessions=some_sessions(tick.blocks),
            left_out=self._left_out,
        )
        self._silent_until, self._left_out = now + 1.0, 0


def some_sessions(blocks: Sequence[Block]) -> list[str]:
    """The ids of some of the live sessions of blocks: as many as a line of the log may name."""
    ids = [
        block.sessions.group.ids[slot]
        for block in blocks
        if block.sessions is not None
        for slot in block.sessions.slots[:_SHOWN].tolist()
    ]
    return list(filter(None, ids))[:_SHOWN]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
