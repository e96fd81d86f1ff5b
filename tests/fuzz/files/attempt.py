"""One file given to who reads it, watched: what came of it, and whether that may be."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fuzz.files.targets import TESTS, Files, Target
from rnnserve_models.errors import UNKNOWN

SECONDS = 20.0
MEGABYTES = 400
"""What one file may take. Those that it is made from are small."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_PROGRAM = tuple(
    os.path.realpath(path)
    for path in (
        sys.prefix,
        sys.base_prefix,
        sysconfig.get_path("stdlib"),
        TESTS.parent,
        "/usr",
        "/lib",
        "/proc",
        "/sys",
    )
)
_FORBIDDEN = ("socket.connect", "socket.bind", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")


class Outcome(NamedTuple):
    """What came of it.

    Attributes:
        what: "loaded", "refused", or the fault.
        fault: whether it is one.
        seconds: that it took.
        reason: why it was refused; the traceback of a fault.
        costly: whether the fault is that it took long or much.
    """

    what: str
    fault: bool
    seconds: float
    reason: str
    costly: bool = False


_touched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what Python is asked to do outside of the folder of an attempt."""
    if _touched is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int):
            return
        if flags & _WRITES or not os.path.realpath(os.fsdecode(path)).startswith(_PROGRAM):
            _touched.append(os.path.realpath(os.fsdecode(path)))
    elif event in ("os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree"):
        if isinstance(arguments[0], int) or (arguments[-1] not in (None, -1) and isinstance(arguments[-1], int)):
            return  # in a directory that is open already, as shutil.rmtree does it
        _touched.append(os.path.realpath(os.fsdecode(arguments[0])))
    elif event in _FORBIDDEN:
        _touched.append(f"{event} {arguments!r:.200}")


_listening = False


@contextmanager
def _watched(watch: bool) -> Iterator[list[str]]:
    global _touched, _listening
    if not watch:
        yield []
        return
    if not _listening:
        sys.addaudithook(_audit)
        _listening = True
    _touched = seen = []
    try:
        yield seen
    finally:
        _touched = None


def write(files: Files, folder: Path) -> None:
    """Writes files into a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


def attempt(target: Target, chance: Random, *, watch: bool = True) -> Outcome:
    """Makes files, has them read, and says what came of it.

    Args:
        target: who reads them.
        chance: what to make them from.
        watch: whether to look at what is opened meanwhile. From then on the process takes a little longer for all that
            it opens, to its end.
    """
    files = target.make(chance)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-files-"))
    own = os.path.realpath(tempfile.gettempdir())
    try:
        folder = scratch / "m" / "1"
        folder.mkdir(parents=True)
        write(files, folder)
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reason, fault = "", ""
        with _watched(watch) as touched:
            try:
                target.read(folder)
                what = "loaded"
            except target.refuses as error:
                what, reason = "refused", str(error)
                if UNKNOWN in reason:
                    what = f"refused unforeseen: {reason.partition(UNKNOWN)[2][2:80]}"
                if not reason or len(reason) > 20_000:
                    fault = f"a reason of {len(reason)} characters"
            except Exception as error:
                fault, what = f"{type(error).__name__}: {error}"[:300], "failed"
                reason = "".join(traceback.format_exception(error)[-8:])[-4000:]
        seconds = time.monotonic() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        outside = [path for path in touched if not path.startswith((f"{scratch}", f"{own}/rnnserve-", "/dev/null"))]
        if what == "loaded" and target.forbidden(files):
            fault = "was loaded although it refers to another file"
        elif outside:
            fault = f"went outside: {sorted(set(outside))[:5]}"
        elif seconds > SECONDS:
            fault = f"took {seconds:.1f} s"
        elif grown > MEGABYTES:
            fault = f"took {grown} MB"
        costly = seconds > SECONDS or grown > MEGABYTES or fault.startswith("MemoryError")
        return Outcome(fault or what, bool(fault), seconds, reason, costly)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
