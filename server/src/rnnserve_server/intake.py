"""What came in one turn of the event loop, put together.

A hundred streams that send a chunk each cost a hundred messages. Beyond the message they shall cost one: their frames
are joined into one block as they come in, and what is checked, laid out, scheduled, computed and committed is done
once for all of them. A frame of many lanes is as good as that by itself, and stays a block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_server.blocks import Block, Sessions, Sink, Trace, end_to_end, only_outputs
from rnnserve_server.layout import Signature, timesteps, to_call
from rnnserve_server.sessions import Group

_LARGE = 32  # lanes of a frame that is worth a block without others': joined, it would part from what is sent ahead
_ROUNDS_BYTES = 4 << 20  # of rounds that are laid out at once: everybody waits for that


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

    @property
    def nbytes(self) -> int:
        """Bytes of input."""
        return sum([x.nbytes for x in self.inputs.values()])


class _Pile:
    """Frames to be joined, by their sinks. No session has two chunks of one sink in it, which must run one after the
    other; or it is rounds of the very same sessions.
    """

    __slots__ = ("_seen", "_steps", "number", "of", "rounds")

    def __init__(self, number: int) -> None:
        self.number = number
        self.of: dict[Sink, list[Frame]] = {}
        self.rounds: list[Frame] = []  # its only frame and those that go on from there, once one might
        self._steps = 0  # of one of them
        self._seen: dict[Sink, set[int]] = {}  # slots, where a sink has several frames here

    def takes(self, frame: Frame) -> bool:
        """Puts a frame into it, unless its sink has a chunk of one of the frame's sessions here: whether it did."""
        if self.rounds:
            return self._takes_round(frame)
        frames = self.of.get(frame.sink)
        if frames is None:
            self.of[frame.sink] = [frame]
            return True
        slots = frame.sessions.slots
        if frames[0].sessions.slots is slots:  # the same lanes again: the clients that send ahead do that
            if len(frames) > 1 or len(slots) < _LARGE or not _plain(frames[0]):
                return False
            self.rounds, self._steps = [frames[0]], timesteps(frame.sessions.group.options, frame.inputs)
            return self._takes_round(frame)
        if (seen := self._seen.get(frame.sink)) is None:
            seen = self._seen[frame.sink] = set(frames[0].sessions.slots.tolist())
        said = slots.tolist()
        if not seen.isdisjoint(said):
            return False
        seen.update(said)
        frames.append(frame)
        return True

    def _takes_round(self, frame: Frame) -> bool:
        """Puts a frame of the same sink and signature behind the others, if it is the next round."""
        sessions, first, count = frame.sessions, self.rounds[0].sessions, len(self.rounds)
        if not _plain(frame) or frame.nbytes * count >= _ROUNDS_BYTES:
            return False
        goes_on = first.same(sessions) if first.first_steps is None else first.goes_on(sessions, self._steps * count)
        if goes_on:
            self.rounds.append(frame)
        return goes_on

    def gathered(self) -> Gathered:
        """All of them, one sink's after the other's, each sink's in the order in which they came; or the rounds."""
        if len(self.rounds) > 1:
            return Gathered(self.rounds, len(self.rounds))
        return Gathered([frame for frames in self.of.values() for frame in frames], 1)


class Gathered(NamedTuple):
    """Frames that become one block.

    Attributes:
        frames: they, in the order in which they run.
        rounds: as many, if they are rounds of the very same sessions; else 1.
    """

    frames: Sequence[Frame]
    rounds: int


def _plain(frame: Frame) -> bool:
    """Whether its steps could as well be part of a longer frame's, and nobody wants to know of it alone."""
    group = frame.sessions.group
    return frame.mask is None and frame.trace is None and only_outputs(group.options) and not group.model.engine.whole


class Intake:
    """The frames of one model that came since it was last emptied.

    Frames of one sink keep their order, and chunks of one session that are of one sink run one after the other. So what
    a client sends in many frames of a session or two costs what it would in one: it must not hold up the others' turns
    any longer.

    Attributes:
        queued_bytes: bytes of input.
        since: for whoever takes it in to say when the first of them came, if anybody watches.
    """

    def __init__(self) -> None:
        self.queued_bytes = 0
        self.since: float | None = None
        self._lone: tuple[Frame, Signature] | None = None  # the only one, as long as there is no other
        self._frames = 0
        self._piles: list[_Pile] = []
        self._open: dict[tuple[Group, Signature, bool, Sink | None], _Pile] = {}  # the last pile of a kind
        self._last: dict[Sink, int] = {}  # the number of the last pile that has a frame of the sink

    def __len__(self) -> int:
        return self._frames

    def add(self, frame: Frame, signature: Signature) -> None:
        """Takes a frame, whose inputs and mask are known to fit and have that signature."""
        self._frames += 1
        self.queued_bytes += frame.nbytes
        if self._frames == 1:
            self._lone = frame, signature
            return
        if self._lone is not None:
            lone, self._lone = self._lone, None
            self._pile(*lone)
        self._pile(frame, signature)

    def _pile(self, frame: Frame, signature: Signature) -> None:
        """Puts a frame with those that it runs with."""
        alone = frame.sink if len(frame.tags) >= _LARGE else None
        kind = (frame.sessions.group, signature, frame.sessions.first_steps is None, alone)
        pile = self._open.get(kind)
        if pile is None or pile.number < self._last.get(frame.sink, -1) or not pile.takes(frame):
            pile = self._open[kind] = _Pile(len(self._piles))
            pile.takes(frame)
            self._piles.append(pile)
        self._last[frame.sink] = pile.number

    def empty(self) -> list[Gathered]:
        """Takes everything out: the frames to be joined, in the order in which they run."""
        if self._lone is not None:
            (frame, _), self._lone, self._frames, self.queued_bytes = self._lone, None, 0, 0
            return [Gathered([frame], 1)]
        if not self._piles:
            return []
        piles = self._piles
        self._piles, self._open, self._last, self._frames, self.queued_bytes = [], {}, {}, 0, 0
        return [pile.gathered() for pile in piles]


def joined(frames: Sequence[Frame], rounds: int = 1) -> Block:
    """Frames of one group and one signature as one block: side by side, or as so many rounds. What is one sink's, which
    stands together, is one answer a round.
    """
    first = frames[0]
    group = first.sessions.group
    tags, sessions, inputs, mask = first.tags, first.sessions, first.inputs, first.mask
    if rounds > 1:
        calls = [to_call(group.model.engine, group.options, frame.inputs, None) for frame in frames]
        sinks = [(first.sink, len(tags))]
        call = end_to_end(calls)
        return Block(call, group.batch_size, group.options, sinks, tags, sessions, rounds=rounds)
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
        _sinks(frames),
        tags,
        sessions,
    )


def _sinks(frames: Sequence[Frame]) -> list[tuple[Sink, int]]:
    """The sinks, one after the other, and how many chunks are of each."""
    if len(frames) == 1:
        return [(frames[0].sink, len(frames[0].tags))]
    counts: dict[Sink, int] = {}
    for frame in frames:
        counts[frame.sink] = counts.get(frame.sink, 0) + len(frame.tags)
    return list(counts.items())


def _columns(parts: list[Array | None]) -> Array | None:
    """Columns end to end; None if they are None, which all of them are or none."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None
