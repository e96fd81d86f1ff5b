"""One connection to Redis, on which every command is sent at most once, and no task waits for the answers."""

from __future__ import annotations

import asyncio
import contextvars
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, NoScriptError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

Command = tuple[Any, ...]
"""A command of Redis and its arguments."""

Answers = list[Any]
"""What commands were answered, each a number, a text or an error."""

Answered = Callable[[Answers | Exception], None]
"""Called with the answers, or with why it is not known what has arrived, or will yet."""

_SENT_AT_ONCE = 1 << 20  # or as much as the system allows

_ERRORS = {
    b"NOSCRIPT": NoScriptError,
    b"NOPERM": NoPermissionError,
    b"NOAUTH": AuthenticationError,
    b"WRONGPASS": AuthenticationError,
}


class Line:
    """Sends commands whose answers are numbers, short texts or errors, one exchange after the other.

    redis-py makes the connection; its own pipelines would send commands again when it breaks, and wait for their
    answers in a task, which costs several turns of the event loop.

    Args:
        client: says how to connect.
        patience: seconds to wait for a connection and for the answers.
    """

    def __init__(self, client: Redis, patience: float) -> None:
        pool = client.connection_pool
        self._connection = pool.connection_class(**pool.connection_kwargs)
        self._patience = patience
        self._waiting: deque[tuple[Callable[[], Sequence[Command]], Answered]] = deque()
        self._told: Answered | None = None  # of the exchange that is under way
        self._connecting: asyncio.Task[None] | None = None
        self._ear: _Ear | None = None  # of the connection that there is
        self._answers: Answers = []
        self._expected = 0
        self._rest = b""  # of an answer whose end has not come
        self._until = 0.0  # when the answers are not waited for any more
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def exchange(self, commands: Callable[[], Sequence[Command]], told: Answered) -> None:
        """Sends commands in one go, when those before were answered.

        Args:
            commands: called when it is their turn. Nothing is sent, or told, if there are none.
            told: called with their answers, in nobody's context.
        """
        self._waiting.append((commands, told))
        if self._told is None and self._connecting is None:
            self._next()

    async def close(self) -> None:
        """Waits for what is under way, and hangs up."""
        await self._idle.wait()
        self._ear = None
        if self._timer is not None:
            self._timer.cancel()
        await self._connection.disconnect()

    def _hear(self, data: bytes) -> None:
        """Redis says something."""
        *lines, self._rest = (self._rest + data).split(b"\r\n")
        try:
            self._answers += map(_answer, lines)
        except ValueError as error:
            self._break_off(RedisError(str(error)))
            return
        if len(self._answers) > self._expected:
            self._break_off(RedisError(f"expected {self._expected} answers, got {len(self._answers)}"))
        elif self._told is not None and len(self._answers) == self._expected:
            self._end(self._answers)

    def _next(self) -> None:
        """Begins the next exchange, if there is one."""
        while self._waiting and self._told is None:
            self._idle.clear()
            if self._ear is None:
                loop = asyncio.get_running_loop()
                self._connecting = loop.create_task(self._connect(), context=contextvars.Context())
                return
            commands, self._told = self._waiting.popleft()
            try:
                if said := commands():
                    self._send(self._ear.transport, said)
                else:
                    self._told = None
            except Exception as error:  # a bug
                self._break_off(error)
        if self._told is None:
            self._idle.set()

    def _send(self, transport: asyncio.WriteTransport, commands: Sequence[Command]) -> None:
        loop = asyncio.get_running_loop()
        self._answers, self._rest, self._expected = [], b"", len(commands)
        self._until = loop.time() + self._patience
        if self._timer is None:  # one for many exchanges
            self._timer = loop.call_at(self._until, self._look_at_time, context=contextvars.Context())
        content = b"".join(self._connection.pack_commands(commands))
        transport.write(memoryview(content))  # of which a part that has to wait is no copy

    def _end(self, answers: Answers | Exception) -> None:
        """Ends the exchange that is under way."""
        told, self._told = self._told, None
        try:
            if told is not None:
                told(answers)
        finally:
            self._next()

    def _break_off(self, error: Exception) -> None:
        """Ends the exchange that is under way, and the connection."""
        ear, self._ear = self._ear, None
        if ear is not None:
            ear.transport.abort()
        self._end(error)

    def _look_at_time(self) -> None:
        self._timer = None
        if self._told is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:
            self._timer = loop.call_at(self._until, self._look_at_time, context=contextvars.Context())
        else:
            self._break_off(RedisTimeoutError(f"no answer within {self._patience:g} s"))

    async def _connect(self) -> None:
        """Connects, and begins the first exchange that waits; ends it if that fails."""
        connection = self._connection
        error: Exception | None = None
        try:
            async with asyncio.timeout(self._patience):
                await connection.disconnect(nowait=True)
                await connection.connect()  # type: ignore[no-untyped-call]
            assert connection._writer is not None
            transport = connection._writer.transport
            sock = transport.get_extra_info("socket")
            if sock.family == getattr(socket, "AF_UNIX", None):  # that of TCP grows by itself
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT_AT_ONCE)
            self._ear = _Ear(transport, lambda ear: ear is self._ear, self._hear, self._break_off)
        except TimeoutError:
            error = RedisTimeoutError(f"no connection within {self._patience:g} s")
        except Exception as failure:
            error = failure
        finally:
            self._connecting = None
        if error is not None:
            _, told = self._waiting.popleft()
            told(error)
        self._next()


class _Ear(asyncio.Protocol):
    """Hears what comes on one connection, as long as it is the one that is listened to.

    Args:
        transport: the connection's.
        is_asked: whether that is so.
        heard: called with what comes.
        lost: called with why nothing comes any more.
    """

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        is_asked: Callable[[_Ear], bool],
        heard: Callable[[bytes], None],
        lost: Callable[[Exception], None],
    ) -> None:
        self.transport = transport
        self._streams = transport.get_protocol()  # redis-py's, which wants to know of the connection's end
        self._is_asked = is_asked
        self._heard = heard
        self._lost = lost
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._is_asked(self):
            self._heard(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._streams.connection_lost(exc)
        if self._is_asked(self):
            self._lost(RedisConnectionError("the server has closed the connection" if exc is None else str(exc)))


def _answer(line: bytes) -> object:
    """What a line of an answer says.

    Raises:
        ValueError: it is not the whole of an answer.
    """
    kind, said = line[:1], line[1:]
    if kind == b":":
        return int(said)
    if kind == b"+":
        return said
    if kind == b"-":
        error = _ERRORS.get(said.partition(b" ")[0], ResponseError)
        return error(said.decode(errors="replace"))
    raise ValueError(f"expected an answer of one line, got {line[:40]!r}")
