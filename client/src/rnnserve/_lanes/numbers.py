"""Lanes by their numbers, and which of them are to be opened or closed."""

from __future__ import annotations

import heapq
from collections import deque

from rnnserve._chunks import Lane


class ProtocolViolation(Exception):
    """The server answered something that was not asked."""


class Numbers:
    """A number for each lane, the lowest that is free."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}
        self._free: list[int] = []
        self._opens: deque[Lane] = deque()
        self._closes: list[Lane] = []

    @property
    def members(self) -> list[Lane]:
        """The lanes that are here, but for those that are closed because they went elsewhere."""
        return [lane for lane in self._lanes.values() if not lane.ghost]

    def _lane(self, number: int) -> Lane:
        lane = self._lanes.get(number)
        if lane is None:
            raise ProtocolViolation(f"the server named lane {number}, which is not open")
        return lane

    def _want(self, lane: Lane) -> None:
        if not (lane.open or lane.opening):
            lane.opening = True
            self._opens.append(lane)

    def _new_number(self) -> int:
        return heapq.heappop(self._free) if self._free else len(self._lanes)

    def _release(self, lane: Lane) -> None:
        lane.closing = True
        self._forget(lane)

    def _forget(self, lane: Lane) -> None:
        lane.open = lane.opening = lane.ready = False
        del self._lanes[lane.number]
        if self._lanes:
            heapq.heappush(self._free, lane.number)
        else:
            self._free.clear()
