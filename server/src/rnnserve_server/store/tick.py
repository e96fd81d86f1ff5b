"""What one tick changes, in columns: N writes that a store can keep as one piece.

A tick steps many sessions alike. Made into a `Write` for each of them it would cost more than the tick itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rnnserve_server.store.base import Reply, StoreCorrupt, Write

Rows = NDArray[np.uint8]
"""N equal parts of bytes: uint8 [N, bytes of a part]."""

_LENGTH_BYTES = 4


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
        epochs: [N], the writer's.
        revisions: [N], the numbers of the writes.
        steps: [N], the sessions' steps afterwards.
        timesteps: time steps that each session took.
        last_used: when they were used.
        states: their states afterwards.
        rounds: the last chunks of each, oldest first: no more than ``keep``.
        keep: replies that a window holds at most.
        forget_before: [N], the first steps of the windows; empty if only ``keep`` limits them.
    """

    ids: Sequence[str]
    epochs: Sequence[int]
    revisions: Sequence[int]
    steps: Sequence[int]
    timesteps: int
    last_used: float
    states: Rows
    rounds: tuple[Answered, ...]
    keep: int
    forget_before: Sequence[int] = ()

    def replies(self, position: int) -> list[Reply]:
        """What one of the sessions was answered, oldest first."""
        step = self.steps[position] - sum([each.timesteps for each in self.rounds])
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
            self.epochs[some],
            self.revisions[some],
            self.steps[some],
            self.timesteps,
            self.last_used,
            self.states[some],
            tuple(Answered(each.timesteps, each.digests[some], each.head, each.rest[some]) for each in self.rounds),
            self.keep,
            self.forget_before[some],
        )

    def writes(self) -> list[Write]:
        """The same, session by session."""
        floors = self.forget_before or [0] * len(self.ids)
        return [
            Write(
                session_id,
                self.epochs[position],
                self.revisions[position],
                self.steps[position],
                self.last_used,
                self.states[position].tobytes(),
                tuple(self.replies(position)),
                floors[position],
                self.keep,
            )
            for position, session_id in enumerate(self.ids)
        ]

    def pack(self) -> bytes:
        """All of it in one piece."""
        rounds = [
            (each.timesteps, each.digests.shape[1], each.head.decode("latin-1"), each.rest.shape[1])
            for each in self.rounds
        ]
        columns = (self.ids, self.epochs, self.revisions, self.steps, self.forget_before)
        what = json.dumps(
            (*columns, self.timesteps, self.last_used, self.keep, self.states.shape[1], rounds), separators=(",", ":")
        ).encode()
        parts: list[bytes | memoryview] = [
            len(what).to_bytes(_LENGTH_BYTES, "little"),
            what,
            np.ascontiguousarray(self.states).data,
        ]
        for each in self.rounds:
            parts += [np.ascontiguousarray(each.digests).data, np.ascontiguousarray(each.rest).data]
        return b"".join(parts)

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
            what = json.loads(packed[_LENGTH_BYTES:start])
            ids, epochs, revisions, steps, floors, timesteps, last_used, keep, width, rounds = what
            count = len(ids)
            states = rows(width)
            answered = tuple(
                Answered(steps_of, rows(digest), head.encode("latin-1"), rows(rest))
                for steps_of, digest, head, rest in rounds
            )
        except (ValueError, TypeError) as error:
            raise StoreCorrupt(f"a stored tick of {len(packed)} bytes cannot be read: {error}") from error
        return cls(ids, epochs, revisions, steps, timesteps, last_used, states, answered, keep, floors)
