"""Where sessions stand in a store, as far as whoever writes there knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from rnnserve_server.store.tick import EPOCH, Numbers

_UNKNOWN = -1
_COLUMNS = 256  # of sessions, of which the rows are in mind


class Standing:
    """The epoch, revision and step of sessions, a row for each, as `Numbers`: int64 [N, 3].

    Sessions that are stepped together are named together tick after tick: their rows are looked up once. A row is never
    given to another session, so who has many sessions come and go is to begin anew.
    """

    def __init__(self) -> None:
        self._row: dict[str, int] = {}
        self._numbers = np.full((64, 3), _UNKNOWN)  # [capacity, 3]
        self._rows: dict[tuple[str, ...], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """How many sessions were ever named."""
        return len(self._row)

    def of(self, ids: tuple[str, ...]) -> Numbers:
        """Those of N sessions: -1 where they are not known."""
        rows = self._find(ids)  # which may make another array
        return self._numbers[rows]

    def set(self, ids: tuple[str, ...], numbers: Numbers) -> None:
        """N sessions stand there now."""
        rows = self._find(ids)
        self._numbers[rows] = numbers

    def forget(self, session_id: str) -> None:
        """It is not known any more where a session stands."""
        if (row := self._row.get(session_id)) is not None:
            self._numbers[row] = _UNKNOWN

    def known(self, ids: Iterable[str]) -> dict[str, list[int]]:
        """Those of sessions that are known."""
        rows = {each: row for each in ids if (row := self._row.get(each)) is not None}
        numbers = zip(rows, self._numbers[list(rows.values())].tolist(), strict=True)
        return {each: where for each, where in numbers if where[EPOCH] != _UNKNOWN}

    def _find(self, ids: tuple[str, ...]) -> NDArray[np.int64]:
        rows = self._rows.get(ids)
        if rows is None:
            row = self._row
            rows = np.array([row.setdefault(session_id, len(row)) for session_id in ids], np.int64)
            if len(row) > len(self._numbers):
                more = np.full((len(row), 3), _UNKNOWN)
                self._numbers = np.concatenate([self._numbers, more])
            if len(self._rows) >= _COLUMNS:
                self._rows.clear()
            self._rows[ids] = rows
        return rows


def strangers(known: Numbers, before: Numbers) -> Sequence[int]:
    """The positions of those of N sessions that are not known to stand where they are said to have stood.

    Args:
        known: where they are known to stand, int64 [N, 3].
        before: where they are said to have stood, int64 [N, 3].
    """
    if known.tobytes() == before.tobytes():
        return ()
    found: list[int] = np.flatnonzero((known != before).any(axis=1)).tolist()
    return found
