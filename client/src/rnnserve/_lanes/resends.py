"""A stream is lost: what is unanswered is a wish again, for the next stream, or is given up."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

from rnnserve._chunks import Answer, Lane
from rnnserve._lanes.answers import DOOMED
from rnnserve._lanes.opens import Opens
from rnnserve._lanes.order import Account
from rnnserve._lanes.pace import Timing
from rnnserve._losses import LOSSES, LOSSES_ALONE, Losses
from rnnserve.errors import ChunkLost, RequestError, StepMismatch


class Resends(Opens):
    """What is sent again on the next stream."""

    def __init__(self, window: int, *, resume: bool, account: Account | None, timing: Timing | None) -> None:
        super().__init__(window, resume=resume, account=account, timing=timing)
        self._losses = Losses()
        self.broken: RequestError | None = None

    @property
    def unanswered(self) -> tuple[int, int]:
        """After a loss: how many chunks are to be sent again, and on how many lanes."""
        return len(self._parked), len({lane for chunk in self._parked for lane in chunk.lanes})

    def lost(self) -> list[Answer]:
        """The stream is lost: makes what is unanswered a wish again. Gives the answers that are known without it."""
        lost = self._count_losses() if self.broken is None else ()
        self.in_flight = 0
        self.broken = None
        self.put_off.clear()
        self._opens.clear()
        self._held.clear()
        self._chunks.clear()
        self._closes.clear()
        self._heard.clear()
        self._reset_paces()
        for lane in list(self._lanes.values()):
            lane.open = lane.opening = lane.ready = False
            lane.active, lane.backlog = 0, None
            if lost:
                self._fail_lost(lane, lost)
            self._fail_doomed(lane)
            if lane.closing:
                if lane.pending or lane.delete_session:
                    self._closes.append(lane)
                else:  # it is closed, like every lane of a stream that is no more
                    self._receive_closed(lane, None)
                    continue
            if lane.fresh or lane.closing or lane.pending:
                self._want(lane)
        self._park_all()
        return self._take_answers() + self.take_later()

    def give_up(self, *, keep: bool) -> list[Any]:
        """The tickets of everything unanswered, each once, in the order of the wishes on each lane.

        For after `lost`, when no other stream is to be had. Opens and closes are given up. With `keep` the chunks keep
        their places: whether they were applied nobody knows, so they are settled on the next stream, ahead of
        anything wished later, though nobody waits for them. Without, they are dropped, and what is wished next starts
        wherever its session is then.
        """
        tickets: dict[int, Any] = {}
        self._reset_paces()
        self._opens.clear()
        self._held.clear()
        self._closes.clear()
        for lane in list(self._lanes.values()):
            for ticket in (lane.open_ticket, *[pending.ticket for pending in lane.pending], lane.close_ticket):
                if ticket is not None:
                    tickets[id(ticket)] = ticket
            lane.opening = False
            if lane.fresh or lane.closing:
                self._drop(lane)
                self._release(lane)
            elif not keep:
                self._drop(lane)
                lane.known = False
            elif lane.pending:
                lane.pending = deque([pending for pending in lane.pending if pending.chunk is not None])
                self._want(lane)
        self._park_all()
        return list(tickets.values())

    def _count_losses(self) -> set[int]:
        """The numbers of the chunks that are to be given up, now that the stream is lost."""
        backlogs = [chunk for lane in self._lanes.values() for chunk in lane.backlog or ()]
        waiting = {chunk.number for chunk in (*self._chunks, *self._parked, *backlogs, *self._held_back)}
        pending = [each.chunk for lane in self._lanes.values() for each in lane.pending]
        return self._losses.count({chunk.number for chunk in pending if chunk is not None} - waiting, waiting)

    def _fail_lost(self, lane: Lane, lost: Collection[int]) -> None:
        """Gives up chunks that are on their way whenever a stream is lost. Whether they were applied nobody knows, so
        the server has to say where the session is.
        """
        for index, pending in enumerate(lane.pending):
            if pending.chunk is not None and pending.chunk.number in lost:
                for behind in range(index + 1, len(lane.pending)):
                    lane.pending[behind] = lane.pending[behind]._replace(generation=DOOMED)
                del lane.pending[index]
                lane.generation += 1
                lane.known = False
                self._fail(pending, ChunkLost.of(lane.request.session_id, pending.first_step, LOSSES + LOSSES_ALONE))
                return

    def _fail_doomed(self, lane: Lane) -> None:
        """Fails what was sent behind a chunk that failed.

        Sent again it might be taken, for what was wished after the failure may have brought the session to its step.
        """
        if any(pending.generation == DOOMED for pending in lane.pending):
            waiting, lane.pending = lane.pending, deque()
            for pending in waiting:
                if pending.generation != DOOMED:
                    lane.pending.append(pending)
                elif pending.chunk is not None:
                    message = f"the chunk at step {pending.first_step} was sent behind one that failed"
                    self._fail(pending, StepMismatch(message, metadata={"got": str(pending.first_step)}))
                elif lane.pending:
                    lane.pending.append(pending._replace(generation=lane.generation))
                else:
                    self._answers.append(Answer(pending.ticket, None))
