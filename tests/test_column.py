"""Columns that grow."""

from __future__ import annotations

import numpy as np
import pytest

from rnnserve_server.column import Column


@pytest.mark.parametrize("shape", [(), (3,), (2, 64)])
def test_growing_keeps_the_rows_and_adds_zeros(shape):
    """From nothing to several MiB, by copies and by a mapping, rows stay as they are and new ones are zeros."""
    column, rows = Column(shape, np.int32), 0
    while column.array.nbytes < 8 << 20:
        more = 3 * rows + 1
        column.grow(more)
        assert column.array.shape == (more, *shape)
        assert (column.array[:rows] == np.arange(rows).reshape(-1, *(1,) * len(shape))).all()
        assert not column.array[rows:].any()
        column.array[:] = np.arange(more).reshape(-1, *(1,) * len(shape))
        rows = more


def test_a_large_column_is_not_copied():
    """A column that has a mapping keeps it: growing to 2 GiB takes neither time nor memory."""
    column = Column((1024,), np.float32)
    column.grow(1 << 10)
    mapping = column._mapping
    column.array[-1] = 7
    column.grow(1 << 19)
    assert column._mapping is mapping
    assert (column.array[1023] == 7).all()


def test_growing_is_possible_while_somebody_holds_on_to_the_rows():
    """An array that was taken from a column stays readable when the column grows, and the column keeps its rows."""
    column = Column((), np.int64)
    column.grow(1 << 17)
    kept = column.array
    kept[:] = 5
    column.grow(1 << 18)
    column.array[0] = 6
    assert (kept == 5).all()
    assert (column.array[1 : 1 << 17] == 5).all()


def test_too_much_changes_nothing():
    """A column that cannot grow stays as it was."""
    column = Column((), np.int64)
    column.grow(1 << 17)
    column.array[:] = 5
    with pytest.raises((MemoryError, OSError)):
        column.grow(1 << 59)
    assert (column.array == 5).all()
    assert len(column.array) == 1 << 17


def test_discarding_leaves_the_other_rows():
    """Rows beside discarded ones stay, also those that share a page of memory with them."""
    column = Column((100,), np.int32)
    column.grow(10_000)
    column.array[:] = 9
    column.discard(1001, 3003)
    assert (column.array[:1001] == 9).all()
    assert (column.array[3003:] == 9).all()
    assert not column.array[1100:2900].any()
    Column((), np.int8).discard(0, 0)
