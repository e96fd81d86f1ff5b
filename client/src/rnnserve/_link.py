"""One bidirectional stream under asyncio: a task that writes, a task that reads, and `Lanes` between them."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from rnnserve._chunks import Chunk, Lane
from rnnserve._lanes import Lanes, ProtocolViolation
from rnnserve.codec import TensorError
from rnnserve.errors import ClientClosed, RnnserveError, ServerError, from_lost_stream
from rnnserve.v1 import inference_pb2, session_pb2

_Call: TypeAlias = grpc.aio.StreamStreamCall[inference_pb2.StreamRequest, inference_pb2.StreamResponse]

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
    """A stream, from its start to its loss. It is never restarted: a new one takes its place.

    Wishes are made on `lanes`, followed by `wake`. The writer is woken through the event loop's queue, behind every
    task that is ready now, so what all of them wish leaves in one message; what is wished while that message is being
    written leaves in the next.
    """

    def __init__(self, start: Callable[[], _Call]) -> None:
        self.lanes = Lanes()
        self.alive = True
        self._loop = asyncio.get_running_loop()
        self._call = start()
        self._idle: asyncio.Future[None] | None = None
        self._closing = False
        self._reader = self._loop.create_task(self._read())
        self._writer = self._loop.create_task(self._write())

    def wake(self) -> None:
        """Lets the writer know of new wishes."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def step(self, lanes: list[Lane], chunk: Chunk, together: bool) -> None:
        """Sends a chunk on one lane, or on several together; the answer goes to its ticket."""
        if together:
            self.lanes.step_all(lanes, chunk)
        else:
            self.lanes.step(lanes[0], chunk)
        self.wake()

    async def open(self, target: session_pb2.SessionConfig | str) -> tuple[Lane, session_pb2.Session]:
        """Opens a lane for a new session, or for a live one by its id."""
        ticket: asyncio.Future[session_pb2.Session] = self._loop.create_future()
        lane = self.lanes.open(target, ticket)
        self.wake()
        try:
            return lane, await asyncio.shield(ticket)
        except asyncio.CancelledError:
            # The server may open it yet, and nobody would ever close it.
            ticket.add_done_callback(lambda late: self._give_back(lane, late, not isinstance(target, str)))
            raise

    async def close_lane(self, lane: Lane, delete_session: bool) -> None:
        """Closes a lane behind its chunks, and ends its session too if asked."""
        ticket: asyncio.Future[None] = self._loop.create_future()
        self.lanes.close(lane, delete_session, ticket)
        self.wake()
        await ticket

    def forget(self, lane: Lane, delete_session: bool) -> None:
        """Closes a lane without waiting to hear of it."""
        if lane.open:
            ticket = self._loop.create_future()
            ticket.cancel()
            self.lanes.close(lane, delete_session, ticket)
            self.wake()

    async def settled(self, lane: Lane) -> None:
        """Waits until every chunk sent on the lane so far is answered."""
        ticket: asyncio.Future[None] = self._loop.create_future()
        if self.lanes.barrier(lane, ticket):
            await ticket

    async def close(self) -> None:
        """Sends what is still to be sent, and ends the stream; what is then unanswered fails with ClientClosed."""
        self._closing = True
        self.wake()
        await asyncio.wait([self._reader], timeout=_PARTING)
        self._lose(ClientClosed)
        self._call.cancel()
        await asyncio.gather(self._reader, self._writer, return_exceptions=True)

    def _give_back(self, lane: Lane, ticket: asyncio.Future[session_pb2.Session], delete_session: bool) -> None:
        if not ticket.cancelled() and ticket.exception() is None:
            self.forget(lane, delete_session)

    async def _write(self) -> None:
        try:
            while self.alive:
                request = self.lanes.flush()
                if request is not None:
                    await self._call.write(request)
                elif self._closing:
                    await self._call.done_writing()
                    return
                else:
                    self._idle = self._loop.create_future()
                    await self._idle
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the stream has ended; the reader hears why
        except Exception as error:  # a chunk that cannot be written is a fault of ours, and must not hang its caller
            cause = error
            self._lose(lambda: ServerError(f"the stream could not be written: {cause!r}"))
            self._call.cancel()

    async def _read(self) -> None:
        failure: grpc.RpcError | None = None
        try:
            while True:
                response = await self._call.read()
                if response is grpc.aio.EOF:
                    break
                for ticket, value, error in self.lanes.receive(cast("inference_pb2.StreamResponse", response)):
                    deliver(ticket, value, error)
                self.wake()  # answers make room for wishes that were held back
        except grpc.RpcError as error:
            failure = error
        except (ProtocolViolation, TensorError, ValueError) as error:
            message = f"the server's answer breaks the contract: {error}"
            self._lose(lambda: ServerError(message))
            self._call.cancel()
        finally:
            self._lose(lambda: from_lost_stream(failure))

    def _lose(self, error: Callable[[], RnnserveError]) -> None:
        if not self.alive:
            return
        self.alive = False
        for ticket in self.lanes.lost():  # each its own exception, whose traceback is its own
            closed = ClientClosed("the client was closed before the answer came") if self._closing else None
            deliver(ticket, None, closed or error())
        self.wake()
