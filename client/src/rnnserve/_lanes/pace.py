"""When short chunks leave: those that come at about the same time share a frame, for a frame costs more than a step.

A chunk of one time step on a lane that owes nothing else is *paced*. It leaves at once if no frame of its form is on
its way. While one is, the server has what it can do: the chunk is *held*, and leaves with all that came meanwhile when
the first answer to that frame comes. So a caller who is alone never waits, and neither does a chunk of another form
behind this one. Answers to frames before the last let nothing go: if they did, as many small frames as once got on
their way would follow one another for ever.

An answer sets callers free who may come with their next step right away, but not all in the same instant. Those who
did so last time are *awaited*: the next frame leaves when the last of them has come. Else the first would leave alone,
with all the others held behind it, and every round trip would carry one step, or all but one.

Many callers who take about as long to come as a frame takes to be answered would take turns with the server: each has
nothing to do while the other one works. So they are two *cohorts*, each with a pace of its own: while the frame of one
is under way, the steps of the other are made. Half of the lanes of a cohort that is much larger go over to the other.
When there are few left, or the server is what is waited for, which does more in larger frames, the second goes over to
the first.

Nothing is waited for long. A frame that is not answered within `PATIENCE` round trips holds up nobody any more, and so
for the awaited, or twice as many where there are two cohorts, whose callers may have to come one behind the other; they
are given up already when none came for half a round trip. What a round trip takes is measured, and before it is known
nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable
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

#: Frames whose answers tell what a round trip takes, of those that are on their way.
_FRAMES = 64

#: Lanes of a cohort, when there come to be two.
COHORT = 64

#: There come to be two while a round trip takes at most so many times as long as the awaited take to come; from twice
#: that on there is one again.
_WORTH = 2

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
        come: counts those who did.
        cohort: 0 or 1.
        size: lanes of its last frame, without those that went over since, and with those that came.
    """

    __slots__ = (
        "__weakref__",
        "_alarm",
        "_answered_at",
        "_call_later",
        "_clock",
        "_limit",
        "_order",
        "_seen",
        "_sent",
        "_soon",
        "_thinking",
        "_turn",
        "_under_way",
        "_until",
        "awaited",
        "cohort",
        "come",
        "form",
        "held",
        "leaving",
        "size",
    )

    def __init__(self, form: Form, order: Order, timing: Timing, cohort: int = 0) -> None:
        self.form = form
        self.cohort = cohort
        self.size = self.come = 0
        self.held: list[Chunk] = []
        self.leaving = False
        self.awaited = 0
        self._order = order
        self._clock = timing.time
        self._call_later = timing.call_later
        self._alarm: Any = None  # while something is held, but for what the event loop has not seen yet
        self._until = 0.0  # when nothing is waited for any more
        self._turn = 0  # counts the frames: who is awaited since another one is not awaited now
        self._under_way = False
        self._sent: dict[int, float] = {}  # when the last frames were sent, but for those that were answered
        self._soon = 0.0  # seconds: PATIENCE round trips, or 0: not known
        self._answered_at = 0.0  # when the last frame was answered, until the next one leaves
        self._thinking = 0.0  # seconds from the one to the other
        self._limit = 0.0  # when those who are awaited are given up
        self._seen = 0  # how many of the awaited had come when the timer was set

    @property
    def patience(self) -> float:
        """How many wishes may gather in other threads until the event loop has to see them. Any thread may ask.

        Above 0 there is an alarm, or there was one and the next message is about to be made: either takes them in.
        """
        if self._alarm is None:
            return 0
        return float("inf") if self._under_way else self.awaited

    def wish(self, lane: Lane, chunk: Chunk) -> None:
        """Takes the only chunk of a lane, which may leave as far as others are concerned."""
        now = self._clock()
        late = now >= self._until and not self._wait_on(now)
        if lane.turn == self._turn:
            lane.turn = -1
            self.awaited -= 1
            self.come += 1
        lane.prompt = now - lane.heard_at <= self._soon
        if self.leaving:
            lane.frame = self._turn
            self.size += 1
            self._order.send(chunk)
            return
        self.held.append(chunk)
        if late or not (self._under_way or self.awaited):
            self.release()
        elif self._alarm is None:  # for the first; most frames are made without one
            self._set_alarm(now)

    def answered(self, lanes: list[Lane]) -> Pace:
        """The only chunks of these lanes are answered; `heard` and `settle` have to follow.

        Returns:
            The pace that some of them have gone over to, for which they have to follow too; or this one.
        """
        frame = -1
        for lane in lanes:
            if lane.frame != frame:
                frame = lane.frame
                self.touched(lane)
        self._expect(lanes)
        other = self._order.other_cohort(self)
        others = 0 if other is None else other.size
        trip = self._soon / PATIENCE
        if self.awaited >= 2 * COHORT and self.size > 2 * others and trip < _WORTH * self._thinking:
            return self._give(lanes[len(lanes) // 2 :], other or self._order.new_cohort(self))
        if self.cohort and other and (self.size + others < COHORT or trip > 2 * _WORTH * self._thinking):
            return self._give(lanes, other)
        return self

    def _expect(self, lanes: list[Lane]) -> None:
        """These lanes were just answered."""
        now, turn = self._clock(), self._turn
        for lane in lanes:
            lane.heard_at = now
            if lane.prompt and lane.turn != turn:
                lane.turn = turn
                self.awaited += 1

    def _give(self, lanes: list[Lane], other: Pace) -> Pace:
        """Lanes that were just answered go over to the other cohort."""
        for lane in lanes:
            if lane.turn == self._turn:
                self.awaited -= 1
            lane.pace, lane.turn, lane.frame = other, -1, -1
        self.size -= len(lanes)
        other.size += len(lanes)
        if not other._soon:
            other._soon, other._thinking = self._soon, self._thinking
        other._expect(lanes)
        return other

    def touched(self, lane: Lane) -> None:
        """Something became of the last chunk of a lane; `heard` and `settle` have to follow."""
        sent_at = self._sent.pop(lane.frame, None)
        if sent_at is not None:
            took, usual = PATIENCE * (self._clock() - sent_at), self._soon
            self._soon = usual + (min(took, _OUTLIER * usual) - usual) * _WEIGHT if usual else took
        if lane.frame == self._turn and self._under_way:
            self._under_way = False
            self._answered_at = self._clock()

    def release(self) -> None:
        """Lets go what is held, with the next message."""
        if not self.leaving:
            self.leaving = True
            self._order.leaving.append(self)
        if self._answered_at:
            self._thinking += (min(self._clock() - self._answered_at, self._soon) - self._thinking) * _WEIGHT
            self._answered_at = 0.0
        self._go_on()
        self.size = len(self.held)
        for chunk in self.held:
            self._order.send(chunk)
            chunk.lanes[0].frame = self._turn
        self.held.clear()
        self._order.woken()

    def sent(self) -> None:
        """The message has been made."""
        self.leaving = False
        now = self._clock()
        self._sent[self._turn] = now
        if len(self._sent) > _FRAMES:
            del self._sent[next(iter(self._sent))]
        if self._soon:
            self._under_way = True
            self._wait(now, self._soon)

    def heard(self) -> None:
        """There are answers; `settle` has to follow."""
        if self.awaited and not self._under_way:
            now = self._clock()
            self._seen, paired = self._come()
            self._limit = now + self._soon * (2 if paired else 1)
            self._wait(now, self._soon / _LOOKS)

    def settle(self) -> None:
        """Lets go what is held, unless there is something to wait for."""
        if self.held and not (self._under_way or self.awaited):
            self.release()

    def reset(self) -> None:
        """The stream is lost: what is held is a wish that others keep, and nothing is under way."""
        self.held.clear()
        self.leaving = self._under_way = False
        self._sent.clear()
        self._go_on()

    def _go_on(self) -> None:
        """Waits for nobody any more."""
        self._turn += 1
        self.awaited = 0
        self._until = 0.0
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _wait(self, now: float, seconds: float) -> None:
        """Chunks may be held for so many seconds from now on."""
        self._until = now + max(seconds, _SHORTEST)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self.held:
            self._set_alarm(now)

    def _set_alarm(self, now: float) -> None:
        self._alarm = self._call_later(self._until - now, self._ring)

    def _ring(self) -> None:
        """What is held has waited long enough, unless some of the awaited have come meanwhile and more may."""
        self._alarm = None
        self._under_way = False
        self._order.account.collect()
        if self.leaving:
            return
        if not self._wait_on(self._clock()):
            self._go_on()
            self.settle()

    def _wait_on(self, now: float) -> bool:
        """Waits longer for the awaited, if some have come meanwhile and more may: whether it does."""
        if self._under_way or not self.awaited or now >= self._limit:
            return False
        come, _ = self._come()
        if come == self._seen:
            return False
        self._seen = come
        self._wait(now, self._soon / _LOOKS)
        return True

    def _come(self) -> tuple[int, bool]:
        """Counts the awaited that came, also those of the other cohort, behind which these may have to come; and
        whether there is one."""
        other = self._order.other_cohort(self)
        return (self.come, False) if other is None else (self.come + other.come, True)
