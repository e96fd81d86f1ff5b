"""What a process that serves asks of its surroundings before it begins. Measured by `benchmarks`."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import suppress

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def tune() -> None:
    """Does all of this module. To be called before anything of gRPC is loaded and before any thread is started."""
    keep_freed_memory()
    open_as_many_as_allowed()
    poll_on_one_thread()
    hear_grpc_of_errors_only()


def end_when_told() -> None:
    """Has SIGTERM and SIGINT end the process at once, with status 0 and a word, until a server heeds them.

    They may come while modules or models load. As process 1 of a container nobody else would heed them, and an
    exception in the middle of whatever is loading might be taken for a fault of it.
    """

    def end(number: int, _: object) -> None:
        os.write(2, f"{signal.Signals(number).name} before anything was served: ended\n".encode())
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def keep_freed_memory() -> None:
    """Has glibc keep blocks of up to 32 MiB that are freed, up to 256 MiB in all, for the next message.

    It would give each large block back to the kernel at once, and every page of the next message would be a fault: 1300
    of them for a frame of 64 lanes and 20 steps. Does nothing under another C library.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def open_as_many_as_allowed() -> None:
    """Has the system let the process open as many files and connections as it may ask for: often only 1024 before."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # there is none under Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def inline_seconds(setting: float | None) -> float:
    """How long a run may be expected to take that the event loop does itself, if the setting does not say.

    To hand a run to the engine's thread and back takes two switches of threads, a tenth of a frame of 256 lanes. On
    one core nothing is gained for them: the loop would only wait for the same core.
    """
    if setting is not None:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0.02 if cores == 1 else 0.0005


class Ebb:
    """Has glibc give freed memory back to the system after a flood; otherwise it is kept, see `keep_freed_memory`.

    Args:
        least: bytes that are worth the trouble: a hundred MiB take it some twenty milliseconds.
    """

    def __init__(self, least: int = 32 << 20) -> None:
        self._least = least
        self._most = 0
        self._falling = False
        self._trim: Callable[[int], object] = lambda _: None
        with suppress(OSError, AttributeError):
            self._trim = ctypes.CDLL("libc.so.6").malloc_trim

    def look(self, held: int) -> bool:
        """To be called now and then with the bytes that are held: whether memory was given back, because a quarter of
        what was held since the last time is not any more, or because it was given back at the last look too, and less
        is held than then: sessions that came together may end in two passes.
        """
        self._most = max(self._most, held)
        enough = self._least // 16 if self._falling else max(self._least, self._most // 4)
        self._falling = self._most - held >= max(enough, 1)
        if not self._falling:
            return False
        self._most = held
        self._trim(0)
        return True


def poll_on_one_thread() -> None:
    """Has gRPC read its connections on the thread that waits for them, not hand them to a pool of its own.

    The pool may serve many cores, but the interpreter uses one, and each message pays for the way from thread to
    thread: a fifth of the CPU time of a message. Whoever has set GRPC_EXPERIMENTS knows better.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")


def hear_grpc_of_errors_only() -> None:
    """Has gRPC's core keep to itself what is no error, such as connections that end. Its lines are none of our log's.
    Whoever has set GRPC_VERBOSITY wants more.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
