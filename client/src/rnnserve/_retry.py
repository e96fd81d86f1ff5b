"""When to try again: exponential backoff with full jitter. Pure: clock, chance and sleep are given to it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

#: Seconds of trying before those who wait are told.
RETRY_FOR = 30.0


@dataclass(frozen=True)
class Retry:
    """How to try again, after how long, and until when.

    Attributes:
        limit: seconds of trying without success, from the first failure on; None for ever, 0 never.
        first: the longest wait before the second try; each further one may be `factor` times as long.
        longest: the longest wait that chance may choose.
    """

    limit: float | None = RETRY_FOR
    first: float = 0.05
    factor: float = 2.0
    longest: float = 2.0
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def begin(self) -> Trial:
        """A trial that starts with a failure now."""
        return Trial(self)


class Trial:
    """One time of trouble, from its first failure to a success or to the limit."""

    def __init__(self, policy: Retry) -> None:
        self.tries = 0
        self._policy = policy
        self._started = policy.clock()

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return self._policy.clock() - self._started

    @property
    def left(self) -> float | None:
        """Seconds to its limit; None if it has none."""
        return None if self._policy.limit is None else max(0.0, self._policy.limit - self.seconds)

    def next(self, least: float | None = None) -> float | None:
        """Seconds to wait before the next try, at least what the server asked for; None to give up.

        Full jitter: chance chooses between nothing and the whole backoff, so that clients that lost the same server
        do not come back at the same moment, however many they are.
        """
        policy, least = self._policy, least or 0.0
        left = self.left
        if left is not None and (left <= 0 or least > left):
            return None
        backoff = policy.longest
        if self.tries < 64:  # beyond it the power overflows, and is the longest anyway
            backoff = min(policy.longest, policy.first * policy.factor**self.tries)
        self.tries += 1
        delay = least + policy.chance() * backoff
        return delay if left is None else min(delay, left)
