"""Reset rules: when the states of a session's rows go back to the model's default by themselves.

What they mean is said at ResetRules in session.proto. Here a chunk is told where in it that happens, so that it is run
in pieces: the engine knows nothing of it. Rules look at nothing but the number of a step and the masked steps before
it, both of which a session carries from chunk to chunk, so it makes no difference how its steps are cut into chunks.

Pure: arrays in, arrays out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.masking import Compacted
from rnnserve_models.spec import StateSpec

MASKED_RUN = "rnnserve.masked_run"
"""A state that sessions have beside their model's, for rules that need it: the masked steps that each row took in a row
up to where the session is, int64 [batch_size]. It is stored, copied and taken back like the others."""


@dataclass(frozen=True, slots=True)
class ResetRules:
    """When the states of a session's rows go back to the model's default.

    Attributes:
        every_steps: whenever the session's step is a multiple of it; 0: not.
        masked_steps: with the so many-th masked step of a row in a row, that row's; 0: not.
    """

    every_steps: int = 0
    masked_steps: int = 0

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What a session has to remember for them."""
        return (StateSpec(MASKED_RUN, np.dtype(np.int64), (), ()),) if self.masked_steps else ()


NO_RULES = ResetRules()


class Resets:
    """Where in the chunks of a block rows are reset.

    Attributes:
        remembered: what its sessions have to remember afterwards, for their rules: [N * batch] each.
    """

    __slots__ = ("_cuts", "_rows", "_stop", "remembered")

    def __init__(self, cuts: list[int], rows: list[Array], stop: int, remembered: Arrays) -> None:
        """Rows are reset when so many compacted steps of them were run, as ``cuts`` says, ascending; all of the steps
        are ``stop``.
        """
        self._cuts = cuts
        self._rows = rows
        self._stop = stop
        self.remembered = remembered

    def left(self, done: int) -> int:
        """When ``done`` steps were run: how many to run before rows are reset, or to the end."""
        index = bisect_right(self._cuts, done)
        return (self._cuts[index] if index < len(self._cuts) else self._stop) - done

    def apply(self, done: int, states: Arrays, specs: Sequence[StateSpec], batch_size: int) -> Arrays:
        """The states, [N * batch, *shape] each, with those rows reset that are so when ``done`` steps were run."""
        index = bisect_right(self._cuts, done) - 1
        if index < 0 or self._cuts[index] != done:
            return states
        rows, fresh = self._rows[index], {}
        for spec in specs:
            fresh[spec.name] = states[spec.name].copy()
            fresh[spec.name][rows] = spec.initial(batch_size)[rows % batch_size]
        return fresh

    def take(self, rows: Array) -> Resets:
        """Those of some of the N * batch rows, ascending."""
        kept = [np.flatnonzero(np.isin(rows, each)) for each in self._rows]
        cuts = [(cut, each) for cut, each in zip(self._cuts, kept, strict=True) if len(each)]
        remembered = {name: value[rows] for name, value in self.remembered.items()}
        return Resets([cut for cut, _ in cuts], [each for _, each in cuts], self._stop, remembered)


def resets(rules: ResetRules, call: Compacted, first_steps: Array, initial: Arrays) -> Resets:
    """Where rules reset rows in N chunks.

    Args:
        rules: the rules of their sessions.
        call: the chunks, in rows of N * batch.
        first_steps: uint64 [N], where they begin.
        initial: what their sessions remember there, [N * batch] each, beside states that do not count here.

    Returns:
        The resets. Every one of them is right behind the step that caused it, so that what a session holds at a step is
        what its next one starts from.
    """
    timesteps, rows = call.timesteps, len(call.lengths)
    stop = next(iter(call.inputs.values())).shape[0]
    remembered: Arrays = {}
    run = None
    if rules.masked_steps:
        run = _masked_runs(call, initial[MASKED_RUN]) if call.mask is not None else None
        remembered = {MASKED_RUN: np.zeros(rows, np.int64) if run is None else run[-1]}
    due = None if run is None else run == rules.masked_steps  # [T, R], behind each step
    if rules.every_steps:
        phases = first_steps % np.uint64(rules.every_steps)  # [N]
        if int(phases.max()) + timesteps >= rules.every_steps:
            steps = phases.astype(np.int64) + np.arange(1, timesteps + 1)[:, None]  # [T, N]
            ends = np.repeat(steps % rules.every_steps == 0, rows // len(first_steps), axis=1)  # [T, R]
            due = ends if due is None else due | ends
    if due is None or not due.any():
        return Resets([], [], stop, remembered)
    times, where = np.nonzero(due)
    # How many steps of the row were run by then. What comes behind a row's last one may wait for the other rows.
    ran = times + 1 if call.mask is None else np.cumsum(call.mask, axis=0)[times, where]
    ran[ran == call.lengths[where]] = stop
    cuts = np.unique(ran).tolist()
    return Resets(cuts, [np.unique(where[ran == cut]) for cut in cuts], stop, remembered)


def _masked_runs(call: Compacted, before: Array) -> Array:
    """How many masked steps each row has taken in a row, behind each step: int64 [T, R]."""
    assert call.mask is not None
    steps = np.arange(call.timesteps)[:, None]  # [T, 1]
    last = np.maximum.accumulate(np.where(call.mask, steps, -1))  # [T, R], the last step that counted
    counted: Array = np.where(last >= 0, steps - last, before + steps + 1)
    return counted
