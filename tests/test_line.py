"""The line to Redis: every command is sent at most once, and whoever sent it is told what is known of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from rnnserve_server.store.line import Answers, Line

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class FakeRedis:
    """Reads commands, and answers those that are not about the connection as it is told.

    Attributes:
        received: the names and first arguments of the others.
        connections: how many there were.
    """

    def __init__(self, answer: Answer) -> None:
        self.received: list[bytes] = []
        self.connections = 0
        self._answer = answer

    async def __aenter__(self) -> FakeRedis:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.client = Redis(port=port, protocol=2, retry=Retry(NoBackoff(), 0))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.client.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while line := await reader.readline():
                arguments = []
                for _ in range(int(line[1:])):
                    size = int((await reader.readline())[1:])
                    arguments.append((await reader.readexactly(size + 2))[:-2])
                if arguments[0] in (b"CLIENT", b"HELLO", b"SELECT"):
                    writer.write(b"+OK\r\n")
                    continue
                self.received.append(b" ".join(arguments[:2]))
                await self._answer(self.received[-1], writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def exchanged(line: Line, *commands: tuple[Any, ...]) -> Answers | Exception:
    answers: asyncio.Future[Answers | Exception] = asyncio.get_running_loop().create_future()
    line.exchange(lambda: commands, answers.set_result)
    return await answers


async def test_answers_come_whole_however_they_are_cut() -> None:
    """Numbers, texts and errors, byte by byte: an exchange is over when all its answers are there."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        said = {b"A 1": b":12\r\n", b"B 2": b"+OK\r\n", b"C 3": b"-NOSCRIPT No matching script\r\n"}[command]
        for byte in said:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    async with FakeRedis(answer) as server:
        line = Line(server.client, 5.0)
        answers = await exchanged(line, ("A", 1), ("B", 2), ("C", 3))
        assert isinstance(answers, list)
        assert answers[:2] == [12, b"OK"]
        assert isinstance(answers[2], NoScriptError)
        await line.close()


async def test_exchanges_wait_for_those_before_them() -> None:
    """Commands are made when it is their turn, so that they can say what the answers before have shown."""
    seen: list[str] = []

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b":1\r\n")

    def commands(name: str) -> list[tuple[str, str]]:
        seen.append(f"make {name}")
        return [(name, "x")]

    async with FakeRedis(answer) as server:
        line = Line(server.client, 5.0)
        for name in "ABC":
            line.exchange(lambda name=name: commands(name), lambda answers, name=name: seen.append(f"{name} {answers}"))  # type: ignore[misc]
        await line.close()  # which waits for them
        assert seen == ["make A", "A [1]", "make B", "B [1]", "make C", "C [1]"]
        assert server.connections == 1


async def test_a_connection_that_breaks_has_nothing_sent_again() -> None:
    """Who waits for an answer is told that it is not known what arrived; the next exchange has a new connection."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        if command == b"A 1":
            writer.close()
        else:
            writer.write(b":2\r\n")

    async with FakeRedis(answer) as server:
        line = Line(server.client, 5.0)
        assert isinstance(await exchanged(line, ("A", 1)), RedisConnectionError)
        assert await exchanged(line, ("B", 2)) == [2]
        assert (server.received, server.connections) == ([b"A 1", b"B 2"], 2)
        await line.close()


async def test_a_server_that_says_nothing() -> None:
    """Patience ends. What it says too late is nobody's answer."""
    late = asyncio.Event()

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        if command == b"A 1":
            await late.wait()
            writer.write(b":1\r\n")
        else:
            writer.write(b":2\r\n")

    async with FakeRedis(answer) as server:
        line = Line(server.client, 0.05)
        assert isinstance(await exchanged(line, ("A", 1)), RedisTimeoutError)
        late.set()
        assert await exchanged(line, ("B", 2)) == [2]
        await line.close()


async def test_a_server_that_is_not_there() -> None:
    """Everybody who waits is told, one after the other, and the line can be closed."""
    async with FakeRedis(lambda command, writer: asyncio.sleep(0)) as server:
        pass
    line = Line(server.client, 5.0)
    told = await asyncio.gather(*(exchanged(line, (name, 1)) for name in "AB"))
    assert all(isinstance(each, RedisError | OSError) for each in told)
    await line.close()


async def test_commands_that_cannot_be_made_or_sent() -> None:
    """A bug in one exchange is told to whoever began it, and is not the next one's."""

    async def answer(command: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"$3\r\nabc\r\n" if command == b"GET 1" else b"-ERR no\r\n")

    def fails() -> list[tuple[str]]:
        raise ZeroDivisionError

    async with FakeRedis(answer) as server:
        line = Line(server.client, 5.0)
        broken: asyncio.Future[Answers | Exception] = asyncio.get_running_loop().create_future()
        line.exchange(fails, broken.set_result)
        assert isinstance(await broken, ZeroDivisionError)
        assert isinstance(await exchanged(line, ("GET", 1)), RedisError)  # such commands are not for this line
        assert type((await exchanged(line, ("SET", 1)))[0]) is ResponseError  # type: ignore[index]
        await line.close()


@pytest.fixture(autouse=True)
def no_logs(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing is logged, an exception that nobody asked for least of all."""
    yield
    assert not caplog.records
