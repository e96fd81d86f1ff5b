"""Whose the sessions in memory are, and how many more of them each principal may have.

The id of a session begins with its owner's scope, such as ``alice/``. Sessions without one are nobody's, and are not
counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rnnserve_server.errors import SessionQuotaExceeded

_RETRY_AFTER = 1.0


@dataclass(slots=True)
class _Holding:
    ids: set[str] = field(default_factory=set)
    state_bytes: int = 0


class Owners:
    """What each principal holds.

    Args:
        sessions: a principal's live sessions at most, by its name; 0: as many as there is room for.
        state_bytes: bytes of their states at most, likewise.
    """

    def __init__(self, sessions: Callable[[str], int], state_bytes: Callable[[str], int]) -> None:
        self._sessions = sessions
        self._state_bytes = state_bytes
        self._held: dict[str, _Holding] = {}

    def add(self, ids: Iterable[str], session_bytes: int) -> None:
        """Sessions came into memory."""
        for session_id in ids:
            if scope := scope_of(session_id):
                holding = self._held.setdefault(scope, _Holding())
                holding.ids.add(session_id)
                holding.state_bytes += session_bytes

    def remove(self, session_id: str, session_bytes: int) -> None:
        """A session left memory."""
        holding = self._held.get(scope_of(session_id))
        if holding is not None:
            holding.ids.discard(session_id)
            holding.state_bytes -= session_bytes
            if not holding.ids:
                del self._held[scope_of(session_id)]

    def of(self, scope: str) -> set[str]:
        """The ids of a principal's sessions in memory."""
        holding = self._held.get(scope)
        return set() if holding is None else holding.ids

    def limited(self, scope: str) -> bool:
        """Whether a principal may have no more than so many sessions."""
        return bool(scope) and self._sessions(scope[:-1]) > 0

    def room(
        self, scope: str, session_bytes: int, stored: int | None, *, new: bool
    ) -> tuple[int, SessionQuotaExceeded | None]:
        """How many more sessions a principal may have in memory, and what to say to one more; None: as many as there is
        room for.

        Args:
            scope: the principal's.
            session_bytes: of the states of each.
            stored: how many it has in the store, if there is one.
            new: they are new ones, not some that come from the store.
        """
        if not scope:
            return sys.maxsize, None
        name, holding = scope[:-1], self._held.get(scope) or _Holding()
        room: int = sys.maxsize
        error: SessionQuotaExceeded | None = None
        if new and (most := self._sessions(name)):
            have = max(len(holding.ids), stored or 0)
            room, error = max(most - have, 0), _exceeded("sessions", most, have, name)
        if (most := self._state_bytes(name)) and (left := (most - holding.state_bytes) // max(1, session_bytes)) < room:
            room, error = max(left, 0), _exceeded("state_bytes", most, holding.state_bytes, name)
        return room, error


def scope_of(session_id: str) -> str:
    """What a session's id has before its owner's own name for it; empty: it is nobody's."""
    name, slash, _ = session_id.partition("/")
    return name + slash if slash else ""


def _exceeded(field: str, most: int, have: int, name: str) -> SessionQuotaExceeded:
    return SessionQuotaExceeded(
        f"{name!r} may have {most} {field} and has {have}; close sessions, or try again when others expire",
        metadata={"field": field, "expected": f"at most {most}", "got": have},
        retry_after=_RETRY_AFTER,
    )
