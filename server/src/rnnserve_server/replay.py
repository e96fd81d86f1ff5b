"""The replay window: what sessions were answered lately, so that a chunk that is asked again is answered again.

A tick answers many sessions with a few arrays, and the window keeps those arrays as they are: a `Round` is a column of
chunks of one tick. A session's window is its last rounds, as many as its group allows, and its last one in any case.
Looking one up is a search, because it is rare; remembering one is an append, because every tick does it.

The states that a tick started from are kept too, so that a session can be taken back to where a chunk began.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.masking import Compacted
from rnnserve_server.blocks import Answers, Sessions, ShownRound
from rnnserve_server.digests import digests, is_digest

if TYPE_CHECKING:
    from rnnserve_server.sessions import Group

_SPREAD = 4  # a round is thinned out when so many times a window of them came after it
_SLACK = 1 << 20  # bytes of thinned rounds that are not worth a second look
_LOOKED_AT_ONCE = 16  # with each that is remembered, of which there may be many in one turn of the event loop
_LOOKED_AT_ALONE = 64  # where nothing else is done in that turn
_SLACK_ROUNDS = 1024  # so many of them, likewise: of small ones a search looks at each


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a session's window holds.

    Attributes:
        replies: chunks at most; 0: none is remembered at all.
        bytes: bytes of answers at most, but for the last one.
    """

    replies: int
    bytes: int


_Answered = tuple[Array | None, Arrays, Arrays]
"""Of a round where it begins, the outputs and the states, as `Round` has them."""

_NONE = np.zeros(0, np.int64)
NO_REPLAY = Limits(0, 0)


@dataclass(slots=True, eq=False)
class Run:
    """What a tick ran for N sessions: several chunks of each where they were taken along together.

    Attributes:
        call: the inputs of all the chunks, in rows of N * batch.
        states: what it started from: every state, [N * batch, *shape]. None: that was forgotten to make room.
        nbytes: of the inputs and the states.
    """

    call: Compacted
    states: Arrays | None
    nbytes: int = field(init=False)
    _thinned: tuple[bytes, Run] | None = None

    def __post_init__(self) -> None:
        self.nbytes = _bytes(self.call.inputs, self.states or {})

    def forget_states(self) -> None:
        """Lets go of what it started from."""
        self.nbytes -= _bytes(self.states or {})
        self.states = None

    def part(self, start: int, timesteps: int) -> Compacted:
        """Some of its steps."""
        if timesteps == self.call.timesteps:
            return self.call
        inputs = {name: x[start : start + timesteps] for name, x in self.call.inputs.items()}
        return Compacted(inputs, np.full(len(self.call.lengths), timesteps), timesteps, None)

    def take(self, index: Array, chunks: int) -> Run:
        """A copy of some of the N."""
        rows = len(self.call.lengths) // chunks
        at = (index[:, None] * rows + np.arange(rows)).ravel()  # [len(index) * batch]
        states = None if self.states is None else {name: state[at] for name, state in self.states.items()}
        return Run(self.call.take(index, chunks), states)

    def thinned(self, index: Array, chunks: int) -> Run:
        """As `take`; rounds that share a run and are thinned alike, one after the other, share what is left of it."""
        key = index.tobytes()
        if self._thinned is None or self._thinned[0] != key:
            self._thinned = key, self.take(index, chunks)
        return self._thinned[1]


