"""A gRPC server on a `CompletionLoop`, of the shape of `grpc.aio`'s."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import grpc
import structlog
from grpc._cython import cygrpc

from rnnserve_server.ending import end
from rnnserve_server.wire.call import Call, Gone, Metadata
from rnnserve_server.wire.loop import CompletionLoop

log = structlog.get_logger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Find: TypeAlias = Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"]


@dataclass(frozen=True, slots=True)
class _Details(grpc.HandlerCallDetails):
    """What an interceptor is told of a call."""

    method: str
    invocation_metadata: Metadata


class CompletionServer(grpc.aio.Server):
    """See `grpc.aio.Server`. To be made, and used, on the thread of its loop.

    Args:
        loop: its event loop.
        interceptors: what every call goes through, the first of them first.
        options: gRPC's.
    """

    def __init__(
        self,
        loop: CompletionLoop,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._loop = loop
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._find: Find = self._named
        for interceptor in reversed(interceptors):
            self._find = partial(interceptor.intercept_service, self._find)
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(loop.queue)
        self._tasks: dict[asyncio.Task[None], Call] = {}
        self._started = False
        self._stopped: asyncio.Future[None] | None = None

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """See `grpc.aio.Server`."""
        self._handlers.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Does nothing: methods are found by their names."""

    def add_insecure_port(self, address: str) -> int:
        """See `grpc.aio.Server`. Raises RuntimeError if it cannot be listened on."""
        return _bound(address, self._server.add_http2_port(address.encode()))

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """See `grpc.aio.Server`. Raises RuntimeError if it cannot be listened on."""
        credentials = server_credentials._credentials
        return _bound(address, self._server.add_http2_port(address.encode(), credentials))

    async def start(self) -> None:
        """Takes calls."""
        self._started = True
        self._server.start()
        self._take_next()

    async def stop(self, grace: float | None) -> None:
        """Takes no new calls, gives those that run so many seconds to end, and cancels the others."""
        if self._stopped is None:
            self._stopped = self._loop.create_future()
            if not self._started:
                self._server.start()  # what never started cannot be shut down
            self._server.shutdown(self._loop.queue, self._was_shut_down)
        if grace:
            await asyncio.wait([self._stopped], timeout=grace)
        if not self._stopped.done():
            self._server.cancel_all_calls()
        await asyncio.shield(self._stopped)
        await end(self._tasks, told=True)  # their calls are over

    async def wait_for_termination(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Not of use here: whoever serves waits for a signal."""
        raise NotImplementedError

    def _was_shut_down(self, event: object) -> None:
        self._server.destroy()
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    # Calls

    def _take_next(self) -> None:
        self._server.request_call(self._loop.queue, self._loop.queue, self._came)

    def _came(self, event: Any) -> None:
        if self._stopped is None:
            self._take_next()
        if not event.success or event.call is None:
            return  # the server is shutting down
        call = Call(event, self._loop)
        task = self._loop.create_task(self._serve(call))
        self._tasks[task] = call
        call.on_cancelled = task.cancel
        task.add_done_callback(self._tasks.pop)

    async def _named(self, details: grpc.HandlerCallDetails) -> Handler | None:
        for handlers in self._handlers:
            if (handler := handlers.service(details)) is not None:
                return handler
        return None

    async def _serve(self, call: Call) -> None:
        try:
            handler = await self._find(_Details(call.method, call.invocation_metadata()))
            if handler is None:
                call.refuse(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
                return
            call.parse, call.pack = handler.request_deserializer, handler.response_serializer
            await _answer(handler, call)
        except grpc.aio.AbortError:
            call.refuse(grpc.StatusCode.UNKNOWN, "")
        except asyncio.CancelledError:
            call.refuse(grpc.StatusCode.CANCELLED, "the server is shutting down")
        except Gone:
            pass
        except Exception as error:  # the boundary: nobody else is left to tell it to
            log.exception("call failed", method=call.method)
            call.refuse(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")


async def _answer(handler: Handler, call: Call) -> None:
    """Has a method answer, and ends the call."""
    request: Any = call.requests()
    if not handler.request_streaming:
        request = await call.read()
        if request is grpc.aio.EOF:
            call.refuse(grpc.StatusCode.UNIMPLEMENTED, "expected a message, got none")
            return
    method: Any = next(
        each
        for each in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        if each is not None
    )
    if inspect.isasyncgenfunction(method):
        async for response in method(request, call):
            await call.write(response)
    else:
        response = await method(request, call)
        if not handler.response_streaming and not call.done():
            failed = call.code() not in (None, 0, grpc.StatusCode.OK)
            call.end(*([] if failed else [response if call.pack is None else call.pack(response)]))
    if not call.done():
        call.end()


def _bound(address: str, port: int) -> int:
    if not port:
        raise RuntimeError(f"Failed to bind to address {address}")
    return port
