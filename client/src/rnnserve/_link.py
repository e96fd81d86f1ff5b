"""The way to the server under asyncio: one bidirectional stream after another, with `Lanes` that outlive them."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias, cast

import grpc
import grpc.aio

from rnnserve import _notices
from rnnserve._chunks import Answer, Lane
from rnnserve._lanes import Account, Lanes, ProtocolViolation
from rnnserve._notices import OnNotice
from rnnserve._retry import Retry, Trial
from rnnserve._tickets import deliver, deliver_all
from rnnserve.codec import TensorError
from rnnserve.errors import ClientClosed, RequestError, RnnserveError, ServerError, Unavailable, from_lost_stream
from rnnserve.v1 import inference_pb2, session_pb2

_Call: TypeAlias = grpc.aio.StreamStreamCall[inference_pb2.StreamRequest, inference_pb2.StreamResponse]

#: Says when the stream is lost, when it is back and when nobody tries any longer.
LOG = logging.getLogger("rnnserve")

#: Seconds that a closing client waits for the server to end the stream in good order.
_PARTING = 2.0


class Host(Protocol):
    """Who has the links."""

    def admit(self) -> None:
        """Answers have come: there may be room for what waits in line."""

    def tell(self, link: Link, error: Callable[[], RnnserveError]) -> None:
        """Whoever waits in line for a link is told that it gave up."""

    async def move(self, link: Link, failure: RequestError) -> bool:
        """A link has lost its stream, or has none: whether all its lanes have gone to other links."""

    def heard(self, link: Link) -> None:
        """There is a server at the other end."""

    def leave(self, link: Link) -> None:
        """The server at the other end shuts down, and still answers."""


class _Timing:
    """An event loop's alarms, with a clock that does not stand still during a turn, or count in milliseconds."""

    time = staticmethod(time.monotonic)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.call_later = loop.call_later


