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
        while self._ticks:
            longer: list[tuple[Chain, Block]] = []
            fresh: list[tuple[tuple[int, bytes], Block]] = []
            for block in self._ticks[0].blocks:
                sessions = _sessions(block)
                key = id(sessions.group), sessions.slots.tobytes()
                chain = chains.get(key)
                if chain is None:
                    fresh.append((key, block))
                elif goes_on(chain[-1], block):
                    longer.append((chain, block))
                else:
                    return taken, list(chains.values())
            slots = {(key[0], slot) for key, block in fresh for slot in _sessions(block).slots.tolist()}
            if not busy.isdisjoint(slots):
                return taken, list(chains.values())
            busy |= slots
            chains |= {key: [block] for key, block in fresh}
            for chain, block in longer:
                chain.append(block)
            taken.append(self._ticks.popleft())
        return taken, list(chains.values())


def _sessions(block: Block) -> Sessions:
    assert block.sessions is not None
    return block.sessions
