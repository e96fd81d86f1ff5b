"""Steps sent ahead of the results that are taken."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
Send = Callable[[Any], "asyncio.Future[T]"]

#: Steps that `stream` sends ahead unless told otherwise.
WINDOW = 32


def check_window(window: int) -> None:
    """Raises ValueError for a window that could never send anything."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


async def pipelined(
    frames: Iterable[Any] | AsyncIterable[Any],
    send: Send[T],
    wait: Callable[[asyncio.Future[T]], Awaitable[T]],
    window: int,
) -> AsyncIterator[T]:
    """The answers to frames, in order, with at most `window` frames sent and not yet answered.

    What is left unanswered when the caller stops early is given up; it may have been applied.
    """
    check_window(window)
    if isinstance(frames, AsyncIterable):
        source = _pipelined_async(frames, send, wait, window)
    else:
        source = _pipelined_sync(frames, send, wait, window)
    try:
        async for answer in source:
            yield answer
    finally:
        await source.aclose()


async def _pipelined_sync(frames: Iterable[Any], send: Send[T], wait: Any, window: int) -> Any:
    sent: deque[asyncio.Future[T]] = deque()
    try:
        for frame in frames:
            sent.append(send(frame))
            while sent and (len(sent) >= window or sent[0].done()):
                yield await wait(sent.popleft())
        while sent:
            yield await wait(sent.popleft())
    finally:
        _give_up(sent)


async def _pipelined_async(frames: AsyncIterable[Any], send: Send[T], wait: Any, window: int) -> Any:
    """A live source has no next frame yet, so a task waits for it while the answers are handed out."""
    sent: asyncio.Queue[asyncio.Future[T] | None] = asyncio.Queue()
    room = asyncio.Semaphore(window)

    async def pump() -> None:
        try:
            async for frame in frames:
                await room.acquire()
                sent.put_nowait(send(frame))
        finally:
            sent.put_nowait(None)

    pumping = asyncio.get_running_loop().create_task(pump())
    current: asyncio.Future[T] | None = None
    try:
        while (current := await sent.get()) is not None:
            answer = await wait(current)
            room.release()
            yield answer
        await pumping  # what the frames raised
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
        left = [current] if current is not None else []
        while not sent.empty():
            if (future := sent.get_nowait()) is not None:
                left.append(future)
        _give_up(left)


def _give_up(futures: Iterable[asyncio.Future[Any]]) -> None:
    for future in futures:
        if not future.cancel() and not future.cancelled():
            future.exception()  # seen, so that asyncio does not report it as never retrieved
