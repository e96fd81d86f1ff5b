"""The event loop that waits for gRPC's completion queue, and the servers on it and on grpc.aio."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import grpc
import pytest
from hyperframe.frame import DataFrame

from compliance.server_suite import ServerSuite
from house import Clock
from raw_http2 import Wire, headers_of
from raw_http2 import message as framed
from rnnserve_server.process import poll_on_one_thread
from rnnserve_server.wire import bell
from rnnserve_server.wire.loop import CompletionLoop, _Completions, at_turns_end, new_event_loop
from rnnserve_server.wire.send import sender
from rnnserve_server.wire.server import CompletionServer

T = TypeVar("T")


class TestCompletionServer(ServerSuite):
    """On the completion queue itself."""

    kind = "completion"


class TestAioServer(ServerSuite):
    """On grpc.aio, which is what it falls back to."""

    kind = "uvloop"


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=lambda: new_event_loop("completion")) as runner:
        return runner.run(asyncio.wait_for(main, 20))


def test_another_thread_wakes_the_loop_at_once():
    """A loop that has nothing to do hears of work from elsewhere without waiting for anything else."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, time.monotonic) - time.monotonic()

    assert abs(run(main())) < 5


def test_files_and_sockets_are_watched():
    """Streams over sockets work as on any loop: what is written arrives, both ways, in order."""

    async def main() -> bytes:
        async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                writer.write(line.upper())
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(shout, "127.0.0.1", 0, limit=2 << 20)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=2 << 20)
            heard = b""
            for number in range(100):
                writer.write(b"line %d\n" % number)
                heard += await reader.readline()
            writer.write(bytes(1 << 20) + b"\n")
            assert len(await reader.readline()) == (1 << 20) + 1
            writer.write_eof()
            assert await reader.read() == b""  # the other end is closed too
            writer.close()
            await writer.wait_closed()
            return heard

    assert run(main()) == b"".join(b"LINE %d\n" % number for number in range(100))


def test_a_file_that_stays_ready_does_not_keep_timers_waiting():
    """A descriptor that nobody reads is told of in every turn, and everything else goes on."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        told = 0

        def tell() -> None:
            nonlocal told
            told += 1

        loop.add_reader(ours, tell)
        theirs.send(b"!")
        await asyncio.sleep(0.05)
        loop.remove_reader(ours)
        ours.close(), theirs.close()
        return told

    assert run(main()) > 1


def test_timers_keep_their_order():
    """Callbacks come when they are due, the earliest first."""

    async def main() -> list[int]:
        loop, came = asyncio.get_running_loop(), []
        for delay in (30, 10, 20, 0):
            loop.call_later(delay / 1000, came.append, delay)
        await asyncio.sleep(0.05)
        return came

    assert run(main()) == [0, 10, 20, 30]


def test_an_error_in_what_completes_is_told_and_the_loop_goes_on():
    """A bug in one call's callback harms no other call."""

    async def main() -> list[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CompletionLoop)
        told: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: told.append(context))

        def fail(event: object) -> None:
            raise ValueError("a bug")

        done = asyncio.Event()
        loop._bell._call.start_server_batch((), fail)
        loop._bell._call.start_server_batch((), lambda _: done.set())
        await done.wait()
        return told

    (context,) = run(main())
    assert isinstance(context["exception"], ValueError)


def test_a_turns_end_comes_when_all_that_has_completed_was_told():
    """What is to be done at a turn's end is done once, behind everything that had completed, and in nobody's context; a
    bug in it is told, and what comes behind it is done all the same.
    """
    whose = contextvars.ContextVar("whose", default="nobody")

    async def main() -> tuple[list[str], list[dict[str, Any]]]:
        loop, came = asyncio.get_running_loop(), []
        assert isinstance(loop, CompletionLoop)
        told: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: told.append(context))
        done = asyncio.Event()

        def end(name: str) -> None:
            came.append(f"end of {name}, {whose.get()}'s")
            if name == "1":
                raise ValueError("a bug")
            if name == "main":
                done.set()

        def complete(number: int) -> None:
            came.append(f"event {number}")
            at_turns_end(lambda: end(str(number)))

        whose.set("main")
        for number in (1, 2):
            loop._bell._call.start_server_batch((), lambda _, number=number: complete(number))
        await asyncio.sleep(0)
        at_turns_end(lambda: end("main"))
        await done.wait()
        return came, told

    came, told = run(main())
    assert came == ["event 1", "event 2", "end of 1, nobody's", "end of 2, nobody's", "end of main, nobody's"]
    assert [str(context["exception"]) for context in told] == ["a bug"]


class Queue:
    """A completion queue as a test fills it: what each look at a connection makes complete, or nothing."""

    def __init__(self, *events: Any) -> None:
        self.events = deque(SimpleNamespace(tag=tag) for tag in events)
        self.nothing = SimpleNamespace(tag=None)

    def poll(self, deadline: float | None = None) -> Any:
        return self.events.popleft() if self.events else self.nothing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("rnnserve_server.wire.loop._clock", clock)
    return clock


def test_connections_that_complete_nothing_do_not_hide_others(clock: Clock):
    """A loop that has had no time to wait looks at several connections before it takes it that nothing has completed:
    seven that send what is no message are passed over in one turn. One that has just waited looks twice.
    """
    told: list[str] = []
    queue = Queue(*[None] * 7, lambda _: told.append("first"), *[None] * 7, lambda _: told.append("second"))
    completions = _Completions(queue, lambda: None, lambda error: None)
    try:
        clock.now += 1
        completions.select(0)
        assert told == ["first", "second"]
        queue.events.extend(SimpleNamespace(tag=each) for each in (None, None, None, lambda _: told.append("third")))
        completions.select(1)  # waits, in which gRPC looks at all of them
        assert len(queue.events) == 3
        completions.select(0)
        assert (len(queue.events), told) == (1, ["first", "second"])
    finally:
        completions.close()


