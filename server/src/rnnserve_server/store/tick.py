"""What one tick changes, in columns: N writes that a store can keep as one piece.

A tick steps many sessions alike. Made into a `Write` for each of them it would cost more than the tick itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rnnserve_server.store.base import Reply, StoreCorrupt, Write

Rows = NDArray[np.uint8]
"""Equal parts of bytes: uint8 [N, bytes of a part], or [R, N, bytes of a part]."""
Numbers = NDArray[np.int64]
"""Where N sessions stand: int64 [N, 3], the epoch, revision and step of each."""

EPOCH, REVISION, STEP = range(3)
"""The columns of `Numbers`."""
_LENGTH_BYTES = 4
_NUMBER_BYTES = 8
_FORMAT_2 = 9  # things that files of format 2 say beside the ids


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """Chunks of each of N sessions that are alike, R of each one after the other, and what was answered.

    Attributes:
        timesteps: time steps of each chunk.
        digests: of the chunks' inputs, [R, N, bytes].
        head: what every payload begins with.
        rest: what follows in each, [R, N, bytes].
    """

    timesteps: int
    digests: Rows
    head: bytes
    rest: Rows

    def __len__(self) -> int:
        """R."""
        return len(self.rest)

    def replies(self, position: int, first_step: int) -> list[Reply]:
        """What one of the N was answered, from that step on, oldest first."""
        steps = range(first_step, first_step + len(self) * self.timesteps, self.timesteps)
        columns = zip(steps, self.digests[:, position], self.rest[:, position], strict=True)
        return [
            Reply(step, self.timesteps, digest.tobytes(), self.head + rest.tobytes()) for step, digest, rest in columns
        ]

    def part(self, start: int, stop: int) -> Answered:
        """That of the sessions from ``start`` to ``stop``."""
        return Answered(self.timesteps, self.digests[:, start:stop], self.head, self.rest[:, start:stop])


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """One or more chunks of each of N distinct sessions, run one after the other. It stands for N writes.

    Attributes:
        ids: [N], the sessions'.
        numbers: where they stand afterwards: the writer's epochs, the numbers of the writes, the steps.
        timesteps: time steps that each session took.
        last_used: when they were used.
        states: their states afterwards.
        answered: the last chunks of each, oldest first: no more than ``keep``.
        keep: replies that a window holds at most.
        forget_before: int64 [N], the first steps of the windows; None if only ``keep`` limits them.
        number: one that was read says here which are older, if it was written with a number.
    """

    ids: tuple[str, ...]
    numbers: Numbers
    timesteps: int
    last_used: float
    states: Rows
    answered: tuple[Answered, ...]
    keep: int
    forget_before: NDArray[np.int64] | None = None
    number: int | None = None

    @property
    def before(self) -> Numbers:
        """Where its sessions stood."""
        before: Numbers = self.numbers - np.array([0, 1, self.timesteps])
        return before

    @property
    def replies_each(self) -> int:
        """How many replies it has of each session."""
        return sum(map(len, self.answered))

    @property
    def nbytes(self) -> int:
        """About as many bytes as it has."""
        return self.states.nbytes + sum([each.digests.nbytes + each.rest.nbytes for each in self.answered])

    def replies(self, position: int) -> list[Reply]:
        """What one of the sessions was answered, oldest first."""
        step = int(self.numbers[position, STEP]) - sum([len(each) * each.timesteps for each in self.answered])
        replies: list[Reply] = []
        for each in self.answered:
            replies += each.replies(position, step)
            step += len(each) * each.timesteps
        return replies

    def part(self, start: int, stop: int) -> Tick:
        """That of the sessions from ``start`` to ``stop``."""
        some = slice(start, stop)
        return Tick(
            self.ids[some],
            self.numbers[some],
            self.timesteps,
            self.last_used,
            self.states[some],
            tuple(each.part(start, stop) for each in self.answered),
            self.keep,
            None if self.forget_before is None else self.forget_before[some],
        )

    def writes(self) -> list[Write]:
        """The same, session by session."""
        floors = [0] * len(self.ids) if self.forget_before is None else self.forget_before.tolist()
        columns = zip(self.ids, self.numbers.tolist(), self.states, floors, strict=True)
        return [
            Write(
                session_id,
                epoch,
                revision,
                step,
                self.last_used,
                states.tobytes(),
                tuple(self.replies(position)),
                floor,
                self.keep,
            )
            for position, (session_id, (epoch, revision, step), states, floor) in enumerate(columns)
        ]

    def pieces(self, number: int) -> list[memoryview]:
        """All of it as bytes, in pieces that follow one another: few, and large ones are not copied.

        Args:
            number: greater than those of the ticks before it.
        """
        answered = tuple(
            [
                (each.timesteps, len(each), each.digests.shape[2], each.head.decode("latin-1"), each.rest.shape[2])
                for each in self.answered
            ]
        )
        floors = "false" if self.forget_before is None else "true"
        what = (
            f"[{_joined(self.ids)},{self.timesteps},{float(self.last_used)!r},{self.keep},{self.states.shape[1]},"
            f"{_as_json(answered)},{floors},{number}]"
        ).encode()
        small = [len(what).to_bytes(_LENGTH_BYTES, "little"), what, self.numbers.tobytes()]
        if self.forget_before is not None:
            small.append(self.forget_before.tobytes())
        pieces = [memoryview(b"".join(small)), bytes_of(self.states)]
        for each in self.answered:
            pieces += [bytes_of(each.digests), bytes_of(each.rest)]
        return pieces

    @classmethod
    def unpack(cls, packed: bytes) -> Tick:
        """What `pieces` made, put together. There may be anything behind it.

        Raises:
            StoreCorrupt: it made something else.
        """
        start = _LENGTH_BYTES + int.from_bytes(packed[:_LENGTH_BYTES], "little")

        def rows(width: int, *replies: int) -> Rows:
            nonlocal start
            size = math.prod((*replies, count, width))
            start += size
            return np.frombuffer(packed, np.uint8, size, start - size).reshape(*replies, count, width)

        try:
            ids, *what = json.loads(packed[_LENGTH_BYTES:start])
            ids = ids if isinstance(ids, list) else ids.split("\n")
            count = len(ids)
            if len(what) == _FORMAT_2:  # numbers and floors are lists
                epochs, revisions, steps, floors, timesteps, last_used, keep, width, answers = what
                numbered = []
                numbers = np.array([epochs, revisions, steps], np.int64).T
                forget_before = np.array(floors, np.int64) if floors else None
            else:
                timesteps, last_used, keep, width, answers, floors, *numbered = what
                numbers = rows(3 * _NUMBER_BYTES).reshape(-1).view(np.int64).reshape(count, 3)
                forget_before = rows(_NUMBER_BYTES).reshape(-1).view(np.int64) if floors else None
            states = rows(width)
            answered = []
            for steps_of, *more, digest, head, rest in answers:
                (replies,) = more or (1,)  # before format 4 it was not said that it is one
                answered.append(Answered(steps_of, rows(digest, replies), head.encode("latin-1"), rows(rest, replies)))
        except (ValueError, TypeError, OverflowError) as error:
            raise StoreCorrupt(f"a stored tick of {len(packed)} bytes cannot be read: {error}") from error
        number = numbered[0] if numbered else None
        return cls(tuple(ids), numbers, timesteps, last_used, states, tuple(answered), keep, forget_before, number)


@lru_cache(maxsize=256)
def _joined(ids: tuple[str, ...]) -> str:
    """The ids as JSON: sessions that are stepped together are named together tick after tick."""
    return json.dumps("\n".join(ids))


_as_json = lru_cache(maxsize=256)(json.dumps)  # what answers are like, which is the same tick after tick


def bytes_of(rows: Rows) -> memoryview:
    """Its bytes, not copied if they lie one after the other."""
    return rows.reshape(-1).data
