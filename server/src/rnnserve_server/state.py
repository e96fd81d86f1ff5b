"""The arena: where sessions keep their states.

One array per state, a slot per session. A slot is set to the model's default when it is given out, never when it is
taken back, so that no session can start from what another left behind.

The lowest free slot is given out first, so that after a peak the sessions that are left stand close together; the
memory between and behind them is given back without moving any, for work that is under way knows them by their slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.spec import StateSpec
from rnnserve_server.column import Column, Index

_GROWN_SLOTS = 1 << 13  # an arena doubles until it grows by so many slots at a time
_PAGE_BYTES = 1 << 16  # states are given back to the system in pieces of so many bytes
_TRIMMED_PAGES = 128  # pieces that are given back at a time, in less than a millisecond


class Arena:
    """States of sessions of one model and one batch size: each an array [capacity, batch_size, *shape].

    Attributes:
        batch_size: rows of one session.
        session_bytes: the bytes of one session's states.
        capacity: slots, given out or not.
    """

    def __init__(self, states: Sequence[StateSpec], batch_size: int) -> None:
        self.batch_size = batch_size
        self.session_bytes = sum(batch_size * spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in states)
        self.capacity = 0
        self._specs = tuple(states)
        self._states = {spec.name: Column((batch_size, *spec.shape), spec.dtype) for spec in states}
        self._shapes = [(spec.name, self._states[spec.name], spec.shape) for spec in states]
        self._used = Column((), np.bool_)
        self._lowest = 0  # no slot below it is free
        fitting = max(64, _PAGE_BYTES // max(1, self.session_bytes))
        self._page = min(_GROWN_SLOTS, 1 << fitting.bit_length() - 1)  # slots of a piece: divides the capacity
        self._touched = np.zeros(0, np.bool_)  # [capacity // page], pieces that may have memory
        self._trimmed = True

    def acquire(self, count: int) -> Array:
        """Gives out slots, the lowest that are free, their states at the model's default.

        When there are no more the arena grows, which takes about a millisecond whatever its size.

        Args:
            count: how many, at least one.

        Returns:
            Their numbers, int64 [count], ascending.
        """
        slots = self._free(count)
        if len(slots) < count:
            self._grow(self.capacity + count - len(slots))
            slots = self._free(count)
        self._used.array[slots] = True
        self._lowest = int(slots[-1]) + 1
        self._touched[slots // self._page] = True
        self.reset(slots)
        return slots

    def release(self, slots: Array) -> None:
        """Takes slots back, N distinct ones that were given out."""
        assert self._used.array[slots].all(), "a session ends once"
        self._used.array[slots] = False
        self._lowest = min(self._lowest, int(slots.min()))
        self._trimmed = False

    def used(self, slots: Array) -> Array:
        """Which of N slots are given out: bool [N]."""
        return self._used.array[slots]

    def all_used(self) -> Array:
        """The slots that are given out, ascending."""
        return np.flatnonzero(self._used.array)

    def reset(self, slots: int | Array, states: Mapping[str, Array] | None = None) -> None:
        """Sets slots to given states, each [batch_size, *shape]; those that are not given, to their default."""
        for spec in self._specs:
            value = states[spec.name] if states and spec.name in states else spec.initial(self.batch_size)
            self._states[spec.name].array[slots] = value

    def gather(self, slots: Index) -> Arrays:
        """Copies the states of N slots: each [N * batch_size, *shape]."""
        found, batch_size = {}, self.batch_size
        for name, column, shape in self._shapes:
            states = column.array[slots].copy() if isinstance(slots, slice) else column.array.take(slots, axis=0)
            found[name] = states.reshape(len(states) * batch_size, *shape)
        return found

    def scatter(self, slots: Index, states: Mapping[str, Array]) -> None:
        """Writes the states of N distinct slots: each [N * batch_size, *shape]."""
        batch_size = self.batch_size
        for name, column, shape in self._shapes:
            state = states[name]
            column.array[slots] = state.reshape(len(state) // batch_size, batch_size, *shape)

    def trim(self) -> bool:
        """Gives memory that holds no session's states back to the system, a bounded amount at a time.

        Returns:
            Whether there may be more of it.
        """
        if self._trimmed or self.capacity < self._page:
            return False
        used = self._used.array.reshape(-1, self._page).any(axis=1)  # [capacity // page]
        empty = np.flatnonzero(self._touched & ~used)
        self._trimmed = len(empty) <= _TRIMMED_PAGES
        empty = empty[:_TRIMMED_PAGES]
        for run in np.split(empty, np.flatnonzero(np.diff(empty) > 1) + 1):
            if len(run):
                for column in self._states.values():
                    column.discard(int(run[0]) * self._page, (int(run[-1]) + 1) * self._page)
        self._touched[empty] = False
        return not self._trimmed

    def _free(self, count: int) -> Array:
        """The lowest free slots, as many as asked for or as there are: int64 [<= count]."""
        for stop in (self._lowest + 4 * count, self.capacity):  # they are seldom far away
            slots = np.flatnonzero(~self._used.array[self._lowest : stop])[:count] + self._lowest
            if len(slots) == count:
                break
        return slots

    def _grow(self, least: int) -> None:
        capacity = max(8, self.capacity)
        while capacity < least:
            capacity += min(capacity, _GROWN_SLOTS)
        for column in (*self._states.values(), self._used):
            column.grow(capacity)
        self._touched = np.pad(self._touched, (0, -(-capacity // self._page) - len(self._touched)))
        self.capacity = capacity
