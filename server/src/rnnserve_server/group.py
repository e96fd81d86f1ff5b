"""Sessions that are alike share columns.

Sessions of the same model version, batch size and options form a *group* and share columns, so that a frame of N
lanes is checked and committed by a few array operations. A session is a slot in its group. A slot's generation
changes when its session ends: work that still carries the old one is refused, and can never touch the states of the
session that has the slot next.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_models.load import LoadedModel
from rnnserve_models.options import LayerOptions
from rnnserve_server.column import Column
from rnnserve_server.expiry import Expiry
from rnnserve_server.replay import NO_REPLAY, Limits, Window
from rnnserve_server.resets import NO_RULES, ResetRules
from rnnserve_server.state import Arena

_COLUMNS = {
    "step": np.uint64,
    "generation": np.int64,
    "last_used": np.float64,
    "tail": np.int64,
    "number": np.int64,
    "create_time": np.float64,
    "idle_lifetime": np.float64,
    "lifetime": np.float64,
    "ends_at": np.float64,
    "unloaded": np.bool_,
    "answered": np.int64,
    "answered_bytes": np.int64,
    "epoch": np.int64,
    "revision": np.int64,
    "dirty": np.bool_,
    "stored_used": np.float64,
}


class Group:
    """The sessions of one model version, batch size and set of options, as columns over slots.

    Attributes:
        index: its number in its table, never given again.
        rules: when their states are reset by themselves; None: never.
        states: what their states are: the model's, and what the rules need beside them.
        arena: their states.
        expiry: when which must be looked at.
        step: uint64 [capacity], time steps consumed.
        generation: int64 [capacity], changes when a slot's session ends.
        last_used: float64 [capacity], when the session was last stepped or reset, by the monotonic clock.
        tail: int64 [capacity], the number of the last block queued for the session, -1 for none.
        number: int64 [capacity], the session's number in its table, in the order in which they were made.
        create_time: float64 [capacity], when the session was made, in seconds since the epoch.
        idle_lifetime: float64 [capacity], seconds without use after which the session expires.
        lifetime: float64 [capacity], seconds after which the session ends in any case; infinity for none.
        ends_at: float64 [capacity], when that is, by the monotonic clock.
        unloaded: bool [capacity], it ends then because its model was unloaded.
        ids: [capacity], the sessions' ids.
        live: sessions in it.
        ended: how many of its sessions have ended.
        answered: int64 [capacity], chunks answered.
        answered_bytes: int64 [capacity], bytes of the answers.
        epoch: int64 [capacity], the owner's; 0: the session is not stored.
        revision: int64 [capacity], the number of the last write, where sessions are stored.
        dirty: bool [capacity], what is in memory is not what is stored.
        stored_used: float64 [capacity], ``last_used`` as it is stored.
        window: what was answered lately.
        fitting: bytes of the answer to a chunk, by the signatures of inputs that are known to fit.
    """

    step: Array
    generation: Array
    last_used: Array
    tail: Array
    number: Array
    create_time: Array
    idle_lifetime: Array
    lifetime: Array
    ends_at: Array
    unloaded: Array
    answered: Array
    answered_bytes: Array
    epoch: Array
    revision: Array
    dirty: Array
    stored_used: Array

    def __init__(
        self,
        model: LoadedModel,
        batch_size: int,
        options: LayerOptions,
        replay: Limits = NO_REPLAY,
        rules: ResetRules = NO_RULES,
        index: int = 0,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.options = options
        self.index = index
        self.rules = rules if rules != NO_RULES else None
        self.states = (*model.engine.states, *rules.states)
        self.arena = Arena(self.states, batch_size)
        self.expiry = Expiry()
        self.ids: list[str] = []
        self.live = 0
        self.ended = 0
        self.window = Window(replay)
        self.fitting: dict[Hashable, int] = {}
        self._columns = {name: Column((), dtype) for name, dtype in _COLUMNS.items()}
        self._show()

    def acquire(self, count: int, now: float) -> Array:
        """Gives sessions slots, at step 0: int64 [count]."""
        slots = self.arena.acquire(count)
        if self.arena.capacity > len(self.ids):
            self._grow(self.arena.capacity)
        self.step[slots] = 0
        self.dirty[slots] = self.unloaded[slots] = False
        self.epoch[slots] = 0
        self.last_used[slots] = self.stored_used[slots] = now
        self.live += count  # tail stays: chunks of a slot's last session may still have to be told that it ended
        return slots

    def release(self, slots: Array) -> None:
        """Takes N distinct slots back. Work that is queued for them will find another generation."""
        self.arena.release(slots)
        self.generation[slots] += 1
        self.dirty[slots] = False
        self.live -= len(slots)
        self.ended += len(slots)

    def unname(self, slots: Array) -> list[str]:
        """Takes the ids off sessions in N slots that leave: [N]."""
        taken = slots.tolist()
        ids = [self.ids[slot] for slot in taken]
        for slot in taken:
            self.ids[slot] = ""
        return ids

    def _grow(self, capacity: int) -> None:
        before = len(self.ids)
        for name, column in self._columns.items():
            setattr(self, name, None)  # a column that somebody holds on to is copied
            column.grow(capacity)
        self._show()
        self.tail[before:] = -1
        self.expiry.grow(capacity)
        self.ids += [""] * (capacity - before)

    def _show(self) -> None:
        for name, column in self._columns.items():
            setattr(self, name, column.array)


@dataclass(slots=True, frozen=True)
class Session:
    """A stateful layer on the server. Two are equal if they are the same layer.

    It is made when somebody asks: what is kept of a session that rests is a row of its group's columns.
    """

    id: str
    number: int
    group: Group
    slot: int
    generation: int
    create_time: float
    idle_lifetime: float
    lifetime: float

    @property
    def step(self) -> int:
        """The number of time steps it has consumed."""
        return int(self.group.step[self.slot])

    @property
    def live(self) -> bool:
        """Whether it has not ended since."""
        return bool(self.group.generation[self.slot] == self.generation)

    @property
    def busy(self) -> bool:
        """Whether chunks wait for it or run."""
        return bool(self.group.tail[self.slot] >= 0)


Key = tuple[str, str, str, int, LayerOptions, Limits, ResetRules]


def key_of(model: LoadedModel, batch_size: int, options: LayerOptions, replay: Limits, rules: ResetRules) -> Key:
    """What the sessions of a group have in common."""
    return model.name, model.version, model.digest, batch_size, options, replay, rules
