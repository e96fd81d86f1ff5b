"""The processes of a run: the servers on one core, and each row's client on another."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import uvloop

from benchmarks.rows import Row, Sample

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]  # the same one where there is only one
ECHO = (sys.executable, "-m", "benchmarks.echo")
BARE = (sys.executable, "-m", "benchmarks.bare")
_START_SECONDS = 60.0
# The port in what a server says when it listens: the echo, rnnserve, Triton.
_PORT = re.compile(r'^(\d+)$|"address": ?"[^"]*:(\d+)"|GRPCInferenceService at [^ ]*:(\d+)"', re.MULTILINE)


def serve(models: Path, *flags: str) -> tuple[str | Path, ...]:
    """The command that serves a folder of models on a free port."""
    rnnserve = Path(sys.executable).with_name("rnnserve")
    return rnnserve, "serve", "--models", models, "--port", "0", "--log-format", "json", *flags


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Processes started meanwhile run on that core, all their threads too."""
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


class Server:
    """A server in a process of its own, on the servers' core, until the end of the `with`."""

    def __init__(self, *command: str | Path, log: Path, env: Mapping[str, str] | None = None) -> None:
        with pinned(SERVER_CORE), log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        self._log = log
        self.address = f"127.0.0.1:{self._port()}"

    @property
    def cpu_seconds(self) -> float:
        """What all its threads have spent so far. /proc/<pid>/stat has it in hundredths of a second only."""
        return time.clock_gettime(~self._process.pid << 3 | 2)  # clock_getcpuclockid(3), which Python does not have

    @property
    def memory(self) -> int:
        """Bytes that it has in memory, shared ones by its share."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        return int(rollup.partition("\nPss:")[2].split()[0]) * 1024

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _port(self) -> str:
        until = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < until:
            if said := _PORT.search(self._log.read_text()):
                return str(next(filter(None, said.groups())))
            time.sleep(0.005)
        self.stop()
        raise RuntimeError(f"{self._process.args!r} did not start:\n{self._log.read_text()}")


class Cpu(NamedTuple):
    """Seconds of CPU that a sample cost, all threads."""

    client: float
    server: float  # the engine's row is its own server


class RowProcess:
    """A row, opened in a process of its own."""

    def __init__(self, row: Row, server: Server | None) -> None:
        self._server = server
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (row, server.address if server else "", theirs)
        self._process = multiprocessing.get_context("spawn").Process(target=_serve_row, args=arguments, daemon=True)
        with pinned(CLIENT_CORE if server else SERVER_CORE):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        self._connection.recv()
        return self

    def measure(self, seconds: float) -> tuple[Sample, Cpu]:
        """A sample of the row, and what it cost."""
        self.begin(seconds)
        return self.end()

    def begin(self, seconds: float) -> None:
        """Begins to measure, until `end`, so that rows can be measured beside one another."""
        self._before = self._server.cpu_seconds if self._server else 0.0
        self._connection.send(seconds)

    def end(self) -> tuple[Sample, Cpu]:
        """What was begun. The server's cost is that of all the rows that were measured meanwhile."""
        sample, own = self._connection.recv()
        return sample, Cpu(own, self._server.cpu_seconds - self._before if self._server else own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()


def _serve_row(row: Row, address: str, connection: Connection) -> None:
    """Opens a row, and measures it as often as it is told to."""

    async def serve_row() -> None:
        async with AsyncExitStack() as stack:
            measure = await row.open(address, stack)
            connection.send(None)
            while True:
                try:
                    seconds = await asyncio.to_thread(connection.recv)
                except EOFError:
                    return
                before = time.process_time()
                sample = await measure(seconds)
                connection.send((sample, time.process_time() - before))

    uvloop.run(serve_row())
