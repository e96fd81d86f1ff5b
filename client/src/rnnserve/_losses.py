"""Chunks that are on their way whenever a stream is lost: found out, tried alone, and given up in the end."""

from __future__ import annotations

from collections.abc import Collection

#: A chunk that was on its way when so many streams were lost is sent with nothing beside it from then on, and is given
#: up when it was lost so often again: whatever is sent beside it may be to blame for the first, nothing else for these.
LOSSES = 3
LOSSES_ALONE = 5


class Losses:
    """How often chunks, known by their numbers, were lost with their streams. False while none was."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._alone = False  # what is on its way has to be answered before anything else is sent

    def __bool__(self) -> bool:
        return bool(self._counts)

    def hold(self, number: int, *, others: bool) -> bool:
        """Whether a chunk that is next has to wait; `others` are on their way. If not, it counts as sent."""
        suspect = self._counts.get(number, 0) >= LOSSES
        if others and (suspect or self._alone):
            return True
        self._alone = suspect
        return False

    def count(self, lost: Collection[int], waiting: Collection[int]) -> set[int]:
        """A stream is lost, with some chunks on their way, and some that were not sent: which are to be given up."""
        counts = {number: count for number, count in self._counts.items() if number in waiting}
        for number in lost:
            count = self._counts.get(number, 0) + 1
            # That it was lost beside others tells no more than the first times.
            counts[number] = count if len(lost) == 1 else min(count, LOSSES)
        self._counts, self._alone = counts, False
        return {number for number in lost if counts[number] >= LOSSES + LOSSES_ALONE}
