"""Blocks: the columns that the scheduler moves about.

A frame of N lanes is not N requests. It stays one block of columns, from the wire through the engine and back, and
whatever is checked or done for a session is done for the whole block by one array operation. Nor are the frames of
many clients many blocks: those that came at the same time and are of one shape are one (see `intake`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.masking import Compacted
from rnnserve_models.options import LayerOptions
from rnnserve_server.column import Index, span
from rnnserve_server.errors import ServiceError
from rnnserve_server.layout import same_lengths
from rnnserve_server.resets import Resets

if TYPE_CHECKING:
    from rnnserve_server.sessions import Group


@dataclass(slots=True, eq=False)
class Answers:
    """The results of N chunks that came from one sink.

    Attributes:
        tags: [N], what the sink knows the chunks by.
        first_steps: uint64 [N], the steps at which they started; None without sessions.
        timesteps: time steps of each chunk.
        outputs: every output, as on the wire: [N, batch, T, *shape] with return_sequences, [N, T, batch, *shape] with
            time_major too, else [N, batch, *shape].
        states: every state after the last step, [N, batch, *shape]; empty unless return_state.
    """

    tags: Array
    first_steps: Array | None
    timesteps: int
    outputs: Arrays
    states: Arrays

    def part(self, start: int, stop: int) -> Answers:
        """Those of the chunks from ``start`` to ``stop``."""
        return Answers(
            self.tags[start:stop],
            None if self.first_steps is None else self.first_steps[start:stop],
            self.timesteps,
            {name: y[start:stop] for name, y in self.outputs.items()},
            {name: state[start:stop] for name, state in self.states.items()},
        )


class Failure(NamedTuple):
    """A chunk that failed. Its session is as it was."""

    tag: int
    first_step: int | None  # where the request said it, or the session's turn had come
    error: ServiceError


Tell = Callable[[], None]
"""Tells what was made ready."""


class Sink(Protocol):
    """Where results go: the call or stream that the chunks came from."""

    cancelled: bool
    deadline: float | None

    def session_id(self, tag: int) -> str:
        """The session behind one of its chunks."""

    def result(self, answers: Answers) -> None:
        """Chunks are done and committed."""

    def ready(self, answers: Sequence[Answers]) -> Tell:
        """Readies what is told of chunks that are done, before it is known that they are committed.

        Returns:
            Tells it, as `result` of each would; it is never called if they are not.
        """

    def failed(self, failures: Sequence[Failure]) -> None:
        """Chunks failed."""

    def flush(self) -> None:
        """All that a tick had to tell was told."""


class Trace(Protocol):
    """A frame or call that is traced."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""


class Sessions:
    """Which sessions a block's N chunks belong to, as columns.

    Attributes:
        group: their group.
        slots: int64 [N].
        generations: int64 [N], the slots' generations when the sessions were found.
        first_steps: uint64 [N]; None: wherever each session is.
        ended: `Group.ended` when all of them were known to be alive; -1 for unknown.
        distinct: no session is there twice, for certain.
        at: the slots as an index, see `span`; worked out if it is not given.
        said: the request says where the chunks begin; else ``first_steps`` are filled in when that is known.
    """

    __slots__ = ("at", "distinct", "ended", "first_steps", "generations", "group", "said", "slots")

    def __init__(
        self,
        group: Group,
        slots: Array,
        generations: Array,
        first_steps: Array | None,
        ended: int = -1,
        distinct: bool = False,
        at: Index | None = None,
    ) -> None:
        self.group = group
        self.slots = slots
        self.generations = generations
        self.first_steps = first_steps
        self.ended = ended
        self.distinct = distinct
        self.at: Index = span(slots) if at is None else at
        self.said = first_steps is not None

    def same(self, other: Sessions) -> bool:
        """Whether other chunks are of the very same sessions, in the same order."""
        if other.slots is self.slots and other.generations is self.generations:
            return True  # as when a stream says its lanes again
        return (
            other.group is self.group
            and other.slots.tobytes() == self.slots.tobytes()
            and other.generations.tobytes() == self.generations.tobytes()
        )

    def goes_on(self, following: Sessions, timesteps: int) -> bool:
        """Whether the following chunks are of the very same sessions, so many steps later. Fills in their steps."""
        assert self.first_steps is not None
        if not self.same(following):
            return False
        first_steps = self.first_steps + np.uint64(timesteps)
        if following.first_steps is None:
            following.first_steps = first_steps
        return following.first_steps.tobytes() == first_steps.tobytes()

    def later(self, timesteps: int) -> Sessions:
        """The same sessions, so many steps later; wherever each is, if the request does not say that."""
        first_steps = None
        if self.said and self.first_steps is not None:
            first_steps = self.first_steps + np.uint64(timesteps)
        slots, generations = self.slots, self.generations
        return Sessions(self.group, slots, generations, first_steps, self.ended, self.distinct, self.at)

    def take(self, index: Array) -> Sessions:
        """Some of them."""
        first_steps = None if self.first_steps is None else self.first_steps[index]
        slots, generations = self.slots[index], self.generations[index]
        taken = Sessions(self.group, slots, generations, first_steps, self.ended, self.distinct)
        taken.said = self.said
        return taken


