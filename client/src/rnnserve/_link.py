"""The way to the server under asyncio: one bidirectional stream after another, with `Lanes` that outlive them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from rnnserve import _notices
from rnnserve._chunks import Answer, Chunk, Lane
from rnnserve._lanes import Lanes, ProtocolViolation
from rnnserve._notices import OnNotice
from rnnserve._retry import Retry, Trial
from rnnserve.codec import TensorError
from rnnserve.errors import ClientClosed, RequestError, RnnserveError, ServerError, Unavailable, from_lost_stream
from rnnserve.v1 import inference_pb2, session_pb2

_Call: TypeAlias = grpc.aio.StreamStreamCall[inference_pb2.StreamRequest, inference_pb2.StreamResponse]

#: Says when the stream is lost, when it is back and when nobody tries any longer.
LOG = logging.getLogger("rnnserve")

#: Bytes of unanswered chunks that a client keeps for sending them again.
REPLAY_BYTES = 64 << 20

#: Seconds that a closing client waits for the server to end the stream in good order.
_PARTING = 2.0


def deliver(ticket: Any, value: Any, error: BaseException | None = None) -> None:
    """Answers a ticket, an asyncio or a concurrent future, unless whoever held it has stopped waiting."""
    if ticket.done():
        return
    try:
        if error is None:
            ticket.set_result(value)
        else:
            ticket.set_exception(error)
    except concurrent.futures.InvalidStateError:  # given up in another thread since the line above
        pass


class Link:
    """The streams of one connection, one at a time, from the first wish until `close`.

    Wishes are made on `lanes`, followed by `wake`. The writer is woken through the event loop's queue, behind every
    task that is ready now, so what all of them wish leaves in one message; what is wished while that message is being
    written leaves in the next.

    When a stream is lost, `Retry` says when the next one starts; it sends again what was not answered. When it says
    to give up, those who wait are told so, and the next wish starts anew. Chunks that were wished keep their places
    all the while, unless `retry` has a limit of 0: then they are dropped with the stream.

    `on_notice` is given every notice of the server, and must return at once.

    Chunks beyond `replay_bytes` wait in line, outside the lanes: they are not sent, and may be taken back.

    Attributes:
        closed: it was closed for good.
        trouble: why there is no stream now although there should be; None while there is one, or none is needed.
    """

    def __init__(
        self,
        target: str,
        start: Callable[[], _Call],
        retry: Retry,
        replay_bytes: int,
        on_notice: OnNotice | None = None,
    ) -> None:
        self.lanes = Lanes(resume=retry.limit != 0)
        self.closed = False
        self.trouble: str | None = None
        self._target = target
        self._start = start
        self._retry = retry
        self._replay_bytes = replay_bytes
        self._on_notice = on_notice
        self._line: dict[Any, tuple[list[Lane], bool] | None] = {}  # chunks, and futures of those who wait behind them
        self._trials: dict[Lane, tuple[Trial, int]] = {}  # of the lanes that are put off
        self._loop = asyncio.get_running_loop()
        self._call: _Call | None = None
        self._idle: asyncio.Future[None] | None = None
        self._fault: RequestError | None = None
        self._progress = False
        self._away: Trial | None = None  # since the last stream was lost, for the log
        self._task = self._loop.create_task(self._run())

    def wake(self) -> None:
        """Lets the writer know of new wishes."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    # Chunks

    @property
    def full(self) -> bool:
        """Whether chunks have to wait in line."""
        return bool(self._line) or self.lanes.held >= self._replay_bytes

    def step(self, lanes: list[Lane], chunk: Chunk, together: bool) -> None:
        """Sends a chunk on one lane, or on several together; the answer goes to its ticket."""
        if self._line or self.lanes.held >= self._replay_bytes:
            self._line[chunk] = lanes, together
            return
        if together:
            self.lanes.step_all(lanes, chunk)
        else:
            self.lanes.step(lanes[0], chunk)
        self.wake()

    def withdraw(self, chunk: Chunk) -> bool:
        """Takes back a chunk that waits in line. False: it does not, and keeps its place in its session."""
        return self._line.pop(chunk, self) is not self

    async def admitted(self) -> None:
        """Waits until nothing that was asked for before waits in line."""
        if self._line:
            ticket = self._loop.create_future()
            self._line[ticket] = None
            await ticket

    async def settled(self, lane: Lane) -> None:
        """Waits until every chunk sent on the lane so far is answered."""
        ticket: asyncio.Future[None] = self._loop.create_future()
        if self.lanes.barrier(lane, ticket):
            self.wake()
            await ticket

    def _admit(self) -> None:
        while self._line and self.lanes.held < self._replay_bytes:
            waiting = next(iter(self._line))
            entry = self._line.pop(waiting)
            if entry is None:
                deliver(waiting, None)
            elif not waiting.ticket.done():
                lanes, together = entry
                if together:
                    self.lanes.step_all(lanes, waiting)
                else:
                    self.lanes.step(lanes[0], waiting)

    # Lanes

    async def open(self, target: session_pb2.SessionConfig | str) -> tuple[Lane, session_pb2.Session]:
        """Opens a lane for a new session, or for a live one by its id."""
        ticket: asyncio.Future[session_pb2.Session] = self._loop.create_future()
        lane = self.lanes.open(target, ticket)
        self.wake()
        try:
            return lane, await asyncio.shield(ticket)
        except asyncio.CancelledError:
            if not self.lanes.withdraw(lane):
                # The server may open it yet, and nobody would ever close it.
                ticket.add_done_callback(lambda late: self._give_back(lane, late, not isinstance(target, str)))
            raise

    async def close_lane(self, lane: Lane, delete_session: bool) -> None:
        """Closes a lane behind its chunks, and ends its session too if asked."""
        if self.closed:
            raise ClientClosed("the client is closed")
        ticket: asyncio.Future[None] = self._loop.create_future()
        if self.lanes.close(lane, delete_session, ticket):
            self.wake()
            await ticket

    def forget(self, lane: Lane, delete_session: bool) -> None:
        """Closes a lane without waiting to hear of it."""
        if not lane.closing and not self.closed:
            self.lanes.close(lane, delete_session, None)
            self.wake()

    def _give_back(self, lane: Lane, ticket: asyncio.Future[session_pb2.Session], delete_session: bool) -> None:
        if not ticket.cancelled() and ticket.exception() is None:
            self.forget(lane, delete_session)

    def _put_off(self) -> None:
        """Tries the lanes that the server will not open now again in a while, each until its own limit."""
        for lane, cause in self.lanes.put_off:
            at = lane.pending[0].first_step if lane.pending else -1
            trial, stuck_at = self._trials.get(lane, (None, 0))
            if trial is None or stuck_at != at:
                trial = self._retry.begin()
            self._trials[lane] = trial, at
            delay = trial.next(cause.retry_after)
            if delay is None:
                del self._trials[lane]
                self._answer(self.lanes.refuse(lane, cause))
            else:
                self._loop.call_later(delay, self._open_again, lane)
        self.lanes.put_off.clear()

    def _open_again(self, lane: Lane) -> None:
        if not self.closed:
            self.lanes.open_again(lane)
            self.wake()

    def _notify(self) -> None:
        """Tells whoever wants to know what the server told."""
        notices, self.lanes.notices = self.lanes.notices, []
        _notices.log(self._target, notices)
        if self._on_notice is not None:
            for notice in notices:
                self._on_notice(notice)

    # Streams

    async def close(self) -> None:
        """Sends what is still to be sent, and ends the stream; what is then unanswered fails with ClientClosed."""
        self.closed = True
        self.wake()
        if self._call is not None and self.trouble is None:
            await asyncio.wait([self._task], timeout=_PARTING)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._tell_all(lambda: ClientClosed("the client was closed before the answer came"), keep=False)

    async def _run(self) -> None:
        trial: Trial | None = None
        gave_up = False
        while True:
            if gave_up or not self.lanes.wishes:
                self._idle = self._loop.create_future()
                await self._idle
            if self.closed:
                return
            failure = await self._converse(trial)
            if self.closed:
                return
            self._answer(self.lanes.lost())
            if trial is None or self._progress:
                trial = self._retry.begin()
            delay = trial.next(failure.retry_after) if isinstance(failure, Unavailable) else None
            gave_up = delay is None
            if delay is None:
                self._give_up(failure, trial)
                trial = None
                continue
            if self._away is None:
                self._away = trial
                chunks, lanes = self.lanes.unanswered
                LOG.warning("no stream to %s: %s; %d chunks of %d sessions wait", self._target, failure, chunks, lanes)
            if self.lanes.wishes:
                self.trouble = failure.message
            else:
                trial = None  # nobody waits: time that passes is no time of trying
            await self._retry.sleep(delay)

    async def _converse(self, trial: Trial | None) -> RequestError:
        """One stream, from its start to its end, and why it ended. After a loss, it must be heard before the limit."""
        self._call = call = self._start()
        self._progress = heard = False
        self._fault = None
        limit = None
        if trial is not None and trial.left is not None:
            limit = self._loop.call_later(trial.left, self._break, call, Unavailable("the server does not answer"))
        writer = self._loop.create_task(self._write(call))
        try:
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    return from_lost_stream(None)
                if not heard:
                    heard = True
                    self._hear()
                    if limit is not None:
                        limit.cancel()
                answers = self.lanes.receive(cast("inference_pb2.StreamResponse", response))
                for ticket, value, error in answers:
                    deliver(ticket, value, error)
                if answers:
                    self._progress = True
                if self.lanes.broken is not None:
                    return self.lanes.broken
                if self.lanes.put_off:
                    self._put_off()
                if self.lanes.notices:
                    self._notify()
                if self._line:
                    self._admit()
                self.wake()  # answers make room for wishes that were held back
        except grpc.RpcError as error:
            return from_lost_stream(error)
        except (ProtocolViolation, TensorError, ValueError) as error:
            return ServerError(f"the server's answer breaks the contract: {error}")
        except asyncio.CancelledError:
            if self._fault is not None:
                return self._fault
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return Unavailable("the stream was cancelled", status=grpc.StatusCode.CANCELLED)
        finally:
            self._call = None
            if limit is not None:
                limit.cancel()
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: _Call) -> None:
        try:
            while True:
                request = self.lanes.flush()
                if request is not None:
                    await call.write(request)
                elif self.closed:
                    await call.done_writing()
                    return
                else:
                    self._idle = self._loop.create_future()
                    await self._idle
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the stream has ended; the reader hears why
        except Exception as error:  # a chunk that cannot be written is a fault of ours, and must not hang its caller
            self._break(call, ServerError(f"the stream could not be written: {error!r}"))

    def _break(self, call: _Call, fault: RequestError) -> None:
        self._fault = fault
        call.cancel()

    def _hear(self) -> None:
        """The first message of a stream: there is a server."""
        self.trouble = None
        if self._away is not None:
            away, self._away = self._away, None
            numbers = (away.seconds, *self.lanes.unanswered)
            LOG.info("a stream to %s again after %.2f s: sending %d chunks of %d sessions", self._target, *numbers)

    def _give_up(self, failure: RequestError, trial: Trial) -> None:
        self.trouble = self._away = None
        keep = isinstance(failure, Unavailable) and self._retry.limit != 0
        if keep:
            chunks, lanes = self.lanes.unanswered
            message = f"no stream to {self._target} for {trial.seconds:.1f} s, after {trial.tries} tries: {failure}"
            LOG.error("%s; %d chunks of %d sessions are not answered", message, chunks, lanes)
            told = (
                f"{message}; a chunk that was sent keeps its place and is applied once, before any that is sent later"
            )

            def error() -> RnnserveError:
                return Unavailable(told, status=failure.status, reason=failure.reason, retry_after=failure.retry_after)

            self._tell_all(error, keep=True)
        else:
            self._tell_all(lambda: copy.copy(failure), keep=False)

    def _tell_all(self, error: Callable[[], RnnserveError], *, keep: bool) -> None:
        for ticket in self.lanes.give_up(keep=keep):  # each its own exception, whose traceback is its own
            deliver(ticket, None, error())
        line, self._line = self._line, {}
        for waiting in line:
            deliver(waiting.ticket if isinstance(waiting, Chunk) else waiting, None, error())

    def _answer(self, answers: Iterable[Answer]) -> None:
        for ticket, value, error in answers:
            deliver(ticket, value, error)
        if self._line:
            self._admit()
