"""What one stream says and hears, without I/O: wishes become StreamRequests, StreamResponses become answers.

`Lanes` holds everything that is wished and not yet sent, and everything that is sent and not yet answered. Its caller
asks `flush` for the next message whenever the stream can take one, so whatever was wished since the last message
leaves in one; and gives `receive` every message that comes. It has no clock, no socket and no thread.

A chunk is kept whole until it is answered, with the step at which it starts, so that it can be sent again.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from typing import Any

from rnnserve._chunks import Answer, Chunk, Columns, Gather, Lane, Pending, write_frame
from rnnserve.codec import decode_named
from rnnserve.errors import StepMismatch, from_status
from rnnserve.v1 import inference_pb2, session_pb2

#: A message takes chunks up to this size, well under gRPC's usual limit of 4 MiB; a larger chunk travels alone.
MESSAGE_BYTES = 1 << 20

#: Rows that may be sent and not yet answered. Beyond it wishes wait, and leave in fuller frames.
ROWS_IN_FLIGHT = 4096


class ProtocolViolation(Exception):
    """The server answered something that was not asked."""


class Lanes:
    """The lanes of one stream."""

    def __init__(self, message_bytes: int = MESSAGE_BYTES, rows_in_flight: int = ROWS_IN_FLIGHT) -> None:
        self._message_bytes = message_bytes
        self._rows_allowed = rows_in_flight
        self._lanes: dict[int, Lane] = {}
        self._free: list[int] = []
        self._opens: deque[inference_pb2.LaneOpen] = deque()
        self._chunks: deque[Chunk] = deque()
        self._closes: list[inference_pb2.LaneClose] = []
        self._answers: list[Answer] = []
        self.in_flight = 0

    # Wishes

    def open(self, target: session_pb2.SessionConfig | str, ticket: Any) -> Lane:
        """Wishes a lane for a new session, or for a live one by its id."""
        number = heapq.heappop(self._free) if self._free else len(self._lanes)
        lane = self._lanes[number] = Lane(number, ticket)
        if isinstance(target, str):
            self._opens.append(inference_pb2.LaneOpen(lane=number, session_id=target))
        else:
            self._opens.append(inference_pb2.LaneOpen(lane=number, create=target))
        return lane

    def step(self, lane: Lane, chunk: Chunk) -> None:
        """Wishes a chunk on one lane, from the step where the chunks wished before it will have left the session."""
        first = lane.next_step
        lane.next_step = first + chunk.timesteps
        chunk.lanes = [lane]
        chunk.first_steps = [first]
        lane.pending.append(Pending(first, lane.generation, chunk, 0, None, chunk.ticket))
        self._chunks.append(chunk)

    def step_all(self, lanes: list[Lane], chunk: Chunk) -> None:
        """Wishes a chunk with a row for each of these lanes; it has one answer, when every lane has its own."""
        chunk.lanes = lanes
        chunk.first_steps = [lane.next_step for lane in lanes]
        gather = Gather(len(lanes))
        for row, lane in enumerate(lanes):
            lane.pending.append(Pending(lane.next_step, lane.generation, chunk, row, gather, chunk.ticket))
            lane.next_step += chunk.timesteps
        self._chunks.append(chunk)

    def barrier(self, lane: Lane, ticket: Any) -> bool:
        """Wishes to know when every chunk wished on the lane so far is answered. False: all are, no answer comes."""
        if lane.pending:
            lane.pending.append(Pending(-1, lane.generation, None, 0, None, ticket))
        return bool(lane.pending)

    def close(self, lane: Lane, delete_session: bool, ticket: Any) -> None:
        """Wishes the lane closed, once what was wished on it before is answered."""
        lane.open = False
        lane.close_ticket = ticket
        self._closes.append(inference_pb2.LaneClose(lane=lane.number, delete_session=delete_session))

    # The stream

    def flush(self) -> inference_pb2.StreamRequest | None:
        """The next message: everything wished since the last one, or as much as one message takes; None: nothing."""
        if not (self._opens or self._chunks or self._closes):
            return None
        request = inference_pb2.StreamRequest()
        room = self._message_bytes
        while self._opens:
            size = self._opens[0].ByteSize()
            if request.opens and size > room:
                return request
            room -= size
            request.opens.append(self._opens.popleft())
        # A frame names a lane once, so a lane's second chunk goes to a later frame than its first.
        frames: dict[tuple[int, Hashable], list[Chunk]] = {}
        rounds: dict[Lane, int] = {}
        while self._chunks:
            chunk = self._chunks[0]
            rows = len(chunk.lanes)
            if (frames and chunk.nbytes > room) or (self.in_flight and self.in_flight + rows > self._rows_allowed):
                break
            self._chunks.popleft()
            self.in_flight += rows
            room -= chunk.nbytes
            if rows == 1:
                lane = chunk.lanes[0]
                turn = rounds.get(lane, 0)
                rounds[lane] = turn + 1
            else:
                turn = max([rounds.get(lane, 0) for lane in chunk.lanes])
                rounds.update(dict.fromkeys(chunk.lanes, turn + 1))
            frames.setdefault((turn, chunk.key), []).append(chunk)
        for _, chunks in sorted(frames.items(), key=lambda item: item[0][0]):
            write_frame(request.frames.add(), chunks)
        if self._closes and not self._chunks:  # a close stays behind the chunks that were wished before it
            request.closes.extend(self._closes)
            self._closes.clear()
        return request if request.opens or request.frames or request.closes else None

    def receive(self, response: inference_pb2.StreamResponse) -> list[Answer]:
        """What a message of the server answers.

        Raises:
            ProtocolViolation: the message answers what was not asked; the stream is of no more use.
            TensorError: so is it when a tensor of the message breaks the contract.
        """
        answers = self._answers = []
        for opened in response.opened:
            lane = self._lane(opened.lane)
            lane.open = True
            lane.next_step = opened.session.step
            answers.append(Answer(lane.open_ticket, opened.session))
            lane.open_ticket = None
        for frame in response.frames:
            self._receive_frame(frame)
        for error in response.errors:
            self._receive_error(error)
        for closed in response.closed:
            lane = self._lane(closed.lane)
            self._release(lane)
            answers.append(Answer(lane.close_ticket, None))
        return answers

    def lost(self) -> list[Any]:
        """The tickets of everything unanswered, each once, in the order of the wishes on each lane.

        For when the stream is lost: every lane is closed for good.
        """
        tickets: dict[int, Any] = {}
        for lane in self._lanes.values():
            lane.open = False
            for ticket in (lane.open_ticket, *[pending.ticket for pending in lane.pending], lane.close_ticket):
                if ticket is not None:
                    tickets[id(ticket)] = ticket
        self._lanes.clear()
        self._opens.clear()
        self._chunks.clear()
        self._closes.clear()
        return list(tickets.values())

    def _lane(self, number: int) -> Lane:
        lane = self._lanes.get(number)
        if lane is None:
            raise ProtocolViolation(f"the server named lane {number}, which is not open")
        return lane

    def _release(self, lane: Lane) -> None:
        lane.open = False
        del self._lanes[lane.number]
        if self._lanes:
            heapq.heappush(self._free, lane.number)
        else:
            self._free.clear()

    def _receive_frame(self, frame: inference_pb2.ResultFrame) -> None:
        columns = Columns(decode_named(frame.outputs, "outputs"), decode_named(frame.states, "states"))
        lanes = list(frame.lanes)
        for arrays in (columns.outputs, columns.states):
            for name, array in arrays.items():
                if array.ndim < 2 or len(array) != len(lanes):
                    raise ProtocolViolation(f"{name!r} has shape {array.shape} for {len(lanes)} lanes")
        gathered: dict[Gather, tuple[Any, list[int], list[int]]] = {}
        for source, (number, first_step) in enumerate(zip(lanes, frame.first_steps, strict=True)):
            pending = self._take(self._lane(number), first_step)
            if pending.gather is None:
                self._answers.append(Answer(pending.ticket, (columns, source)))
            else:
                _, rows, sources = gathered.setdefault(pending.gather, (pending.ticket, [], []))
                rows.append(pending.row)
                sources.append(source)
        for gather, (ticket, rows, sources) in gathered.items():
            gather.put(columns, rows, sources)
            if not gather.left:
                self._answers.append(gather.answer(ticket))

    def _receive_error(self, error: inference_pb2.LaneError) -> None:
        lane = self._lane(error.lane)
        cause = from_status(error.status)
        if error.operation == inference_pb2.LANE_OPERATION_OPEN:
            self._release(lane)
            self._answers.append(Answer(lane.open_ticket, None, cause))
        elif error.operation == inference_pb2.LANE_OPERATION_CLOSE:
            self._release(lane)
            self._answers.append(Answer(lane.close_ticket, None, cause))
        else:
            first_step = error.first_step if error.HasField("first_step") else None
            pending = self._take(lane, first_step)
            if pending.generation == lane.generation:
                # The session is where this chunk found it; what was wished behind it will fail too.
                lane.generation += 1
                expected = cause.expected_step if isinstance(cause, StepMismatch) else None
                lane.next_step = pending.first_step if expected is None else expected
            if pending.gather is None:
                self._answers.append(Answer(pending.ticket, None, cause))
            else:
                pending.gather.errors[pending.row] = cause
                pending.gather.left -= 1
                if not pending.gather.left:
                    self._answers.append(pending.gather.answer(pending.ticket))

    def _take(self, lane: Lane, first_step: int | None) -> Pending:
        """Takes the earliest unanswered chunk of the lane that starts there, and passes the barriers that it held."""
        waiting = lane.pending
        for index, pending in enumerate(waiting):
            if pending.chunk is not None and (first_step is None or pending.first_step == first_step):
                if index:
                    del waiting[index]
                else:
                    waiting.popleft()
                self.in_flight -= 1
                while waiting and waiting[0].chunk is None:
                    self._answers.append(Answer(waiting.popleft().ticket, None))
                return pending
        raise ProtocolViolation(f"the server answered step {first_step} of lane {lane.number}, which was not asked")
