"""The journal of ticks in a SQLite file, as the process knows it that writes there.

A tick is a row, whole, whatever the number of its sessions. Of what it says of them only the last is wanted in the end.
So ticks of which nothing is wanted any more are taken out, or written over, and the rest is brought to the sessions'
own rows when the journal has grown all the same. Until then this process has in mind where the sessions stand, as long
as nobody else writes: a tick that follows what is in mind is appended without a look at the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from rnnserve_server.store.outcome import Outcome, wanted
from rnnserve_server.store.standing import Standing, strangers
from rnnserve_server.store.tick import EPOCH, Tick

_LOOK_BYTES = 1 << 19  # a small journal is written to the same pages, which are cached, and copied back once
_MOST_BYTES = 32 << 20
_MOST_TICKS = 1024
_MOST_SESSIONS = 4096  # to bring the journal to their rows keeps commits waiting for some tens of milliseconds
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
    """The table `journal` of a file. All that changes it is called within a transaction.

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
        self._known = Standing()  # all that the journal names are in it
        self._entries: list[_Entry] = []
        self._nbytes = 0
        self._spare: list[_Row] = []  # rows with large ticks of which nothing is wanted, which are written over
        self._look_again = _LOOK_BYTES

    def forget(self) -> None:
        """What is in mind may not be what is there."""
        self._version = _NO_VERSION

    def is_current(self) -> bool:
        """Whether what is in mind is good: nobody else has written since."""
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        return bool(version == self._version)

    @property
    def is_full(self) -> bool:
        """Whether it is to be brought to the sessions' rows, before that takes too long."""
        return self._nbytes > _MOST_BYTES or len(self._entries) > _MOST_TICKS or len(self._known) > _MOST_SESSIONS

    @property
    def is_long(self) -> bool:
        """Whether there is so much in it that it may take long to append something."""
        return self.is_full or (self._nbytes > self._look_again and len(self._entries) > _FEW_TICKS)

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Those of sessions of which it is not in mind where they stand."""
        known = self._known.of(tuple(ids))
        return [ids[position] for position in np.flatnonzero(known[:, EPOCH] < 0).tolist()]

    def know(self, numbers: Mapping[str, Sequence[int]]) -> None:
        """Has in mind where sessions stand: epoch, revision and step of each."""
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

    def _thin(self) -> None:
        if self._nbytes <= self._look_again:
            return
        found = wanted([(each.ids, each.replies_each, each.keep) for each in reversed(self._entries)])[::-1]
        entries = list(zip(self._entries, found, strict=True))
        self._entries = [entry for entry, kept in entries if kept]
        self._nbytes = sum([entry.row.nbytes for entry in self._entries])
        self._look_again = max(_LOOK_BYTES, 2 * self._nbytes)
        unwanted = [entry.row for entry, kept in entries if not kept]
        large = [*self._spare, *(row for row in unwanted if row.nbytes > _LARGE_BYTES)]
        self._spare = large[-_SPARE_ROWS:]
        gone = [*large[:-_SPARE_ROWS], *(row for row in unwanted if row.nbytes <= _LARGE_BYTES)]
        self._db.executemany("DELETE FROM journal WHERE n = ?", [(row.n,) for row in gone])

    def begin_anew(self) -> Outcome:
        """What all that is in the file comes to, which the caller brings to the sessions' rows, and empties the table.
        Nothing is in mind then.
        """
        found = [(n, Tick.unpack(packed)) for n, packed in self._db.execute("SELECT n, tick FROM journal")]
        # Before format 4 each had a row of its own. Of what is in spare rows nothing is wanted.
        found.sort(key=lambda each: each[0] if each[1].number is None else each[1].number, reverse=True)
        (self._version,) = self._db.execute("PRAGMA data_version").fetchone()
        self._known, self._entries, self._nbytes, self._spare = Standing(), [], 0, []
        self._look_again = _LOOK_BYTES
        outcome = Outcome()
        for _, tick in found:
            outcome.add(tick)
        return outcome

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
