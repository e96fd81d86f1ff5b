"""What durability costs: the same frames, to servers that keep their sessions in a store."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import redis

from benchmarks.processes import CLIENT_CORE, Server, pinned, serve
from benchmarks.rows import Row, ServerRow

_START_SECONDS = 10.0


@dataclass(frozen=True)
class StoreRow(ServerRow):
    """rnnserve with a store.

    Attributes:
        kept: where the sessions are, and what an answer waits for: a key of `SERVERS`.
    """

    kept: str = ""

    part: ClassVar[str] = "rnnserve with a store"

    @property
    def server(self) -> str:
        return self.kept

    @property
    def name(self) -> str:
        return f"{self.kept}: {super().name}"

    @property
    def in_memory(self) -> ServerRow:
        """The row of the server without a store doing the same work."""
        return ServerRow(self.streams, self.lanes, self.steps, self.depth)


SERVERS: Mapping[str, tuple[str, ...]] = {
    "sqlite, step": ("--durability", "step"),
    "redis, step": ("--durability", "step"),
    "sqlite, step, sync normal": ("--durability", "step", "--store-sync", "normal"),
    "sqlite, interval": ("--durability", "interval"),
    "redis, interval": ("--durability", "interval"),
}
"""The servers, and their flags, in the order in which they are measured behind the one without a store."""


def rows(shape: Row) -> list[StoreRow]:
    """A shape of frames, to each of the servers."""
    return [StoreRow(shape.streams, shape.lanes, shape.steps, shape.depth, kept) for kept in SERVERS]


def installed() -> bool:
    """Whether there is a redis-server."""
    return shutil.which("redis-server") is not None


def starts(folder: Path, stack: ExitStack) -> dict[str, Callable[[], Server]]:
    """How each server is started, on stores in a folder; Redis with the first that wants it, until the stack closes."""
    urls: dict[str, str] = {}

    def url(kept: str) -> str:
        if kept.startswith("sqlite"):
            return f"sqlite:///{folder / kept.replace(', ', '-')}.db"
        if "redis" not in urls:
            urls["redis"] = stack.enter_context(RedisServer(folder)).url
        return f"{urls['redis']}?db={list(SERVERS).index(kept)}"

    def start(kept: str) -> Callable[[], Server]:
        log = folder / f"{kept.replace(', ', '-')}.log"
        return lambda: Server(*serve(folder / "models", "--store", url(kept), *SERVERS[kept]), log=log)

    return {kept: start(kept) for kept in SERVERS}


def let_go(folder: Path) -> None:
    """Has the system forget what it keeps in memory of the file that Redis appends to, which grows by 100 MB a second.
    A virtual machine hands memory that was never used out ten times slower than it writes; where Redis has run for
    long, it writes to memory that was used before.
    """
    for path in folder.glob("appendonlydir/*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class RedisServer:
    """A redis-server on a socket, on the clients' core as it would be on another machine, that appends every command to
    a file and has it written to disk once a second. The file is made anew at each GiB, not at each 64 MiB: that is a
    process of its own, for which another machine would have another core.
    """

    def __init__(self, folder: Path) -> None:
        socket = folder / "redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", ""]
        command += ["--auto-aof-rewrite-min-size", "1gb"]
        with pinned(CLIENT_CORE), (folder / "redis.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--appendonly", "yes", "--appendfsync", "everysec"], stdout=log, stderr=log
            )
        self.url = f"unix://{socket}"

    def __enter__(self) -> Self:
        until = time.monotonic() + _START_SECONDS
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return self
                except redis.ConnectionError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.005)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
