"""What came in one turn of the event loop, put together.

A hundred streams that send a chunk each cost a hundred messages. Beyond the message they shall cost one: their frames
are joined into one block as they come in, and what is checked, laid out, scheduled, computed and committed is done
once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_server.blocks import Block, Sessions, Sink, Trace
from rnnserve_server.layout import Signature, to_call
from rnnserve_server.sessions import Group


@dataclass(slots=True, eq=False)
class Frame:
    """N chunks of one group and one shape, from one sink.

    Attributes:
        sink: where results go.
        tags: [N], what the sink knows the chunks by.
        sessions: whose chunks they are.
        inputs: every input, [N, batch, time, *shape] ([N, time, batch, *shape] with time_major).
        mask: bool, [N, batch, time] or [N, 1, time] (likewise), or None.
        trace: what whoever traces knows it by; None if nobody does.
    """

    sink: Sink
    tags: Array
    sessions: Sessions
    inputs: Arrays
    mask: Array | None
    trace: Trace | None = None


@dataclass(slots=True, eq=False)
class _Pile:
    """Frames to be joined. No sink has two in it: those might be of one session, and must run one after the other."""

    number: int
    frames: list[Frame] = field(default_factory=list)


class Intake:
    """The frames of one model that came since it was last emptied.

    Frames of one sink keep their order.

    Attributes:
        queued_bytes: bytes of input.
        since: for whoever takes it in to say when the first of them came, if anybody watches.
    """

    def __init__(self) -> None:
        self.queued_bytes = 0
        self.since: float | None = None
        self._piles: list[_Pile] = []
        self._open: dict[tuple[Group, Signature, bool], _Pile] = {}  # the last pile of a kind
        self._last: dict[Sink, int] = {}  # the number of the last pile that has a frame of the sink

    def __len__(self) -> int:
        return sum([len(pile.frames) for pile in self._piles])

    def add(self, frame: Frame, signature: Signature) -> None:
        """Takes a frame, whose inputs and mask are known to fit and have that signature."""
        kind = (frame.sessions.group, signature, frame.sessions.first_steps is None)
        pile = self._open.get(kind)
        if pile is None or pile.number <= self._last.get(frame.sink, -1):
            pile = self._open[kind] = _Pile(len(self._piles))
            self._piles.append(pile)
        pile.frames.append(frame)
        self._last[frame.sink] = pile.number
        for x in frame.inputs.values():
            self.queued_bytes += x.nbytes

    def empty(self) -> list[list[Frame]]:
        """Takes everything out: the frames to be joined, in the order in which they run."""
        if not self._piles:
            return []
        piles = self._piles
        self._piles, self._open, self._last, self.queued_bytes = [], {}, {}, 0
        return [pile.frames for pile in piles]


def joined(frames: Sequence[Frame]) -> Block:
    """Frames of one group and one signature as one block."""
    first = frames[0]
    group = first.sessions.group
    tags, sessions, inputs, mask = first.tags, first.sessions, first.inputs, first.mask
    if len(frames) > 1:
        tags = np.concatenate([frame.tags for frame in frames])  # [N]
        sessions = Sessions(
            group,
            np.concatenate([frame.sessions.slots for frame in frames]),
            np.concatenate([frame.sessions.generations for frame in frames]),
            _columns([frame.sessions.first_steps for frame in frames]),
            min(frame.sessions.ended for frame in frames),
        )
        inputs = {name: np.concatenate([frame.inputs[name] for frame in frames]) for name in inputs}  # [N, ...]
        mask = _columns([frame.mask for frame in frames])  # [N, batch or 1, time]
    return Block(
        to_call(group.model.engine, group.options, inputs, mask),
        group.batch_size,
        group.options,
        [(frame.sink, len(frame.tags)) for frame in frames],
        tags,
        sessions,
    )


def _columns(parts: list[Array | None]) -> Array | None:
    """Columns end to end; None if they are None, which all of them are or none."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None
