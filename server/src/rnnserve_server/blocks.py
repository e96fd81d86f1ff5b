"""Blocks: the columns that the scheduler moves about.

A frame of N lanes is not N requests. It stays one block of columns, from the wire through the engine and back, and
whatever is checked or done for a session is done for the whole block by one array operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.masking import Compacted
from rnnserve_models.options import LayerOptions
from rnnserve_server.errors import ServiceError

if TYPE_CHECKING:
    from rnnserve_server.sessions import Group


class Sink(Protocol):
    """Where a block's results go: the call or stream that it came from."""

    cancelled: bool
    deadline: float | None

    def session_id(self, tag: int) -> str:
        """The session behind one of a block's ``tags``."""

    def result(self, block: Block, outputs: Arrays, states: Arrays) -> None:
        """The block is done and committed.

        Args:
            block: the block; its ``tags`` and ``first_steps`` say whose rows these are.
            outputs: every output, [T, N * batch_size, *shape] with return_sequences, else [N * batch_size, *shape].
            states: every state after the last step, [N * batch_size, *shape].
        """

    def failed(self, block: Block, errors: list[tuple[int, ServiceError]]) -> None:
        """Some of the block's N chunks failed: (index into ``tags``, why). Their sessions are as they were."""


@dataclass(slots=True, eq=False)
class Sessions:
    """Which sessions a block's N chunks belong to, as columns."""

    group: Group
    slots: Array  # [N] int64
    generations: Array  # [N] int64
    first_steps: Array | None  # [N] uint64; None: wherever each session is

    def take(self, index: Array) -> Sessions:
        """Some of them."""
        first_steps = None if self.first_steps is None else self.first_steps[index]
        return Sessions(self.group, self.slots[index], self.generations[index], first_steps)


@dataclass(slots=True, eq=False)
class Block:
    """N chunks of equal shape, of one model and one set of options.

    Attributes:
        call: inputs, lengths and mask of all N * batch_size rows, time-major, valid steps first.
        batch_size: rows of each chunk.
        options: the options of the layer.
        sink: where the results go.
        tags: [N], what the sink knows each chunk by (lanes of a stream).
        sessions: whose chunks these are; None for a call without a session.
        states: the working states, [N * batch_size, *shape] each. For sessions, a copy: the arena changes only when
            the whole block is done.
        done: compacted time steps already run.
        solo: run by itself, because it shared a batch that failed.
        begun: whether its sessions were checked and their states gathered.
        outputs: what the engine gave so far, for each slice of time steps.
        number: its own, given when it is queued.
        order: its turn among the blocks that are ready.
        followers: what must wait for it.
    """

    call: Compacted
    batch_size: int
    options: LayerOptions
    sink: Sink
    tags: Array
    sessions: Sessions | None = None
    states: Arrays = field(default_factory=dict)
    done: int = 0
    solo: bool = False
    begun: bool = False
    outputs: list[Arrays] = field(default_factory=list)
    number: int = -1
    order: int = -1
    followers: list[Block | Barrier] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """N * batch_size."""
        return len(self.call.lengths)

    @property
    def steps(self) -> int:
        """Compacted time steps in all: the largest number of valid steps of a row."""
        return len(next(iter(self.call.inputs.values())))

    @property
    def nbytes(self) -> int:
        """Bytes of input that it holds."""
        return sum(x.nbytes for x in self.call.inputs.values())

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
        elif live is None and not self.options.return_sequences:
            self.outputs.clear()  # only the last step's is asked for
        self.outputs.append(outputs)
        self.states = states
        self.done += steps

    def take(self, index: Array) -> Block:
        """A block of some of the chunks, not queued. ``index`` holds distinct positions among the N."""
        rows = (index[:, None] * self.batch_size + np.arange(self.batch_size)).ravel()  # [len(index) * batch_size]
        return Block(
            call=replace(
                self.call,
                inputs={name: x[:, rows] for name, x in self.call.inputs.items()},
                lengths=self.call.lengths[rows],
                mask=None if self.call.mask is None else self.call.mask[:, rows],
            ),
            batch_size=self.batch_size,
            options=self.options,
            sink=self.sink,
            tags=self.tags[index],
            sessions=self.sessions and self.sessions.take(index),
            states={name: state[rows] for name, state in self.states.items()},
            done=self.done,
            solo=self.solo,
            begun=self.begun,
            outputs=[{name: y[:, rows] for name, y in part.items()} for part in self.outputs],
        )


@dataclass(slots=True, eq=False)
class Barrier:
    """Something to do to one session when the chunks that came before it are done."""

    group: Group
    slot: int
    action: Callable[[], None]
    number: int = -1
    followers: list[Block | Barrier] = field(default_factory=list)
