"""Servers in processes of their own, which can be killed and started again within a fraction of a second.

They are forked from a process that has loaded all modules. What is run in them is what `rnnserve serve` runs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torture.serve_one"])
_TESTS = Path(__file__).parent.parent
_SECONDS = 60.0
_BACKLOG = 4  # connections that Linux takes for a listener of none, and more


class ServerProcess:
    """A server that is killed and started again at the same port.

    Attributes:
        address: where it is.
        starts: how often it was started.
    """

    def __init__(self, settings: dict[str, Any], log: Path, fault: str = "") -> None:
        self._settings = {"drain_seconds": 5.0, "log_level": "warning", **settings, "port": free_port()}
        self._log = log
        self._fault = fault
        self._process: Any = None
        self._ready: Any = None
        self._asking = threading.Lock()  # its status can be read once: the second of two threads would hear of 255
        self.address = f"127.0.0.1:{self._settings['port']}"
        self.starts = 0

    def start(self, *, wait: bool = True, **settings: Any) -> None:
        """Starts it, and waits until it listens.

        Args:
            wait: whether to wait; else `wait_until_ready` does.
            settings: from now on, instead of those that it had.
        """
        from torture import serve_one

        self._settings |= settings
        self._ready, child = _FORKS.Pipe(duplex=False)
        with contextlib.chdir(_TESTS):  # Python 3.11 passes no path on: what it is to preload must be in the folder
            forkserver.ensure_running()
        arguments = (self._settings, self._log, child, self._fault)
        self._process = _FORKS.Process(target=serve_one.run, args=arguments, daemon=True)
        self._process.start()
        child.close()
        self.starts += 1
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        if not self._ready.poll(_SECONDS):
            raise TimeoutError(f"the server does not start; see {self._log}")
        try:
            self._ready.recv()
        except EOFError:
            raise RuntimeError(f"the server did not start:\n{self.log()}") from None
        finally:
            self._ready.close()

    @property
    def pid(self) -> int:
        """Of its process."""
        return int(self._process.pid)

    @property
    def alive(self) -> bool:
        with self._asking:
            return self._process is not None and self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """What it ended with; None: it runs."""
        with self._asking:
            code: int | None = self._process.exitcode
        return code

    def kill(self) -> None:
        """SIGKILL: it ends in the middle of whatever it does."""
        self._process.kill()
        self._wait()

    def terminate(self, *, wait: bool = True) -> None:
        """SIGTERM: it drains and ends."""
        self._process.terminate()
        if wait:
            self.join()

    def join(self) -> None:
        """Waits until it has ended by itself."""
        self._wait()
        if self.alive:
            self.kill()
            raise TimeoutError(f"the server did not end after SIGTERM; see {self._log}:\n{self.log()[-3000:]}")

    def _wait(self) -> None:
        """Waits until it has ended, without a hold on its status."""
        wait([self._process.sentinel], _SECONDS)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing answers at its address, after it was killed: what is sent there is lost, as if its host were gone."""
        port = int(self._settings["port"])
        with contextlib.ExitStack() as sockets:
            listener = sockets.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(0)
            for _ in range(_BACKLOG):  # nobody accepts them, and what comes when they are full is not answered
                one = sockets.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            yield

    def close(self) -> None:
        if self.alive:
            self.kill()

    def log(self) -> str:
        """What it has logged, in all its lives."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""


@contextlib.contextmanager
def server_process(log: Path, fault: str = "", **settings: Any) -> Iterator[ServerProcess]:
    """A server in a process of its own, for as long as the block runs."""
    server = ServerProcess(settings, log, fault)
    try:
        server.start()
        yield server
    finally:
        server.close()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on, outside of those that the kernel gives to clients."""
    for port in _PORTS:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return port
    raise OSError("no port is free")


def _ports() -> Iterator[int]:
    """Ports below the ephemeral ones, from a place that differs from process to process: each is given once."""
    import os

    first = 20000 + os.getpid() * 37 % 10000
    yield from range(first, first + 2000)


_PORTS = _ports()
