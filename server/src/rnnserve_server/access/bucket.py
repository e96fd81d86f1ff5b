"""Rows a second, by a bucket that fills as time passes."""

from __future__ import annotations

from collections.abc import Callable

from rnnserve_server.errors import QuotaExceeded


class Bucket:
    """A bucket that holds what one second fills in.

    Work is let in while there is anything in it, and may take it below empty: so a frame that is larger than the bucket
    can pass, and what is over a longer time is never more than the rate.

    Args:
        name: whose it is, for messages.
        rate: rows of time steps a second; 0: as many as come.
        clock: monotonic seconds.
    """

    def __init__(self, name: str, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._name = name
        self._clock = clock
        self._level = rate
        self._at = clock()

    def set_rate(self, rate: float) -> None:
        """Changes the rate. A bucket that had none starts full."""
        if rate != self._rate:
            self._level = rate if not self._rate else min(self._level, rate)
            self._rate = rate

    def take(self, rows: int) -> None:
        """Lets rows in.

        Raises:
            QuotaExceeded: the bucket is empty. Nothing was taken.
        """
        if not self._rate:
            return
        now = self._clock()
        self._level = min(self._rate, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level <= 0:
            wait = max(-self._level / self._rate, 0.001)
            raise QuotaExceeded(
                f"{self._name!r} may run {self._rate:g} rows of time steps a second and has run them; "
                f"send it again in {wait:.3f} s",
                metadata={"field": "rows_per_second", "expected": f"at most {self._rate:g}"},
                retry_after=wait,
            )
        self._level -= rows
