"""An event loop on a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

from rnnserve._chunks import Chunk
from rnnserve._live import Live
from rnnserve._tickets import deliver
from rnnserve.errors import ClientClosed

T = TypeVar("T")


class Portal:
    """Runs coroutines for other threads, and takes chunks from them without one task for each."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._inbox: deque[tuple[Live, Chunk]] = deque()
        self._woken = False
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rnnserve", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, which is cancelled if the waiting thread is interrupted."""
        if self._closed:
            work.close()
            raise ClientClosed("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, live: Live, chunk: Chunk) -> None:
        """Hands a chunk to the loop; the answer goes to its ticket. Chunks of one thread keep their order."""
        self._inbox.append((live, chunk))
        if self._closed:  # asked only now that whoever closes it can see the chunk
            raise ClientClosed("the client is closed")
        # Threads that find the loop woken but not yet run add to what it will find. Two that wake it do no harm. One
        # whose step would have to wait for others lets it sleep. It looks only now that the loop can see the step:
        # who makes others wait less takes in what is here afterwards.
        if not self._woken and not (chunk.form.paced and chunk.ticket.waited and len(self._inbox) < live.patience):
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._empty)
            except RuntimeError:  # closed since the check above
                raise ClientClosed("the client is closed") from None

    def abandon(self, live: Live, chunk: Chunk) -> bool:
        """Gives up the answer to a chunk that was submitted; whether the chunk keeps its place all the same."""

        async def give_up() -> bool:
            return live.abandon(chunk)

        try:
            return self.run(give_up())
        except ClientClosed:
            return True

    def forget(self, live: Live, chunk: Chunk) -> None:
        """Does the same without waiting to hear of it."""
        with contextlib.suppress(RuntimeError):  # closed: nothing is kept
            self._loop.call_soon_threadsafe(live.abandon, chunk)

    def collect(self) -> None:
        """Takes in what other threads have submitted. Belongs to the loop."""
        while self._inbox:
            live, chunk = self._inbox.popleft()
            try:
                live.submit(chunk)
            except Exception as error:  # whoever waits must hear of it
                deliver(chunk.ticket, None, error)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs a last coroutine, stops the loop and joins the thread. Closes once."""
        with self._closing:
            if self._closed:
                last.close()
                return
            try:
                asyncio.run_coroutine_threadsafe(last, self._loop).result()
            finally:
                self._closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._empty()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    def _empty(self) -> None:
        self._woken = False  # before looking: who comes after this wakes the loop again
        self.collect()
