"""Triton beside rnnserve: the server that the `nvidia-pytriton` wheel ships, driven by NVIDIA's `perf_analyzer`.

`make bench-triton` installs both, in an environment of their own; the runner takes them along when they are there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import work
from benchmarks.processes import Server
from benchmarks.rows import Measure, Row, Sample, count
from rnnserve_models.export import export_cell

ENVIRONMENT = Path(__file__).parents[1] / ".cache" / "triton"
PERF_ANALYZER = ENVIRONMENT / "bin" / "perf_analyzer"
_ASK_PYTHON = (
    "import json, sys, sysconfig; print(json.dumps([sys.base_prefix, sysconfig.get_config_var('LIBDIR'), "
    "sysconfig.get_path('purelib'), sysconfig.get_python_version()]))"
)
_MODEL = Path(__file__).with_name("triton_model.py")
_CONFIG = f"""
backend: "python"
max_batch_size: 256
input {{ name: "input" data_type: TYPE_FP32 dims: [-1, {work.FEATURES}] }}
output {{ name: "output" data_type: TYPE_FP32 dims: [-1, {work.UNITS}] }}
instance_group {{ kind: KIND_CPU count: 1 }}
sequence_batching {{ max_sequence_idle_microseconds: 3600000000 oldest {{ max_candidate_sequences: 256 }} }}
"""


_TRIES = 3  # now and then it says that it has seen no request in a window
_TIMEOUT = 60.0
_RATE = re.compile(r"throughput: ([0-9.]+) infer/sec")


def installed() -> bool:
    return PERF_ANALYZER.exists()


def server(folder: Path) -> Server:
    """A Triton that serves the work; it keeps its files in the folder."""
    model = folder / "models" / "lstm"
    (model / "1").mkdir(parents=True)
    shutil.copy(_MODEL, model / "1" / "model.py")
    (model / "1" / "model.onnx").write_bytes(export_cell(work.cell(), work.FEATURES)[0])
    (model / "config.pbtxt").write_text(_CONFIG)
    return serve(folder)


def serve(folder: Path) -> Server:
    """A Triton that serves the models of ``folder / "models"``; it keeps its files in the folder."""
    prefix, libraries, packages, version = _python()
    shipped = Path(packages, "pytriton", "tritonserver")
    shutil.copytree(shipped / "backends", folder / "backends")
    shutil.copy(shipped / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "backends/python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Server(
        shipped / "bin" / "tritonserver",
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        "--allow-http=false",
        "--allow-metrics=false",
        log=folder / "triton.log",
        env=os.environ
        | {
            "LD_LIBRARY_PATH": f"{packages}/nvidia_pytriton.libs:{libraries}",
            "PYTHONHOME": prefix,
            "TRITON_PACKAGES": packages,
        },
    )


@dataclass(frozen=True)
class TritonRow(Row):
    """Sequences, a request under way on each.

    Attributes:
        streaming: over one gRPC stream, else a call for each request.
    """

    streaming: bool = False

    part = "Triton"
    server = "triton"
    model: ClassVar[str] = "lstm"

    @property
    def name(self) -> str:
        way = "streaming" if self.streaming else "unary"
        return f"{count(self.streams, 'sequence')}, {count(self.steps, 'step')}, {way}"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        link_libraries(folder)
        trips = folder / "trips.json"

        async def measure(seconds: float) -> Sample:
            # Three windows are the fewest that it takes; they count as stable however far they are apart.
            command = [PERF_ANALYZER, "-m", self.model, "-i", "grpc", "-u", address]
            command += ["--streaming"] if self.streaming else []
            command += ["--concurrency-range", self.streams, "--shape", f"input:{self.steps},{work.FEATURES}"]
            command += ["--sequence-length", 1_000_000, "--sequence-length-variation", 0]
            command += ["--measurement-interval", max(500, round(seconds * 1000 / 3)), "--max-trials", 3]
            command += ["--stability-percentage", 999, "--profile-export-file", trips]
            for _ in range(_TRIES):
                trips.unlink(missing_ok=True)  # it writes no file that is there
                said = await _said(command, {"LD_LIBRARY_PATH": str(folder)})
                if rate := _RATE.search(said):
                    return _sample(trips, float(rate[1]))
            raise RuntimeError(f"{self.name}: {said}")

        return measure


class OipRow(TritonRow):
    """The same client and the same requests, answered by rnnserve."""

    part = "rnnserve, perf_analyzer"
    server = "rnnserve"
    model = work.MODEL


async def _said(command: list[Any], env: dict[str, str]) -> str:
    """What a command prints."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _TIMEOUT)
    except TimeoutError:
        process.kill()
        raise
    return said.decode()


def _sample(trips: Path, rate: float) -> Sample:
    """What perf_analyzer wrote of each request; the rate is its own, which knows of the time between its windows."""
    requests = json.loads(trips.read_text())["experiments"][0]["requests"]
    each = [(request["response_timestamps"][-1] - request["timestamp"]) / 1e9 for request in requests]
    return Sample(len(each) / rate, each)


def link_libraries(folder: Path) -> None:
    """Puts what perf_analyzer wants into a folder: Triton's wheel has it, under other names."""
    bundled = Path(_python()[2], "nvidia_pytriton.libs")
    for library, wanted in (("libb64-", "libb64.so.0d"), ("libcudart-", "libcudart.so.12")):
        (folder / wanted).symlink_to(next(bundled.glob(f"{library}*")))


@cache
def _python() -> tuple[str, str, str, str]:
    """Of the Python of Triton's environment: where it is installed, its library, its packages, and its version."""
    said = subprocess.check_output([ENVIRONMENT / "bin" / "python", "-c", _ASK_PYTHON], text=True)
    prefix, libraries, packages, version = json.loads(said)
    return prefix, libraries, packages, version
