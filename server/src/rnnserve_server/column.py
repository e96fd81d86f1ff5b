"""Columns that grow without a pause."""

from __future__ import annotations

import math
import mmap

import numpy as np
from numpy.typing import DTypeLike

from rnnserve_models.engine.base import Array

Index = Array | slice
"""Which rows of a column: int64 [N], or a slice."""

_MAPPED_BYTES = 1 << 18  # less is copied in 0.1 ms, and a process has only so many mappings


def span(rows: Array) -> Index:
    """N rows, at least one, as a slice if they follow one another, as those of a stream's lanes mostly do: a slice is
    read and written several times as fast.
    """
    first, count = int(rows[0]), len(rows)
    if int(rows[-1]) - first == count - 1 and (count < 3 or (rows[1:] - rows[:-1] == 1).all()):
        return slice(first, first + count)
    return rows


class Column:
    """An array [rows, *shape], zeros at first, that grows and gives back the memory of rows that nobody needs.

    A small one is copied when it grows. A large one has a mapping of its own, which the kernel enlarges by moving its
    page table: 400 MiB in 0.1 ms. Rows that were never written take no memory.

    Attributes:
        array: the rows. Another object after `grow`, which has to copy while anybody holds on to the one before.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.array: Array = np.zeros((0, *shape), dtype)
        self._row_bytes = math.prod(shape) * self.array.itemsize
        self._mapping: mmap.mmap | None = None

    def grow(self, rows: int) -> None:
        """Makes it ``rows`` long; the new rows are zeros.

        Raises:
            MemoryError, OSError: there is no more memory; nothing has changed.
        """
        shape, dtype, nbytes = (rows, *self.array.shape[1:]), self.array.dtype, rows * self._row_bytes
        if nbytes < _MAPPED_BYTES:
            self._copy_to(np.zeros(shape, dtype))
            return
        if self._mapping is not None:
            self.array = np.zeros((0, *shape[1:]), dtype)  # a mapping cannot be resized while an array shows it
            try:
                self._mapping.resize(nbytes)
                return
            except (BufferError, SystemError):  # somebody's array shows it; or a system that cannot
                pass
            finally:
                self.array = np.frombuffer(self._mapping, dtype).reshape(-1, *shape[1:])
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._copy_to(np.frombuffer(mapping, dtype).reshape(shape))
        self._mapping = mapping

    def discard(self, start: int, stop: int) -> None:
        """Gives the memory of some rows back to the system, as far as it has pages of its own. What they hold
        afterwards is undefined.
        """
        first = -(-start * self._row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if self._mapping is not None and first < last:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _copy_to(self, larger: Array) -> None:
        larger[: len(self.array)] = self.array
        self.array = larger
