"""What one connection says and hears, without I/O: wishes become StreamRequests, StreamResponses become answers.

`Lanes` holds everything that is wished and not yet sent, and everything that is sent and not yet answered. Its caller
asks `flush` for the next message whenever the stream can take one, so whatever was wished since the last message
leaves in one; and gives `receive` every message that comes. It has no clock, no socket and no thread.

Lanes may move from one `Lanes` to another, each with what is wished on it: `part` and `let_go` give them away, and
`adopt` takes them in. A chunk of several lanes whose lanes are not all in one place is sent in parts, and answered when
all its rows are.

It outlives its streams. A chunk is kept whole until it is answered, with the step at which it starts. When a stream is
lost, `lost` makes everything unanswered a wish again: the next stream first opens the lanes that are needed, by the ids
of their sessions, and then sends the chunks anew, in their order and each from its own first step. The server applies
what it has not applied, and answers what it has with the same reply, so that each chunk is applied once. A lane on
which nothing is wished is opened again with the next wish, and not before.
"""

from __future__ import annotations

import copy
import heapq
from collections import deque
from collections.abc import Callable, Collection, Hashable
from typing import Any

import grpc

from rnnserve._chunks import (
    OVERHEAD,
    REPLAY_CHUNKS,
    REPLAY_WINDOW,
    Answer,
    Chunk,
    Columns,
    Gather,
    Lane,
    Pending,
    left_over,
    write_frame,
)
from rnnserve._losses import LOSSES, LOSSES_ALONE, Losses
from rnnserve._notices import Notice
from rnnserve.codec import decode_named
from rnnserve.errors import ChunkLost, RequestError, SessionExists, StepMismatch, Unavailable, from_status
from rnnserve.v1 import inference_pb2, session_pb2

#: A message takes chunks up to this size, well under gRPC's usual limit of 4 MiB; a larger chunk travels alone.
MESSAGE_BYTES = 1 << 20

#: Rows that may be sent and not yet answered. Beyond it wishes wait, and leave in fuller frames.
ROWS_IN_FLIGHT = 4096

#: Opens of one message.
OPENS_IN_MESSAGE = 1024

#: The generation of a chunk that was sent behind one that failed, and will fail for that reason.
_DOOMED = -1

_TAKEN_OVER = "SESSION_TAKEN_OVER"


class ProtocolViolation(Exception):
    """The server answered something that was not asked."""


class Account:
    """What the lanes of one client have in common, wherever they are.

    Attributes:
        held: bytes that unanswered chunks take, roughly.
        count: of the chunks that were wished.
    """

    __slots__ = ("count", "held")

    def __init__(self) -> None:
        self.held = self.count = 0


