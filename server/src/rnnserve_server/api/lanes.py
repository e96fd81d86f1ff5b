"""The lanes of a stream: which sessions are on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import count
from typing import cast

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_server.blocks import Sessions
from rnnserve_server.column import span
from rnnserve_server.errors import LaneRepeated
from rnnserve_server.sessions import Group

_FOUND_LANES = 65536  # of frames whose sessions are remembered
_NONE = np.zeros(0, np.int64)
_FREE, _SHUT = -1, -2  # lanes that are not open, in the column of groups


class Lanes:
    """Lanes index columns, so that a frame of N lanes finds its sessions by array operations.

    Attributes:
        groups: the groups of the sessions, by a number of the stream's own.
        group: int64 [capacity], the number of the lane's group; less than 0: the lane is not open.
        slot: int64 [capacity], the session's slot in its group.
        generation: int64 [capacity], the slot's generation when the session was put here.
        ids: [capacity], the session's id.
        era: another number whenever lanes were opened or closed.
    """

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}
        self.group = np.full(64, _FREE)
        self.slot = np.zeros(64, np.int64)
        self.generation = np.zeros(64, np.int64)
        self.ids = [""] * 64
        self.era = 0
        self._counts: Counter[int] = Counter()  # lanes in each of `groups`
        self._found: dict[tuple[int, ...], list[Part]] = {}  # what `find` found, by a frame's lanes
        self._found_lanes = 0

    def __len__(self) -> int:
        return len(self.group)

    def is_open(self, lane: int) -> bool:
        """Whether there is a session on a lane, for which chunks may come."""
        return lane < len(self.group) and bool(self.group[lane] >= 0)

    def is_free(self, lane: int) -> bool:
        """Whether a session may be put on a lane."""
        return lane >= len(self.group) or bool(self.group[lane] == _FREE)

    def is_here(self, lane: int) -> bool:
        """Whether the session on an open lane is where it was when it was put there."""
        group = self.groups[int(self.group[lane])]
        return bool(group.generation[self.slot[lane]] == self.generation[lane])

    def place(self, lane: int) -> tuple[Group, int]:
        """Where the session on an open lane was when it was put there: its group and its slot."""
        return self.groups[int(self.group[lane])], int(self.slot[lane])

    def id(self, lane: int) -> str:
        """The id of the session on a lane that is not free; empty for none."""
        return self.ids[lane] if lane < len(self.ids) else ""

    def one_group(self, lanes: list[int]) -> Group | None:
        """The group of the sessions on N lanes, if it is the same for all of them, and all are open."""
        if max(lanes) >= len(self.group):
            return None
        numbers = self.group[lanes]
        return None if numbers[0] < 0 or (numbers != numbers[0]).any() else self.groups[int(numbers[0])]

    def put(self, lanes: Sequence[int], group: Group, slots: Array) -> None:
        """Puts the sessions in N slots of a group on N lanes."""
        number = next((number for number, other in self.groups.items() if other is group), None)
        if number is None:
            number = next(number for number in count() if number not in self.groups)
            self.groups[number] = group
        self._counts[number] += len(lanes)
        self._forget()
        self._make_room(max(lanes))
        self.group[lanes] = number
        self.slot[lanes] = slots
        self.generation[lanes] = group.generation[slots]
        for lane, slot in zip(lanes, slots.tolist(), strict=True):
            self.ids[lane] = group.ids[slot]

    def vacate(self, lanes: list[int]) -> None:
        """Takes the sessions, all of one group, off N lanes, which are free then."""
        if self.is_open(lanes[0]):
            self.shut(lanes)
        self.group[lanes] = _FREE
        for lane in lanes:
            self.ids[lane] = ""

    def shut(self, lanes: list[int]) -> None:
        """No more chunks may come for the sessions, all of one group, on N open lanes, which `vacate` takes off."""
        self._forget()
        number = int(self.group[lanes[0]])
        self.group[lanes] = _SHUT
        self._counts[number] -= len(lanes)
        if not self._counts[number]:  # its memory is given back although the stream goes on
            del self.groups[number], self._counts[number]

    def all_alive(self, lanes: Sequence[int]) -> bool:
        """Whether all lanes of a frame are known to be open and their sessions to be alive; False: look closer."""
        found = self._found.get(tuple(lanes))
        return found is not None and all(part.alive() for part in found)

    def find(self, lanes: tuple[int, ...], away: Collection[int] = ()) -> list[Part]:
        """The sessions of a frame's lanes, group by group. A stream says the same lanes again and again.

        Args:
            lanes: they.
            away: those of which it is known that their sessions cannot be had.

        Raises:
            LaneRepeated: one is there twice.
        """
        if not away and (known := self._found.get(lanes)):
            return known
        tags = np.array(lanes, np.int64)  # [N]
        ordered = np.sort(tags)
        if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
            raise LaneRepeated(int(twice[0]))
        inside = np.minimum(tags, len(self.group) - 1)
        groups = np.where(inside == tags, self.group[inside], _FREE)  # [N]
        if away:
            groups[np.isin(tags, list(away))] = _FREE
        numbers = np.unique(groups).tolist()
        found = []
        for number in numbers:
            index = np.flatnonzero(groups == number) if len(numbers) > 1 else None
            chosen = tags if index is None else tags[index]
            if number < 0:
                found.append(Part(index, chosen))
            else:
                found.append(Part(index, chosen, self.groups[number], self.slot[chosen], self.generation[chosen]))
        if not away:
            if self._found_lanes + len(lanes) > _FOUND_LANES:
                self._forget()
            self._found[lanes] = found
            self._found_lanes += len(lanes)
        return found

    def _forget(self) -> None:
        """Lanes were opened or closed: what `find` found may be so no more."""
        self._found.clear()
        self._found_lanes = 0
        self.era += 1

    def _make_room(self, lane: int) -> None:
        """Makes the columns reach to a lane."""
        while lane >= len(self.group):
            missing = (0, len(self.group))
            self.group = np.pad(self.group, missing, constant_values=_FREE)
            self.slot = np.pad(self.slot, missing)
            self.generation = np.pad(self.generation, missing)
            self.ids += [""] * missing[1]


class Part:
    """The lanes of a frame whose sessions are of one group, or that are not open.

    Attributes:
        index: their positions among the frame's N lanes; None: all of them.
        tags: int64 [n], the lanes.
        group: their group; None: they are not open.
    """

    __slots__ = ("_at", "_distinct", "_ended", "_generations", "_slots", "group", "index", "tags")

    def __init__(
        self,
        index: Array | None,
        tags: Array,
        group: Group | None = None,
        slots: Array = _NONE,
        generations: Array = _NONE,
    ) -> None:
        """The sessions' slots and the slots' generations are int64 [n]."""
        self.index = index
        self.tags = tags
        self.group = group
        self._slots = slots
        self._generations = generations
        self._distinct = len(np.unique(slots)) == len(slots)
        self._at = span(slots) if len(slots) else slots
        self._ended = -1  # `Group.ended` when all of the sessions were alive

    def positions(self) -> Sequence[int]:
        """The positions of its lanes among the frame's."""
        return range(len(self.tags)) if self.index is None else cast("list[int]", self.index.tolist())

    def alive(self) -> bool:
        """Whether all of the lanes are open and their sessions alive."""
        group = self.group
        if group is None:
            return False
        if self._ended != group.ended and (group.generation[self._at] == self._generations).all():
            self._ended = group.ended
        return self._ended == group.ended

    def sessions(self, first_steps: Array | None) -> Sessions:
        """The sessions, n chunks of which begin at those steps."""
        group = self.group
        assert group is not None
        self.alive()
        return Sessions(group, self._slots, self._generations, first_steps, self._ended, self._distinct, self._at)
