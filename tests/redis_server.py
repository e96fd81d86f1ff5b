"""A real Redis for the tests, and a wire that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


class RedisServer:
    """A redis-server of our own, on a socket in a folder of its own, that writes every command to disk at once.

    Attributes:
        url: where it is.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self.socket = folder / "socket"
        self.url = f"unix://{self.socket}"

    def start(self) -> None:
        """Starts it, on what it has on disk, and waits until it is ready."""
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if "eady to accept connections" in line:
                return
        raise RuntimeError("redis-server did not start:\n" + "".join(said))

    def kill(self) -> None:
        """Ends it as a power cut would."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def running_redis(*options: str) -> Iterator[RedisServer]:
    """A redis-server for as long as the block runs; skips the test where there is none."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix="redis") as folder:  # pytest's own are too long for a socket's name
        server = RedisServer(Path(folder), *options)
        server.start()
        try:
            yield server
        finally:
            server.kill()


class Wire:
    """A proxy before a server's socket that can hold back, or cut after so many bytes.

    Attributes:
        cut_sent: bytes after which a connection is cut on the way to the server, or None.
        cut_received: the same on the way back.
        open: cleared, nothing passes to the server.
        waiting: set once something is held back.
    """

    def __init__(self, server: RedisServer, socket: Path) -> None:
        self._server = server
        self._socket = socket
        self._tasks: set[asyncio.Task[None]] = set()
        self.cut_sent: int | None = None
        self.cut_received: int | None = None
        self.sent = self.received = 0
        self.open = asyncio.Event()
        self.open.set()
        self.waiting = asyncio.Event()
        self.url = f"unix://{socket}"

    async def __aenter__(self) -> Wire:
        self._listener = await asyncio.start_unix_server(self._connected, self._socket)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_unix_connection(self._server.socket)
        both = [asyncio.create_task(self._send(reader, back)), asyncio.create_task(self._receive(there, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # which asyncio would say nobody expected
            pass
        finally:
            for end in (writer, back):
                end.close()
            for each in both:
                each.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not self.open.is_set():
                self.waiting.set()
                await self.open.wait()
            if self.cut_sent is not None and self.sent + len(data) > self.cut_sent:
                writer.write(data[: self.cut_sent - self.sent])
                self.sent = self.cut_sent
                return await writer.drain()
            self.sent += len(data)
            writer.write(data)
            await writer.drain()
        return None

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.cut_received is not None and self.received + len(data) > self.cut_received:
                writer.write(data[: self.cut_received - self.received])
                self.received = self.cut_received
                return await writer.drain()
            self.received += len(data)
            writer.write(data)
            await writer.drain()
        return None
