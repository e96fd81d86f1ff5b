"""What ticks of the same sessions come to in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rnnserve_server.store.base import Reply, Write
from rnnserve_server.store.tick import Tick


def wanted(ticks: Iterable[tuple[Sequence[str], int, int]]) -> list[bool]:
    """Of which ticks of a journal anything is wanted: the last states of a session, or one of its last replies.

    Args:
        ticks: the youngest first: the sessions of each, how many replies it has of each of them, and how many replies
            of each are kept.
    """
    found: list[bool] = []
    lacking: dict[str, int] = {}  # replies of each session that are kept and not found yet
    ids: Sequence[str] = ()
    given = most = 0  # replies that the last ticks, all of the same sessions, have of each; that one of those lacks
    for of, replies, keep in ticks:
        fresh = False
        if of != ids:
            lacking.update([(session_id, lacking[session_id] - given) for session_id in ids])
            fresh = not lacking.keys() >= set(of)
            ids, given = of, 0
            most = max([lacking.setdefault(session_id, keep) for session_id in of], default=0)
        found.append(fresh or most > given)
        given += replies
    return found


class Outcome:
    """What a journal of ticks leaves of each session: its last states, and its last replies.

    Attributes:
        last: by session, the last tick that has it, and its position there.
    """

    def __init__(self) -> None:
        self.last: dict[str, tuple[Tick, int]] = {}
        self._parts: dict[str, list[tuple[Tick, int]]] = {}  # with replies that are kept, youngest first
        self._lacking: dict[str, int] = {}  # replies that are kept and not found yet
        self._full: Sequence[str] = ()  # sessions of which nothing more is wanted

    def add(self, tick: Tick) -> None:
        """Takes a tick into account, the youngest first."""
        if tick.ids == self._full:
            return
        lacking = False
        for position, session_id in enumerate(tick.ids):
            if session_id not in self.last:
                self.last[session_id] = tick, position
                self._parts[session_id], self._lacking[session_id] = [], tick.keep
            if self._lacking[session_id] > 0:
                self._parts[session_id].append((tick, position))
                self._lacking[session_id] -= tick.replies_each
                lacking = lacking or self._lacking[session_id] > 0
        if not lacking:
            self._full = tick.ids

    def writes(self) -> Iterator[Write]:
        """The same as one write of each session."""
        for session_id, (tick, position) in self.last.items():
            window: list[Reply] = []
            for each, at in reversed(self._parts[session_id]):
                window += each.replies(at)
            window = window[len(window) - tick.keep :] if len(window) > tick.keep else window
            floor = 0 if tick.forget_before is None else int(tick.forget_before[position])
            whole = len(window) == tick.keep
            epoch, revision, step = tick.numbers[position].tolist()
            if whole and window:
                floor = max(floor, window[0].first_step)
            yield Write(
                session_id,
                epoch,
                revision,
                step,
                tick.last_used,
                tick.states[position].tobytes(),
                tuple([reply for reply in window if reply.first_step >= floor]),
                floor,
                0 if whole else tick.keep,
            )
