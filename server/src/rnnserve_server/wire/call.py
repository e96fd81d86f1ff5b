"""One call, as `grpc.aio` shows it to whoever answers it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, NoReturn

import grpc
from grpc._cython import cygrpc

from rnnserve_server.wire.bell import silence

_FOREVER = 1e11  # seconds since the epoch; gRPC tells that there is no deadline by one that is far off

Parse = Callable[[bytes], Any]
Metadata = tuple[tuple[str, str | bytes], ...]


class Gone(grpc.aio.InternalError):
    """The client is not there any more."""


class Call(grpc.aio.ServicerContext[Any, Any]):
    """See `grpc.aio.ServicerContext`.

    Args:
        event: the event of a call that has come in.
        loop: the loop that tells what completes.

    Attributes:
        method: its full name, such as ``/rnnserve.v1.SessionService/GetSession``.
        parse: what makes a message of bytes; None: they stay what they are.
        pack: what makes bytes of a message, likewise.
        on_cancelled: called when the client has gone before the call had ended.
        take: what each message is shown to, as bytes, when somebody waits to read it: whether it has dealt with it, so
            that it need not be read. It must not raise. It saves a future, and a turn of a task, for each message.
    """

    def __init__(self, event: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.method: str = event.call_details.method.decode()
        self.parse: Parse | None = None
        self.pack: Callable[[Any], bytes] | None = None
        self.on_cancelled: Callable[[], object] | None = None
        self.take: Callable[[bytes], bool] | None = None
        self._call = event.call
        self._deadline: float = event.call_details.deadline
        self._metadata: Metadata = event.invocation_metadata
        self._loop = loop
        self._greeted = False  # the initial metadata were sent
        self._over = False  # the status was sent
        self._cancelled = False
        self._code: grpc.StatusCode | int | None = None
        self._details = ""
        self._trailing: Metadata = ()
        self._reader: asyncio.Future[Any] | None = None
        self._reading = False
        self._kept: deque[bytes | None] = deque()  # messages that nobody waited for any more when they came
        self._callbacks: list[Callable[[Any], object]] = []
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._closed)

    # Messages

    def read(self) -> Any:
        """A future of the next message, or of `grpc.aio.EOF`; it raises what `parse` does."""
        reader = self._reader = self._loop.create_future()
        if self._kept:
            self._give(self._kept.popleft())
        elif not self._reading:
            self._reading = True
            self._call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), self._received)
        return reader

    def _received(self, event: Any) -> None:
        content: bytes | None = event.batch_operations[0].message()
        reader, take = self._reader, self.take
        if take is not None and content is not None and reader is not None and not reader.done() and take(content):
            self._call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), self._received)
            return
        self._reading = False
        self._give(content)

    def _give(self, content: bytes | None) -> None:
        reader = self._reader
        if reader is None or reader.done():
            self._kept.append(content)
            return
        if content is None:
            reader.set_result(grpc.aio.EOF)
            return
        try:
            reader.set_result(content if self.parse is None else self.parse(content))
        except Exception as error:  # it is no message: whoever reads is told
            reader.set_exception(error)

    def write(self, message: Any) -> Any:
        """Sends a message, one after the other: a future that raises `Gone` if the client has."""
        sent = self._loop.create_future()

        def told(error: Exception | None) -> None:
            if sent.done():
                return
            if error is None:
                sent.set_result(None)
            else:
                sent.set_exception(error)

        self.send(message, told)
        return sent

    def send(self, message: Any, told: Callable[[Exception | None], None]) -> None:
        """As `write`, without a future: has a function called when the message was sent, or with why it was not."""

        def completed(event: Any) -> None:
            told(None if event.success else Gone("the client has gone"))

        operation = cygrpc.SendMessageOperation(message if self.pack is None else self.pack(message), 0)
        self._start((operation,) if self._greeted else (*self._greeting(), operation), completed)

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Sends the metadata that come before the first message."""
        self._start(self._greeting(tuple(initial_metadata)), silence)

    def _greeting(self, metadata: Metadata = ()) -> tuple[Any, ...]:
        if self._greeted:
            return ()
        self._greeted = True
        return (cygrpc.SendInitialMetadataOperation(tuple(metadata), 0),)

    def _start(self, operations: tuple[Any, ...], told: Callable[[Any], None]) -> None:
        if self._cancelled:
            raise Gone("the client has gone")
        if self._over:
            raise grpc.aio.UsageError(f"{self.method}: expected nothing after the end of a call")
        self._call.start_server_batch(operations, told)

    def requests(self) -> AsyncIterator[Any]:
        """The messages, one after the other."""
        return _Requests(self)

    # The end

    def end(self, *messages: bytes) -> None:
        """Ends the call, as `set_code` and `set_details` say, after what may be its last message."""
        code = grpc.StatusCode.OK if self._code is None else self._code
        status = cygrpc.SendStatusFromServerOperation(
            tuple(self._trailing), code if isinstance(code, int) else code.value[0], self._details.encode(), 0
        )
        sent = [cygrpc.SendMessageOperation(each, 0) for each in messages]
        self._start((*self._greeting(), *sent, status), silence)
        self._over = True

    def refuse(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call with an error, if it has not ended yet."""
        if not self.done():
            self._code, self._details = code, details
            self.end()

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call with an error, and raises `grpc.aio.AbortError`."""
        if code in (grpc.StatusCode.OK, 0):
            raise grpc.aio.UsageError("abort: expected an error, got OK")
        self._code, self._details, self._trailing = code, details, trailing_metadata or self._trailing
        if not self.done():
            self.end()
        raise grpc.aio.AbortError("the call was ended with an error")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """As `abort`."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    def _closed(self, event: Any) -> None:
        self._cancelled = event.batch_operations[0].cancelled()
        if self._cancelled and not self._over and self.on_cancelled is not None:
            self.on_cancelled()
        self._over = True
        self.on_cancelled = None
        for callback in self._callbacks:
            callback(self)

    # What is known of it

    def cancelled(self) -> bool:
        """Whether the client has gone before the call had ended."""
        return self._cancelled

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._over

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Has a function called with this when the call has ended."""
        self._callbacks.append(callback)

    def invocation_metadata(self) -> Any:
        """The client's metadata."""
        return self._metadata

    def time_remaining(self) -> Any:
        """Seconds until the deadline, or None."""
        return None if self._deadline > _FOREVER else max(self._deadline - time.time(), 0.0)

    def peer(self) -> str:
        """The address of the client's end of the connection."""
        peer: str | bytes = self._call.peer()
        return peer if isinstance(peer, str) else peer.decode()

    def peer_identities(self) -> Iterable[bytes] | None:
        """What the client's certificate says of who it is."""
        found: Iterable[bytes] | None = cygrpc.peer_identities(self._call)
        return found

    def peer_identity_key(self) -> str | None:
        """What kind of thing `peer_identities` are."""
        key: bytes | None = cygrpc.peer_identity_key(self._call)
        return None if key is None else key.decode()

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What is known of the connection's other end."""
        return {key.decode(): value for key, value in cygrpc.auth_context(self._call).items()}

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """The metadata that go with the status."""
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> Any:
        """See `set_trailing_metadata`."""
        return self._trailing

    def set_code(self, code: Any) -> None:
        """The status of the end."""
        self._code = code

    def code(self) -> Any:
        """See `set_code`."""
        return self._code

    def set_details(self, details: str) -> None:
        """The text of the status."""
        self._details = details

    def details(self) -> str:
        """See `set_details`."""
        return self._details

    def set_compression(self, compression: Any) -> None:
        """Raises NotImplementedError: floats gain little."""
        raise NotImplementedError("answers are not compressed")

    def disable_next_message_compression(self) -> None:
        """Does nothing: answers are not compressed."""


class _Requests:
    """The messages of a call."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = await self._call.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return message
