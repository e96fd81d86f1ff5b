"""A real server on a free port of the loopback interface, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rnnserve_server.config import Settings
from rnnserve_server.repository import Repository
from rnnserve_server.server import Server
from rnnserve_server.wire.loop import new_event_loop

ZOO = Path(__file__).parent.parent / "models" / "zoo"


class RunningServer:
    """A server that listens.

    Attributes:
        address: where.
        server: the server itself. Touch it only through `call`.
    """

    def __init__(self, settings: Settings, repository: Repository | None) -> None:
        self._settings = settings
        self._repository = repository
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="server")
        self._thread.start()
        self._ready.result()
        self.address = f"127.0.0.1:{self.server.port}"

    def call(self, function: Any) -> Any:
        """Runs a function, or a coroutine function, on the server's event loop and returns its result."""

        async def run() -> Any:
            result = function()
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: new_event_loop(self._settings.event_loop)) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            self.server = Server(self._settings, self._repository)
            await self.server.start()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        await self._stopping.wait()
        await self.server.stop()


@contextmanager
def running_server(repository: Repository | None = None, **settings: Any) -> Iterator[RunningServer]:
    """Serves the zoo, or a repository, until the block ends."""
    server = RunningServer(Settings(**{"models": ZOO, "port": 0, "drain_seconds": 5.0, **settings}), repository)
    try:
        yield server
    finally:
        server.stop()
