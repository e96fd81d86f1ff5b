"""Lanes that open and close, as the server answers: opened, refused, put off, closed; and what it tells of them."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import grpc

from rnnserve._chunks import REPLAY_CHUNKS, REPLAY_WINDOW, Answer, Lane
from rnnserve._lanes.answers import Answers
from rnnserve._lanes.order import Account
from rnnserve._lanes.pace import Timing
from rnnserve._notices import Notice
from rnnserve.errors import RequestError, SessionExists
from rnnserve.v1 import inference_pb2, session_pb2


class Opens(Answers):
    """The lanes that are wished open or closed, and are not yet."""

    def __init__(self, window: int, *, resume: bool, account: Account | None, timing: Timing | None) -> None:
        super().__init__(account, timing)
        self._window = window
        self._resume = resume
        self._held: set[Lane] = set()  # lanes that are opened once they are closed where they were
        self.put_off: list[tuple[Lane, RequestError]] = []
        self.notices: list[Notice] = []

    def close(self, lane: Lane, delete_session: bool, ticket: Any) -> bool:
        """Wishes the lane closed, once what was wished on it before is answered. False: it is, no answer comes."""
        lane.closing = True
        lane.delete_session = delete_session
        lane.close_ticket = ticket
        if not (lane.open or lane.opening or lane.pending or delete_session):
            self._release(lane)
            return False
        self._hurry(lane)
        self._closes.append(lane)
        self._want(lane)
        return True

    def withdraw(self, lane: Lane) -> bool:
        """Takes back the wish of a new lane, if no server can have heard of it."""
        if lane.tries or not lane.opening:
            return False
        self._opens.remove(lane)
        self._release(lane)
        return True

    def open_again(self, lane: Lane) -> None:
        """Wishes a lane open that was put off, if it still is."""
        if self._lanes.get(lane.number) is lane:
            self._want(lane)

    def open_held(self, lane: Lane) -> None:
        """Wishes a lane open that was held until now, unless it has been wished, or has gone on, meanwhile."""
        if lane in self._held:
            self._held.remove(lane)
            self._opens.append(lane)
            self.woken()

    def refuse(self, lane: Lane, cause: RequestError) -> list[Answer]:
        """Fails everything that is wished on a lane that was put off, if it still is; gives the answers."""
        if self._lanes.get(lane.number) is lane and not (lane.open or lane.opening):
            self._refuse(lane, cause)
            self._unpark()
        return self._take_answers()

    def _receive_opened(self, opened: inference_pb2.LaneOpened) -> None:
        lane = self._lane(opened.lane)
        session = opened.session
        lane.open, lane.ready, lane.opening = True, True, False
        lane.asked = False
        if session.replay_window.max_chunks:
            replay = session.replay_window
            lane.window = min(self._window, replay.max_chunks * (REPLAY_WINDOW // REPLAY_CHUNKS), replay.max_bytes)
        if not lane.known:
            lane.known = True
            self._number(lane, session.step)
        if not lane.fresh:
            return
        lane.fresh = False
        ticket, lane.open_ticket = lane.open_ticket, None
        if lane.claim is not None and not _made_by(lane.claim[0], session):
            self._answers.append(Answer(ticket, None, lane.claim[1]))
            self.close(lane, False, None)
        else:
            lane.request = inference_pb2.LaneOpen(lane=lane.number, session_id=session.session_id)
            self._answers.append(Answer(ticket, session))

    def _receive_refused(self, lane: Lane, cause: RequestError) -> None:
        lane.opening = False
        ours = lane.fresh and lane.tries > 1 and lane.request.WhichOneof("target") == "create"
        if ours and isinstance(cause, SessionExists):
            # An earlier try has made it, and its answer was lost. The id tells, but a given one is not proof enough.
            config = lane.request.create
            lane.claim = config, cause
            lane.request = inference_pb2.LaneOpen(lane=lane.number, session_id=config.session_id)
            self._want(lane)
        elif self._resume and (
            cause.status is grpc.StatusCode.UNAVAILABLE or (cause.retry_after is not None and not lane.fresh)
        ):
            self.put_off.append((lane, cause))
        else:
            self._refuse(lane, cause)

    def _receive_closed(self, lane: Lane, cause: RequestError | None) -> None:
        self._release(lane)
        if lane.close_ticket is not None:
            self._answers.append(Answer(lane.close_ticket, None, cause))

    def _receive_notice(self, message: inference_pb2.LaneNotice) -> None:
        numbers = message.lanes or list(self._lanes)
        for lane in [self._lanes[number] for number in numbers if number in self._lanes]:  # or it is closed since
            if not (lane.fresh or lane.closing) and (notice := Notice.of(lane.request.session_id, message)):
                lane.notice = notice
                self.notices.append(notice)

    def _refuse(self, lane: Lane, cause: RequestError) -> None:
        """The lane cannot be opened: nothing that is wished on it can be had."""
        lane.opening = lane.known = False
        waiting, lane.pending = lane.pending, deque()
        for pending in waiting:
            if pending.chunk is None:
                self._answers.append(Answer(pending.ticket, None))
            else:
                self._stale = True
                self._fail(pending, copy.copy(cause))
        if lane.closing:
            self._closes.remove(lane)
            self._receive_closed(lane, cause)
        elif lane.fresh:
            self._release(lane)
            self._answers.append(Answer(lane.open_ticket, None, cause))


def _made_by(config: session_pb2.SessionConfig, session: session_pb2.Session) -> bool:
    """Whether a session may be what this wish has just made: of its kind, and never stepped."""
    return session.step == 0 and session.model == config.model and session.batch_size == (config.batch_size or 1)
