"""The journal that a server pushes its ticks to in Redis, as the server knows it.

See `rnnserve_server.store.scripts` for what a journal is and who may do what with one.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from rnnserve_server.store import scripts
from rnnserve_server.store.line import Command
from rnnserve_server.store.outcome import wanted
from rnnserve_server.store.standing import Standing, strangers
from rnnserve_server.store.tick import Tick, bytes_of

# To fold a journal keeps other clients waiting: for 10 ms, if there are 16 answers of half a KiB of 64 sessions in it,
# because Lua reads every byte of every string several times. It takes what is wanted of it, not what is there; so it is
# to have room for twice what a thousand sessions want, which is then thinned out, and folded for nobody but who takes
# one of them over. Of more, folds are rare and long: of 2,560 one commit of 480 waits for 0.45 s, where with a quarter
# of the room one of 20 waited for 0.1 s.
_TICKS = 1024
_BYTES = 32 << 20
_SESSIONS = 4096
_LOOK_TICKS = 32  # how many it has when it is looked through for such of which nothing is wanted any more
_LOOK_BYTES = 2 << 20


class _Pushed(NamedTuple):
    """A tick in the journal.

    Attributes:
        ids: its sessions.
        replies: of each of them.
        keep: so many are wanted of each at most.
        length: elements.
        nbytes: bytes.
    """

    ids: Sequence[str]
    replies: int
    keep: int
    length: int
    nbytes: int


class Journal:
    """What a journal has in it if all that was pushed to it has arrived, in order.

    Args:
        name: its key, which no other journal ever had.
        prefix: what the keys of sessions begin with.
        before: the journal before it, which the first tick has folded; or nothing.

    Attributes:
        length: its elements.
    """

    def __init__(self, name: str, prefix: str, before: str) -> None:
        self.name = name
        self.length = 0
        self._prefix = prefix
        self._before = before
        self._nbytes = 0
        self._pushed: list[_Pushed] = []
        self._mark = secrets.token_bytes(16)  # is no element, nor will be
        self._look_ticks, self._look_bytes = _LOOK_TICKS, _LOOK_BYTES
        self._known = Standing()  # the sessions that have something in it
        self._keyed: tuple[Sequence[str], bytes] = ((), b"")  # the sessions of the last tick, and their keys

    @property
    def is_full(self) -> bool:
        """Whether it is to be folded, before that takes too long."""
        return len(self._pushed) >= _TICKS or self._nbytes >= _BYTES or len(self._known) >= _SESSIONS

    @property
    def is_due(self) -> bool:
        """Whether it is to be looked through for ticks of which nothing is wanted."""
        return len(self._pushed) >= self._look_ticks or self._nbytes >= self._look_bytes

    def trim(self) -> Command | None:
        """Takes the ticks out of which nothing is wanted, if there are any: with this command. Its answer is `length`
        as it is then, or the journal is not as it should be, and nothing was taken out.
        """
        found = wanted([(each.ids, each.replies, each.keep) for each in reversed(self._pushed)])[::-1]
        before, start, left, elements = self.length, 0, list[_Pushed](), list[int]()
        for each, kept in zip(self._pushed, found, strict=True):
            if kept:
                left.append(each)
            else:
                elements += start, start + each.length - 1
            start += each.length
        self._pushed = left
        self.length = sum([each.length for each in left])
        self._nbytes = sum([each.nbytes for each in left])
        self._look_ticks, self._look_bytes = max(_LOOK_TICKS, 2 * len(left)), max(_LOOK_BYTES, 2 * self._nbytes)
        if not elements:
            return None
        return ("EVAL", scripts.TRIM.text, 1, self.name, before, self._mark, *elements)

    def strangers(self, tick: Tick) -> Sequence[int]:
        """The positions of those of a tick's sessions that do not go on from here."""
        return strangers(self._known.of(tick.ids), tick.before)

    def push(self, tick: Tick) -> Command:
        """The command that pushes a tick. Its answer is `length` as it is then, or the tick may not be there."""
        before = tick.before
        fresh = strangers(self._known.of(tick.ids), before)
        common = f"{tick.last_used!r},{tick.keep},{tick.timesteps},{tick.states.shape[1]}"
        elements: list[bytes | memoryview] = []
        for each in tick.answered:
            common += f"|{each.timesteps},{each.digests.shape[2]},{each.rest.shape[2]},{len(each)}"
            elements += [bytes_of(each.digests), each.head, bytes_of(each.rest)]
        elements += [bytes_of(tick.states), before.tobytes(), common.encode(), self._keys(tick.ids)]
        command: Command = ("RPUSHX", self.name)
        if fresh or not self.length:
            keys = [f"{self._prefix}{{{tick.ids[position]}}}" for position in fresh]
            numbers, last = before[list(fresh)].tobytes(), "" if self.length else self._before
            command = ("EVALSHA", scripts.TICK.sha, len(keys) + 1, *keys, self.name, numbers, self.length, last)
        self.length += len(elements)
        pushed = _Pushed(tick.ids, tick.replies_each, tick.keep, len(elements), sum(map(len, elements)))
        self._pushed.append(pushed)
        self._nbytes += pushed.nbytes
        self._known.set(tick.ids, tick.numbers)
        return (*command, *elements)

    def forget(self, session_id: str) -> None:
        """A session ends."""
        self._known.forget(session_id)

    def _keys(self, ids: Sequence[str]) -> bytes:
        if ids != self._keyed[0]:
            self._keyed = ids, "\n".join([f"{self._prefix}{{{session_id}}}" for session_id in ids]).encode()
        return self._keyed[1]
