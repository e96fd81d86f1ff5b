"""The arena: where sessions keep their states.

One array per state, a slot per session. A slot is set to the model's default when it is given out, never when it is
taken back, so that no session can start from what another left behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.spec import StateSpec


class Arena:
    """States of sessions of one model and one batch size: each an array [capacity, batch_size, *shape]."""

    def __init__(self, states: Sequence[StateSpec], batch_size: int) -> None:
        self.batch_size = batch_size
        self.capacity = 0
        self._specs = tuple(states)
        self._arrays: Arrays = {spec.name: np.zeros((0, batch_size, *spec.shape), spec.dtype) for spec in states}
        self._free: list[int] = []

    @property
    def session_bytes(self) -> int:
        """The bytes of one session's states."""
        return sum(self.batch_size * spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in self._specs)

    def acquire(self) -> int:
        """Gives out a slot, its states at the model's default. The arena doubles when it is full."""
        if not self._free:
            self._grow(max(8, 2 * self.capacity))
        slot = self._free.pop()
        self.reset(slot)
        return slot

    def release(self, slot: int) -> None:
        """Takes a slot back."""
        self._free.append(slot)

    def reset(self, slot: int, states: Mapping[str, Array] | None = None) -> None:
        """Sets one slot to given states, each [batch_size, *shape], or to the model's default."""
        for spec in self._specs:
            self._arrays[spec.name][slot] = states[spec.name] if states else spec.initial(self.batch_size)

    def gather(self, slots: Array) -> Arrays:
        """Copies the states of N slots: each [N * batch_size, *shape]."""
        return {
            spec.name: self._arrays[spec.name][slots].reshape(len(slots) * self.batch_size, *spec.shape)
            for spec in self._specs
        }

    def scatter(self, slots: Array, states: Mapping[str, Array]) -> None:
        """Writes the states of N distinct slots: each [N * batch_size, *shape]."""
        for spec in self._specs:
            shape = (len(slots), self.batch_size, *spec.shape)
            self._arrays[spec.name][slots] = states[spec.name].reshape(shape)

    def _grow(self, capacity: int) -> None:
        for name, array in self._arrays.items():
            grown = np.zeros((capacity, *array.shape[1:]), array.dtype)
            grown[: self.capacity] = array
            self._arrays[name] = grown
        self._free.extend(range(capacity - 1, self.capacity - 1, -1))
        self.capacity = capacity
