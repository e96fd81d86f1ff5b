"""How the process treats the memory that it frees."""

from __future__ import annotations

import ctypes
from contextlib import suppress

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Has glibc keep blocks of up to 32 MiB that are freed, up to 256 MiB in all, for the next message.

    It would give each large block back to the kernel at once, and every page of the next message would be a fault: 1300
    of them for a frame of 64 lanes and 20 steps. Does nothing under another C library.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
