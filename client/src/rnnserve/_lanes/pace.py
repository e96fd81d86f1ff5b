"""When short chunks leave: those that come at about the same time share a frame, for a frame costs more than a step.

A chunk of one time step on a lane that owes nothing else is *paced*. It leaves at once if no frame of its form is on
its way. While one is, the server has what it can do: the chunk is *held*, and leaves with all that came meanwhile when
any answer comes. So a caller who is alone never waits, and neither does a chunk of another form behind this one.

An answer sets callers free who may come with their next step right away, but not all in the same instant. Those who
did so last time are *awaited*: the next frame leaves when the last of them has come. Else the first would leave alone,
with all the others held behind it, and every round trip would carry one step, or all but one.

Nothing is waited for long. A frame that is not answered within `PATIENCE` round trips holds up nobody any more, and so
for the awaited; they are given up already when none came for half a round trip. What a round trip takes is measured,
and before it is known nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from rnnserve._chunks import Chunk, Form, Lane

if TYPE_CHECKING:
    from rnnserve._lanes.order import Order

#: Round trips that are waited for, at most.
PATIENCE = 2

#: How often it is looked meanwhile whether some of the awaited have come.
_LOOKS = 4

#: How much of a round trip's measure the last one makes, and how many times as long as usual it counts for at most.
_WEIGHT = 1 / 8
_OUTLIER = 4

#: Seconds: event loops keep no time that is shorter.
_SHORTEST = 0.001


class Timing(Protocol):
    """A clock and its alarms."""

    def time(self) -> float:
        """Seconds, of a clock that does not go back."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> Any:
        """Calls back in so many seconds, unless the `cancel` of what it returns is called before."""


class Pace:
    """The chunks of one form on one stream.

    Attributes:
        form: of the chunks.
        held: those that wait.
        leaving: some leave with the next message, and more may join them.
        awaited: lanes that were answered and are expected to come again right away.
    """

    __slots__ = (
        "__weakref__",
        "_call_later",
        "_clock",
        "_limit",
        "_order",
        "_seen",
        "_sent_at",
        "_soon",
        "_timer",
        "_turn",
        "_under_way",
        "awaited",
        "form",
        "held",
        "leaving",
    )

    def __init__(self, form: Form, order: Order, timing: Timing) -> None:
        self.form = form
        self.held: list[Chunk] = []
        self.leaving = False
        self.awaited = 0
        self._order = order
        self._clock = timing.time
        self._call_later = timing.call_later
        self._timer: Any = None
        self._turn = 0  # counts the frames: who is awaited since another one is not awaited now
        self._under_way = False
        self._sent_at = 0.0  # of a frame none of whose answers has come, or 0
        self._soon = 0.0  # seconds: PATIENCE round trips, or 0: not known
        self._limit = 0.0  # when those who are awaited are given up
        self._seen = 0  # how many there were when the timer was set

    @property
    def patience(self) -> float:
        """How many wishes may gather in other threads until the event loop has to see them. Any thread may ask.

        Above 0 the event loop comes by itself. Whoever makes it less has to take in the wishes of other threads then.
        """
        if self.leaving:
            return 0
        return float("inf") if self._under_way else self.awaited

    def wish(self, lane: Lane, chunk: Chunk) -> None:
        """Takes the only chunk of a lane, which may leave as far as others are concerned."""
        if lane.turn == self._turn:
            lane.turn = -1
            self.awaited -= 1
        lane.prompt = self._clock() - lane.heard_at <= self._soon
        if self.leaving:
            self._order.send(chunk)
            return
        self.held.append(chunk)
        if not (self._under_way or self.awaited):
            self.release()

    def answered(self, lanes: Iterable[Lane]) -> None:
        """The only chunks of these lanes are answered; `heard` and `settle` have to follow."""
        now, turn = self._clock(), self._turn
        for lane in lanes:
            lane.heard_at = now
            if lane.prompt and lane.turn != turn:
                lane.turn = turn
                self.awaited += 1

    def release(self) -> None:
        """Lets go what is held, with the next message."""
        if not self.leaving:
            self.leaving = True
            self._order.leaving.append(self)
        for chunk in self.held:
            self._order.send(chunk)
        self.held.clear()
        self._go_on()
        self._order.woken()

    def sent(self) -> None:
        """The message has been made."""
        self.leaving = False
        self._sent_at = self._clock()
        if self._soon:
            self._under_way = True
            self._set_timer(self._soon)

    def heard(self) -> None:
        """There is an answer; `settle` has to follow."""
        now = self._clock()
        if self._sent_at:
            took, usual = PATIENCE * (now - self._sent_at), self._soon
            self._soon = usual + (min(took, _OUTLIER * usual) - usual) * _WEIGHT if usual else took
            self._sent_at = 0.0
        self._under_way = False
        if self.awaited:
            self._seen = self.awaited
            self._limit = now + self._soon
            self._set_timer(self._soon / _LOOKS)

    def settle(self) -> None:
        """Lets go what is held, unless there is something to wait for."""
        if self.held and not (self._under_way or self.awaited):
            self.release()

    def reset(self) -> None:
        """The stream is lost: what is held is a wish that others keep, and nothing is under way."""
        self.held.clear()
        self.leaving = self._under_way = False
        self._sent_at = 0.0
        self._go_on()

    def _go_on(self) -> None:
        """Waits for nobody any more."""
        self._turn += 1
        self.awaited = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._call_later(max(delay, _SHORTEST), self._look)

    def _look(self) -> None:
        """It is time."""
        self._timer = None
        self._under_way = False
        self._order.account.collect()
        if self._timer is not None or self.leaving:
            return  # somebody has come
        if 0 < self.awaited < self._seen and self._clock() < self._limit:
            self._seen = self.awaited
            self._set_timer(self._soon / _LOOKS)
            return
        self._go_on()
        self._order.account.collect()
        self.settle()
