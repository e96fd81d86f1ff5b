"""Sessions in one SQLite file.

A commit appends to a write-ahead log, and waits for the disk once. Another process may have the same file open: epochs
and revisions are compared inside the transaction, and a writer waits for the one before it. Who waits for what, and on
which thread, is `rnnserve_server.store.sqlite_file`'s.

A tick is a row of a journal, of which the oldest is brought to the sessions' own rows when it has grown, and a session
that anything else is asked of: see `rnnserve_server.store.sqlite_journal`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from rnnserve_server.store.base import (
    REMEMBERED,
    Applied,
    End,
    Ended,
    Head,
    Meta,
    Record,
    Reply,
    Store,
    StoreMisconfigured,
    Told,
    Write,
    check_distinct,
)
from rnnserve_server.store.outcome import Outcome
from rnnserve_server.store.sqlite_file import PAGE_BYTES, SqliteFile
from rnnserve_server.store.sqlite_journal import SqliteJournal
from rnnserve_server.store.tick import Tick

_APPLICATION = 0x726E6E73  # "rnns"
_VERSION = 5
_TICKS_SINCE = 2  # that version there is a journal of ticks
_READ = (1, 2, 3, 4, _VERSION)

# Replies lie in the order in which they were given, not by session: those that come together are neighbours, and so are
# those that are forgotten together. For the same reason pages are large. `look_at` is when the sweep looks at a session
# next, never later than it is due; uses do not move it, so a commit changes no index.
_SCHEMA = """
CREATE TABLE sessions (
    n INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    step INTEGER NOT NULL,
    last_used REAL NOT NULL,
    look_at REAL NOT NULL,
    cursor TEXT NOT NULL,
    model TEXT NOT NULL,
    meta TEXT NOT NULL,
    states BLOB NOT NULL
) STRICT;
CREATE INDEX sessions_by_cursor ON sessions (cursor);
CREATE INDEX sessions_by_model ON sessions (model, cursor);
CREATE INDEX sessions_by_look ON sessions (look_at);
CREATE TABLE replies (
    session INTEGER NOT NULL,
    first_step INTEGER NOT NULL,
    timesteps INTEGER NOT NULL,
    request_digest BLOB NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (session, first_step)
) STRICT;
CREATE TABLE ended (
    id TEXT PRIMARY KEY,
    why TEXT NOT NULL,
    at REAL NOT NULL,
    epoch INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX ended_by_time ON ended (at);
"""
# What files of format 1 have not.
_JOURNAL = "CREATE TABLE journal (n INTEGER PRIMARY KEY, tick BLOB NOT NULL) STRICT"
_PAGES_BESIDE = 3  # that are written with a tick's own
_BYTES_PER_SECOND = 1e9  # of ticks that are appended, about

_HEAD = "id, meta, epoch, revision, step, last_used"
# One row for a whole batch: the interpreter's lock is given up and taken again at every row.
_COUNTERS = """
SELECT json_group_array(json_array(id, n, epoch, revision, step))
FROM sessions WHERE id IN (SELECT value FROM json_each(?))
"""
_IN_SCOPE = "id >= ? AND id < ?"

P = ParamSpec("P")
T = TypeVar("T")


class SqliteStore(Store):
    """Keeps sessions in a file. `open` makes one.

    Survives the death of the process with either ``synchronous``; that of the machine without loss only with "full",
    which waits for the disk at every commit. With "normal" the last commits may be gone after a power cut, but whole
    ones, and the latest: what is left is a state that once was.
    """

    name = "sqlite"
    shared = True
    embedded = True

    def __init__(
        self,
        path: Path,
        *,
        synchronous: Literal["full", "normal"],
        remember: float,
        patience: float,
        inline_seconds: float,
    ) -> None:
        self._path = path
        self._remember = remember
        self._most_bytes_here = inline_seconds * _BYTES_PER_SECOND
        self._file = SqliteFile(path, synchronous, patience, inline_seconds, forget=lambda: self._journal.forget())
        self._db: sqlite3.Connection
        self._journal: SqliteJournal

    @classmethod
    async def open(
        cls,
        path: Path | str,
        *,
        synchronous: Literal["full", "normal"] = "full",
        remember: float = REMEMBERED,
        patience: float = 5.0,
        inline_seconds: float = 0.0005,
    ) -> SqliteStore:
        """Opens a file, or makes it, for its owner only.

        Args:
            path: the file; two more, with -wal and -shm behind its name, lie beside it.
            synchronous: what a commit waits for: "full" for the disk, "normal" for the operating system.
            remember: seconds for which it is remembered why a session ended.
            patience: seconds to wait for another process's transaction.
            inline_seconds: for which the event loop may be kept to append ticks, and to wait for the disk; 0: both are
                the store's thread's.

        Raises:
            StoreMisconfigured: there can be no such file, or it belongs to another program or a later release.
            StoreCorrupt: the file is damaged.
            StoreUnavailable: another process keeps it locked.
        """
        store = cls(
            Path(path), synchronous=synchronous, remember=remember, patience=patience, inline_seconds=inline_seconds
        )
        try:
            await store._file.run(store._open)
        except BaseException:
            store._file.shutdown()
            raise
        return store

    @property
    def failed(self) -> str:
        """See `Store`."""
        return self._file.failed

    async def create(self, records: Sequence[Record]) -> list[bool]:
        """See `Store`."""
        check_distinct([record.id for record in records])
        return await self._file.run(self._create, records)

    async def take(self, ids: Sequence[str], now: float) -> list[Record | None]:
        """See `Store`."""
        check_distinct(ids)
        return await self._file.run(self._take, ids, now)

    async def peek(self, ids: Sequence[str]) -> list[Head | None]:
        """See `Store`."""
        return await self._file.run(self._peek, ids)

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        """See `Store`."""
        check_distinct([write.id for write in writes])
        return await self._file.run(self._commit, writes)

    async def commit_ticks(self, ticks: Sequence[Tick]) -> Applied:
        """See `Store`."""
        check_distinct([session_id for tick in ticks for session_id in tick.ids])
        if self._append_here(ticks):
            await self._file.run(lambda: None)
        elif not await self._file.run(self._append, ticks):
            return await super().commit_ticks(ticks)  # some are another's, or were sent before: each is looked at
        return _all_of(ticks)

    def begin_commit(self, ticks: Sequence[Tick], told: Told) -> None:
        """See `Store`."""
        check_distinct([session_id for tick in ticks for session_id in tick.ids])

        def synced(error: Exception | None) -> None:
            told(_all_of(ticks) if error is None else error)

        def appended(result: bool | Exception) -> None:
            if result is False:
                super(SqliteStore, self).begin_commit(ticks, told)
            else:
                told(_all_of(ticks) if result is True else result)

        if self._append_here(ticks):
            self._file.synced(synced)
        else:
            self._file.begin(partial(self._append, ticks), appended)

    def _append_here(self, ticks: Sequence[Tick]) -> bool:
        """Puts ticks into the journal without waiting, if that is short work: whether it did."""
        if not self._file.is_idle:
            return False
        journal, nbytes = self._journal, sum([tick.nbytes for tick in ticks])
        if nbytes > self._most_bytes_here or journal.is_long or not all(map(journal.is_followed_by, ticks)):
            return False
        return self._file.here(partial(journal.append, ticks), nbytes // PAGE_BYTES + _PAGES_BESIDE)

    async def delete(self, owned: Sequence[tuple[str, int]], why: End, now: float) -> list[bool]:
        """See `Store`."""
        check_distinct([session_id for session_id, _ in owned])
        return await self._file.run(self._delete, owned, why, now)

    async def ended(self, ids: Sequence[str], now: float) -> list[Ended | None]:
        """See `Store`."""
        return await self._file.run(self._find_ended, ids, now)

    async def expire(self, now: float, limit: int) -> list[str]:
        """See `Store`."""
        return await self._file.run(self._expire, now, limit)

    async def page(self, after: str, limit: int, model: str = "", scope: str = "") -> list[Head]:
        """See `Store`."""
        return await self._file.run(self._page, after, limit, model, scope)

    async def count_of(self, scope: str) -> int:
        """See `Store`."""
        return await self._file.run(self._count_of, scope)

    async def count(self, models: Sequence[str]) -> list[int]:
        """See `Store`."""
        return await self._file.run(self._count, models)

    async def close(self) -> None:
        """See `Store`."""
        await self._file.close()

    # On the store's thread

    def _open(self) -> None:
        if sqlite3.sqlite_version_info < (3, 38):
            raise StoreMisconfigured(f"SQLite 3.38 or later is needed, Python has {sqlite3.sqlite_version}")
        self._file.connect()
        self._db = self._file.db
        self._journal = SqliteJournal(self._db, PAGE_BYTES)
        try:
            self._db.execute("BEGIN")  # else another process might make the tables between two of the looks
            self._check_owner()
            self._db.execute("COMMIT")
            self._file.begin_log()
            with self._file.transaction():
                if self._check_owner():
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version < _TICKS_SINCE:
                    self._db.execute(_JOURNAL)
                if version < _VERSION:
                    self._db.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            self._file.abandon()
            raise

    def _check_owner(self) -> bool:
        """Whether the file is empty. It is left alone if it is another program's."""
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not (application or version or tables):
            return True
        if application != _APPLICATION:
            raise StoreMisconfigured(
                f"{self._path}: expected a file of rnnserve's sessions, got another program's database; "
                "name a file that is not there yet"
            )
        if version not in _READ:
            raise StoreMisconfigured(
                f"{self._path}: expected sessions in format {_VERSION}, got format {version}; "
                "serve them with the release that wrote them, or name another file"
            )
        return False

    def _create(self, records: Sequence[Record]) -> list[bool]:
        with self._file.transaction():
            self._bring([record.id for record in records])
            return [self._create_one(record) for record in records]

    def _create_one(self, record: Record) -> bool:
        other = self._living(record.id, record.meta.create_time)
        if other is not None:
            head, _ = other
            return (head.epoch, head.revision) == (record.epoch, record.revision)
        self._db.execute("DELETE FROM ended WHERE id = ?", (record.id,))
        number = self._db.execute(
            "INSERT INTO sessions (id, epoch, revision, step, last_used, look_at, cursor, model, meta, states) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.id,
                record.epoch,
                record.revision,
                record.step,
                record.last_used,
                record.expires_at,
                record.cursor,
                record.meta.model,
                record.meta.to_json(),
                record.states,
            ),
        ).lastrowid
        self._add_replies([(number, reply) for reply in record.replies])
        return True

    def _take(self, ids: Sequence[str], now: float) -> list[Record | None]:
        with self._file.transaction():
            self._bring(ids)
            taken = [self._take_one(session_id, now) for session_id in ids]
            self._journal.part_with(ids)
        return taken

    def _take_one(self, session_id: str, now: float) -> Record | None:
        found = self._living(session_id, now)
        if found is None:
            return None
        head, number = found
        self._db.execute("UPDATE sessions SET epoch = epoch + 1 WHERE n = ?", (number,))
        (states,) = self._db.execute("SELECT states FROM sessions WHERE n = ?", (number,)).fetchone()
        return Record(
            head.id, head.meta, head.epoch + 1, head.revision, head.step, head.last_used, states, self._replies(number)
        )

    def _peek(self, ids: Sequence[str]) -> list[Head | None]:
        self._settle(ids)
        rows = (self._db.execute(f"SELECT {_HEAD} FROM sessions WHERE id = ?", (each,)).fetchone() for each in ids)
        return [row and _head(row) for row in rows]

    def _append(self, ticks: Sequence[Tick]) -> bool:
        """Puts ticks into the journal, if all of them follow what is stored: whether they do."""
        journal = self._journal
        with self._file.transaction():
            self._look([session_id for tick in ticks for session_id in tick.ids])
            if not all(map(journal.is_followed_by, ticks)):
                return False
            if not journal.append(ticks):  # else it would be told as stored
                raise RuntimeError("somebody else has written to the file within a transaction of this connection")
            self._apply_ticks(journal.take_oldest(len(ticks)))
        return True

    def _look(self, ids: Sequence[str]) -> None:
        """Has in mind where sessions stand, of those that there are."""
        if not self._journal.is_current():
            self._fold()
        if unknown := self._journal.unknown(ids):
            self._journal.know({each: numbers[1:] for each, numbers in self._counters(unknown).items()})

    def _settle(self, ids: Sequence[str]) -> None:
        """Has the rows of sessions say what the journal does."""
        if self._journal.is_current():
            behind = bool(self._behind(ids))
        else:
            behind = bool(self._db.execute("SELECT 1 FROM journal LIMIT 1").fetchone())
        if behind:
            with self._file.transaction():
                self._bring(ids)

    def _behind(self, ids: Sequence[str]) -> list[str]:
        """Those of sessions whose rows are behind the journal, which is as it is in mind."""
        known = self._journal.known(ids)
        if not known:
            return []
        stored = self._counters(list(known))
        return [each for each, numbers in known.items() if each in stored and stored[each][1:] != numbers]

    def _bring(self, ids: Sequence[str]) -> None:
        """As `_settle`, within a transaction."""
        if not self._journal.is_current():
            self._fold()
        elif behind := self._behind(ids):
            self._apply_ticks(self._journal.naming(set(behind)), behind)

    def _fold(self) -> None:
        """Brings the journal to the sessions' rows, and empties it."""
        self._apply_ticks(self._journal.take_all())

    def _apply_ticks(self, ticks: Iterable[Tick], ids: Sequence[str] | None = None) -> None:
        """Brings ticks to the rows of their sessions, or of some of them. The youngest comes first."""
        if ids is None:
            ticks = list(ticks)
            ids = list({session_id for tick in ticks for session_id in tick.ids})
        if not ids:
            return
        stored = self._counters(ids)
        outcome = Outcome({each: (epoch, revision) for each, (_, epoch, revision, _) in stored.items()})
        for tick in ticks:
            outcome.add(tick)
            if outcome.is_whole:
                break
        self._apply([(stored[write.id][0], write) for write in outcome.writes()], [])

    def _counters(self, ids: Sequence[str]) -> dict[str, list[int]]:
        """Number, epoch, revision and step of those sessions that have a row."""
        (found,) = self._db.execute(_COUNTERS, (json.dumps(ids),)).fetchone()
        return {row[0]: row[1:] for row in json.loads(found)}

    def _commit(self, writes: Sequence[Write]) -> list[bool]:
        ids = [write.id for write in writes]
        with self._file.transaction():
            self._bring(ids)
            stored = self._counters(ids)
            applied, follow, back = [], [], []
            for write in writes:
                number, epoch, revision, step = stored.get(write.id, (0, 0, 0, 0))
                fits = epoch == write.epoch and revision == write.revision - 1
                if fits:
                    follow.append((number, write))
                    if write.start < step:
                        back.append((number, write))
                applied.append(fits or (epoch == write.epoch and revision == write.revision and self._is_in(write)))
            self._apply(follow, back)
            self._journal.part_with(ids)
        return applied

    def _apply(self, writes: list[tuple[int, Write]], back: list[tuple[int, Write]]) -> None:
        many = self._db.executemany
        many(
            "UPDATE sessions SET revision = ?, step = ?, last_used = ?, states = ? WHERE n = ?",
            [(w.revision, w.step, w.last_used, w.states, n) for n, w in writes if w.states is not None],
        )
        many(
            "UPDATE sessions SET revision = ?, step = ?, last_used = ? WHERE n = ?",
            [(w.revision, w.step, w.last_used, n) for n, w in writes if w.states is None],
        )
        many(
            "DELETE FROM replies WHERE session = ? AND first_step < ?",
            [(n, w.forget_before) for n, w in writes if w.forget_before],
        )
        many("DELETE FROM replies WHERE session = ? AND first_step + timesteps > ?", [(n, w.start) for n, w in back])
        self._add_replies([(n, reply) for n, w in writes for reply in w.replies])
        many(
            "DELETE FROM replies WHERE session = ?1 AND first_step <= "
            "(SELECT first_step FROM replies WHERE session = ?1 ORDER BY first_step DESC LIMIT 1 OFFSET ?2)",
            [(n, w.keep) for n, w in writes if w.keep],
        )

    def _is_in(self, write: Write) -> bool:
        """Whether a session at a write's epoch and revision is what this very write left behind."""
        row = self._db.execute(f"SELECT {_HEAD}, states, n FROM sessions WHERE id = ?", (write.id,)).fetchone()
        head, states, number = _head(row[:-2]), row[-2], row[-1]
        replies = self._replies(number)
        return write.is_in(
            Record(head.id, head.meta, head.epoch, head.revision, head.step, head.last_used, states, replies)
        )

    def _delete(self, owned: Sequence[tuple[str, int]], why: End, now: float) -> list[bool]:
        done = []
        with self._file.transaction():
            for session_id, epoch in owned:
                row = self._db.execute("SELECT n, epoch FROM sessions WHERE id = ?", (session_id,)).fetchone()
                if row is not None and row[1] == epoch:
                    self._end(row[0], session_id, epoch, why, now)
                    done.append(True)
                else:
                    note = None if row else self._note(session_id)
                    done.append(note is not None and (note.epoch, note.why) == (epoch, why))
        return done

    def _find_ended(self, ids: Sequence[str], now: float) -> list[Ended | None]:
        notes = map(self._note, ids)
        return [note if note is not None and note.at + self._remember > now else None for note in notes]

    def _expire(self, now: float, limit: int) -> list[str]:
        expired: list[str] = []
        with self._file.transaction():
            self._db.execute("DELETE FROM ended WHERE at <= ?", (now - self._remember,))
            due = "SELECT n, id, epoch, last_used, meta FROM sessions WHERE look_at <= ? ORDER BY look_at LIMIT ?"
            while len(expired) < limit and (rows := self._db.execute(due, (now, limit - len(expired))).fetchall()):
                self._bring([row[1] for row in rows])  # they may have been used since
                rows = self._db.execute(due, (now, limit - len(expired))).fetchall()
                for number, session_id, epoch, last_used, document in rows:
                    meta = Meta.from_json(document)
                    if why := meta.due(last_used, now):
                        self._end(number, session_id, epoch, why, now)
                        expired.append(session_id)
                    else:
                        look_at = meta.expires_at(last_used)
                        self._db.execute("UPDATE sessions SET look_at = ? WHERE n = ?", (look_at, number))
        return expired

    def _count(self, models: Sequence[str]) -> list[int]:
        query = "SELECT count(*) FROM sessions WHERE model = ?"
        return [self._db.execute(query, (model,)).fetchone()[0] for model in models]

    def _page(self, after: str, limit: int, model: str, scope: str) -> list[Head]:
        conditions: list[tuple[str, tuple[Any, ...]]] = [("cursor > ?", (after,))]
        if model:
            conditions.append(("model = ?", (model,)))
        if scope:
            conditions.append((_IN_SCOPE, _scope(scope)))
        where = " AND ".join(condition for condition, _ in conditions)
        values = [value for _, part in conditions for value in part]
        query = f"SELECT {_HEAD} FROM sessions WHERE {where} ORDER BY cursor LIMIT ?"
        self._settle([row[0] for row in self._db.execute(query, (*values, limit)).fetchall()])
        return [_head(row) for row in self._db.execute(query, (*values, limit)).fetchall()]

    def _count_of(self, scope: str) -> int:
        (count,) = self._db.execute(f"SELECT count(*) FROM sessions WHERE {_IN_SCOPE}", _scope(scope)).fetchone()
        return int(count)

    # Within a transaction

    def _living(self, session_id: str, now: float) -> tuple[Head, int] | None:
        """A session's head and number. Ends it if it has come to its end."""
        row = self._db.execute(f"SELECT {_HEAD}, n FROM sessions WHERE id = ?", (session_id,)).fetchone()
        if row is None:
            return None
        head, number = _head(row[:-1]), row[-1]
        if why := head.meta.due(head.last_used, now):
            self._end(number, session_id, head.epoch, why, now)
            return None
        return head, number

    def _end(self, number: int, session_id: str, epoch: int, why: End, now: float) -> None:
        self._db.execute("DELETE FROM sessions WHERE n = ?", (number,))
        self._db.execute("DELETE FROM replies WHERE session = ?", (number,))
        self._db.execute("INSERT OR REPLACE INTO ended VALUES (?, ?, ?, ?)", (session_id, why, now, epoch))
        self._journal.part_with([session_id])

    def _note(self, session_id: str) -> Ended | None:
        row = self._db.execute("SELECT why, at, epoch FROM ended WHERE id = ?", (session_id,)).fetchone()
        return row and Ended(End(row[0]), row[1], row[2])

    def _replies(self, number: int) -> tuple[Reply, ...]:
        rows = self._db.execute(
            "SELECT first_step, timesteps, request_digest, payload FROM replies WHERE session = ? ORDER BY first_step",
            (number,),
        )
        return tuple(Reply(*row) for row in rows)

    def _add_replies(self, replies: Sequence[tuple[int | None, Reply]]) -> None:
        self._db.executemany(
            "INSERT INTO replies VALUES (?, ?, ?, ?, ?)",
            [(n, reply.first_step, reply.timesteps, reply.request_digest, reply.payload) for n, reply in replies],
        )


def _scope(scope: str) -> tuple[str, str]:
    """The bounds of ids that begin so."""
    return scope, scope[:-1] + chr(ord(scope[-1]) + 1)


def _head(row: tuple[Any, ...]) -> Head:
    session_id, document, epoch, revision, step, last_used = row
    return Head(session_id, Meta.from_json(document), epoch, revision, step, last_used)


def _all_of(ticks: Sequence[Tick]) -> Applied:
    """That all of them are applied."""
    return [[True] * len(tick.ids) for tick in ticks]
