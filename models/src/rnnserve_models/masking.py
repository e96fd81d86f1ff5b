"""Masks by compaction: an engine that knows only right-padded rows computes what Keras computes under any mask.

Keras's loop skips a masked step of a row: the state stays, and the output repeats. Moving each row's valid steps to
the front, in order, gives the engine the same steps to compute; `Compacted.expand` puts the outputs back where Keras
has them. Steps are selected, never multiplied, so a NaN in a masked step goes nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rnnserve_models.errors import InputError


@dataclass(slots=True, eq=False)
class Compacted:
    """The valid steps of a batch, first in each row, in the order in which a layer iterates over them.

    Attributes:
        inputs: each [T', R, ...], where T' is the largest of ``lengths``, or more where `take` left longer rows out;
            zeros after a row's last valid step.
        lengths: int64 [R], the number of valid steps of each row.
        timesteps: T, the number of steps that came.
        mask: bool [T, R] in the order of iteration, or None where every step is valid.
    """

    inputs: Mapping[str, np.ndarray]
    lengths: np.ndarray
    timesteps: int
    mask: np.ndarray | None

    def take(self, index: np.ndarray, parts: int) -> Compacted:
        """Some of the equal parts that the R rows make up: a view if they follow one another, else a copy.

        Args:
            index: positions among the parts, ascending, at least one.
            parts: how many there are.
        """
        size = len(self.lengths) // parts
        rows: np.ndarray | slice
        if int(index[-1]) - int(index[0]) == len(index) - 1:
            rows = slice(int(index[0]) * size, (int(index[-1]) + 1) * size)
        else:
            rows = (index[:, None] * size + np.arange(size)).ravel()  # [len(index) * size]
        return Compacted(
            {name: x[:, rows] for name, x in self.inputs.items()},
            self.lengths[rows],
            self.timesteps,
            None if self.mask is None else self.mask[:, rows],
        )

    def expand(self, y: np.ndarray, *, return_sequences: bool, zero_output_for_mask: bool) -> np.ndarray:
        """Gives each step its output as Keras does, in the order of iteration (``go_backwards`` is never undone).

        A masked step repeats the output before it, or is 0 with ``zero_output_for_mask``; before a row's first valid
        step the output is 0, whatever the initial state.

        Args:
            y: the engine's outputs, [T', R, ...]; what is beyond a row's length is not read.
            return_sequences: all the outputs rather than the last.
            zero_output_for_mask: zeros at masked steps.

        Returns:
            [T, R, ...] with ``return_sequences``, else [R, ...]; a view of ``y`` where every step is valid.
        """
        if self.mask is None:
            return y if return_sequences else y[-1]
        if return_sequences:
            index = np.cumsum(self.mask, axis=0) - 1  # [T, R]; -1 before the first valid step
            shown = self.mask if zero_output_for_mask else index >= 0
        else:
            index = self.lengths - 1  # [R]
            shown = self.mask[-1] if zero_output_for_mask else index >= 0
        output = np.zeros((*index.shape, *y.shape[2:]), y.dtype)
        rows = np.broadcast_to(np.arange(len(self.lengths)), index.shape)
        output[shown] = y[index[shown], rows[shown]]
        return output


def compact(inputs: Mapping[str, np.ndarray], mask: np.ndarray | None, *, go_backwards: bool) -> Compacted:
    """Moves the valid steps of each row to the front.

    Without a mask, or with one that masks nothing, the inputs are views of what came.

    Args:
        inputs: each [T, R, ...], time-major.
        mask: [T, R] or, the same for every row, [T, 1]; any nonzero is valid. None: every step is.
        go_backwards: iterate from the last step to the first.

    Raises:
        InputError: there is no input, or the inputs or the mask differ in T or R.
    """
    timesteps, rows = _common_shape(inputs)
    if mask is not None:
        if mask.shape not in ((timesteps, rows), (timesteps, 1)):
            raise InputError("mask", f"time and batch {[timesteps, rows]}", f"{list(mask.shape)}")
        mask = np.broadcast_to(mask != 0, (timesteps, rows))
        if mask.all():
            mask = None
    if go_backwards:
        inputs = {name: x[::-1] for name, x in inputs.items()}
        mask = None if mask is None else mask[::-1]
    if mask is None:
        return Compacted(inputs, np.full(rows, timesteps), timesteps, None)

    lengths = mask.sum(axis=0, dtype=np.int64)  # [R]
    longest = int(lengths.max(initial=0))
    order = np.argsort(~mask, axis=0, kind="stable")[:longest]  # [T', R]; valid steps first, in their order
    padding = np.arange(longest)[:, None] >= lengths  # [T', R]
    packed = {}
    for name, x in inputs.items():
        packed[name] = x[order, np.arange(rows)]  # [T', R, ...]
        packed[name][padding] = 0  # what stood there may be NaN
    return Compacted(packed, lengths, timesteps, mask)


def _common_shape(inputs: Mapping[str, np.ndarray]) -> tuple[int, int]:
    shape: tuple[int, ...] | None = None
    for name, x in inputs.items():
        if x.ndim < 2 or (shape is not None and x.shape[:2] != shape):
            raise InputError(f"inputs.{name}", f"time and batch {list(shape or ('T', 'B'))}", f"{list(x.shape)}")
        shape = x.shape[:2]
    if shape is None:
        raise InputError("inputs", "at least one input", "none")
    return shape[0], shape[1]
