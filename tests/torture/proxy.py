"""A TCP proxy before a server that cuts every connection sooner or later, and can refuse and delay for a while."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from typing import Literal

How = Literal["close", "reset", "half"]


class Proxy:
    """Listens at an address of its own for as long as its block runs.

    Attributes:
        address: where.
        mean: bytes, in the mean, after which a connection is cut, in the way that they went; None: never.
        cuts: how many connections it has cut, by how.
        resets: how many connections it has reset at once.
        refusing: whether new connections are reset at once.
        passing: cleared, nothing passes; set again, everything goes on.
    """

    def __init__(self, target: str, chance: random.Random, mean: int | None) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._chance = chance
        self._tasks: set[asyncio.Task[None]] = set()
        self.mean = mean
        self.cuts: Counter[How] = Counter()
        self.resets = 0
        self.refusing = False
        self.passing = asyncio.Event()
        self.passing.set()

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
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
        task.add_done_callback(self._tasks.discard)
        if self.refusing:
            self.resets += 1
            _reset(writer)
            return
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:  # the server is down, and so is its proxy
            _reset(writer)
            return
        both = (writer, back)
        up, down = self._left(), self._left()
        ways = [
            asyncio.create_task(self._pass(reader, back, up, both)),
            asyncio.create_task(self._pass(there, writer, down, both)),
        ]
        try:
            await asyncio.gather(*ways)
        except asyncio.CancelledError:
            pass  # the block has ended; asyncio would complain of a task that was cancelled
        finally:
            for way in ways:
                way.cancel()
            for each in both:
                each.close()

    def _left(self) -> int | None:
        """The bytes that pass before one way of a connection is cut; half of the time the other way is cut first."""
        if self.mean is None or self._chance.random() < 0.5:
            return None
        return int(self._chance.expovariate(1 / self.mean))

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: int | None,
        both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        try:
            while data := await reader.read(65536):
                await self.passing.wait()
                if left is not None and len(data) >= left:
                    writer.write(data[:left])
                    how: How = self._chance.choice(("close", "reset", "half"))
                    self.cuts[how] += 1
                    if how == "half":
                        writer.write_eof()
                        while await reader.read(65536):
                            pass  # heard, and passed on to nobody
                        return
                    for each in both:
                        _reset(each) if how == "reset" else each.close()
                    return
                left = None if left is None else left - len(data)
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:  # one side is gone at once: so is the other
            for each in both:
                _reset(each)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes at once and without lingering, for which the kernel sends RST."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
