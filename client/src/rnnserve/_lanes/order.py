"""Chunks leave in the order in which they were wished, once their lanes are open and the server can remember them.

One that may leave at once is *sent*: it goes with the next message. One on a single lane that is too much for what the
server remembers of the session waits in the lane's *backlog*. One on a lane that is not open, or behind such a chunk,
is *parked*, and so is one of several lanes that has to wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from rnnserve._chunks import OVERHEAD, Chunk, Form, Gather, Lane, Pending, left_over, new_pending
from rnnserve._lanes.numbers import Numbers
from rnnserve._lanes.pace import Pace, Timing

if TYPE_CHECKING:
    from rnnserve._lanes.lanes import Lanes


class Account:
    """What the lanes of one client have in common, wherever they are.

    Attributes:
        held: bytes that unanswered chunks take, roughly.
        count: of the chunks that were wished.
        collect: takes in what other threads wish.
    """

    __slots__ = ("collect", "count", "held")

    def __init__(self) -> None:
        self.held = self.count = 0
        self.collect: Callable[[], None] = _nobody


class Order(Numbers):
    """The chunks that are wished and not sent."""

    def __init__(self, account: Account | None, timing: Timing | None) -> None:
        super().__init__()
        self.account = account or Account()
        self.leaving: list[Pace] = []  # those with chunks among those that leave with the next message
        self._timing = timing
        #: By form and cohort; those of lanes that are still here.
        self._paces: WeakValueDictionary[tuple[Form, int], Pace] = WeakValueDictionary()
        self.woken: Callable[[], None] = _nobody
        self._chunks: deque[Chunk] = deque()
        self._parked: list[Chunk] = []  # in order; on lanes that are not open, or behind such a chunk
        self._crowded = False  # a parked chunk waits for the answers to others
        self._stale = False  # rows of parked chunks were answered or have another first step

    def step(self, lane: Lane, chunk: Chunk) -> None:
        """Wishes a chunk on one lane, from the step where the chunks wished before it will have left the session."""
        form = chunk.form
        first = lane.next_step
        lane.next_step = first + form.timesteps
        chunk.lanes = (lane,)
        chunk.first_steps = (first,)
        account = self.account
        chunk.number = account.count = account.count + 1
        account.held += chunk.nbytes + OVERHEAD
        lane.pending.append(new_pending((first, lane.generation, chunk, 0, None, chunk.ticket)))
        if not lane.ready:
            self._park(chunk)
        elif lane.active or lane.backlog is not None:
            if lane.active + form.weight <= lane.window and lane.backlog is None:
                self._send(chunk)
            else:
                self._queue(lane, chunk)
        elif form.paced and self._timing is not None and len(lane.pending) == 1:
            lane.active = form.weight
            pace = lane.pace
            if pace is None or pace.form is not form:
                pace = self._set_pace(lane, form, self._timing)
            pace.wish(lane, chunk)
        else:
            self._send(chunk)

    def step_all(self, lanes: list[Lane], chunk: Chunk) -> None:
        """Wishes a chunk with a row for each of these lanes; it has one answer, when every lane has its own.

        The lanes may be anywhere: each `Lanes` sends the rows of its own.
        """
        chunk.lanes = lanes
        chunk.first_steps = [lane.next_step for lane in lanes]
        account = self.account
        chunk.number = account.count = account.count + 1
        account.held += chunk.nbytes + OVERHEAD
        gather = Gather(len(lanes))
        for row, lane in enumerate(lanes):
            lane.pending.append(Pending(lane.next_step, lane.generation, chunk, row, gather, chunk.ticket))
            lane.next_step += chunk.form.timesteps
        holder = lanes[0].holder
        if all(lane.holder is holder for lane in lanes):
            holder._send_all(chunk)
            return
        rows: dict[Lanes, list[tuple[int, Lane, int]]] = {}
        for row, lane in enumerate(lanes):
            rows.setdefault(lane.holder, []).append((row, lane, chunk.first_steps[row]))
        for holder, some in rows.items():
            holder._send_all(chunk.part(some))

    def send(self, chunk: Chunk) -> None:
        """Sends a chunk with the next message, for which somebody has to call `woken`."""
        self._chunks.append(chunk)

    def _send_all(self, chunk: Chunk) -> None:
        """Sends the rows of a chunk of several lanes, all of which are here, or parks them."""
        if all(lane.ready and lane.backlog is None and _fits(lane, chunk) for lane in chunk.lanes):
            self._send(chunk)
        else:
            self._park(chunk)
            self._crowded = True

    def _send(self, chunk: Chunk) -> None:
        for lane in chunk.lanes:
            lane.active += chunk.form.weight
            self._hurry(lane)
        self._chunks.append(chunk)
        self.woken()

    def _hurry(self, lane: Lane) -> None:
        """Lets go a chunk of the lane that is held, for something is to leave behind it."""
        if lane.pace is not None and lane.pace.held and lane.holder is self:
            lane.pace.release()

    @property
    def _held_back(self) -> list[Chunk]:
        """The chunks that wait for answers to others of their form."""
        return [chunk for pace in self._paces.values() for chunk in pace.held]

    def _reset_paces(self) -> None:
        """The stream is lost, and with it what would have let chunks go."""
        self.leaving.clear()
        for pace in self._paces.values():
            pace.reset()

    def hurry(self) -> None:
        """Lets go everything that is held."""
        for pace in self._paces.values():
            if pace.held:
                pace.release()

    def _set_pace(self, lane: Lane, form: Form, timing: Timing) -> Pace:
        pace = self._paces.get((form, 0)) or self._paces.get((form, 1))
        if pace is None:
            pace = self._paces[form, 0] = Pace(form, self, timing)
        lane.pace, lane.turn, lane.frame = pace, -1, -1
        return pace

    def other_cohort(self, pace: Pace) -> Pace | None:
        """The pace of the other cohort of the same form, if it has lanes."""
        return self._paces.get((pace.form, 1 - pace.cohort))

    def new_cohort(self, pace: Pace) -> Pace:
        """Makes the pace of the other cohort, for lanes of this one."""
        assert self._timing is not None
        other = self._paces[pace.form, 1 - pace.cohort] = Pace(pace.form, self, self._timing, 1 - pace.cohort)
        return other

    def _queue(self, lane: Lane, chunk: Chunk) -> None:
        """Puts a chunk of one lane behind those that are on their way. (A chunk of several is parked.)"""
        if lane.backlog is None:
            lane.backlog = deque()
        lane.backlog.append(chunk)

    def _next(self, lane: Lane, backlog: deque[Chunk]) -> None:
        """Lets go what waits on a lane for answers to others, as far as there is room."""
        while backlog and _fits(lane, backlog[0]):
            self._send(backlog.popleft())
        if not backlog:
            lane.backlog = None

    def _park(self, chunk: Chunk) -> None:
        self._parked.append(chunk)
        for lane in chunk.lanes:
            lane.ready = False
            self._want(lane)
        self.woken()

    def _park_all(self) -> None:
        self._parked = left_over(self._lanes.values())
        self._stale = False

    def _unpark(self) -> None:
        """Lets go the parked chunks whose lanes are all open, unless one that is still parked was wished before."""
        if self._stale:
            self._stale = False
            rows = {(chunk.number, lane) for chunk in self._parked for lane in chunk.lanes}
            self._parked = left_over(self._lanes.values(), rows)
        parked, self._parked = self._parked, []
        self._crowded = False
        behind: set[Lane] = set()
        for chunk in parked:
            lanes = chunk.lanes
            if behind.isdisjoint(lanes) and all(lane.open for lane in lanes):
                if all(lane.backlog is None and _fits(lane, chunk) for lane in lanes):
                    self._send(chunk)
                    continue
                if len(lanes) == 1:
                    self._queue(lanes[0], chunk)
                    continue
                self._crowded = True
            self._parked.append(chunk)
            behind.update(lanes)
        for chunk in parked:
            for lane in chunk.lanes:
                lane.ready = lane.open and lane not in behind

    def _number(self, lane: Lane, step: int) -> None:
        """Numbers what is wished on a lane from the step at which its session is."""
        for index, pending in enumerate(lane.pending):
            if pending.chunk is not None:
                lane.pending[index] = pending._replace(first_step=step)
                step += pending.chunk.form.timesteps
                self._stale = True
        lane.next_step = step


def _nobody() -> None:
    pass


def _fits(lane: Lane, chunk: Chunk) -> bool:
    """Whether the server will remember the answer to a chunk beside those that are on their way."""
    return not lane.active or lane.active + chunk.form.weight <= lane.window
