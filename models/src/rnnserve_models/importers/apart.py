"""Files of strangers, read and tried in a process of their own.

A model is a program, and the libraries that run it are not made for hostile ones: a graph may loop without an end, ask
for more memory than there is, or bring onnxruntime down. `write_apart` and `load_apart` have all that happen in a child
with bounds on time and memory, so that the worst a file can do is to be refused.

The children are forked from a process that has loaded the libraries, and nothing else, which takes a second; it ends
when it has had nothing to do for a while, or when who started it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rnnserve_models.errors import ModelError, reading

SECONDS = 120.0
"""How long a model may take, and a second more for every 2 MB of it."""

MEMORY = 4 << 30
"""Bytes of address space that it may take, and so many times its size."""

MEMORY_RATIO = 16

_PROGRAM = "from rnnserve_models.importers.apart import fork_children; fork_children()"
_IDLE_SECONDS = 60.0
_GRACE_SECONDS = 30.0  # beyond a model's own: to load the libraries, and to end
_REASON = 2000  # characters


def write_apart(
    path: Path,
    target: Path,
    *,
    prefix: str | None = None,
    nonlinearity: str = "tanh",
    seconds: float | None = None,
) -> list[str]:
    """`rnnserve_models.importers.files.write_model` in a child process, which loads what it has written.

    ``seconds`` is how long a small file may take; SECONDS unless told.

    Raises:
        ModelError: the file is no model, or takes too long, too much memory, or the process that reads it with it.
    """
    return _apart(path, target, path.stat().st_size, seconds, {"prefix": prefix, "nonlinearity": nonlinearity})


def load_apart(directory: Path, *, seconds: float | None = None) -> None:
    """Loads a model directory in a child process, to see whether it can be.

    Raises:
        ModelError: it is no model, or takes too long, too much memory, or the process that loads it with it.
    """
    _apart(None, directory, sum(each.stat().st_size for each in directory.iterdir()), seconds, {})


def _apart(path: Path | None, target: Path, size: int, least: float | None, options: dict[str, Any]) -> list[str]:
    seconds = math.ceil((SECONDS if least is None else least) + size / 2e6)
    with tempfile.TemporaryDirectory(prefix="rnnserve-apart-") as folder:
        report, errors = Path(folder) / "report.json", Path(folder) / "stderr"
        job = {
            "path": None if path is None else str(path.resolve()),
            "target": str(target.resolve()),
            "options": options,
            "seconds": seconds,
            "memory": MEMORY + MEMORY_RATIO * size,
            "report": str(report),
            "errors": str(errors),
        }
        status = _FORKS.run(job)
        if status in (None, -signal.SIGXCPU):
            raise ModelError(f"it was not loaded after {seconds} s, which is as long as a model may take")
        try:
            found = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            last = errors.read_bytes()[-_REASON:].decode("utf-8", "replace").strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            why = f": {last[-1][:300]}" if last else ""
            raise ModelError(f"the process that tried to load it ended with {how}{why}") from error
    if "error" in found:
        raise ModelError(found["error"])
    return [str(line) for line in found["findings"]]


class _Forks:
    """The process that forks children, for this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, job: dict[str, Any]) -> int | None:
        """Does a job in a child of its own; returns what it ended with, or None if it was given up.

        Raises:
            ModelError: no process can be had.
        """
        with self._lock:
            for _ in range(2):  # it may have ended just now, for it had nothing to do
                try:
                    return self._ask(job)
                except (EOFError, OSError) as error:
                    self._close()
                    failure = error
            raise ModelError(f"no process can be had to load it in: {failure}") from failure

    def close(self) -> None:
        """Ends it."""
        with self._lock:
            self._close()

    def _ask(self, job: dict[str, Any]) -> int | None:
        if self._process is None:
            self._process = subprocess.Popen(
                # -P: what lies where the server was started must not be imported in place of packages.
                (sys.executable, "-P", "-c", _PROGRAM),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        # It watches the time itself; this is for when it cannot.
        ready, _, _ = select.select([self._process.stdout], [], [], job["seconds"] + _GRACE_SECONDS)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise EOFError("it has ended")
        status: int | None = json.loads(line)
        return status

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with process:  # closes its pipes, which ends it, and waits
                process.kill()


_FORKS = _Forks()
atexit.register(_FORKS.close)


def fork_children() -> None:
    """The program of the process that forks: a job a line, and for each a line of what its child ended with."""
    import rnnserve_models.engine.onnx
    import rnnserve_models.export
    import rnnserve_models.importers.files
    import rnnserve_models.importers.keras_file  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it, which then ends it
    while select.select([sys.stdin], [], [], _IDLE_SECONDS)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(job)
        status = _awaited(child, time.monotonic() + job["seconds"])
        sys.stdout.write(json.dumps(status) + "\n")
        sys.stdout.flush()


def _awaited(child: int, deadline: float) -> int | None:
    """What a child ended with; None if it had to be ended. Ends with whoever asked for it."""
    pause = 0.001
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        gone = bool(select.select([sys.stdin], [], [], pause)[0])  # nothing more is asked meanwhile: it is the end
        if gone or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # with its own child, where it reads HDF5
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # it has not come to be a group yet
            os.waitpid(child, 0)
            if gone:
                os._exit(0)
            return None
        pause = min(0.05, 2 * pause)


def _child(job: dict[str, Any]) -> None:
    """Does a job, and ends the process."""
    status = 1
    try:
        os.setsid()
        nothing, errors = os.open(os.devnull, os.O_RDWR), os.open(job["errors"], os.O_WRONLY | os.O_CREAT, 0o600)
        for number, file in enumerate((nothing, nothing, errors)):
            os.dup2(file, number)
        _bound(job["seconds"], job["memory"])
        target = Path(job["target"])
        found: dict[str, Any]
        try:
            with reading("it"):
                found = {"findings": _try(None if job["path"] is None else Path(job["path"]), target, job["options"])}
        except (ModelError, OSError) as error:
            found = {"error": str(error).replace(f"{target}{os.sep}", "")}
        Path(job["report"]).write_text(json.dumps(found), encoding="utf-8")
        status = 0
    finally:
        os._exit(status)  # what a hostile graph has left in the libraries is not torn down, but dropped


def _try(path: Path | None, target: Path, options: dict[str, Any]) -> list[str]:
    from rnnserve_models.importers.files import write_model
    from rnnserve_models.load import load_model

    findings = [] if path is None else write_model(path, target, **options)
    load_model(target)
    return findings


def _bound(seconds: int, memory: int) -> None:
    import resource

    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (soft, hard))  # the hard one stays: a child of its own sets others
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory ends all the same, this goes before the server
