"""The guard at the door: every call is let in before anything of it is read, or is not."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from rnnserve_server.access.access import Access, open_to_all
from rnnserve_server.access.authenticators import Shown
from rnnserve_server.access.caller import Caller, set_caller
from rnnserve_server.api.errors import abort
from rnnserve_server.errors import InvalidRequest, ServiceError, TooLarge, Unauthenticated

log = structlog.get_logger(__name__)

_ENTRY_BYTES = 32  # that HTTP/2 counts for each key beside itself and its value

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):
    """Asks `Access` about every call, and has the call's task know who makes it.

    Every method is served as one of streams, because of such a one gRPC reads nothing until it is asked to: whoever is
    not let in cannot have the server read or parse a message. On the wire there is no difference.

    Streams live long, so those that are open are held against the principals again whenever `recheck` is called.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._open: dict[asyncio.Future[None], tuple[Caller, Shown]] = {}
        self._refused = 0
        self._last: dict[str, str] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or open_to_all(method):
            return handler

        async def guarded(requests: Any, context: Context) -> None:
            try:
                metadata = tuple(context.invocation_metadata() or ())
                shown = self._access.shown(metadata, context.auth_context() or {})
                who = self._access.enter(method, shown)
            except ServiceError as error:
                self._refused += 1
                self._last = {"method": method, "peer": context.peer(), "error": str(error)}
                await abort(context, error)
                return
            set_caller(who)
            structlog.contextvars.bind_contextvars(principal=who.name)  # for every line that this call logs
            if handler.request_streaming:
                await self._while_let_in(_answer(handler, requests, context), context, who, shown)
            else:
                await _answer(handler, requests, context)

        return grpc.stream_stream_rpc_method_handler(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def recheck(self) -> None:
        """Ends the streams of callers who would not be let in any more, or have other roles now. Logs how many calls
        were refused since the last time, in one line: whoever makes them must not fill the log.
        """
        if self._refused:
            log.warning("calls were not let in", count=self._refused, last=self._last)
            self._refused = 0
        for ended, (who, shown) in list(self._open.items()):
            if not ended.done() and not self._access.still(who, shown):
                log.info("not let in any more", principal=who.name)
                ended.set_result(None)

    async def _while_let_in(self, answer: Awaitable[None], context: Context, who: Caller, shown: Shown) -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        work = asyncio.ensure_future(answer)
        self._open[ended] = who, shown
        try:
            await asyncio.wait([work, ended], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                await abort(context, Unauthenticated("the principals have changed: the stream has to be opened anew"))
            await work
        finally:
            del self._open[ended]
            work.cancel()


class Sieve(grpc.aio.ServerInterceptor):
    """Refuses what is no call: metadata that is too large, and messages that are none.

    gRPC refuses the former too, but counts each frame of a call's headers for itself; all of them may be 1024 times as
    large. Of the latter it says UNKNOWN.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See grpc.aio.ServerInterceptor."""
        metadata = handler_call_details.invocation_metadata or ()
        size = sum([len(key) + len(value) + _ENTRY_BYTES for key, value in metadata])
        if size > self._most:

            async def refuse(requests: Any, context: Context) -> None:
                await abort(context, TooLarge("metadata", self._most, size))

            return grpc.stream_stream_rpc_method_handler(refuse)
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = handler_call_details.method
        if method not in self._handlers:
            self._handlers[method] = _parsing(handler)
        return self._handlers[method]


def _parsing(handler: Handler) -> Handler:
    """A method that is asked with one message and says what is wrong with one that cannot be parsed."""
    method: Any = handler.unary_unary

    def parse(content: bytes) -> Any:
        try:
            return handler.request_deserializer(content) if handler.request_deserializer else content
        except DecodeError as error:
            return error

    async def answer(request: Any, context: Context) -> Any:
        if isinstance(request, DecodeError):
            await abort(context, request)
        return await method(request, context)

    return grpc.unary_unary_rpc_method_handler(answer, parse, handler.response_serializer)


async def _answer(handler: Handler, requests: Any, context: Context) -> None:
    """Has a method of any kind answer as one of streams."""
    method: Any = next(
        each
        for each in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        if each is not None
    )
    request = requests
    if not handler.request_streaming:
        try:
            request = await context.read()
        except DecodeError as error:
            await abort(context, error)
        if request is grpc.aio.EOF:
            await abort(context, InvalidRequest("message", "one", "none"))
    if inspect.isasyncgenfunction(method):
        async for response in method(request, context):
            await context.write(response)
        return
    response = method(request, context)
    if inspect.isawaitable(response):  # gRPC's own services are not all of asyncio
        response = await response
    if not handler.response_streaming:
        await context.write(response)
