"""What one tick changes, in columns: N writes that a store can keep as one piece.

A tick steps many sessions alike. Made into a `Write` for each of them it would cost more than the tick itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rnnserve_server.store.base import Reply, StoreCorrupt, Write

Rows = NDArray[np.uint8]
"""N equal parts of bytes: uint8 [N, bytes of a part]."""
Numbers = NDArray[np.int64]
"""Where N sessions stand: int64 [N, 3], the epoch, revision and step of each."""

EPOCH, REVISION, STEP = range(3)
"""The columns of `Numbers`."""
_LENGTH_BYTES = 4
_NUMBER_BYTES = 8
_FORMAT_2 = 9  # things that files of format 2 say beside the ids


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """One chunk of each of N sessions, and what was answered.

    Attributes:
        timesteps: time steps of each chunk.
        digests: of the chunks' inputs.
        head: what every payload begins with.
        rest: what follows in each.
    """

    timesteps: int
    digests: Rows
    head: bytes
    rest: Rows

    def reply(self, position: int, first_step: int) -> Reply:
        """What one of the N was answered."""
        payload = self.head + self.rest[position].tobytes()
        return Reply(first_step, self.timesteps, self.digests[position].tobytes(), payload)


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """One or more chunks of each of N distinct sessions, run one after the other. It stands for N writes.

    Attributes:
        ids: [N], the sessions'.
        numbers: where they stand afterwards: the writer's epochs, the numbers of the writes, the steps.
        timesteps: time steps that each session took.
        last_used: when they were used.
        states: their states afterwards.
        rounds: the last chunks of each, oldest first: no more than ``keep``.
        keep: replies that a window holds at most.
        forget_before: int64 [N], the first steps of the windows; None if only ``keep`` limits them.
    """

    ids: tuple[str, ...]
    numbers: Numbers
    timesteps: int
    last_used: float
    states: Rows
    rounds: tuple[Answered, ...]
    keep: int
    forget_before: NDArray[np.int64] | None = None

    @property
    def before(self) -> Numbers:
        """Where its sessions stood."""
        before: Numbers = self.numbers - np.array([0, 1, self.timesteps])
        return before

    def replies(self, position: int) -> list[Reply]:
        """What one of the sessions was answered, oldest first."""
        step = int(self.numbers[position, STEP]) - sum([each.timesteps for each in self.rounds])
        replies = []
        for each in self.rounds:
            replies.append(each.reply(position, step))
            step += each.timesteps
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
            tuple(Answered(each.timesteps, each.digests[some], each.head, each.rest[some]) for each in self.rounds),
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

    def pack(self) -> bytes:
        """All of it in one piece."""
        rounds = [
            (each.timesteps, each.digests.shape[1], each.head.decode("latin-1"), each.rest.shape[1])
            for each in self.rounds
        ]
        floors = self.forget_before is not None
        common = (self.timesteps, self.last_used, self.keep, self.states.shape[1], rounds, floors)
        what = json.dumps(("\n".join(self.ids), *common), separators=(",", ":")).encode()
        parts: list[bytes | memoryview] = [len(what).to_bytes(_LENGTH_BYTES, "little"), what, *self._contents()]
        return b"".join(parts)

    def _contents(self) -> Iterator[memoryview]:
        yield np.ascontiguousarray(self.numbers).data
        if self.forget_before is not None:
            yield np.ascontiguousarray(self.forget_before).data
        yield np.ascontiguousarray(self.states).data
        for each in self.rounds:
            yield np.ascontiguousarray(each.digests).data
            yield np.ascontiguousarray(each.rest).data

    @classmethod
    def unpack(cls, packed: bytes) -> Tick:
        """What `pack` made.

        Raises:
            StoreCorrupt: it made something else.
        """
        start = _LENGTH_BYTES + int.from_bytes(packed[:_LENGTH_BYTES], "little")

        def rows(width: int) -> Rows:
            nonlocal start
            start += count * width
            return np.frombuffer(packed, np.uint8, count * width, start - count * width).reshape(count, width)

        try:
            ids, *what = json.loads(packed[_LENGTH_BYTES:start])
            ids = ids if isinstance(ids, list) else ids.split("\n")
            count = len(ids)
            if len(what) == _FORMAT_2:  # numbers and floors are lists
                epochs, revisions, steps, floors, timesteps, last_used, keep, width, rounds = what
                numbers = np.array([epochs, revisions, steps], np.int64).T
                forget_before = np.array(floors, np.int64) if floors else None
            else:
                timesteps, last_used, keep, width, rounds, floors = what
                numbers = rows(3 * _NUMBER_BYTES).reshape(-1).view(np.int64).reshape(count, 3)
                forget_before = rows(_NUMBER_BYTES).reshape(-1).view(np.int64) if floors else None
            states = rows(width)
            answered = tuple(
                Answered(steps_of, rows(digest), head.encode("latin-1"), rows(rest))
                for steps_of, digest, head, rest in rounds
            )
        except (ValueError, TypeError) as error:
            raise StoreCorrupt(f"a stored tick of {len(packed)} bytes cannot be read: {error}") from error
        return cls(tuple(ids), numbers, timesteps, last_used, states, answered, keep, forget_before)
