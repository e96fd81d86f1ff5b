"""Messages that are sent without a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import grpc

from rnnserve_server.wire.call import Call

Told = Callable[[Exception | None], None]
Send = Callable[[Any, Told], None]
"""Sends a message, and tells when it was sent, with None, or why it was not. The next one must wait for that."""


def sender(context: grpc.aio.ServicerContext[Any, Any]) -> Send:
    """What sends the messages of a call at once: a task would do so in the event loop's next turn, which is one system
    call and half of the time of a small message later.
    """
    return context.send if isinstance(context, Call) else partial(_send, context)


def _send(context: grpc.aio.ServicerContext[Any, Any], message: Any, told: Told) -> None:
    _Eager(context.write(message), told)


class _Eager:
    """Runs a coroutine up to where it first waits, now, and on from there when its future is done.

    (Python 3.12 has `asyncio.eager_task_factory` for this.) Not for what asks for the current task, as
    `asyncio.timeout` does: there is none.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, object], told: Told) -> None:
        self._coroutine = coroutine
        self._told = told
        self._step()

    def _step(self, _: asyncio.Future[Any] | None = None) -> None:
        try:
            future = self._coroutine.send(None)
        except StopIteration:
            self._told(None)
        except Exception as error:
            self._told(error)
        else:
            future._asyncio_future_blocking = False  # as a task tells the future that it has heard
            future.add_done_callback(self._step)
