"""A TCP proxy on the loopback interface that cuts, resets, half-closes, stalls and refuses, as told or by chance.

    async with TcpProxy(server.target, plan=Plan.by_chance, seed=7) as proxy:
        client = Client(proxy.address)

It belongs to one event loop, has no clock, and does the same again for the same seed and the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

How = Literal["close", "reset", "half", "stall"]


@dataclass(frozen=True)
class Plan:
    """What happens to one connection.

    Attributes:
        up: bytes that pass to the server before it happens; None for all.
        down: bytes that pass to the client before it happens; None for all.
        how: `close` ends both ways in good order, `reset` with RST, `half` ends only the way that has passed its
            bytes, `stall` goes on with nothing on that way, and tells nobody.
    """

    up: int | None = None
    down: int | None = None
    how: How = "close"

    @classmethod
    def by_chance(cls, number: int, chance: random.Random, *, longest: int = 4000) -> Plan:
        """A cut somewhere in the first bytes of either way. (A stall would have to be noticed by somebody.)"""
        at = chance.randrange(longest)
        how = chance.choice(("close", "reset", "half"))
        return cls(up=at, how=how) if chance.random() < 0.5 else cls(down=at, how=how)


def nothing(number: int, chance: random.Random) -> Plan:
    """The plan of a proxy that does no harm."""
    return Plan()


class TcpProxy:
    """A proxy before one server.

    Attributes:
        address: where it listens; the same until it is left.
        connections: how many it has accepted.
        cuts: how many of them it has cut.
        heard: how many times clients have said something.
        passing: cleared, nothing passes; set again, everything goes on where it was.
    """

    def __init__(
        self,
        target: str,
        plan: Callable[[int, random.Random], Plan] = nothing,
        seed: int = 0,
    ) -> None:
        self.aim(target)
        self.plan = plan
        self._chance = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self._changed = asyncio.Condition()
        self._over = False
        self.connections = self.cuts = self.heard = 0
        self.passing = asyncio.Event()
        self.passing.set()

    async def __aenter__(self) -> TcpProxy:
        # Bound and never listening: it keeps the port while connections are refused.
        self._keeper = _bound(0)
        port = self._keeper.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        await self.accept()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._over = True
        self.refuse()
        self.passing.set()
        self.cut("close")
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._keeper.close()

    # What a test commands

    def aim(self, target: str) -> None:
        """From now on new connections go to that server."""
        host, _, port = target.rpartition(":")
        self._target = host, int(port)

    def refuse(self) -> None:
        """From now on new connections are refused. Those that there are go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def accept(self) -> None:
        """Ends `refuse`."""
        if self._listener is None:
            sock = _bound(self._keeper.getsockname()[1])
            self._listener = await asyncio.start_server(self._connected, sock=sock)

    def cut(self, how: How = "reset") -> None:
        """Cuts every connection that there is, now."""
        for writer in list(self._writers):
            _end(writer, how)

    async def wait_for(self, fact: Callable[[TcpProxy], bool]) -> None:
        """Returns once something is so, of what the attributes tell."""
        async with self._changed:
            await self._changed.wait_for(lambda: fact(self))

    # Its work

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        plan = self.plan(self.connections, self._chance)
        async with self._changed:
            self.connections += 1
            self._changed.notify_all()
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:  # the server is down: so is its proxy
            _end(writer, "reset")
            return
        pair = {writer, back}
        self._writers |= pair
        if self._over:
            self.cut("close")
        ways = [
            asyncio.create_task(self._pass(reader, back, plan.up, plan.how, pair, counts=True)),
            asyncio.create_task(self._pass(there, writer, plan.down, plan.how, pair)),
        ]
        await asyncio.gather(*ways)
        self._writers -= pair
        for each in pair:
            each.close()
            with contextlib.suppress(OSError):
                await each.wait_closed()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: int | None,
        how: How,
        pair: set,
        *,
        counts: bool = False,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if counts:
                    async with self._changed:
                        self.heard += 1
                        self._changed.notify_all()
                await self.passing.wait()
                if left is None or len(data) < left:
                    left = None if left is None else left - len(data)
                    writer.write(data)
                    await writer.drain()
                    continue
                writer.write(data[:left])
                async with self._changed:
                    self.cuts += 1
                    self._changed.notify_all()
                if how == "half":
                    writer.write_eof()
                elif how != "stall":
                    for each in pair:
                        _end(each, how)
                while how in ("half", "stall") and await reader.read(65536):
                    pass  # heard, and told to nobody
                return
            writer.write_eof()


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.setblocking(False)
    return sock


def _end(writer: asyncio.StreamWriter, how: How) -> None:
    if how == "reset":
        # Closed at once and without lingering: the kernel sends RST.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    elif not writer.is_closing():
        writer.close()