class Link:
    """The streams to one server, or by one way, one at a time, from the first wish until `close`.

    Wishes are made on `lanes`, followed by `wake`. The writer is woken through the event loop's queue, behind every
    task that is ready now, so what all of them wish leaves in one message; what is wished while that message is being
    written leaves in the next.

    When a stream is lost, the host may have other links for the lanes. If not, `Retry` says when the next one starts;
    it sends again what was not answered. When it says to give up, those who wait are told so, and the next wish starts
    anew. Chunks that were wished keep their places all the while, unless `retry` has a limit of 0: then they are
    dropped with the stream.

    `on_notice` is given every notice of the server, and must return at once.

    Attributes:
        lanes: what is wished.
        key: the id of the first session that was wished here, by which proxies route its streams; or "".
        closed: it was closed for good.
        trouble: why there is no stream now although there should be; None while there is one, or none is needed.
        served: whether the last stream was heard of.
        heard_at: when the stream began or was heard of last, by the clock of `retry`.
        silent: the last stream was given up because nothing was heard of it.
    """

    def __init__(
        self,
        target: str,
        start: Callable[[Link], _Call],
        retry: Retry,
        host: Host,
        account: Account | None = None,
        on_notice: OnNotice | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.lanes = Lanes(resume=retry.limit != 0, account=account, timing=_Timing(self._loop))
        self.lanes.woken = self.wake
        self.key = ""
        self.closed = False
        self.trouble: str | None = None
        self.served = self.silent = False
        self.heard_at = retry.clock()
        self._target = target
        self._start = start
        self._retry = retry
        self._host = host
        self._on_notice = on_notice
        self._trials: dict[Lane, tuple[Trial, int]] = {}  # of the lanes that are put off
        self._call: _Call | None = None
        self._idle: asyncio.Future[None] | None = None
        self._fault: RequestError | None = None
        self._progress = False
        self._away: Trial | None = None  # since the last stream was lost, for the log
        self._task = self._loop.create_task(self._run())

    @property
    def live(self) -> bool:
        """Whether there is a stream."""
        return self._call is not None

    def wake(self) -> None:
        """Lets the writer know of new wishes."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    # Lanes

    async def open(self, target: session_pb2.SessionConfig | str) -> tuple[Lane, session_pb2.Session]:
        """Opens a lane for a new session, or for a live one by its id."""
        ticket: asyncio.Future[session_pb2.Session] = self._loop.create_future()
        self.key = self.key or (target if isinstance(target, str) else target.session_id)
        lane = self.lanes.open(target, ticket)
        self.wake()
        try:
            return lane, await asyncio.shield(ticket)
        except asyncio.CancelledError:
            if not lane.holder.withdraw(lane):
                # The server may open it yet, and nobody would ever close it.
                ticket.add_done_callback(lambda late: _give_back(lane, late, not isinstance(target, str)))
            raise

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
        if self._retry.limit != 0 and any(notice.reason == "draining" and not notice.ended for notice in notices):
            self._host.leave(self)
        _notices.log(self._target, notices)
        if self._on_notice is not None:
            for notice in notices:
                self._on_notice(notice)

    # Streams

    async def close(self) -> None:
        """Sends what is still to be sent, and ends the stream; what is then unanswered fails with ClientClosed."""
        self.closed = True
        self.lanes.hurry()
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
            self._answer(self.lanes.lost())
            if self.closed:
                return
            self.lanes.account.collect()  # nothing is under way that would let them in
            if self._retry.limit != 0 and await self._move(failure):
                trial, gave_up = None, False
                continue
            if trial is None or self._progress:
                trial = self._retry.begin()
            delay = trial.next(failure.retry_after) if isinstance(failure, Unavailable) else None
            if delay and self.served and failure.reason == "DRAINING" and not failure.retry_after:
                delay = 0.0  # in good order: somebody else is there, if there is a proxy
            gave_up = delay is None
            if delay is None:
                self._give_up(failure, trial)
                trial = None
                await self._move(failure)
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

    async def _move(self, failure: RequestError) -> bool:
        """Whether the lanes have gone elsewhere."""
        if not isinstance(failure, Unavailable) or not await self._host.move(self, failure):
            return False
        self.trouble = self._away = None
        self._trials.clear()
        return True

    async def _converse(self, trial: Trial | None) -> RequestError:
        """One stream, from its start to its end, and why it ended. After a loss, it must be heard before the limit."""
        self._call = call = self._start(self)
        self._progress = self.served = self.silent = False
        self.heard_at = self._retry.clock()
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
                self.heard_at = self._retry.clock()
                if not self.served:
                    self.served = True
                    self._hear()
                    if limit is not None:
                        limit.cancel()
                answers = self.lanes.receive(cast("inference_pb2.StreamResponse", response))
                deliver_all(answers)
                if later := self.lanes.take_later():
                    # Behind the tasks that were just set free, whose steps then leave while these make theirs.
                    self._loop.call_soon(deliver_all, later)
                if answers:
                    self._progress = True
                if self.lanes.broken is not None:
                    return self.lanes.broken
                if self.lanes.put_off:
                    self._put_off()
                if self.lanes.notices:
                    self._notify()
                self._host.admit()
                self.lanes.settle()
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

    def silence(self, message: str) -> None:
        """Gives up the stream, if there is one, because nothing is heard of it."""
        if self._call is not None:
            self.silent = True
            self._break(self._call, Unavailable(message))

    def _break(self, call: _Call, fault: RequestError) -> None:
        self._fault = fault
        call.cancel()

    def _hear(self) -> None:
        """The first message of a stream: there is a server."""
        self.trouble = None
        self._host.heard(self)
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
        self._host.tell(self, error)

    def _answer(self, answers: Iterable[Answer]) -> None:
        deliver_all(answers)
        self._host.admit()


def forget(lane: Lane, delete_session: bool) -> None:
    """Closes a lane without waiting to hear of it."""
    if not lane.closing:
        lane.holder.close(lane, delete_session, None)
        lane.holder.woken()


def _give_back(lane: Lane, ticket: asyncio.Future[session_pb2.Session], delete_session: bool) -> None:
    if not ticket.cancelled() and ticket.exception() is None:
        forget(lane, delete_session)