@dataclass(slots=True, eq=False)
class Block:
    """N chunks of equal shape, of one model and one set of options; or R rounds of them, one after the other.

    Attributes:
        call: inputs, lengths and mask of all N * batch_size rows, time-major, valid steps first; the rounds end to end.
        batch_size: rows of each chunk.
        options: the options of the layer.
        sinks: where the results go, and how many of the N chunks, one sink after the other.
        tags: [N], what its sink knows each chunk by (lanes of a stream).
        sessions: whose chunks these are; None for a call without a session.
        states: the working states, [N * batch_size, *shape] each. For sessions, a copy: the arena changes only when
            the whole block is done.
        initial: the states that it began with, alike; empty before it has begun.
        done: compacted time steps already run.
        solo: run by itself, because it shared a batch that failed.
        begun: whether its sessions were checked and their states gathered.
        resets: where its rows are reset by themselves; None: nowhere.
        outputs: what the engine gave so far, for each slice of time steps.
        number: its own, given when it is queued.
        followers: what must wait for it.
        onto: the block that it follows, from whose states it runs on while that is run but not finished; None: from the
            sessions' own.
        ran: it was run to its end and is not finished.
        rounds: R, how many chunks of each session it has; they are of equal length, unless it is made of other blocks,
            and without a mask.
        parts: the blocks that it was made of, if it was: see `Scheduler.absorb`. Their sinks may be different ones.
        queued_at: when it was queued, by the worker's clock, if anybody watches.
        traces: the frames in it that are traced, as whoever traces them knows them.
        rows: N * batch_size.
        steps: compacted time steps in all: the largest number of valid steps of a row.
        nbytes: bytes of input that it holds.
    """

    call: Compacted
    batch_size: int
    options: LayerOptions
    sinks: list[tuple[Sink, int]]
    tags: Array
    sessions: Sessions | None = None
    states: Arrays = field(default_factory=dict)
    initial: Arrays = field(default_factory=dict)
    done: int = 0
    solo: bool = False
    begun: bool = False
    resets: Resets | None = None
    outputs: list[Arrays] = field(default_factory=list)
    number: int = -1
    followers: list[Block | Barrier] = field(default_factory=list)
    onto: Block | None = None
    ran: bool = False
    rounds: int = 1
    parts: list[Block] = field(default_factory=list)
    queued_at: float = 0.0
    traces: Sequence[Trace] = ()
    rows: int = field(init=False)
    steps: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        inputs = self.call.inputs.values()
        self.steps, self.rows = next(iter(inputs)).shape[:2]
        self.nbytes = sum([x.nbytes for x in inputs])

    @property
    def pieces(self) -> Sequence[Block]:
        """Blocks whose rounds are of equal length, which it is made of: itself, mostly."""
        return self.parts or (self,)

    @property
    def all_sinks(self) -> Collection[Sink]:
        """The sinks of all its pieces, each once: a session may be on several streams, which send at the same time."""
        if not self.parts:
            return [sink for sink, _ in self.sinks]
        return {sink for each in self.parts for sink, _ in each.sinks}

    @property
    def next_steps(self) -> int:
        """Time steps that it wants to run next: those of one round, if none of it was run yet, else what is left."""
        return self.steps - self.done if self.done or self.rounds == 1 else self.pieces[0].round_steps

    @property
    def round_steps(self) -> int:
        """Time steps of one of its rounds, which are of equal length."""
        return self.call.timesteps // self.rounds

    @property
    def live(self) -> Array | None:
        """The rows that have steps left, or None for all of them."""
        if self.call.mask is None:
            return None
        return np.flatnonzero(self.call.lengths > self.done)

    def advance(self, steps: int, outputs: Arrays, states: Arrays) -> None:
        """Takes what the engine made of the next ``steps`` steps of the live rows."""
        live = self.live
        if live is not None and len(live) < self.rows:
            for name, y in outputs.items():
                outputs[name] = np.zeros((steps, self.rows, *y.shape[2:]), y.dtype)
                outputs[name][:, live] = y
            for name, state in states.items():
                states[name] = self.states[name].copy()
                states[name][live] = state
        elif live is None and not self.options.return_sequences and self.rounds == 1:
            self.outputs.clear()  # only the last step's is asked for
        self.outputs.append(outputs)
        self.states = states
        self.done += steps

    def fail(self, errors: Iterable[tuple[int, ServiceError]]) -> None:
        """Tells the sinks why chunks failed: (position among the N, ascending, and the error)."""
        if self.rounds > 1:
            errors = list(errors)
            for piece in self.pieces:
                for each in piece.each():
                    each.fail(errors)
            return
        first_steps = None if self.sessions is None else self.sessions.first_steps
        sinks = iter(self.sinks)
        sink, stop = next(sinks)
        failures: list[Failure] = []
        for position, error in errors:
            while position >= stop:
                if failures:
                    sink.failed(failures)
                    failures = []
                sink, count = next(sinks)
                stop += count
            first_step = None if first_steps is None else int(first_steps[position])
            failures.append(Failure(int(self.tags[position]), first_step, error))
        if failures:
            sink.failed(failures)

    def first_steps(self) -> Sequence[Array | None]:
        """Where the N chunks of each of its rounds, which are of equal length, begin: uint64 [N] each, or None."""
        if self.sessions is None or self.sessions.first_steps is None:
            return (None,) * self.rounds
        if self.rounds == 1:
            return (self.sessions.first_steps,)
        later = np.arange(0, self.call.timesteps, self.round_steps, dtype=np.uint64)
        return list(self.sessions.first_steps + later[:, None])  # [R, N]

    def sink_of(self, position: int) -> Sink:
        """The sink of the chunk at a position among the N."""
        for sink, count in self.sinks:
            if position < count:
                return sink
            position -= count
        raise IndexError(position)

    def cut(self, start: int, stop: int) -> Block:
        """A block of some of its rounds, which are of equal length, not queued. Nothing of them was run."""
        steps = self.round_steps
        count = (stop - start) * steps
        return Block(
            call=Compacted(
                {name: x[start * steps : stop * steps] for name, x in self.call.inputs.items()},
                same_lengths(self.rows, count),
                count,
                None,
            ),
            batch_size=self.batch_size,
            options=self.options,
            sinks=self.sinks,
            tags=self.tags,
            sessions=self.sessions and self.sessions.later(start * steps),
            rounds=stop - start,
            queued_at=self.queued_at,
        )

    def each(self) -> Sequence[Block]:
        """Its rounds, which are of equal length, a block each."""
        return (self,) if self.rounds == 1 else [self.cut(at, at + 1) for at in range(self.rounds)]

    def take(self, index: Array) -> Block:
        """A block of some of the chunks, not queued. ``index`` holds positions among the N, ascending."""
        stops = np.searchsorted(index, np.cumsum([count for _, count in self.sinks])).tolist()
        counts = np.diff(stops, prepend=0).tolist()
        rows = (index[:, None] * self.batch_size + np.arange(self.batch_size)).ravel()  # [len(index) * batch_size]
        return Block(
            call=self.call.take(index, len(self.tags)),
            batch_size=self.batch_size,
            options=self.options,
            sinks=[(sink, count) for (sink, _), count in zip(self.sinks, counts, strict=True) if count],
            tags=self.tags[index],
            sessions=self.sessions and self.sessions.take(index),
            states={name: state[rows] for name, state in self.states.items()},
            initial={name: state[rows] for name, state in self.initial.items()},
            done=self.done,
            solo=self.solo,
            begun=self.begun,
            resets=self.resets and self.resets.take(rows),
            outputs=[{name: y[:, rows] for name, y in part.items()} for part in self.outputs],
            rounds=self.rounds,
            parts=[each.take(index) for each in self.parts],
            queued_at=self.queued_at,
            traces=self.traces,
        )


