"""What was run and is not stored yet.

While a store keeps one tick, the next ones run: those of other sessions, and those that go right on with the very same
ones, from the states that the tick before left behind (see `Scheduler.ran`). What was run meanwhile is stored together,
in the order in which it was run, and as one write where it is of the same sessions. In memory, and for everybody else,
a session stands where it is stored.

Pure: no I/O, no clock of its own, no threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rnnserve_server.blocks import Block, Sessions, goes_on
from rnnserve_server.observer import Ticked


@dataclass(frozen=True, slots=True)
class Ran:
    """The blocks of sessions that a tick brought to their end.

    Attributes:
        blocks: they, no session in two of them.
        watched: the tick, if anybody watches.
    """

    blocks: Sequence[Block]
    watched: Ticked | None


Chain = list[Block]
"""Blocks of the very same sessions, each where the one before it ends."""


class Behind:
    """Ticks in the order in which they were run."""

    def __init__(self) -> None:
        self._ticks: deque[Ran] = deque()

    def __len__(self) -> int:
        return len(self._ticks)

    def add(self, ran: Ran) -> None:
        """One more was run."""
        self._ticks.append(ran)

    def take(self) -> tuple[list[Ran], list[Chain]]:
        """Takes out the ticks that can be stored at once, one at least: they, and their blocks as chains, no session in
        two of them.
        """
        if len(self._ticks) == 1:
            ran = self._ticks.popleft()
            return [ran], [[block] for block in ran.blocks]
        taken: list[Ran] = []
        chains: dict[tuple[int, bytes], Chain] = {}
        busy: set[tuple[int, int]] = set()
        uncounted: list[Block] = []  # whose slots are not among those: mostly nothing is ever looked for there
        while self._ticks:
            longer: list[tuple[Chain, Block]] = []
            fresh: dict[tuple[int, bytes], Chain] = {}
            for block in self._ticks[0].blocks:
                sessions = _sessions(block)
                key = id(sessions.group), sessions.slots.tobytes()
                chain = chains.get(key)
                if chain is None:
                    fresh[key] = [block]
                elif goes_on(chain[-1], block):
                    longer.append((chain, block))
                else:
                    return taken, list(chains.values())
            new = [block for (block,) in fresh.values()]
            if taken and new:
                busy |= _slots(uncounted)
                uncounted = []
                if not busy.isdisjoint(_slots(new)):
                    return taken, list(chains.values())
            uncounted += new
            chains |= fresh
            for chain, block in longer:
                chain.append(block)
            taken.append(self._ticks.popleft())
        return taken, list(chains.values())


def _slots(blocks: Sequence[Block]) -> set[tuple[int, int]]:
    """The groups and slots of blocks' sessions."""
    return {(id(each.group), slot) for each in map(_sessions, blocks) for slot in each.slots.tolist()}


def _sessions(block: Block) -> Sessions:
    assert block.sessions is not None
    return block.sessions
