"""A store with a stopwatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from rnnserve_server.store.base import Applied, End, Ended, Head, Record, Store, StoreError, Told, Write
from rnnserve_server.store.tick import Tick
from rnnserve_server.tally import SECONDS, Tally

T = TypeVar("T")


class ObservedStore(Store):
    """Another store, of which it is known how long each operation takes and how often it fails.

    Args:
        store: the other.
        clock: monotonic seconds.
        span: what to be within while an operation of that name is under way.

    Attributes:
        seconds: how long calls took, failed ones too, by operation.
        errors: how many failed, by operation.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float],
        span: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.name = store.name
        self.shared = store.shared
        self.embedded = store.embedded
        self.seconds: dict[str, Tally] = {}
        self.errors: Counter[str] = Counter()
        self._store = store
        self._clock = clock
        self._span = span

    @property
    def failed(self) -> str:
        """See `Store`."""
        return self._store.failed

    async def create(self, records: Sequence[Record]) -> list[bool]:
        """See `Store`."""
        return await self._timed("create", self._store.create(records))

    async def take(self, ids: Sequence[str], now: float) -> list[Record | None]:
        """See `Store`."""
        return await self._timed("take", self._store.take(ids, now))

    async def peek(self, ids: Sequence[str]) -> list[Head | None]:
        """See `Store`."""
        return await self._timed("peek", self._store.peek(ids))

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        """See `Store`."""
        return await self._timed("commit", self._store.commit(writes))

    async def commit_ticks(self, ticks: Sequence[Tick]) -> Applied:
        """See `Store`."""
        return await self._timed("commit", self._store.commit_ticks(ticks))

    def begin_commit(self, ticks: Sequence[Tick], told: Told) -> None:
        """See `Store`."""
        if self._span is not nullcontext:  # it takes a task to be within something
            super().begin_commit(ticks, told)
            return
        start = self._clock()

        def timed(applied: Applied | Exception) -> None:
            self._note("commit", start, failed=isinstance(applied, StoreError))
            told(applied)

        self._store.begin_commit(ticks, timed)

    async def delete(self, owned: Sequence[tuple[str, int]], why: End, now: float) -> list[bool]:
        """See `Store`."""
        return await self._timed("delete", self._store.delete(owned, why, now))

    async def ended(self, ids: Sequence[str], now: float) -> list[Ended | None]:
        """See `Store`."""
        return await self._timed("ended", self._store.ended(ids, now))

    async def expire(self, now: float, limit: int) -> list[str]:
        """See `Store`."""
        return await self._timed("expire", self._store.expire(now, limit))

    async def page(self, after: str, limit: int, model: str = "", scope: str = "") -> list[Head]:
        """See `Store`."""
        return await self._timed("page", self._store.page(after, limit, model, scope))

    async def count_of(self, scope: str) -> int:
        """See `Store`."""
        return await self._timed("count", self._store.count_of(scope))

    async def count(self, models: Sequence[str]) -> list[int]:
        """See `Store`."""
        return await self._timed("count", self._store.count(models))

    async def close(self) -> None:
        """See `Store`."""
        await self._store.close()

    async def _timed(self, operation: str, call: Awaitable[T]) -> T:
        start, failed = self._clock(), False
        try:
            with self._span(operation):
                return await call
        except StoreError:
            failed = True
            raise
        finally:
            self._note(operation, start, failed=failed)

    def _note(self, operation: str, start: float, *, failed: bool) -> None:
        if failed:
            self.errors[operation] += 1
        if operation not in self.seconds:
            self.seconds[operation] = Tally(SECONDS)
        self.seconds[operation].add(self._clock() - start)
