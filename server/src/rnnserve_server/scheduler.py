"""Continuous batching for recurrences: given what waits, what runs next.

A session's chunks run in order, so each block follows the last block queued before it that has a session in common
with it. A block that would follow several is split, so that it follows at most one and no session waits for another.

Ready blocks are kept by the magnitude of the time steps they have left. The magnitudes take turns: a tick fills up to
``max_batch_rows`` rows with blocks of one, and runs all of them for the steps that the shortest has left, at most
``slice_steps``. So nothing is padded, and a tick is at least half full in time. While there are several magnitudes, no
tick is much longer than one of ``max_batch_rows`` rows and one step: neither one long chunk nor many of them keep a
short one waiting for longer, and the short ones come back for their share before all of the long ones had theirs.

A client that sends ahead has blocks of the very same sessions behind one another, or rounds of one block (`intake`). If
they have many rows, the first runs alone and takes some of the others along (see `Scheduler.absorb`): fewer while there
is work beside it.

Where calls must stay whole, blocks are kept by their number of steps and run in one tick, never padded or cut.

Pure: no I/O, no clock of its own, no threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_server.blocks import Barrier, Block, Sessions, end_to_end, goes_on, only_outputs

_MOST_BLOCKS = 16  # of a tick: each takes the event loop some tenths of a millisecond, beside the run
_SHARED_RUN = 1.6  # ticks of one step, that a tick may take among others: less, and long chunks have not their share
_WIDE = 32  # rows that are worth a run of their own
_LARGE_RUN = 4  # ticks of one step: a run of more row-steps gains nothing, for its arrays leave the core's cache


class Tick(NamedTuple):
    """What runs next: some blocks, and for how many time steps."""

    blocks: list[Block]
    steps: int


class Scheduler:
    """The queue of one model.

    Attributes:
        max_batch_rows: rows of one tick, unless one chunk alone has more.
        slice_steps: time steps of one tick at most, unless calls must stay whole.
        queued_bytes: bytes of input that wait or run.
    """

    def __init__(self, max_batch_rows: int, slice_steps: int, *, whole: bool = False) -> None:
        self.max_batch_rows = max_batch_rows
        self.slice_steps = slice_steps
        self._whole = whole
        self.queued_bytes = 0
        self._ready: dict[Hashable, deque[Block]] = {}  # no line is empty
        self._queued: dict[int, Block | Barrier] = {}
        self._number = 0
        self._last: Hashable = None  # the line that the last tick was of

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def has_ready(self) -> bool:
        """Whether there is something for `next_tick`."""
        return bool(self._ready)

    def submit(self, work: Block | Barrier) -> None:
        """Queues a block, or does a barrier's action when its turn comes, which may be at once."""
        if isinstance(work, Barrier):
            self._queue(work, int(work.group.tail[work.slot]))
            return
        if not self._queued and work.rows <= self.max_batch_rows and (work.sessions is None or work.sessions.distinct):
            self.queued_bytes += work.nbytes
            self._queue(work, -1)
            return
        for block in _distinct(work):
            for part, predecessor in self._parts(block):
                self.queued_bytes += part.nbytes
                self._queue(part, predecessor)

    def next_tick(self) -> Tick | None:
        """Takes the blocks that run next out of the line, or None when none is ready.

        The caller hands each of them to `requeue` or `finish` afterwards.
        """
        if not self._ready:
            return None
        key, line = next(iter(self._ready.items()))
        among_others = len(self._ready) > 1 or self._last not in (None, key)
        del self._ready[key]
        self._last = key
        most, run = self.max_batch_rows, int(_SHARED_RUN * self.max_batch_rows)  # row-steps
        if among_others and not self._whole:
            first = line[0]
            most = min(most, max(1, run // max(1, min(self.slice_steps, first.next_steps))))
            if first.rows > most:
                self._split(line, most)
        blocks = [line.popleft()]
        rows, alone = blocks[0].rows, blocks[0].solo or self._sends_ahead(blocks[0])
        while line and not alone and not line[0].solo and rows + line[0].rows <= most and len(blocks) < _MOST_BLOCKS:
            rows += line[0].rows
            blocks.append(line.popleft())
        if line:
            self._ready[key] = line  # at the end: the others have their turns first
        steps = min([block.next_steps for block in blocks])
        if self._whole:
            return Tick(blocks, steps)
        if among_others:
            steps = min(steps, max(1, run // rows))
        return Tick(blocks, min(self.slice_steps, steps))

    def absorb(self, block: Block, wanted: Callable[[Block], bool]) -> bool:
        """Lets a block that is about to run take along those that wait for it with the next chunks of its sessions.

        A client that sends ahead of the answers then pays for one run, check and commit, and not for each chunk. Chunks
        are taken along as long as all of them together are no longer than others may be kept waiting for, have the same
        sessions in the same order, each at the step where the one before it ends, and nothing but their outputs is
        asked for. Of a block that has more rounds than that, the last ones wait.

        Args:
            block: a block that was checked, of which nothing was run.
            wanted: whether a block should run at all.

        Returns:
            Whether it has other rounds now.
        """
        sessions = block.sessions
        if sessions is None or not (block.followers or block.rounds > 1) or self._whole or not _plain(block):
            return False
        assert sessions.first_steps is not None
        run = _SHARED_RUN if self._ready else _LARGE_RUN
        most = min(self.slice_steps, int(run * self.max_batch_rows) // block.rows)
        if block.steps > most and block.rounds > 1:
            self._shorten(block, most)
            return True
        if 2 * block.steps > most:
            return False
        parts, followers, steps = [block], block.followers, block.steps
        while len(followers) == 1:
            (following,) = followers
            if not (
                isinstance(following, Block)
                and following.sessions is not None
                and steps + following.next_steps <= most
                and _plain(following)
                and sessions.goes_on(following.sessions, steps)
                and wanted(following)
            ):
                break
            if steps + following.steps > most:
                self._shorten(following, most - steps)
            parts.append(following)
            followers, steps = following.followers, steps + following.steps
        if len(parts) == 1:
            return False
        for following in parts[1:]:
            del self._queued[following.number]
        self._pass_on(sessions, parts[-1].number, block.number)
        parts[0] = replace(block, states={}, initial={}, outputs=[], followers=[], onto=None)
        block.call = end_to_end([each.call for each in parts])
        block.parts, block.followers, block.steps = parts, followers, steps
        block.rounds = sum([each.rounds for each in parts])
        block.nbytes = sum([each.nbytes for each in parts])
        return True

    def part(self, block: Block) -> None:
        """Has each round of a block run by itself: the block becomes the first of them, of which nothing was run, and
        the others wait for it.
        """
        first, *others = [each for piece in block.pieces for each in piece.each()]
        followers = block.followers
        block.call, block.steps, block.nbytes, block.rounds, block.parts = first.call, first.steps, first.nbytes, 1, []
        block.states, block.initial, block.outputs = {}, {}, []
        block.done, block.begun, block.resets = 0, False, None
        previous = block
        for each in others:
            if each.sessions is not None and not each.sessions.said:
                each.sessions.first_steps = None  # those before it may fail
            self._enter(each)
            previous.followers = [each]
            previous = each
        previous.followers = followers
        assert block.sessions is not None
        self._pass_on(block.sessions, block.number, previous.number)

    def halve(self, block: Block) -> Block:
        """Has half of a block's N chunks, of which there are several, run before the other half, each by itself.

        Returns:
            The first half, which takes the place of the block given; the second one follows it.
        """
        positions, middle = np.arange(len(block.tags)), len(block.tags) // 2
        second, followers = block.take(positions[middle:]), block.followers
        self.queued_bytes += second.nbytes
        self._enter(second)
        if second.sessions is not None:
            self._pass_on(second.sessions, block.number, second.number)
        first = self.narrow(block, positions[:middle])
        first.followers, second.followers, second.solo = [second], followers, True
        return first

    def _shorten(self, block: Block, steps: int) -> None:
        """Leaves a block only as many of its rounds, one at least, as fit into so many steps; the others follow it."""
        count = max(1, steps // block.round_steps)
        first, rest = block.cut(0, count), block.cut(count, block.rounds)
        block.call, block.steps, block.nbytes, block.rounds = first.call, first.steps, first.nbytes, count
        self._enter(rest)
        rest.followers, block.followers = block.followers, [rest]
        assert block.sessions is not None
        self._pass_on(block.sessions, block.number, rest.number)

    def _enter(self, work: Block | Barrier) -> None:
        """Puts work on the books."""
        self._number += 1
        work.number = self._number
        self._queued[work.number] = work

    @staticmethod
    def _pass_on(sessions: Sessions, number: int, to: int) -> None:
        """Has another block be the last one of those sessions of which the one of that number was."""
        tail, slots = sessions.group.tail, sessions.slots
        tail[slots[tail[slots] == number]] = to

    def requeue(self, block: Block) -> None:
        """Puts a block that has steps left at the end of the line."""
        self._ready.setdefault(self._line(block), deque()).append(block)

    def ran(self, block: Block) -> None:
        """Lets the block that goes right on with the very same sessions run on from where one is that was run to its
        end, but is not finished. Anything else waits until it is.
        """
        block.ran = True
        if len(block.followers) == 1:
            self._run_on(block, block.followers[0])

    def finish(self, work: Block | Barrier) -> None:
        """Forgets work that is done, failed or dropped, and lets what follows it go on."""
        followers = self._forget(work)
        if isinstance(work, Block) and work.onto is not None:  # what it ran on from is not finished: they wait for that
            work.onto.followers.remove(work)
            work.onto.followers += followers
        elif followers:
            self._release(followers)

    def holds(self, block: Block) -> bool:
        """Whether a block was submitted and not finished."""
        return self._queued.get(block.number) is block

    def narrow(self, block: Block, index: Array) -> Block:
        """Goes on with some of a block's N chunks: returns a block that takes the place of the one given."""
        rest = block.take(index)
        rest.number, rest.followers = block.number, block.followers
        if (before := block.onto) is not None:
            rest.onto = before
            before.followers[before.followers.index(block)] = rest
        self._queued[rest.number] = rest
        self.queued_bytes += rest.nbytes - block.nbytes
        if block.sessions is not None:
            tail, dropped = block.sessions.group.tail, np.delete(block.sessions.slots, index)
            tail[dropped[tail[dropped] == block.number]] = _before(block)
        return rest

    def _sends_ahead(self, block: Block) -> bool:
        """Whether a block of many rows may have one behind it to take along. It does so only where it runs alone, and
        that saves more, a check, commit and answer each, than to run beside others would.
        """
        if block.rounds > 1:
            return True
        if self._whole or block.begun or block.rows < _WIDE or len(block.followers) != 1 or not _plain(block):
            return False
        (following,) = block.followers
        return isinstance(following, Block) and following.rows == block.rows and _plain(following)

    def _line(self, block: Block) -> Hashable:
        """What the blocks that may run together have in common."""
        if self._whole:
            return block.steps, "mask" in block.call.inputs
        return min(self.slice_steps, block.next_steps).bit_length()

    def _split(self, line: deque[Block], most: int) -> None:
        """Has no more than so many rows of the first block in a line be the first, if it has not begun and nothing
        waits for all of it. The others come next. What is of one sink stays together, and is answered together.
        """
        block = line[0]
        if block.begun or block.followers or block.onto is not None:
            return
        chunks = block.sinks[0][1]
        for _, count in block.sinks[1:]:
            if (chunks + count) * block.batch_size > most:
                break
            chunks += count
        else:
            return
        self._forget(block)
        positions = np.arange(len(block.tags))
        parts = block.take(positions[:chunks]), block.take(positions[chunks:])
        for part in parts:
            self._enter(part)
            self.queued_bytes += part.nbytes
            if part.sessions is not None:
                part.sessions.group.tail[part.sessions.at] = part.number
        line.popleft()
        line.extendleft(reversed(parts))

    def _parts(self, block: Block) -> list[tuple[Block, int]]:
        """Cuts a block so that each part fits a tick and follows at most one other block, or none (-1)."""
        if block.sessions is None:
            return [(block, -1)]
        chunks = len(block.tags)
        fitting = max(1, self.max_batch_rows // block.batch_size)
        if not self._queued and chunks <= fitting:
            return [(block, -1)]
        tails = block.sessions.group.tail[block.sessions.at]  # [N]
        said = tails.tobytes()
        if chunks <= fitting and said == said[: tails.itemsize] * chunks:  # all follow the same one
            return [(block, int(tails[0]))]
        parts = []
        for tail in np.unique(tails):
            index = np.flatnonzero(tails == tail)
            parts += [
                (block.take(index[start : start + fitting]), int(tail)) for start in range(0, len(index), fitting)
            ]
        return parts

    def _queue(self, work: Block | Barrier, predecessor: int) -> None:
        self._enter(work)
        if isinstance(work, Barrier):
            work.group.tail[work.slot] = work.number
        elif work.sessions is not None:
            work.sessions.group.tail[work.sessions.at] = work.number
        if before := self._queued.get(predecessor):
            before.followers.append(work)
            if isinstance(before, Block) and before.ran and len(before.followers) == 1:
                self._run_on(before, work)
        elif isinstance(work, Block):
            self.requeue(work)
        else:
            self._release([work])

    def _run_on(self, before: Block, work: Block | Barrier) -> None:
        if isinstance(work, Block) and goes_on(before, work):
            work.onto = before
            self.requeue(work)

    def _forget(self, work: Block | Barrier) -> list[Block | Barrier]:
        """Takes work off the books: what followed it."""
        del self._queued[work.number]
        if isinstance(work, Block):
            self.queued_bytes -= work.nbytes
            if work.sessions is not None:
                tail, at = work.sessions.group.tail, work.sessions.at
                if work.followers:  # they took some of its sessions' tails over
                    slots = work.sessions.slots
                    at = slots[tail[slots] == work.number]
                tail[at] = _before(work)
        elif work.group.tail[work.slot] == work.number:
            work.group.tail[work.slot] = -1
        return work.followers

    def _release(self, works: Sequence[Block | Barrier]) -> None:
        released = deque(works)  # not by recursion: any number of barriers may stand behind one another
        while released:
            work = released.popleft()
            if isinstance(work, Barrier):
                work.action()
                if not work.held:
                    released.extend(self._forget(work))
            elif work.onto is not None:  # it runs already
                work.onto = None
            else:
                self.requeue(work)


def _before(block: Block) -> int:
    """The number of the last work queued for a block's sessions before it, -1 for none."""
    return -1 if block.onto is None else block.onto.number


def _plain(block: Block) -> bool:
    """Whether its steps could as well be part of a longer chunk."""
    return block.call.mask is None and not block.solo and only_outputs(block.options)


def _distinct(block: Block) -> Iterator[Block]:
    """Cuts a block so that no part has two chunks of one session: it may be on several lanes of a frame."""
    if block.sessions is None or block.sessions.distinct or len(block.tags) == 1:
        yield block
        return
    slots = np.sort(block.sessions.slots)
    if not (slots[1:] == slots[:-1]).any():
        yield block
        return
    left = np.arange(len(slots))
    while len(left):
        _, first = np.unique(block.sessions.slots[left], return_index=True)
        first.sort()
        yield block.take(left[first])
        left = np.delete(left, first)
