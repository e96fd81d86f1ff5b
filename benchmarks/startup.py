"""How long it takes until the server answers, and until the client is imported.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.findings import Finding, at_most, markdown
from benchmarks.processes import CLIENT_CORE, Server, pinned, serve

ZOO = Path(__file__).parents[1] / "models" / "zoo"
# The package loads its modules when they are first used, so both clients are.
_IMPORT = """
from time import perf_counter
import numpy, grpc, grpc.aio
before = perf_counter()
import rnnserve
rnnserve.Client, rnnserve.aio.Client
print(perf_counter() - before)
"""


def findings(rounds: int, seconds: float) -> list[Finding]:
    _import_seconds()  # to warm up
    return [
        at_most("`rnnserve serve` on the zoo answers health", 1.5, [_serve_seconds() for _ in range(rounds)], " s"),
        at_most("`import rnnserve` and its clients", 0.2, [_import_seconds() for _ in range(rounds)], " s"),
    ]


def _serve_seconds() -> float:
    """From the start of the process to SERVING."""
    with tempfile.TemporaryDirectory() as folder:
        before = perf_counter()
        with (
            Server(*serve(ZOO), log=Path(folder, "log")) as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            check = health_pb2_grpc.HealthStub(channel).Check
            while check(health_pb2.HealthCheckRequest()).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            return perf_counter() - before


def _import_seconds() -> float:
    with pinned(CLIENT_CORE):
        return float(subprocess.check_output([sys.executable, "-c", _IMPORT]))


if __name__ == "__main__":
    print(markdown(findings(7, 0.5)))
