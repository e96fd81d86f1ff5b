"""Having tasks end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

_AGAIN_SECONDS = 1.0  # what a task that was told may need to clean up


async def end(tasks: Iterable[asyncio.Task[None]], *, told: bool = False) -> None:
    """Cancels tasks, and waits until they have ended. Whoever wants to know how asks the task.

    Args:
        tasks: they.
        told: they were cancelled, or are at their end, and have their time to clean up first.

    They are cancelled again and again, for one cancellation may get lost: before Python 3.12 `asyncio.wait_for`
    returns, as if it had not been cancelled, when what it waits for is done in that very moment. redis-py waits so.
    """
    left = set(tasks)
    while left:
        for task in () if told else left:
            task.cancel()
        told = False
        _, left = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
