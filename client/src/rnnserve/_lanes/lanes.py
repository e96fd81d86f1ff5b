"""The lanes of one stream, as their callers see them, and how they move from one stream to another."""

from __future__ import annotations

from typing import Any

from rnnserve._chunks import REPLAY_WINDOW, Lane, left_over
from rnnserve._lanes.messages import Messages
from rnnserve._lanes.order import Account
from rnnserve._lanes.pace import Timing
from rnnserve.v1 import inference_pb2, session_pb2

#: A message takes chunks up to this size, well under gRPC's usual limit of 4 MiB; a larger chunk travels alone.
MESSAGE_BYTES = 1 << 20

#: Rows that may be sent and not yet answered. Beyond it wishes wait, and leave in fuller frames.
ROWS_IN_FLIGHT = 4096


class Lanes(Messages):
    """The lanes of one stream.

    No more of a session's chunks are on their way than their answers fit into `window`, or what the server says that it
    remembers if that is less, where a chunk's weight is the bytes of its answer, or a share of the window: the server
    must still have all of them if the stream is lost.
    With `timing`, an event loop or what is like one, short chunks wait for one another: see `pace`.
    With `resume` False nothing is asked again for the server's sake: UNAVAILABLE on a lane is an answer like others.

    Attributes:
        account: shared with the other `Lanes` of a client.
        woken: to be called when something was wished.
        in_flight: rows that are sent on this stream and not answered.
        broken: why the stream is of no more use although it goes on, or None.
        put_off: lanes that the server will not open now, with what it said: try `open_again`, or `refuse`.
        notices: what the server told of sessions without being asked, for whoever takes it out.
    """

    def __init__(
        self,
        message_bytes: int = MESSAGE_BYTES,
        rows_in_flight: int = ROWS_IN_FLIGHT,
        window: int = REPLAY_WINDOW,
        *,
        resume: bool = True,
        account: Account | None = None,
        timing: Timing | None = None,
    ) -> None:
        super().__init__(message_bytes, rows_in_flight, window, resume=resume, account=account, timing=timing)

    def open(self, target: session_pb2.SessionConfig | str, ticket: Any) -> Lane:
        """Wishes a lane for a new session, or for a live one by its id.

        A new session should be given an id: without one, a create whose answer is lost may make a second session.
        """
        number = self._new_number()
        if isinstance(target, str):
            request = inference_pb2.LaneOpen(lane=number, session_id=target)
        else:
            request = inference_pb2.LaneOpen(lane=number, create=target)
        lane = self._lanes[number] = Lane(number, request, ticket, self._window, self)
        self._want(lane)
        return lane

    def part(self) -> list[Lane]:
        """Gives all lanes away, which are then nobody's. For after `lost`."""
        lanes = self.members
        self._lanes.clear()
        self._free.clear()
        self._opens.clear()
        self._held.clear()
        self._closes.clear()
        self._parked.clear()
        self._stale = self._crowded = False
        for lane in lanes:
            lane.opening = False
        return lanes

    @staticmethod
    def may_go(lane: Lane) -> bool:
        """Whether nothing is wished on a lane."""
        return not (lane.pending or lane.closing or lane.opening or lane.fresh)

    def let_go(self, lane: Lane, ticket: Any = None) -> bool:
        """Gives a lane away if nothing is wished on it; the server is told that it is not needed here.

        The ticket of an open lane is answered once the server has closed it, or cannot any more.
        """
        if not self.may_go(lane):
            return False
        if lane.open:
            ghost = self._lanes[lane.number] = Lane(lane.number, lane.request, None, self._window, self)
            ghost.open = ghost.ready = ghost.closing = ghost.ghost = True
            ghost.fresh = False
            ghost.close_ticket = ticket
            self._closes.append(ghost)
            lane.open = lane.ready = False
            self.woken()
        else:
            self._forget(lane)
        return True

    def adopt(self, lanes: list[Lane], *, held: bool = False) -> None:
        """Takes lanes that are nobody's, with all that is wished on them, behind what is wished here already.

        Held, they are opened when `open_held` says so, and no wish is needed for that.
        """
        for lane in lanes:
            request = inference_pb2.LaneOpen()
            request.CopyFrom(lane.request)
            request.lane = lane.number = self._new_number()
            lane.request, lane.holder, lane.window, lane.pace = request, self, self._window, None
            self._lanes[lane.number] = lane
            if lane.closing:
                self._closes.append(lane)
            if held:
                lane.opening = True
                self._held.add(lane)
            elif lane.fresh or lane.closing or lane.pending:
                self._want(lane)
        self._parked += left_over(lanes)
        self._parked.sort(key=lambda chunk: chunk.number)
        self.woken()