def test_what_completes_does_not_keep_timers_and_tasks_waiting(clock: Clock):
    """Of what has completed as much is told in a turn as takes five milliseconds; what is to be done at its end is done
    in that turn, and the rest told in the next one.
    """
    told: list[str] = []

    def tell(_: object) -> None:
        told.append("event")
        clock.now += 0.0024
        if len(told) == 1:
            completions.ends.append(lambda: told.append("end"))

    completions = _Completions(Queue(*[tell] * 12), lambda: None, lambda error: None)
    try:
        for _ in range(4):
            told.clear()
            completions.select(0)
            assert told == ["event"] * 3 + ["end"]
    finally:
        completions.close()


def test_messages_that_are_taken_are_not_read():
    """Of a stream of messages some are taken as they come and the others are read; each is seen once, in order."""
    seen: list[tuple[str, bytes]] = []

    async def serve(requests: Any, context: Any) -> None:
        def take(message: bytes) -> bool:
            if taken := message.startswith(b"t"):
                seen.append(("taken", message))
            return taken

        context.take = take
        async for message in requests:
            seen.append(("read", message))
            await asyncio.sleep(0)  # others come meanwhile
        await context.write(b"done")

    async def main() -> list[bytes]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CompletionLoop)
        server = CompletionServer(loop)
        handler = grpc.stream_stream_rpc_method_handler(serve)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("a.Service", {"Method": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

        def ask() -> list[bytes]:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                return list(channel.stream_stream("/a.Service/Method")(iter(messages), timeout=20))

        answers = await asyncio.to_thread(ask)
        await server.stop(None)
        return answers

    messages = [b"%c%d" % (b"rtttr"[number % 5], number) for number in range(500)]
    assert run(main()) == [b"done"]
    assert [message for _, message in seen] == messages
    assert {how for how, message in seen if message.startswith(b"r")} == {"read"}
    assert ("taken", messages[1]) in seen or ("taken", messages[2]) in seen


def test_what_came_during_a_callback_is_told_before_the_next():
    """A loop that has more to do looks at what its clients have sent meanwhile first, although it was sending itself:
    what it runs next has all of it.
    """
    with mock.patch.dict(os.environ), ProcessPoolExecutor(1, get_context("spawn")) as other:
        os.environ.pop("GRPC_EXPERIMENTS", None)
        poll_on_one_thread()  # is heeded when gRPC is loaded: by another process, not by this one
        assert other.submit(_answer_and_go_on, 20).result(60) == 20 * ["1", "2", "next"]


def _answer_and_go_on(times: int) -> list[str]:
    """In what order a server is told what comes while a callback answers, and is called back itself."""
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CompletionLoop)
        over = asyncio.Event()

        async def serve(requests: Any, context: Any) -> None:
            def answer() -> None:
                sender(context)(b"answer", lambda _: None)
                wire.send(DataFrame(1, framed(b"2")))
                wire.wait_until_taken()
                loop.call_soon(go_on)

            def go_on() -> None:
                seen.append("next")
                if len(seen) < 3 * times:
                    wire.send(DataFrame(1, framed(b"1")))
                else:
                    over.set()

            def take(content: bytes) -> bool:
                seen.append(content.decode())
                if content == b"1":
                    loop.call_soon(answer)
                return True

            context.take = take
            async for _ in requests:
                raise AssertionError("it was taken")

        server = CompletionServer(loop)
        handler = grpc.stream_stream_rpc_method_handler(serve)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("a.Service", {"Method": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with Wire(f"127.0.0.1:{port}") as wire:
            wire.call(1, headers_of("/a.Service/Method"), b"1", end=False)
            await over.wait()
        await server.stop(0)

    run(main())
    return seen


def test_a_signal_wakes_the_loop():
    """SIGTERM is heard by a loop that waits for gRPC and nothing else."""
    script = (
        "import asyncio, os, signal\n"
        "from rnnserve_server.wire.loop import new_event_loop\n"
        "async def main():\n"
        "    stop = asyncio.Event()\n"
        "    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)\n"
        "    print('ready', flush=True)\n"
        "    await stop.wait()\n"
        "    print('stopped')\n"
        "with asyncio.Runner(loop_factory=lambda: new_event_loop('completion')) as runner:\n"
        "    runner.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.read() == "stopped\n"
        assert process.wait(20) == 0


def test_a_closed_loop_leaves_nothing():
    """Neither threads nor descriptors are left of loops that were closed."""
    asyncio.run(asyncio.sleep(0))
    run(asyncio.sleep(0))
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(asyncio.sleep(0))
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_without_the_layer_below_grpc_aio_serves(monkeypatch):
    """Where gRPC is another one than the one that is pinned, the server is slower, not out of order."""
    monkeypatch.delattr(bell.cygrpc, "Server", raising=False)
    loop = new_event_loop("completion")
    try:
        assert not isinstance(loop, CompletionLoop)
        assert loop.run_until_complete(asyncio.sleep(0, "ran")) == "ran"
    finally:
        loop.close()


@pytest.mark.parametrize("kind", ["completion", "uvloop"])
def test_the_setting_chooses_the_loop(kind):
    """`event_loop` says which."""
    loop = new_event_loop(kind)
    try:
        assert isinstance(loop, CompletionLoop) == (kind == "completion")
    finally:
        loop.close()