class Lanes:
    """The lanes of one stream.

    No more of a session's chunks are on their way than their answers fit into `window`, or what the server says that it
    remembers if that is less, where a chunk's weight is the bytes of its answer, or a share of the window: the server
    must still have all of them if the stream is lost.
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
    ) -> None:
        self.account = account or Account()
        self.woken: Callable[[], None] = _nobody
        self._message_bytes = message_bytes
        self._rows_allowed = rows_in_flight
        self._window = window
        self._resume = resume
        self._lanes: dict[int, Lane] = {}
        self._free: list[int] = []
        self._opens: deque[Lane] = deque()
        self._chunks: deque[Chunk] = deque()
        self._parked: list[Chunk] = []  # in order; on lanes that are not open, or behind such a chunk
        self._crowded = False  # a parked chunk waits for the answers to others
        self._stale = False  # rows of parked chunks were answered or have another first step
        self._closes: list[Lane] = []
        self._held: set[Lane] = set()  # lanes that are opened once they are closed where they were
        self._answers: list[Answer] = []
        self._losses = Losses()
        self.in_flight = 0
        self.broken: RequestError | None = None
        self.put_off: list[tuple[Lane, RequestError]] = []
        self.notices: list[Notice] = []

    # Wishes

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

    def step(self, lane: Lane, chunk: Chunk) -> None:
        """Wishes a chunk on one lane, from the step where the chunks wished before it will have left the session."""
        first = lane.next_step
        lane.next_step = first + chunk.timesteps
        chunk.lanes = [lane]
        chunk.first_steps = [first]
        account = self.account
        chunk.number = account.count = account.count + 1
        account.held += chunk.nbytes + OVERHEAD
        lane.pending.append(Pending(first, lane.generation, chunk, 0, None, chunk.ticket))
        if lane.ready:
            active = lane.active + chunk.weight
            if (active <= lane.window or not lane.active) and lane.backlog is None:
                lane.active = active
                self._chunks.append(chunk)
            else:
                self._queue(lane, chunk)
        else:
            self._park(chunk)

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
            lane.next_step += chunk.timesteps
        holder = lanes[0].holder
        if all(lane.holder is holder for lane in lanes):
            holder._send_all(chunk)
            return
        rows: dict[Lanes, list[tuple[int, Lane, int]]] = {}
        for row, lane in enumerate(lanes):
            rows.setdefault(lane.holder, []).append((row, lane, chunk.first_steps[row]))
        for holder, some in rows.items():
            holder._send_all(chunk.part(some))
            holder.woken()

    def barrier(self, lane: Lane, ticket: Any) -> bool:
        """Wishes to know when every chunk wished on the lane so far is answered. False: all are, no answer comes."""
        if lane.pending:
            lane.pending.append(Pending(-1, lane.generation, None, 0, None, ticket))
        return bool(lane.pending)

    def close(self, lane: Lane, delete_session: bool, ticket: Any) -> bool:
        """Wishes the lane closed, once what was wished on it before is answered. False: it is, no answer comes."""
        lane.closing = True
        lane.delete_session = delete_session
        lane.close_ticket = ticket
        if not (lane.open or lane.opening or lane.pending or delete_session):
            self._release(lane)
            return False
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

    def refuse(self, lane: Lane, cause: RequestError) -> list[Answer]:
        """Fails everything that is wished on a lane that was put off, if it still is; gives the answers."""
        answers = self._answers = []
        if self._lanes.get(lane.number) is lane and not (lane.open or lane.opening):
            self._refuse(lane, cause)
            self._unpark()
        return answers

    # Moving

    @property
    def members(self) -> list[Lane]:
        """The lanes that are here, but for those that are closed because they went elsewhere."""
        return [lane for lane in self._lanes.values() if not lane.ghost]

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
            lane.request, lane.holder, lane.window = request, self, self._window
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

    def open_held(self, lane: Lane) -> None:
        """Wishes a lane open that was held until now, unless it has been wished, or has gone on, meanwhile."""
        if lane in self._held:
            self._held.remove(lane)
            self._opens.append(lane)
            self.woken()

    # The stream

    @property
    def wishes(self) -> bool:
        """Whether something is to be sent, be it now or on the next stream."""
        return bool(self._opens or self._chunks or self._closes)

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer."""
        return self.in_flight > 0 or any(lane.opening for lane in self._lanes.values())

    @property
    def unanswered(self) -> tuple[int, int]:
        """After a loss: how many chunks are to be sent again, and on how many lanes."""
        return len(self._parked), len({lane for chunk in self._parked for lane in chunk.lanes})

    def flush(self) -> inference_pb2.StreamRequest | None:
        """The next message: everything wished since the last one, or as much as one message takes; None: nothing."""
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
            for lane in self._closes:
                if lane.ready:
                    request.closes.add(lane=lane.number, delete_session=lane.delete_session)
            self._closes = [lane for lane in self._closes if not lane.ready]
        return request if request.opens or request.frames or request.closes else None

    def receive(self, response: inference_pb2.StreamResponse) -> list[Answer]:
        """What a message of the server answers.

        Raises:
            ProtocolViolation: the message answers what was not asked; the stream is of no more use.
            TensorError: so is it when a tensor of the message breaks the contract.
        """
        answers = self._answers = []
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
        return answers

    def lost(self) -> list[Answer]:
        """The stream is lost: makes what is unanswered a wish again. Gives the answers that are known without it."""
        answers = self._answers = []
        lost = self._count_losses() if self.broken is None else ()
        self.in_flight = 0
        self.broken = None
        self.put_off.clear()
        self._opens.clear()
        self._held.clear()
        self._chunks.clear()
        self._closes.clear()
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
        return answers

    def give_up(self, *, keep: bool) -> list[Any]:
        """The tickets of everything unanswered, each once, in the order of the wishes on each lane.

        For after `lost`, when no other stream is to be had. Opens and closes are given up. With `keep` the chunks keep
        their places: whether they were applied nobody knows, so they are settled on the next stream, ahead of
        anything wished later, though nobody waits for them. Without, they are dropped, and what is wished next starts
        wherever its session is then.
        """
        tickets: dict[int, Any] = {}
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

    # Lanes

    def _lane(self, number: int) -> Lane:
        lane = self._lanes.get(number)
        if lane is None:
            raise ProtocolViolation(f"the server named lane {number}, which is not open")
        return lane

    def _want(self, lane: Lane) -> None:
        if not (lane.open or lane.opening):
            lane.opening = True
            self._opens.append(lane)

    def _new_number(self) -> int:
        return heapq.heappop(self._free) if self._free else len(self._lanes)

    def _release(self, lane: Lane) -> None:
        lane.closing = True
        self._forget(lane)

    def _drop(self, lane: Lane) -> None:
        """Drops what is wished on a lane; whoever waits for it is told by others."""
        for pending in lane.pending:
            chunk, gather = pending.chunk, pending.gather
            if chunk is not None:
                if gather is not None:
                    gather.left -= 1
                if gather is None or not gather.left:
                    self.account.held -= chunk.nbytes + OVERHEAD
        lane.pending.clear()

    def _forget(self, lane: Lane) -> None:
        lane.open = lane.opening = lane.ready = False
        del self._lanes[lane.number]
        if self._lanes:
            heapq.heappush(self._free, lane.number)
        else:
            self._free.clear()

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

    # Chunks

    def _send_all(self, chunk: Chunk) -> None:
        """Sends the rows of a chunk of several lanes, all of which are here, or parks them."""
        if all(lane.ready and lane.backlog is None and _fits(lane, chunk) for lane in chunk.lanes):
            self._send(chunk)
        else:
            self._park(chunk)
            self._crowded = True

    def _send(self, chunk: Chunk) -> None:
        for lane in chunk.lanes:
            lane.active += chunk.weight
        self._chunks.append(chunk)

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
                step += pending.chunk.timesteps
                self._stale = True
        lane.next_step = step

    def _receive_frame(self, frame: inference_pb2.ResultFrame) -> None:
        columns = Columns(decode_named(frame.outputs, "outputs"), decode_named(frame.states, "states"))
        lanes = list(frame.lanes)
        for arrays in (columns.outputs, columns.states):
            for name, array in arrays.items():
                if array.ndim < 2 or len(array) != len(lanes):
                    raise ProtocolViolation(f"{name!r} has shape {array.shape} for {len(lanes)} lanes")
        gathered: dict[Gather, tuple[Pending, list[int], list[int]]] = {}
        for source, (number, first_step) in enumerate(zip(lanes, frame.first_steps, strict=True)):
            pending = self._take(self._lane(number), first_step)
            if pending.gather is None:
                self.account.held -= pending.chunk.nbytes + OVERHEAD  # type: ignore[union-attr]  # not a barrier
                self._answers.append(Answer(pending.ticket, (columns, source)))
            else:
                _, rows, sources = gathered.setdefault(pending.gather, (pending, [], []))
                rows.append(pending.row)
                sources.append(source)
        for gather, (pending, rows, sources) in gathered.items():
            gather.put(columns, rows, sources)
            if not gather.left:
                self.account.held -= pending.chunk.nbytes + OVERHEAD  # type: ignore[union-attr]
                self._answers.append(gather.answer(pending.ticket))

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
            first_step = error.first_step if error.HasField("first_step") else None
            past = isinstance(cause, StepMismatch) and cause.past
            pending = self._take(lane, first_step, failed=not past)
            expected = cause.expected_step if isinstance(cause, StepMismatch) else None
            if past:
                # The session is beyond it already: that does no harm to what was wished behind it.
                lane.next_step = max(lane.next_step, expected or 0)
            elif pending.generation == lane.generation:
                # The session is where this chunk found it; what was wished behind it will fail too.
                lane.generation += 1
                lane.next_step = pending.first_step if expected is None else expected
            self._fail(pending, cause)

    def _fail(self, pending: Pending, cause: RequestError) -> None:
        assert pending.chunk is not None
        gather = pending.gather
        if gather is None:
            self._answers.append(Answer(pending.ticket, None, cause))
        else:
            gather.errors[pending.row] = cause
            gather.left -= 1
            if gather.left:
                return
            self._answers.append(gather.answer(pending.ticket))
        self.account.held -= pending.chunk.nbytes + OVERHEAD

    def _fail_doomed(self, lane: Lane) -> None:
        """Fails what was sent behind a chunk that failed.

        Sent again it might be taken, for what was wished after the failure may have brought the session to its step.
        """
        if any(pending.generation == _DOOMED for pending in lane.pending):
            waiting, lane.pending = lane.pending, deque()
            for pending in waiting:
                if pending.generation != _DOOMED:
                    lane.pending.append(pending)
                elif pending.chunk is not None:
                    message = f"the chunk at step {pending.first_step} was sent behind one that failed"
                    self._fail(pending, StepMismatch(message, metadata={"got": str(pending.first_step)}))
                elif lane.pending:
                    lane.pending.append(pending._replace(generation=lane.generation))
                else:
                    self._answers.append(Answer(pending.ticket, None))

    def _count_losses(self) -> set[int]:
        """The numbers of the chunks that are to be given up, now that the stream is lost."""
        backlogs = [chunk for lane in self._lanes.values() for chunk in lane.backlog or ()]
        waiting = {chunk.number for chunk in (*self._chunks, *self._parked, *backlogs)}
        pending = [each.chunk for lane in self._lanes.values() for each in lane.pending]
        return self._losses.count({chunk.number for chunk in pending if chunk is not None} - waiting, waiting)

    def _fail_lost(self, lane: Lane, lost: Collection[int]) -> None:
        """Gives up chunks that are on their way whenever a stream is lost. Whether they were applied nobody knows, so
        the server has to say where the session is.
        """
        for index, pending in enumerate(lane.pending):
            if pending.chunk is not None and pending.chunk.number in lost:
                for behind in range(index + 1, len(lane.pending)):
                    lane.pending[behind] = lane.pending[behind]._replace(generation=_DOOMED)
                del lane.pending[index]
                lane.generation += 1
                lane.known = False
                self._fail(pending, ChunkLost.of(lane.request.session_id, pending.first_step, LOSSES + LOSSES_ALONE))
                return

    def _take(self, lane: Lane, first_step: int | None, *, failed: bool = False) -> Pending:
        """Takes the earliest unanswered chunk of the lane that starts there, and passes the barriers that it held."""
        waiting = lane.pending
        for index, pending in enumerate(waiting):
            if pending.chunk is not None and (first_step is None or pending.first_step == first_step):
                if failed and pending.generation == lane.generation:
                    for behind in range(index + 1, len(waiting)):
                        waiting[behind] = waiting[behind]._replace(generation=_DOOMED)
                if index:
                    del waiting[index]
                else:
                    waiting.popleft()
                self.in_flight -= 1
                lane.active -= pending.chunk.weight
                if lane.backlog is not None:
                    self._next(lane, lane.backlog)
                while waiting and waiting[0].chunk is None:
                    self._answers.append(Answer(waiting.popleft().ticket, None))
                return pending
        raise ProtocolViolation(f"the server answered step {first_step} of lane {lane.number}, which was not asked")


def _nobody() -> None:
    pass


def _fits(lane: Lane, chunk: Chunk) -> bool:
    """Whether the server will remember the answer to a chunk beside those that are on their way."""
    return not lane.active or lane.active + chunk.weight <= lane.window


def _made_by(config: session_pb2.SessionConfig, session: session_pb2.Session) -> bool:
    """Whether a session may be what this wish has just made: of its kind, and never stepped."""
    return session.step == 0 and session.model == config.model and session.batch_size == (config.batch_size or 1)
