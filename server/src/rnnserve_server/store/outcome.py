"""What ticks of the same sessions come to in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rnnserve_server.store.base import Reply, Write
from rnnserve_server.store.tick import EPOCH, REVISION, Tick


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
    """What ticks of a journal leave of sessions: their last states, and their last replies.

    Args:
        stored: where the sessions stand in the store without the journal: epoch and revision. Of others nothing is
            wanted, nor of what was before or of another epoch: they ended since, or were brought to the store.

    Attributes:
        last: by session, the last tick that has it, and its position there.
    """

    def __init__(self, stored: Mapping[str, tuple[int, int]]) -> None:
        self.last: dict[str, tuple[Tick, int]] = {}
        self._stored = stored
        self._parts: dict[str, list[tuple[Tick, int]]] = {}  # with replies that are kept, youngest first
        # Replies of each session that are kept and not found yet; -1: nothing of it is. Gone: nothing more is wanted.
        self._lacking = dict.fromkeys(stored, -1)
        self._full: Sequence[str] = ()  # sessions of which nothing more is wanted

    @property
    def is_whole(self) -> bool:
        """Whether nothing more is wanted."""
        return not self._lacking

    def add(self, tick: Tick) -> None:
        """Takes a tick into account, the youngest first."""
        if tick.ids == self._full:
            return
        lacking, full = self._lacking, True
        for position, (session_id, numbers) in enumerate(zip(tick.ids, tick.numbers.tolist(), strict=True)):
            left = lacking.get(session_id)
            if left is None:
                continue
            epoch, revision = self._stored[session_id]
            if numbers[EPOCH] != epoch or numbers[REVISION] <= revision:
                del lacking[session_id]
                continue
            if left < 0:
                self.last[session_id] = tick, position
                self._parts[session_id], left = [], tick.keep
            if left > 0:
                self._parts[session_id].append((tick, position))
                left -= tick.replies_each
            if left > 0:
                lacking[session_id], full = left, False
            else:
                del lacking[session_id]
        if full:
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