@dataclass(slots=True, eq=False)
class Round:
    """A chunk of each of N sessions, and what was answered.

    Attributes:
        slots: int64 [N], the sessions' slots.
        generations: int64 [N], the slots' generations.
        first_steps: uint64 [N], where the chunks began.
        timesteps: time steps of each chunk.
        number: int64 [N], how many chunks each session had been answered before.
        before: int64 [N], how many bytes each session had been answered before; [0], if that is not counted.
        asked: what ran; or the chunks' digests, uint8 [N, bytes of each], where that is not known any more.
        start: where in it the chunks began.
        outputs: as `Answers` has them.
        states: as `Answers` has them.
        nbytes: of inputs, states and answers that it holds: its part, where it shares a run.
        alike: how many rounds up to this one, one after the other, are of the very same column of sessions.
    """

    slots: Array
    generations: Array
    first_steps: Array
    timesteps: int
    number: Array
    before: Array
    asked: Run | Array
    start: int
    outputs: Arrays
    states: Arrays
    nbytes: int
    alike: int = 1

    def digests(self, index: Array) -> Array:
        """What tells the chunks of some of the N sessions from others for the same steps: uint8 [len(index), bytes]."""
        if not isinstance(self.asked, Run):
            return self.asked[index]
        found: Array = digests(self.asked.part(self.start, self.timesteps).take(index, len(self.slots)), len(index))[0]
        return found

    def is_of(self, index: int, call: Compacted, position: int, chunks: int) -> bool:
        """Whether one session's chunk is the very same as one of the N chunks of a call."""
        (known,) = self.digests(np.array([index]))
        return is_digest(known.tobytes(), call, position, chunks)

    def began(self, index: int) -> tuple[Arrays, Compacted | None] | None:
        """What led to where one session's chunk began: every state, [batch, *shape], and what ran from there, if
        anything did. None: that is not known any more.
        """
        if not isinstance(self.asked, Run):
            return None
        run = self.asked.take(np.array([index]), len(self.slots))
        if run.states is None:
            return None
        return run.states, run.part(0, self.start) if self.start else None

    def shown(self, index: int) -> tuple[Arrays, Arrays]:
        """The outputs and states that one session was answered, each [1, ...]."""
        one = slice(index, index + 1)
        outputs = {name: y[one] for name, y in self.outputs.items()}
        return outputs, {name: state[one] for name, state in self.states.items()}

    def shown_to(self, index: Array) -> tuple[Arrays, Arrays]:
        """The outputs and states that some of the sessions were answered, each [len(index), ...]."""
        outputs = {name: y[index] for name, y in self.outputs.items()}
        return outputs, {name: state[index] for name, state in self.states.items()}

    def answers(self, index: int, tags: Array) -> Answers:
        """What one session was answered, for a sink that knows the chunk by another tag."""
        return Answers(tags, self.first_steps[index : index + 1], self.timesteps, *self.shown(index))

    def take(self, index: Array) -> Round:
        """A copy of some of the N."""
        asked = self.asked.thinned(index, len(self.slots)) if isinstance(self.asked, Run) else self.asked[index]
        outputs, states = self.shown_to(index)
        return Round(
            self.slots[index],
            self.generations[index],
            self.first_steps[index],
            self.timesteps,
            self.number[index],
            self.before[index] if len(self.before) else self.before,
            asked,
            self.start,
            outputs,
            states,
            _bytes(outputs, states) + _part_bytes(asked, self.timesteps),
        )


@dataclass(slots=True, eq=False)
class _Columns:
    """Many rounds as one column: there may be thousands of a row or two. As `Round` has them, and where each ends."""

    slots: Array
    generations: Array
    number: Array
    before: Array
    ends: Array

    @classmethod
    def of(cls, rounds: Collection[Round]) -> _Columns:
        return cls(
            np.concatenate([each.slots for each in rounds]),
            np.concatenate([each.generations for each in rounds]),
            np.concatenate([each.number for each in rounds]),
            np.concatenate([each.before for each in rounds]),
            np.cumsum([len(each.slots) for each in rounds]),
        )

    def take(self, index: Array) -> _Columns:
        before = self.before[index] if len(self.before) else self.before
        return _Columns(self.slots[index], self.generations[index], self.number[index], before, self.ends)

    def counted(self, rounds: Iterable[Round], chosen: Array) -> Iterator[tuple[Round, int, int]]:
        """Each round, where it starts, and how many of its chunks are chosen."""
        starts = np.concatenate(([0], self.ends[:-1]))
        return zip(rounds, starts.tolist(), np.add.reduceat(chosen.astype(np.int64), starts).tolist(), strict=True)


