"""Wishes become messages to the server, and its messages become answers."""

from __future__ import annotations

from collections.abc import Hashable

import grpc

from rnnserve._chunks import Answer, Chunk, Lane, write_frame
from rnnserve._lanes.order import Account
from rnnserve._lanes.pace import Timing
from rnnserve._lanes.resends import Resends
from rnnserve.errors import Unavailable, from_status
from rnnserve.v1 import inference_pb2

#: Opens of one message.
OPENS_IN_MESSAGE = 1024

_TAKEN_OVER = "SESSION_TAKEN_OVER"


def _first_lane(chunk: Chunk) -> int:
    return chunk.lanes[0].number


class Messages(Resends):
    """The two ways of a stream."""

    def __init__(
        self,
        message_bytes: int,
        rows_in_flight: int,
        window: int,
        *,
        resume: bool,
        account: Account | None,
        timing: Timing | None,
    ) -> None:
        super().__init__(window, resume=resume, account=account, timing=timing)
        self._message_bytes = message_bytes
        self._rows_allowed = rows_in_flight

    @property
    def wishes(self) -> bool:
        """Whether something is to be sent, be it now or on the next stream."""
        return bool(self._opens or self._chunks or self._closes or self._held_back)

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer."""
        return self.in_flight > 0 or any(lane.opening for lane in self._lanes.values())

    def flush(self) -> inference_pb2.StreamRequest | None:
        """The next message: everything wished since the last one, or as much as one message takes; None: nothing."""
        if self.leaving:
            self.account.collect()  # what came too late to be woken for
        if not (self._opens or self._chunks or self._closes):
            return None
        request = inference_pb2.StreamRequest()
        room = self._message_bytes
        while self._opens:
            lane = self._opens[0]
            size = lane.request.ByteSize()
            if request.opens and (size > room or len(request.opens) >= OPENS_IN_MESSAGE):
                return request
            room -= size
            lane.tries += 1
            request.opens.append(lane.request)
            self._opens.popleft()
        # A frame names a lane once, so a lane's second chunk goes to a later frame than its first.
        frames: dict[tuple[int, Hashable], list[Chunk]] = {}
        rounds: dict[Lane, int] = {}
        same: list[Chunk] = []
        last_turn, last_form = -1, None
        while self._chunks:
            chunk = self._chunks[0]
            rows = len(chunk.lanes)
            if (frames and chunk.nbytes > room) or (self.in_flight and self.in_flight + rows > self._rows_allowed):
                break
            if self._losses and self._losses.hold(chunk.number, others=self.in_flight > 0):
                break
            self._chunks.popleft()
            self.in_flight += rows
            room -= chunk.nbytes
            if rows > 1:
                turn = max([rounds.get(lane, 0) for lane in chunk.lanes])
                rounds.update(dict.fromkeys(chunk.lanes, turn + 1))
            elif len(chunk.lanes[0].pending) == 1:
                turn = 0
            else:
                lane = chunk.lanes[0]
                turn = rounds.get(lane, 0)
                rounds[lane] = turn + 1
            form = chunk.form
            if turn != last_turn or form is not last_form:
                last_turn, last_form = turn, form
                same = frames.setdefault((turn, form.key), [])
            same.append(chunk)
        for pace in self.leaving:
            pace.sent()
        self.leaving.clear()
        for _, chunks in sorted(frames.items(), key=lambda item: item[0][0]):
            if len(chunks) > 1:
                chunks.sort(key=_first_lane)  # the server knows a frame of the same lanes in the same order again
            write_frame(request.frames.add(), chunks)
        if self._closes and not self._chunks:  # a close stays behind the chunks that were wished before it
            for lane in self._closes:
                if lane.ready:
                    request.closes.add(lane=lane.number, delete_session=lane.delete_session)
            self._closes = [lane for lane in self._closes if not lane.ready]
        return request if request.opens or request.frames or request.closes else None

    def receive(self, response: inference_pb2.StreamResponse) -> list[Answer]:
        """What a message of the server answers, but for what `take_later` gives.

        After an error `lost` has what it answered until there.

        Raises:
            ProtocolViolation: the message answers what was not asked; the stream is of no more use.
            TensorError: so is it when a tensor of the message breaks the contract.
        """
        for opened in response.opened:
            self._receive_opened(opened)
        for frame in response.frames:
            self._receive_frame(frame)
        for error in response.errors:
            self._receive_error(error)
        for closed in response.closed:
            self._receive_closed(self._lane(closed.lane), None)
        for notice in response.notices:
            self._receive_notice(notice)
        if self._parked and (self._crowded or response.opened or response.errors):
            self._unpark()
        return self._take_answers() or self.take_later()

    def _receive_error(self, error: inference_pb2.LaneError) -> None:
        lane = self._lane(error.lane)
        cause = from_status(error.status)
        if error.operation == inference_pb2.LANE_OPERATION_OPEN:
            self._receive_refused(lane, cause)
        elif error.operation == inference_pb2.LANE_OPERATION_CLOSE:
            self._receive_closed(lane, cause)
        elif self._resume and lane.asked and cause.reason == _TAKEN_OVER:
            # By a call of ours that a proxy took to another server: streams that start now go there too.
            self.broken = Unavailable(cause.message, status=cause.status, reason=cause.reason)
        elif self._resume and cause.status is grpc.StatusCode.UNAVAILABLE:
            # Whoever says so will not run what comes behind it either: all of it is for another stream.
            self.broken = cause
        else:
            self._receive_failure(lane, error.first_step if error.HasField("first_step") else None, cause)
