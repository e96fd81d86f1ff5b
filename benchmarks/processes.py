"""The processes of a run: the servers on one core, and each row's client on another."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import uvloop

from benchmarks.rows import Row, Sample

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]  # the same one where there is only one
_START_SECONDS = 60.0


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Processes started meanwhile run on that core, all their threads too."""
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


class Server:
    """A server in a process of its own, on the servers' core."""

    def __init__(self, *command: str | Path, log: Path) -> None:
        with pinned(SERVER_CORE), log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        self._log = log
        self.address = f"127.0.0.1:{self._port()}"

    @property
    def cpu_seconds(self) -> float:
        """What it has spent so far, in ticks of a hundredth of a second."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = fields[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _port(self) -> int:
        """Where it says that it listens: {"address": "host:port"} in its log, or the port alone."""
        until = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < until:
            for line in self._log.read_text().splitlines():
                said = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
                if line.isdecimal() or "address" in said:
                    return int(str(said.get("address", line)).rpartition(":")[2])
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"{self._process.args!r} did not start:\n{self._log.read_text()}")


class RowProcess:
    """A row, opened in a process of its own."""

    def __init__(self, row: Row, server: Server | None) -> None:
        self.row = row
        self.server = server
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (row, server.address if server else "", theirs)
        self._process = multiprocessing.get_context("spawn").Process(target=_serve_row, args=arguments, daemon=True)
        with pinned(CLIENT_CORE if server else SERVER_CORE):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        self._connection.recv()
        return self

    def measure(self, seconds: float) -> tuple[Sample, float]:
        """A sample of the row, and the seconds of CPU that the server spent."""
        before = self.server.cpu_seconds if self.server else 0.0
        self._connection.send(seconds)
        sample: Sample = self._connection.recv()
        return sample, self.server.cpu_seconds - before if self.server else 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()


def _serve_row(row: Row, address: str, connection: Connection) -> None:
    """Opens a row, and measures it as often as it is told to."""

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            measure = await row.open(address, stack)
            connection.send(None)
            while True:
                try:
                    seconds = await asyncio.to_thread(connection.recv)
                except EOFError:
                    return
                connection.send(await measure(seconds))

    uvloop.run(serve())
