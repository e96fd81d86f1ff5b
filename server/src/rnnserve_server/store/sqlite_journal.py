"""The journal of ticks in a SQLite file, as the process knows it that writes there.

A tick is a row, whole, whatever the number of its sessions. Of what it says of them only the last is wanted in the end.
So ticks of which nothing is wanted any more are taken out, or written over, and when the journal has grown all the same
the oldest are brought to the sessions' own rows, a few with every commit. Until then this process has in mind where the
sessions stand, as long as nobody else writes: a tick that follows what is in mind is appended without a look at the
file, and a session that is not in mind is as its row says.

A session may be brought to its row by itself, and ticks of it stay: what they say of it is over then, as it is when the
session has ended or was taken over. The row tells, by its epoch and revision (see `Outcome`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from rnnserve_server.store.outcome import wanted
from rnnserve_server.store.standing import Standing, strangers
from rnnserve_server.store.tick import EPOCH, Tick

_LOOK_BYTES = 1 << 19  # a small journal is written to the same pages, which are cached, and copied back once
_MOST_BYTES = 32 << 20  # to bring that to the rows at once, as who opens the file next does, takes a second
_MOST_TICKS = 1024
_MORE_TICKS = 256  # than there were when it was looked through
_MOST_SESSIONS = 4096  # to have in mind before it is looked for those that may be forgotten
_LARGE_BYTES = 65536  # of a tick: less is written in one piece, to a row of its own
_SPARE_ROWS = 8
_FEW_TICKS = 64  # are looked through in a tenth of a millisecond

# As a parameter a tick would be copied three times on its way to the file's pages.
_APPEND = """
INSERT INTO journal (tick) SELECT zeroblob(?1) WHERE (SELECT data_version FROM pragma_data_version) = ?2
"""
_NO_VERSION = -1  # of the file: nothing is in mind


class _Row(NamedTuple):
    """A row of the journal.

    Attributes:
        n: its number.
        nbytes: which it has room for.
    """

    n: int
    nbytes: int


class _Entry(NamedTuple):
    """A tick in the journal: what tells whether anything is wanted of it. Its bytes are in the file.

    Attributes:
        row: where it is.
        ids: its sessions.
        replies_each: how many replies it has of each.
        keep: how many are kept of each.
    """

    row: _Row
    ids: tuple[str, ...]
    replies_each: int
    keep: int


class SqliteJournal:
    """The table `journal` of a file. All that changes it is called within a transaction. What reads ticks raises
    StoreCorrupt if one is damaged.

    Args:
        db: the file.
        page_bytes: of its pages.
    """

    def __init__(self, db: sqlite3.Connection, page_bytes: int) -> None:
        self._db = db
        self._page_bytes = page_bytes
        self._version = _NO_VERSION
        self._numbered = 0  # ticks so far
        # All of these are good for that version of the file:
        self._known = Standing()  # all whose rows may be behind the journal are in it
        self._entries: list[_Entry] = []
        self._nbytes = 0
        self._spare: list[_Row] = []  # rows with large ticks of which nothing is wanted, which are written over
        self._look_at(0, 0)
        self._most_sessions = _MOST_SESSIONS

    def forget(self) -> None:
        """What is in mind may not be what is there."""
        self._version = _NO_VERSION

    def part_with(self, ids: Iterable[str]) -> None:
        """Nothing is in mind of sessions any more: they are as their rows say."""
        for each in ids:
            self._known.forget(each)

    def is_current(self) -> bool:
        """Whether what is in mind is good: nobody else has written since."""
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        return bool(version == self._version)

    @property
    def is_full(self) -> bool:
        """Whether the oldest of it is to be brought to the sessions' rows."""
        return self._nbytes > _MOST_BYTES or len(self._entries) > _MOST_TICKS

    @property
    def is_long(self) -> bool:
        """Whether there is so much in it that it may take long to append something."""
        return self.is_full or (self._is_due and len(self._entries) > _FEW_TICKS)

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Those of sessions of which it is not in mind where they stand."""
        known = self._known.of(tuple(ids))
        return [ids[position] for position in np.flatnonzero(known[:, EPOCH] < 0).tolist()]

    def known(self, ids: Iterable[str]) -> dict[str, list[int]]:
        """Where those of sessions stand that are in mind: epoch, revision and step of each."""
        return self._known.known(ids)

    def know(self, numbers: Mapping[str, Sequence[int]]) -> None:
        """Has in mind where sessions stand that are as their rows say: epoch, revision and step of each."""
        self._known.set(tuple(numbers), np.array(list(numbers.values()), np.int64).reshape(-1, 3))

    def is_followed_by(self, tick: Tick) -> bool:
        """Whether all sessions of a tick go on from where they are known to stand."""
        return not strangers(self._known.of(tick.ids), tick.before)

    def append(self, ticks: Sequence[Tick]) -> bool:
        """Puts ticks that follow what is in mind into the file, if that is good: whether it is. Takes those out of
        which nothing is wanted any more, if it is time to.
        """
        if not all(map(self._put, ticks)):  # if what is in mind is not good, it is not for the first one
            return False
        self._thin()
        return True

    def _put(self, tick: Tick) -> bool:
        self._numbered += 1
        pieces = tick.pieces(self._numbered)
        nbytes = sum(map(len, pieces))
        row = self._row(nbytes)
        if row is None:
            return False
        with self._db.blobopen("journal", "tick", row.n) as blob:
            for piece in pieces if nbytes > _LARGE_BYTES else [b"".join(pieces)]:
                blob.write(piece)
        self._entries.append(_Entry(row, tick.ids, tick.replies_each, tick.keep))
        self._nbytes += row.nbytes
        self._known.set(tick.ids, tick.numbers)
        return True

    @property
    def _is_due(self) -> bool:
        """Whether it is to be looked through for ticks of which nothing is wanted any more."""
        return self._nbytes > self._look_bytes or len(self._entries) > self._look_ticks

    def _look_at(self, nbytes: int, ticks: int) -> None:
        """Has it looked through again when it has grown, from so many bytes and ticks."""
        self._look_bytes = nbytes + max(_LOOK_BYTES, min(nbytes, _MOST_BYTES // 4))
        self._look_ticks = ticks + _MORE_TICKS

    def _thin(self) -> None:
        """Takes out the ticks of which nothing is wanted, if it is time to: of sessions not in mind nothing is."""
        if not self._is_due:
            return
        known = self._known.known({session_id for entry in self._entries for session_id in entry.ids})
        found = wanted([(each.ids, each.replies_each, each.keep) for each in reversed(self._entries)])[::-1]
        kept, gone = list[_Entry](), list[_Entry]()
        for entry, is_wanted in zip(self._entries, found, strict=True):
            (kept if is_wanted and not known.keys().isdisjoint(entry.ids) else gone).append(entry)
        self._entries = kept
        self._release(gone)
        self._look_at(self._nbytes, len(kept))
        if len(self._known) > self._most_sessions:
            self._known = Standing()
            self.know(known)
            self._most_sessions = max(_MOST_SESSIONS, 2 * len(known))

    def _release(self, entries: Sequence[_Entry]) -> None:
        """Nothing is wanted of entries any more that were taken out: large ones are written over."""
        rows = [entry.row for entry in entries]
        self._nbytes -= sum([row.nbytes for row in rows])
        large = [*self._spare, *(row for row in rows if row.nbytes > _LARGE_BYTES)]
        self._spare = large[-_SPARE_ROWS:]
        gone = [*large[:-_SPARE_ROWS], *(row for row in rows if row.nbytes <= _LARGE_BYTES)]
        self._db.executemany("DELETE FROM journal WHERE n = ?", [(row.n,) for row in gone])

    def take_oldest(self, appended: int) -> list[Tick]:
        """Takes the oldest ticks out, somewhat more than so many of the last ones, if it is full: them, the youngest
        first. The caller brings them to the sessions' rows.
        """
        if not self.is_full:
            return []
        nbytes = int(1.5 * sum([entry.row.nbytes for entry in self._entries[-appended:]]))
        most_bytes = max(_MOST_BYTES, self._nbytes - nbytes)
        most_ticks = max(_MOST_TICKS, len(self._entries) - appended - 1)
        taken, left = 0, self._nbytes
        while left > most_bytes or len(self._entries) - taken > most_ticks:
            left -= self._entries[taken].row.nbytes
            taken += 1
        oldest, self._entries = self._entries[:taken], self._entries[taken:]
        ticks = [self._read(entry) for entry in reversed(oldest)]
        self._release(oldest)
        return ticks

    def naming(self, ids: AbstractSet[str]) -> Iterator[Tick]:
        """The ticks that have any of these sessions, the youngest first."""
        return (self._read(entry) for entry in reversed(self._entries) if not ids.isdisjoint(entry.ids))

    def take_all(self) -> list[Tick]:
        """Takes all ticks out of the table: them, the youngest first. The caller brings them to the sessions' rows.
        Nothing is in mind then but that it is empty.
        """
        found = [(n, Tick.unpack(packed)) for n, packed in self._db.execute("SELECT n, tick FROM journal")]
        # Before format 4 each had a row of its own. Of what is in spare rows nothing is wanted.
        found.sort(key=lambda each: each[0] if each[1].number is None else each[1].number, reverse=True)
        if found:
            self._db.execute("DELETE FROM journal")
        (self._version,) = self._db.execute("PRAGMA data_version").fetchone()
        self._known, self._entries, self._nbytes, self._spare = Standing(), [], 0, []
        self._look_at(0, 0)
        return [tick for _, tick in found]

    def _read(self, entry: _Entry) -> Tick:
        (packed,) = self._db.execute("SELECT tick FROM journal WHERE n = ?", (entry.row.n,)).fetchone()
        return Tick.unpack(packed)

    def _row(self, nbytes: int) -> _Row | None:
        """A row for a tick of so many bytes, if what is in mind is good. To make one for a large tick, and to take it
        away again, takes half as long as to write and store it.
        """
        large = nbytes > _LARGE_BYTES
        fitting = [row for row in self._spare if nbytes <= row.nbytes] if large else []
        if fitting:
            if not self.is_current():
                return None
            row = min(fitting, key=attrgetter("nbytes"))
            self._spare.remove(row)
            return row
        room = -(-nbytes // self._page_bytes) * self._page_bytes if large else nbytes
        added = self._db.execute(_APPEND, (room, self._version))
        if not added.rowcount or added.lastrowid is None:
            return None
        return _Row(added.lastrowid, room)
