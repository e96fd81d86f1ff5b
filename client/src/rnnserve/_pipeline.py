"""Steps sent ahead of the results that are taken."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any

from rnnserve._chunks import Chunk
from rnnserve._live import Live

ChunkOf = Callable[[Any], Chunk]

#: Steps that `stream` sends ahead unless told otherwise.
WINDOW = 32


def check_window(window: int) -> None:
    """Raises ValueError for a window that could never send anything."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


async def pipelined(
    live: Live,
    frames: Iterable[Any] | AsyncIterable[Any],
    chunk_of: ChunkOf,
    window: int,
    limit: float | None,
) -> AsyncIterator[Any]:
    """The answers to frames, in order, with at most `window` frames sent and not yet answered.

    Where too many chunks of the client are not answered, that is a window of 1. What is left unanswered when the
    caller stops early is given up: it is applied, and its answers are lost.
    """
    check_window(window)
    source = (_from_async if isinstance(frames, AsyncIterable) else _from_plain)(live, frames, chunk_of, window, limit)
    try:
        async for answer in source:
            yield answer
    finally:
        await source.aclose()


async def _from_plain(live: Live, frames: Any, chunk_of: ChunkOf, window: int, limit: float | None) -> Any:
    sent: deque[Chunk] = deque()
    try:
        for frame in frames:
            chunk = chunk_of(frame)
            live.submit(chunk)
            sent.append(chunk)
            while sent and (len(sent) >= window or sent[0].ticket.done() or live.full):
                yield await live.answer(sent.popleft(), limit)
        while sent:
            yield await live.answer(sent.popleft(), limit)
    finally:
        for chunk in sent:
            live.abandon(chunk)


async def _from_async(live: Live, frames: Any, chunk_of: ChunkOf, window: int, limit: float | None) -> Any:
    """A live source has no next frame yet, so a task waits for it while the answers are handed out."""
    sent: asyncio.Queue[Chunk | None] = asyncio.Queue()
    room = asyncio.Semaphore(window)

    async def pump() -> None:
        last: Chunk | None = None
        try:
            async for frame in frames:
                await room.acquire()
                if live.full and last is not None and not last.ticket.done():
                    await asyncio.wait([last.ticket])
                last = chunk_of(frame)
                live.submit(last)
                sent.put_nowait(last)
        finally:
            sent.put_nowait(None)

    pumping = asyncio.get_running_loop().create_task(pump())
    current: Chunk | None = None
    try:
        while (current := await sent.get()) is not None:
            answer = await live.answer(current, limit)
            room.release()
            yield answer
        await pumping  # what the frames raised
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
        left = [current] if current is not None else []
        while not sent.empty():
            if (chunk := sent.get_nowait()) is not None:
                left.append(chunk)
        for chunk in left:
            live.abandon(chunk)
