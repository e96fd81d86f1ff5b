"""Sessions by their ids: where each is, or why it is here no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from rnnserve_server.errors import (
    SessionAged,
    SessionAway,
    SessionClosed,
    SessionError,
    SessionEvicted,
    SessionExpired,
    SessionTakenOver,
    SessionUnknown,
    SessionUnloaded,
)

_REMEMBERED_ENDS = 65536
_PARTS = 256  # one large dictionary would now and then take tens of milliseconds to grow
_WHYS: tuple[type[SessionError], ...] = (
    SessionClosed,
    SessionExpired,
    SessionTakenOver,
    SessionAway,
    SessionAged,
    SessionEvicted,
    SessionUnloaded,
)


class Directory:
    """The live sessions, and the last that ended."""

    def __init__(self) -> None:
        # By id. Of a live session: the index of its group, and in the low 32 bits its slot. Of an ended one: less than
        # 0, the number of the end and why, so that no more is kept of it than of a live one.
        self._known = [dict[str, int]() for _ in range(_PARTS)]
        self._ended: deque[str] = deque()  # the last ends, oldest first
        self._ends = 0

    def __contains__(self, session_id: str) -> bool:
        return self._part(session_id).get(session_id, -1) >= 0

    def find(self, session_id: str) -> tuple[int, int] | None:
        """The index of a live session's group and its slot in it; None: there is no such session."""
        place = self._part(session_id).get(session_id, -1)
        return None if place < 0 else (place >> 32, place & 0xFFFFFFFF)

    def put(self, ids: Iterable[str], group: int, slots: Iterable[int]) -> None:
        """Sessions are in slots of the group of that index."""
        for slot, session_id in zip(slots, ids, strict=True):
            self._part(session_id)[session_id] = group << 32 | slot

    def forget(self, ids: Iterable[str]) -> None:
        """Live sessions are here no more, and nothing is to be known of them."""
        for session_id in ids:
            del self._part(session_id)[session_id]

    def end(self, ids: Iterable[str], why: type[SessionError]) -> None:
        """Sessions have ended: keeps in mind why, for the last of them."""
        for session_id in ids:
            self._ends += 1
            self._part(session_id)[session_id] = -(self._ends * len(_WHYS) + _WHYS.index(why))
            self._ended.append(session_id)
        while len(self._ended) > _REMEMBERED_ENDS:
            oldest, number = self._ended.popleft(), self._ends - len(self._ended)
            part = self._part(oldest)
            if -part.get(oldest, 0) // len(_WHYS) == number:  # and no later session had the id
                del part[oldest]

    def why(self, session_id: str) -> type[SessionError]:
        """Why a session is not here: SessionUnknown, if that is not known."""
        end = -self._part(session_id).get(session_id, 0)
        return _WHYS[end % len(_WHYS)] if end > 0 else SessionUnknown

    def _part(self, session_id: str) -> dict[str, int]:
        return self._known[hash(session_id) % _PARTS]
