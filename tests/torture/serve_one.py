"""What runs in the process of a server that a test may kill. Loaded once, before the processes are forked."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rnnserve_server.process import tune

tune()  # before gRPC is loaded, as the command does

import structlog  # noqa: E402

import rnnserve_models.engine.onnx  # noqa: E402
import rnnserve_models.export  # noqa: E402, F401
import rnnserve_server.store.redis  # noqa: E402
import rnnserve_server.store.sqlite  # noqa: E402, F401
from rnnserve_server.config import Settings  # noqa: E402
from rnnserve_server.server import Server, serve  # noqa: E402
from rnnserve_server.wire.loop import new_event_loop  # noqa: E402
from torture.faults import plant  # noqa: E402

_PR_SET_PDEATHSIG = 1


def run(settings: dict[str, Any], log: Path, ready: Connection, fault: str) -> None:
    """Serves until SIGTERM, and says on which port. Dies with whoever started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test, which then ends its servers
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    if fault:
        plant(fault)
    start = Server.start

    async def started(self: Server) -> None:
        await start(self)
        ready.send(self.port)

    Server.start = started  # type: ignore[method-assign]
    said = Settings(**settings)
    # As the command does it: a line for each stream, which nobody asked for, would be time that the sessions wait.
    level = getattr(logging, said.log_level.upper())
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    with asyncio.Runner(loop_factory=lambda: new_event_loop(said.event_loop)) as runner:
        runner.run(serve(said))
