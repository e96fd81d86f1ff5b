"""Sessions that live as long as the process."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rnnserve_server.store.base import REMEMBERED, End, Ended, Head, Record, Store, Write, check_distinct


class MemoryStore(Store):
    """Keeps sessions in a dict. The plainest store: what the others must be indistinguishable from.

    Args:
        remember: seconds for which it is remembered why a session ended.
    """

    name = "memory"
    shared = False

    def __init__(self, *, remember: float = REMEMBERED) -> None:
        self._remember = remember
        self._live: dict[str, Record] = {}
        self._ended: dict[str, Ended] = {}  # oldest first
        self._due: list[tuple[float, str]] = []  # a heap of when to look at a session

    async def create(self, records: Sequence[Record]) -> list[bool]:
        """See `Store`."""
        check_distinct([record.id for record in records])
        return [self._create(record) for record in records]

    async def take(self, ids: Sequence[str], now: float) -> list[Record | None]:
        """See `Store`."""
        check_distinct(ids)
        taken: list[Record | None] = []
        for session_id in ids:
            record = self._living(session_id, now)
            if record is not None:
                record = self._live[session_id] = replace(record, epoch=record.epoch + 1)
            taken.append(record)
        return taken

    async def peek(self, ids: Sequence[str]) -> list[Head | None]:
        """See `Store`."""
        return [_head(self._live[session_id]) if session_id in self._live else None for session_id in ids]

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        """See `Store`."""
        check_distinct([write.id for write in writes])
        return [self._write(write) for write in writes]

    async def delete(self, owned: Sequence[tuple[str, int]], why: End, now: float) -> list[bool]:
        """See `Store`."""
        check_distinct([session_id for session_id, _ in owned])
        done = []
        for session_id, epoch in owned:
            record, note = self._live.get(session_id), self._ended.get(session_id)
            if record is not None and record.epoch == epoch:
                self._end(record, why, now)
                done.append(True)
            else:
                done.append(record is None and note is not None and (note.epoch, note.why) == (epoch, why))
        return done

    async def ended(self, ids: Sequence[str], now: float) -> list[Ended | None]:
        """See `Store`."""
        notes = map(self._ended.get, ids)
        return [note if note is not None and note.at + self._remember > now else None for note in notes]

    async def expire(self, now: float, limit: int) -> list[str]:
        """See `Store`."""
        for session_id, note in list(self._ended.items()):
            if note.at + self._remember > now:
                break
            del self._ended[session_id]
        expired: list[str] = []
        while self._due and self._due[0][0] <= now and len(expired) < limit:
            _, session_id = heapq.heappop(self._due)
            record = self._live.get(session_id)
            if record is None:
                continue
            if self._living(session_id, now) is None:
                expired.append(session_id)
            else:
                heapq.heappush(self._due, (record.expires_at, session_id))
        return expired

    async def page(self, after: str, limit: int, model: str = "", scope: str = "") -> list[Head]:
        """See `Store`."""
        records = sorted(self._live.values(), key=lambda record: record.cursor)
        wanted = [r for r in records if r.id.startswith(scope) and model in ("", r.meta.model)]
        return [_head(r) for r in wanted if r.cursor > after][:limit]

    async def count_of(self, scope: str) -> int:
        """See `Store`."""
        return sum(session_id.startswith(scope) for session_id in self._live)

    async def count(self, models: Sequence[str]) -> list[int]:
        """See `Store`."""
        found = Counter(record.meta.model for record in self._live.values())
        return [found[model] for model in models]

    async def close(self) -> None:
        """See `Store`."""
        pass

    def _create(self, record: Record) -> bool:
        other = self._living(record.id, record.meta.create_time)
        if other is not None:
            return (other.epoch, other.revision) == (record.epoch, record.revision)
        self._live[record.id] = record
        self._ended.pop(record.id, None)
        heapq.heappush(self._due, (record.expires_at, record.id))
        return True

    def _living(self, session_id: str, now: float) -> Record | None:
        record = self._live.get(session_id)
        if record is not None and (why := record.meta.due(record.last_used, now)):
            self._end(record, why, now)
            return None
        return record

    def _write(self, write: Write) -> bool:
        record = self._live.get(write.id)
        if record is None or record.epoch != write.epoch:
            return False
        if record.revision == write.revision:
            return write.is_in(record)
        if record.revision != write.revision - 1:
            return False
        self._live[write.id] = replace(
            record,
            revision=write.revision,
            step=write.step,
            last_used=write.last_used,
            states=record.states if write.states is None else write.states,
            replies=write.window(record.replies),
        )
        return True

    def _end(self, record: Record, why: End, now: float) -> None:
        del self._live[record.id]
        self._ended.pop(record.id, None)  # so that it goes to the end of the line
        self._ended[record.id] = Ended(why, now, record.epoch)


def _head(record: Record) -> Head:
    return Head(record.id, record.meta, record.epoch, record.revision, record.step, record.last_used)
