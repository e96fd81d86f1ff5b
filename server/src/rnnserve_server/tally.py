"""A histogram that is cheap to add to: metrics are made of it when they are asked for, not before."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = tuple(float(1 << power) for power in range(13))


class Example(NamedTuple):
    """A value that was seen, and the trace that tells of it.

    Attributes:
        trace_id: 32 hexadecimal digits.
        value: the value.
        at: when, in seconds since the epoch.
    """

    trace_id: str
    value: float
    at: float


class Tally:
    """Counts values by size. To add one is a search among a dozen bounds and two additions.

    Args:
        bounds: the largest value of each bucket, ascending; one more bucket takes what is larger.

    Attributes:
        bounds: the same.
        counts: values in each bucket.
        sum: of all values.
        examples: by bucket, the last value that came with a trace.
    """

    __slots__ = ("bounds", "counts", "examples", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.examples: dict[int, Example] = {}

    def add(self, value: float, trace_id: str = "", at: float = 0.0) -> None:
        """Counts a value; with the trace that tells of it and the time since the epoch, if there is one."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.sum += value
        if trace_id:
            self.examples[bucket] = Example(trace_id, value, at)

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)
