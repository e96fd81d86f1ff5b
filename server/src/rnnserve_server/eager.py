"""Coroutines that begin at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Eager:
    """Runs a coroutine up to where it first waits, now, and on from there when its future is done.

    A task would begin in the event loop's next turn, which is one system call and half of the time of a small write
    later. (Python 3.12 has `asyncio.eager_task_factory` for this.) Not for what asks for the current task, as
    `asyncio.timeout` does: there is none.

    Args:
        coroutine: what to run.
        done: called once, when it has ended, with the exception that it raised or None.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, object], done: Callable[[Exception | None], None]) -> None:
        self._coroutine = coroutine
        self._done = done
        self._step()

    def _step(self, _: asyncio.Future[Any] | None = None) -> None:
        try:
            future = self._coroutine.send(None)
        except StopIteration:
            self._done(None)
        except Exception as error:
            self._done(error)
        else:
            future._asyncio_future_blocking = False  # as a task tells the future that it has heard
            future.add_done_callback(self._step)
