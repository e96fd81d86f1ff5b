"""When which slots must be looked at, because the sessions in them may have expired."""

from __future__ import annotations

import heapq
from array import array

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_server.column import Column

_NEVER = np.iinfo(np.int64).max


class Expiry:
    """Slots of a group in buckets, one for each second at whose end some must be looked at.

    A slot has one entry that counts, whoever has the slot, and it is never later than the slot's session is due: using
    or ending a session, or giving its slot to another, moves nothing. What comes up before it is due is put back.
    """

    def __init__(self) -> None:
        self._second = Column((), np.int64)  # [capacity], the bucket of the slot's entry; _NEVER: it has none
        self._buckets: dict[int, array[int]] = {}
        self._order: list[int] = []  # a heap of the buckets' seconds
        self._held = 0  # entries in all buckets

    @property
    def soonest(self) -> float | None:
        """When the next slot must be looked at."""
        return self._order[0] if self._order else None

    def grow(self, capacity: int) -> None:
        """Makes room for so many slots."""
        before = len(self._second.array)
        self._second.grow(capacity)
        self._second.array[before:] = _NEVER

    def put(self, slots: Array, due: Array) -> None:
        """Has distinct slots looked at within a second after they are due, at the latest.

        Args:
            slots: [N].
            due: float64 [N], seconds of the clock that `take` is asked by.
        """
        seconds = np.ceil(due).astype(np.int64)  # [N]
        sooner = seconds < self._second.array[slots]
        self._enter(slots[sooner], seconds[sooner])
        if self._held > 2 * len(self._second.array):  # most are of slots that have an earlier one
            slots = np.flatnonzero(self._second.array != _NEVER)
            self._buckets, self._order, self._held = {}, [], 0
            self._enter(slots, self._second.array[slots])

    def take(self, now: float, most: int) -> Array:
        """Takes out slots whose second has come.

        Args:
            now: seconds.
            most: entries looked at, at most.

        Returns:
            Distinct slots, [<= most]. Each must be `put` back unless its session ends or ended.
        """
        taken = [np.zeros(0, np.int64)]
        while most > 0 and self._order and self._order[0] <= now:
            second = self._order[0]
            bucket = self._buckets[second]
            entries = np.array(bucket[-most:], np.int64)
            del bucket[-most:]
            if not bucket:
                del self._buckets[heapq.heappop(self._order)]
            most -= len(entries)
            self._held -= len(entries)
            slots = np.sort(entries[self._second.array[entries] == second])
            slots = slots[np.diff(slots, prepend=-1) > 0]  # it may have had an earlier entry in between
            self._second.array[slots] = _NEVER
            taken.append(slots)
        return np.concatenate(taken)

    def _enter(self, slots: Array, seconds: Array) -> None:
        if not len(slots):
            return
        self._second.array[slots] = seconds
        self._held += len(slots)
        order = np.argsort(seconds, kind="stable")
        slots, seconds = slots[order], seconds[order]
        starts = np.flatnonzero(np.diff(seconds)) + 1
        for second, part in zip(seconds[[0, *starts]].tolist(), np.split(slots, starts), strict=True):
            if second not in self._buckets:
                self._buckets[second] = array("q")
                heapq.heappush(self._order, second)
            self._buckets[second].frombytes(part.tobytes())
