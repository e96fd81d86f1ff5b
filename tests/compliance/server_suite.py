"""What every gRPC server that ours may run on promises to those who answer and to those who call.

Inherit `ServerSuite`, say which event loop, and pytest holds the server to the behaviour of `grpc.aio.Server`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal

import grpc
import pytest

from rnnserve_server.server import grpc_server
from rnnserve_server.wire.loop import new_event_loop

SECONDS = 20.0


class Echo:
    """A service with a method of each kind. Messages are bytes.

    Attributes:
        cancelled: set when a handler was cancelled.
        running: set when `Hang` runs.
        release: what `Hang` waits for.
        ended: what ended `Flood`.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.running = threading.Event()
        self.release = asyncio.Event()
        self.ended: BaseException | None = None

    async def Unary(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("seen", "yes"),))
        return b"<" + request + b">"

    async def Count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield str(number).encode()

    async def Join(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([each async for each in requests])

    async def Talk(self, requests: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request.upper())

    async def Refuse(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not so", (("why", "because"),))
        raise AssertionError("abort raises")

    async def Coded(self, request: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("nowhere")
        return b""

    async def Fail(self, request: bytes, context: Any) -> bytes:
        raise ValueError("a bug")

    async def Hang(self, request: bytes, context: Any) -> bytes:
        self.running.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b"released"

    async def Flood(self, request: bytes, context: Any) -> None:
        try:
            while True:
                await context.write(bytes(1000))
        except BaseException as error:
            self.ended = error
            self.cancelled.set()
            raise

    async def Left(self, request: bytes, context: Any) -> bytes:
        left = context.time_remaining()
        return b"none" if left is None else str(left).encode()

    async def Told(self, request: bytes, context: Any) -> bytes:
        return dict(context.invocation_metadata())["word"].encode() + b" " + context.peer().encode()

    def handlers(self) -> grpc.GenericRpcHandler:
        kinds = {
            "Count": grpc.unary_stream_rpc_method_handler,
            "Flood": grpc.unary_stream_rpc_method_handler,
            "Join": grpc.stream_unary_rpc_method_handler,
            "Talk": grpc.stream_stream_rpc_method_handler,
        }
        names = ("Unary", "Count", "Join", "Talk", "Refuse", "Coded", "Fail", "Hang", "Flood", "Left", "Told")
        return grpc.method_handlers_generic_handler(
            "test.Echo",
            {name: kinds.get(name, grpc.unary_unary_rpc_method_handler)(getattr(self, name)) for name in names},
        )


class Renaming(grpc.aio.ServerInterceptor):
    """Writes down what passes, and turns one method into another."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self._name = name
        self._seen = seen

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self._seen.append(f"{self._name} {handler_call_details.method}")
        return await continuation(handler_call_details)


class Served:
    """A server on a thread of its own, and a channel to it."""

    def __init__(self, kind: Literal["completion", "uvloop"], **options: Any) -> None:
        self._kind = kind
        self._options = options
        self.seen: list[str] = []
        self._ready: Future[int] = Future()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        port = self._ready.result(SECONDS)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: new_event_loop(self._kind)) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[float | None] = self.loop.create_future()
        self.echo = Echo()
        interceptors = [Renaming("first", self.seen), Renaming("second", self.seen)]
        self.server = grpc_server(interceptors, list(self._options.items()))
        self.server.add_generic_rpc_handlers((self.echo.handlers(),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self._ready.set_result(port)
        await self.server.stop(await self._stop)

    def call(self, function: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(function)

    def unary(self, method: str, request: bytes = b"", **options: Any) -> Any:
        return self.channel.unary_unary(f"/test.Echo/{method}")(request, timeout=SECONDS, **options)

    def future(self, method: str, request: bytes = b"", **options: Any) -> Any:
        return self.channel.unary_unary(f"/test.Echo/{method}").future(request, **{"timeout": SECONDS, **options})

    def stop(self, grace: float | None = None) -> None:
        if not self._stop.done():
            self.call(lambda: self._stop.set_result(grace))

    def join(self) -> None:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        self.channel.close()


class ServerSuite:
    """The contract of a server."""

    kind: Literal["completion", "uvloop"]

    @contextmanager
    def serving(self, **options: Any) -> Iterator[Served]:
        served = Served(self.kind, **options)
        try:
            yield served
        finally:
            served.stop()
            served.join()

    def test_each_kind_of_method_answers(self) -> None:
        """One or many messages in, one or many out: each comes once, in order."""
        with self.serving() as served:
            assert served.unary("Unary", b"a") == b"<a>"
            assert list(served.channel.unary_stream("/test.Echo/Count")(b"20")) == [b"%d" % n for n in range(20)]
            parts = [b"%d," % n for n in range(50)]
            assert served.channel.stream_unary("/test.Echo/Join")(iter(parts)) == b"".join(parts)
            talk = served.channel.stream_stream("/test.Echo/Talk")
            assert list(talk(iter([b"a", b"b", b""]))) == [b"A", b"B", b""]
            assert list(talk(iter([]))) == []

    def test_many_calls_at_the_same_time_do_not_mix(self) -> None:
        """Each of 200 concurrent calls gets its own answer."""
        with self.serving() as served:
            calls = [served.future("Unary", b"%d" % n) for n in range(200)]
            assert [call.result() for call in calls] == [b"<%d>" % n for n in range(200)]

    def test_interceptors_are_asked_in_their_order(self) -> None:
        """The first one given is the first one asked."""
        with self.serving() as served:
            served.unary("Unary")
            assert served.seen == ["first /test.Echo/Unary", "second /test.Echo/Unary"]

    def test_metadata_and_deadline_arrive(self) -> None:
        """The one who answers knows what the caller sent, where from, and how long he waits."""
        with self.serving() as served:
            word, peer = served.unary("Told", metadata=(("word", "hello"),)).split()
            assert word == b"hello"
            assert peer.startswith(b"ipv4:127.0.0.1:")
            assert 0 < float(served.unary("Left")) < 2 * SECONDS
            assert served.channel.unary_unary("/test.Echo/Left")(b"") == b"none"
            _, call = served.channel.unary_unary("/test.Echo/Unary").with_call(b"")
            assert ("seen", "yes") in call.trailing_metadata()

    @pytest.mark.parametrize(
        ("method", "code", "details"),
        [
            ("Refuse", grpc.StatusCode.FAILED_PRECONDITION, "not so"),
            ("Coded", grpc.StatusCode.NOT_FOUND, "nowhere"),
            ("Fail", grpc.StatusCode.UNKNOWN, "a bug"),
            ("Missing", grpc.StatusCode.UNIMPLEMENTED, "Method not found!"),
        ],
    )
    def test_what_is_refused_has_its_status(self, method: str, code: grpc.StatusCode, details: str) -> None:
        """Whatever way a method fails, its caller hears of it, and the server goes on."""
        with self.serving() as served:
            with pytest.raises(grpc.RpcError) as failed:
                served.unary(method)
            assert failed.value.code() == code
            assert details in failed.value.details()
            if method == "Refuse":
                assert ("why", "because") in failed.value.trailing_metadata()
            assert served.unary("Unary", b"a") == b"<a>"

    def test_a_message_that_is_too_large_ends_its_call_alone(self) -> None:
        """The limit holds, and other calls do not notice."""
        with self.serving(**{"grpc.max_receive_message_length": 1000}) as served:
            with pytest.raises(grpc.RpcError) as failed:
                served.unary("Unary", bytes(1001))
            assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert served.unary("Unary", bytes(1000)) == b"<" + bytes(1000) + b">"

    def test_who_goes_away_has_his_method_cancelled(self) -> None:
        """A call that its client cancels, or whose deadline passes, is not answered any further."""
        with self.serving() as served:
            call = served.future("Hang")
            assert served.echo.running.wait(SECONDS)
            call.cancel()
            assert served.echo.cancelled.wait(SECONDS)
            served.echo.cancelled.clear()
            with pytest.raises(grpc.RpcError) as failed:
                served.future("Hang", timeout=0.1).result()
            assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert served.echo.cancelled.wait(SECONDS)

    def test_who_writes_to_nobody_is_told(self) -> None:
        """A message that cannot be sent any more ends the method that sends it, and no other call."""
        with self.serving() as served:
            call = served.channel.unary_stream("/test.Echo/Flood")(b"")
            assert next(call) == bytes(1000)
            call.cancel()
            assert served.echo.cancelled.wait(SECONDS)
            assert isinstance(served.echo.ended, asyncio.CancelledError | grpc.aio.InternalError), served.echo.ended
            assert served.unary("Unary", b"a") == b"<a>"

    def test_a_stop_lets_calls_end(self) -> None:
        """Within the time that it is given, what runs is answered; what comes then is not taken."""
        with self.serving() as served:
            call = served.future("Hang")
            assert served.echo.running.wait(SECONDS)
            served.stop(SECONDS)
            served.call(served.echo.release.set)
            assert call.result() == b"released"
            served.join()

    def test_a_stop_ends_calls_that_do_not(self) -> None:
        """Without time to end, a call is cancelled, on both sides, and the server is gone."""
        with self.serving() as served:
            call = served.future("Hang")
            assert served.echo.running.wait(SECONDS)
            served.stop(None)
            assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert served.echo.cancelled.wait(SECONDS)
            served.join()

    def test_an_address_that_is_taken_is_told(self) -> None:
        """Nobody serves on a port and is not reached."""
        with self.serving(**{"grpc.so_reuseport": 0}) as served:
            port = served._ready.result()
            told: Future[Exception | None] = Future()

            def try_it() -> None:
                async def tried() -> None:
                    server = grpc_server([], [("grpc.so_reuseport", 0)])
                    try:
                        server.add_insecure_port(f"127.0.0.1:{port}")
                        told.set_result(None)
                    except RuntimeError as error:
                        told.set_result(error)
                    finally:
                        await server.stop(None)

                self._task = served.loop.create_task(tried())

            served.call(try_it)
            assert isinstance(told.result(SECONDS), RuntimeError)
            assert served.unary("Unary", b"a") == b"<a>"
