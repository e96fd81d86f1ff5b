"""What ticks of the same sessions come to in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rnnserve_server.store.base import Reply, Write
from rnnserve_server.store.tick import Tick


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

    def add(self, tick: Tick) -> bool:
        """Takes a tick into account, the youngest first: whether anything of it is wanted."""
        if tick.ids == self._full:
            return False
        wanted = lacking = False
        for position, session_id in enumerate(tick.ids):
            if session_id not in self.last:
                self.last[session_id] = tick, position
                self._parts[session_id], self._lacking[session_id] = [], tick.keep
                wanted = True
            if self._lacking[session_id] > 0:
                self._parts[session_id].append((tick, position))
                self._lacking[session_id] -= len(tick.rounds)
                wanted = True
                lacking = lacking or self._lacking[session_id] > 0
        if not lacking:
            self._full = tick.ids
        return wanted

    def writes(self) -> Iterator[Write]:
        """The same as one write of each session."""
        for session_id, (tick, position) in self.last.items():
            window: list[Reply] = []
            for each, at in reversed(self._parts[session_id]):
                window += each.replies(at)
            window = window[len(window) - tick.keep :] if len(window) > tick.keep else window
            floor = tick.forget_before[position] if tick.forget_before else 0
            whole = len(window) == tick.keep
            if whole and window:
                floor = max(floor, window[0].first_step)
            yield Write(
                session_id,
                tick.epochs[position],
                tick.revisions[position],
                tick.steps[position],
                tick.last_used,
                tick.states[position].tobytes(),
                tuple([reply for reply in window if reply.first_step >= floor]),
                floor,
                0 if whole else tick.keep,
            )