class ShownRound(NamedTuple):
    """What N chunks of a block are answered.

    Attributes:
        block: it.
        first_steps: uint64 [N], where they begin; None without sessions.
        outputs: as `Answers` has them.
        states: likewise.
    """

    block: Block
    first_steps: Array | None
    outputs: Arrays
    states: Arrays

    def shares(self) -> Iterator[tuple[Sink, Answers]]:
        """Each sink's share of it."""
        block = self.block
        answers = Answers(block.tags, self.first_steps, block.round_steps, self.outputs, self.states)
        if len(block.sinks) == 1:
            yield block.sinks[0][0], answers
            return
        start = 0
        for sink, count in block.sinks:
            yield sink, answers.part(start, start + count)
            start += count


def sinks_of(blocks: Sequence[Block]) -> Collection[Sink]:
    """The sinks of blocks, each once."""
    if len(blocks) == 1:
        return blocks[0].all_sinks
    return {sink for block in blocks for sink in block.all_sinks}


def only_outputs(options: LayerOptions) -> bool:
    """Whether chunks without a mask could as well be one longer chunk: nothing is asked for between them."""
    return not (options.return_state or options.go_backwards)


def end_to_end(calls: Sequence[Compacted]) -> Compacted:
    """Calls of the same rows, none of them masked, as one call.

    Args:
        calls: R of them, each input [T, N * batch, *shape], T of each its own.

    Returns:
        Each input [sum of T, N * batch, *shape], a copy.
    """
    steps = sum([call.timesteps for call in calls])
    inputs = {name: np.concatenate([call.inputs[name] for call in calls]) for name in calls[0].inputs}
    return Compacted(inputs, same_lengths(len(calls[0].lengths), steps), steps, None)


def goes_on(before: Block, block: Block) -> bool:
    """Whether a block is of the very same sessions as another, and begins where that ends. Fills in their steps."""
    if before.sessions is None or block.sessions is None or before.sessions.first_steps is None:
        return False
    return before.sessions.group is block.sessions.group and before.sessions.goes_on(
        block.sessions, before.call.timesteps
    )


@dataclass(slots=True, eq=False)
class Barrier:
    """Something to do to one session when the chunks that came before it are done.

    Attributes:
        group: the session's group.
        slot: its slot.
        action: what to do.
        held: what comes after it waits until `Scheduler.finish` is called, not only until the action returns.
        number: its own, given when it is queued.
        followers: what must wait for it.
    """

    group: Group
    slot: int
    action: Callable[[], None]
    held: bool = False
    number: int = -1
    followers: list[Block | Barrier] = field(default_factory=list)
