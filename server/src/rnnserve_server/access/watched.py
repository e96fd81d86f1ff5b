"""Files that may change while the server runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")

_EVERY = 1.0  # seconds between two looks

Seen = tuple[tuple[int, int, int], ...]


class Watched(Generic[T]):
    """What some files say, read again when they have changed.

    They are looked at when somebody asks, once a second at most. What cannot be read changes nothing: what was read
    before stays, and the log says why, once for each change.

    Args:
        paths: the files.
        read: what they say; raises ValueError or OSError if it cannot be used.
        clock: monotonic seconds.

    Raises:
        ValueError, OSError: what they say at first cannot be used.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._paths = paths
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()  # gRPC asks on threads of its own
        self._seen = self._look()  # before it is read: a change in between is seen at the next look
        self._value = read()
        self._next = clock() + _EVERY

    def get(self) -> T:
        """What the files say now, or said when they could be read last."""
        now = self._clock()
        if now < self._next:
            return self._value
        with self._lock:
            if now < self._next:
                return self._value
            self._next = now + _EVERY
            seen = self._look()
            if seen != self._seen:
                try:
                    self._value = self._read()
                    log.info("read again", files=[str(path) for path in self._paths])
                except (OSError, ValueError) as error:
                    log.error("cannot be read again; what was read before stays", error=str(error))
                self._seen = seen
            return self._value

    def _look(self) -> Seen:
        found = []
        for path in self._paths:
            try:
                status = os.stat(path)  # of what a symbolic link leads to: that is how Kubernetes changes secrets
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                found.append((0, 0, 0))
        return tuple(found)