class Window:
    """The replay windows of a group's sessions. The group's columns say how much each of them was answered.

    Attributes:
        limits: of each session.
        nbytes: bytes that all of them hold.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.nbytes = 0
        self._recent: deque[Round] = deque()
        self._thinned: deque[Round] = deque()
        self._thinned_bytes = 0
        self._looked: deque[Round] = deque()  # thinned ones, older than those of _thinned, that were looked at again
        self._left = 0  # of _thinned, that will be next
        self._ended = 0  # `Group.ended` when the rounds were last looked through for that
        self._bytes_count = False  # all answers so far are so small that only their number is limited
        self._look_again = _SLACK
        self._look_again_rounds = _SLACK_ROUNDS

    def remember(
        self, sessions: Sessions, run: Run, start: int, timesteps: int, answered: Sequence[ShownRound]
    ) -> None:
        """Keeps what N sessions are about to be answered.

        Args:
            sessions: they.
            run: what ran for them.
            start: where in it the first of the chunks began.
            timesteps: of each chunk.
            answered: the answers to a chunk of each, and what to the next chunk of each, and so on.
        """
        if self.limits.replies:
            self._keep(sessions, run, start, timesteps, [each[1:] for each in answered])

    def restore(
        self,
        group: Group,
        slots: Array,
        first_steps: Array,
        timesteps: int,
        asked: Array,
        outputs: Arrays,
        states: Arrays,
    ) -> None:
        """Keeps what N sessions were answered elsewhere, and of which nothing younger is known here.

        Arguments as `Round` has them.
        """
        if self.limits.replies:
            sessions = Sessions(group, slots, group.generation[slots], first_steps)
            self._keep(sessions, asked, 0, timesteps, [(first_steps, outputs, states)])

    def _keep(
        self, sessions: Sessions, asked: Run | Array, start: int, timesteps: int, answered: Sequence[_Answered]
    ) -> None:
        """Keeps rounds of N sessions, one after the other, that are of equal length and shape."""
        group, slots, at, recent = sessions.group, sessions.slots, sessions.at, self._recent
        _, outputs, states = answered[0]
        answer_bytes = _bytes(outputs, states)
        nbytes, each_bytes = answer_bytes + _part_bytes(asked, timesteps), answer_bytes // len(slots)
        if not self._bytes_count and each_bytes * self.limits.replies > self.limits.bytes:
            self._count_bytes(group)
        number = group.answered[at].copy()  # [N]
        before = group.answered_bytes[at].copy() if self._bytes_count else _NONE  # [N]
        alike = recent[-1].alike if recent and recent[-1].slots is slots else 0
        for first_steps, outputs, states in answered:
            assert first_steps is not None
            alike += 1
            recent.append(
                Round(
                    slots,
                    sessions.generations,
                    first_steps,
                    timesteps,
                    number,
                    before,
                    asked,
                    start,
                    outputs,
                    states,
                    nbytes,
                    alike,
                )
            )
            start, number = start + timesteps, number + 1
            if self._bytes_count:
                before = before + each_bytes
        group.answered[at] = number
        if self._bytes_count:
            group.answered_bytes[at] = before
        self.nbytes += nbytes * len(answered)
        self._forget(group, len(answered))

    def _count_bytes(self, group: Group) -> None:
        """Has bytes count from now on, those of the answers that are remembered already too."""
        self._bytes_count = True
        group.answered_bytes[:] = 0
        self._settle()
        for round_ in (*self._thinned, *self._recent):  # the oldest first
            here = group.generation[round_.slots] == round_.generations
            round_.before = group.answered_bytes[round_.slots]
            answers = _bytes(round_.outputs, round_.states)
            group.answered_bytes[round_.slots[here]] += answers // len(round_.slots)

    @property
    def by_count(self) -> bool:
        """Whether only the number of answers limits the windows: all so far are small."""
        return not self._bytes_count

    def oldest(self, group: Group, slots: Array) -> Array:
        """Where the windows of N sessions begin: uint64 [N]; their steps, if they are empty."""
        first = group.step.copy()  # [capacity]
        for round_ in self._rounds():
            live = self._live(group, round_)
            first[round_.slots[live]] = np.minimum(first[round_.slots[live]], round_.first_steps[live])
        return first[slots]

    def find(self, group: Group, slots: Array, generations: Array, first_steps: Array) -> dict[int, tuple[Round, int]]:
        """Looks chunks up.

        Args:
            group: the sessions' group.
            slots: int64 [N].
            generations: int64 [N].
            first_steps: uint64 [N].

        Returns:
            By position among the N, where the chunk that began at that step is: a round, and the position in it.
        """
        keys = zip(slots.tolist(), generations.tolist(), first_steps.tolist(), strict=True)
        wanted = {key: position for position, key in enumerate(keys)}
        found: dict[int, tuple[Round, int]] = {}
        for round_, index in self._places(group, slots):
            key = int(round_.slots[index]), int(round_.generations[index]), int(round_.first_steps[index])
            if key in wanted:
                found.setdefault(wanted[key], (round_, index))
        return found

    def _places(self, group: Group, slots: Array) -> list[tuple[Round, int]]:
        """The windows of sessions that have N slots: rounds, in the order of `_rounds`, and a position in each. All
        rounds are looked at as one column, because there may be thousands of a row or two.
        """
        rounds = list(self._rounds())
        if not rounds:
            return []
        wanted = np.zeros(len(group.generation), bool)
        wanted[slots] = True
        columns = _Columns.of(rounds)
        at = np.flatnonzero(wanted[columns.slots])
        at = at[self._live(group, columns.take(at))]
        which = np.searchsorted(columns.ends, at, "right")
        index = at - np.where(which, columns.ends[which - 1], 0)
        return [(rounds[w], i) for w, i in zip(which.tolist(), index.tolist(), strict=True)]

    def of(self, group: Group, slot: int) -> list[tuple[Round, int]]:
        """The window of the session that has a slot: rounds, oldest first, and its position in each."""
        places = self._places(group, np.array([slot]))
        return sorted(places, key=lambda place: int(place[0].number[place[1]]))

    def of_many(self, group: Group, slots: Array) -> Iterator[tuple[Round, Array]]:
        """The windows of the sessions that have N slots: rounds, in any order, and the positions in each."""
        found: dict[int, tuple[Round, list[int]]] = {}
        for round_, index in self._places(group, slots):
            found.setdefault(id(round_), (round_, []))[1].append(index)
        for round_, indexes in found.values():
            yield round_, np.array(indexes)

    def forget_from(self, group: Group, slot: int, step: int) -> None:
        """Forgets the chunks of a session that began at a step or later."""
        places = [place for place in self.of(group, slot) if place[0].first_steps[place[1]] >= step]
        if not places:
            return
        oldest, index = places[0]
        group.answered[slot] = oldest.number[index]
        group.answered_bytes[slot] = oldest.before[index] if len(oldest.before) else 0
        nobody: dict[Round, Round] = {}
        for round_, index in places:
            generations = nobody.get(round_, round_).generations.copy()  # others may hold on to it
            generations[index] = -1
            nobody[round_] = replace(round_, generations=generations)
        self._settle()
        # Copies, so that `_forget` does not count the rounds that the session has lost as later than older ones.
        self._recent = deque(replace(each := nobody.get(r, r), slots=each.slots.copy(), alike=1) for r in self._recent)
        self._thinned = deque(nobody.get(round_, round_) for round_ in self._thinned)

    def drop_starts(self, nbytes: int) -> int:
        """Forgets the states before rounds, the oldest first, to make room for so many bytes: how many bytes it made.

        What was answered is answered again all the same, but sessions cannot be taken back to there.
        """
        self._settle()
        sharing: dict[int, list[Round]] = {}
        for round_ in (*self._thinned, *self._recent):
            if isinstance(round_.asked, Run) and round_.asked.states:
                sharing.setdefault(id(round_.asked), []).append(round_)
        thinned, made = {id(round_) for round_ in self._thinned}, 0
        for rounds in sharing.values():
            if made >= nbytes:
                break
            run = rounds[0].asked
            assert isinstance(run, Run)
            before = run.nbytes
            run.forget_states()
            for round_ in rounds:  # each held its part of the run
                part, whole = round_.timesteps, run.call.timesteps
                less = before * part // whole - run.nbytes * part // whole
                round_.nbytes -= less
                made += less
                if id(round_) in thinned:
                    self._thinned_bytes -= less
        self.nbytes -= made
        return made

    def forget_ended(self, group: Group) -> bool:
        """Lets go of the rounds of sessions that have ended, and of half-empty rounds' other half: of the latest at
        once, and begins to look at the others.

        Returns:
            Whether `look_on` is to go on with that.
        """
        if group.ended != self._ended:
            self._ended = group.ended
            self._settle()
            self.nbytes -= sum([round_.nbytes for round_ in self._recent])
            self._recent = self._without_ended(group, self._recent)
            self.nbytes += sum([round_.nbytes for round_ in self._recent])
            self._left = len(self._thinned)
        return self._left > 0

    def look_on(self, group: Group) -> bool:
        """Looks at some of the rounds that are still to be looked at: whether there are more."""
        if self._left:
            self._look(group, _LOOKED_AT_ALONE)
        return self._left > 0

    def _without_ended(self, group: Group, rounds: deque[Round]) -> deque[Round]:
        if not rounds:
            return rounds
        columns = _Columns.of(rounds)
        here = group.generation[columns.slots] == columns.generations
        if here.all():
            return rounds
        kept: deque[Round] = deque()
        for round_, start, count in columns.counted(rounds, here):
            if 2 * count > len(round_.slots):
                kept.append(round_)
            elif count:
                kept.append(round_.take(np.flatnonzero(here[start : start + len(round_.slots)])))
        return kept

    def drop_oldest(self) -> bool:
        """Forgets the oldest round, whoever might still ask for it, to make room: whether there was one."""
        self._settle()
        rounds = self._thinned or self._recent
        if not rounds:
            return False
        oldest = rounds.popleft()
        self.nbytes -= oldest.nbytes
        if rounds is self._thinned:
            self._thinned_bytes -= oldest.nbytes
        return True

    def _rounds(self) -> Iterator[Round]:
        yield from reversed(self._recent)
        yield from reversed(self._thinned)
        yield from reversed(self._looked)

    def _live(self, group: Group, round_: Round | _Columns) -> Array:
        """bool [N]: which chunks of a round, or of many, are in their session's window."""
        slots = round_.slots
        later = group.answered[slots] - round_.number  # [N], 1 for the last
        within = later <= self.limits.replies
        if self._bytes_count:
            since = group.answered_bytes[slots] - round_.before
            within = (within & (since <= self.limits.bytes)) | (later == 1)
        live: Array = within & (group.generation[slots] == round_.generations)
        return live

    def _forget(self, group: Group, came: int) -> None:
        """Lets go of rounds that are in no window, and of what is in none in rounds that few windows hold on to, after
        so many came.
        """
        while len(self._recent) > self.limits.replies:  # before that, the oldest is in everybody's window
            if self._recent[-1].alike >= len(self._recent) or self._alike() > self.limits.replies:
                self.nbytes -= self._recent.popleft().nbytes  # the same frame came again often enough
                continue
            live = self._live(group, self._recent[0])
            count = int(np.count_nonzero(live))
            if count and len(self._recent) <= _SPREAD * self.limits.replies:
                break
            self._thin(self._recent.popleft(), live, count, self._thinned)
        if not self._left and (self._thinned_bytes > self._look_again or len(self._thinned) > self._look_again_rounds):
            self._left = len(self._thinned)
        if self._left:
            self._look(group, came * _LOOKED_AT_ONCE)

    def _look(self, group: Group, most: int) -> None:
        """Looks at some of the thinned rounds again: at all of them at once everybody would have to wait for it."""
        rounds = [self._thinned.popleft() for _ in range(min(self._left, most))]
        self._left -= len(rounds)
        columns = _Columns.of(rounds)
        live = self._live(group, columns)
        for round_, start, count in columns.counted(rounds, live):
            self._thinned_bytes -= round_.nbytes
            self._thin(round_, live[start : start + len(round_.slots)], count, self._looked)
        if not self._left:
            self._settle()
            self._look_again = 2 * self._thinned_bytes + _SLACK
            self._look_again_rounds = 2 * len(self._thinned) + _SLACK_ROUNDS

    def _settle(self) -> None:
        """Puts thinned rounds that were looked at again where they were: before those that were not."""
        self._thinned.extendleft(reversed(self._looked))
        self._looked.clear()
        self._left = 0

    def _alike(self) -> int:
        """How many rounds are of the column of sessions that the oldest is of."""
        return sum([each.slots is self._recent[0].slots for each in self._recent])

    def _thin(self, round_: Round, live: Array, count: int, to: deque[Round]) -> None:
        """Puts what of a round is in a window, so many chunks, to others."""
        self.nbytes -= round_.nbytes
        if not count:
            return
        if 2 * count <= len(live):  # to copy more than the half would take longer than it is worth
            round_ = round_.take(np.flatnonzero(live))
        self.nbytes += round_.nbytes
        self._thinned_bytes += round_.nbytes
        to.append(round_)


def _part_bytes(asked: Run | Array, timesteps: int) -> int:
    """Bytes of what ran that are of so many of its steps."""
    return asked.nbytes * timesteps // asked.call.timesteps if isinstance(asked, Run) else 0


def _bytes(*kinds: Mapping[str, Array]) -> int:
    nbytes = 0
    for arrays in kinds:
        for array in arrays.values():
            nbytes += array.nbytes
    return nbytes
