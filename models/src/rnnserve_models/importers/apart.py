"""Files of strangers, read and tried in a process of their own.

A model is a program, and the libraries that run it are not made for hostile ones: a graph may loop without an end, ask
for more memory than there is, or bring onnxruntime down. `write_apart` and `load_apart` have all that happen in a child
with bounds on time and memory, so that the worst a file can do is to be refused. This file is also that child's
program.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from rnnserve_models.errors import ModelError, reading

SECONDS = 120.0
"""How long a model may take, and a second more for every 2 MB of it."""

MEMORY = 4 << 30
"""How much it may take, and so many times its size."""

MEMORY_RATIO = 16

_PROGRAM = "from rnnserve_models.importers.apart import child; child()"
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
    job = {
        "path": None if path is None else str(path.resolve()),
        "target": str(target.resolve()),
        "options": options,
        "seconds": seconds,
        "memory": MEMORY + MEMORY_RATIO * size,
    }
    with tempfile.TemporaryDirectory(prefix="rnnserve-apart-") as folder:
        report = Path(folder) / "report.json"
        with (
            (Path(folder) / "stderr").open("w+b") as errors,
            subprocess.Popen(
                # -P: what lies where the server was started must not be imported in place of packages.
                (sys.executable, "-P", "-c", _PROGRAM, json.dumps({**job, "report": str(report)})),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # it has a child itself, where it reads HDF5
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            ) as process,
        ):
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired as error:
                raise ModelError(
                    f"it was not loaded after {seconds} s, which is as long as a model may take"
                ) from error
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        try:
            found = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(_ended(process.returncode, Path(folder) / "stderr")) from error
    if "error" in found:
        raise ModelError(found["error"])
    return [str(line) for line in found["findings"]]


def _ended(status: int, errors: Path) -> str:
    """What became of a child that has not said so itself."""
    if status == -signal.SIGXCPU:
        return "it took longer to load than a model may take"
    last = errors.read_bytes()[-_REASON:].decode("utf-8", "replace").strip().splitlines()
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"the process that tried to load it ended with {how}" + (f": {last[-1][:300]}" if last else "")


def child() -> None:
    """The child's program: its only argument says what to do."""
    job = json.loads(sys.argv[1])
    _bound(job["seconds"], job["memory"])
    target = Path(job["target"])
    found: dict[str, Any] = {}
    try:
        with reading("it"):
            found["findings"] = _try(None if job["path"] is None else Path(job["path"]), target, job["options"])
    except (ModelError, OSError) as error:
        found = {"error": str(error).replace(f"{target}{os.sep}", "")}
    Path(job["report"]).write_text(json.dumps(found), encoding="utf-8")
    sys.stderr.flush()
    os._exit(0)  # what a hostile graph has left in the libraries is not torn down, but dropped


def _try(path: Path | None, target: Path, options: dict[str, Any]) -> list[str]:
    from rnnserve_models.load import load_model

    findings: list[str] = []
    if path is not None:
        from rnnserve_models.importers.files import write_model

        findings = write_model(path, target, **options)
    load_model(target)
    return findings


def _bound(seconds: int, memory: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such bounds; the parent watches the time
        return
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (soft, hard))  # the hard one stays: a child of its own sets others
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory ends all the same, this goes before the server
