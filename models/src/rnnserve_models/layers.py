"""The layer of ``tf.keras.layers.RNN``, on this machine and in NumPy: what a served session computes, without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rnnserve_models.cell import Cell, Shape, States, run_cell, shape_of
from rnnserve_models.errors import InputError
from rnnserve_models.masking import compact
from rnnserve_models.options import LayerOptions
from rnnserve_models.stack import StackedRNNCells


class RNN:
    """A recurrent layer: a cell, or stacked cells, iterated over time.

    Takes the options of ``tf.keras.layers.RNN`` (`LayerOptions` says what they do) and returns what it returns at
    inference. ``initial_state`` takes the place of a stateful layer's recorded state, as in Keras 3.
    """

    def __init__(
        self,
        cell: Cell | Sequence[Cell],
        *,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        time_major: bool = False,
        zero_output_for_mask: bool = False,
    ) -> None:
        """Makes a layer of a cell with its weights, or of several, stacked."""
        self.cell = cell if isinstance(cell, Cell) else StackedRNNCells(cell)
        self.options = LayerOptions(
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            unroll=unroll,
            time_major=time_major,
            zero_output_for_mask=zero_output_for_mask,
        )
        self._states: list[np.ndarray] | None = None  # in the order of the cell's state_specs()

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None, initial_state: Any = None) -> Any:
        """Computes the layer.

        Args:
            x: [B, T, features], or [T, B, features] if ``time_major``; converted to the cell's dtype.
            mask: [B, T] or [B, T, 1] (time first if ``time_major``), where B may be 1; any nonzero is valid.
            initial_state: arrays [B, units], nested as `get_initial_state` nests them; a cell's only state may stand
                without its list. Default: the recorded state if ``stateful``, else zeros.

        Returns:
            The output: [B, units], or with ``return_sequences`` [B, T, units] or, ``time_major``, [T, B, units]. With
            ``return_state``, the list [output, *states].

        Raises:
            InputError: a tensor does not fit the cell, the others, or the batch size that a stateful layer began with.
        """
        inputs = self._time_major_inputs(x)  # [T, B, ...]
        steps, batch = inputs.shape[:2]
        if initial_state is not None:
            states = self._checked_states(initial_state, batch)
        else:
            states = self._zeros(batch) if self._states is None else self._states
        time_major_mask = self._time_major_mask(mask, steps, batch)
        packed = compact({"x": inputs}, time_major_mask, go_backwards=self.options.go_backwards)
        y, states = run_cell(self.cell, packed.inputs["x"], packed.lengths, states)
        output = packed.expand(
            y,
            return_sequences=self.options.return_sequences,
            zero_output_for_mask=self.options.zero_output_for_mask,
        )
        if self.options.return_sequences and not self.options.time_major:
            output = output.swapaxes(0, 1)
        if self.options.stateful:
            self._states = states
        return [output, *self._nested(states)] if self.options.return_state else output

    @property
    def states(self) -> States | None:
        """A copy of the recorded states; None if there are none, before the first call or if not ``stateful``."""
        return None if self._states is None else self._nested(self._states)

    def reset_states(self, values: Any = None) -> None:
        """Sets the recorded states to ``values``, nested as ``initial_state`` is, or to zeros.

        Raises:
            AttributeError: the layer is not ``stateful``, as in Keras 2.
            InputError: the values do not fit the cell or the layer's batch size.
        """
        if not self.options.stateful:
            raise AttributeError("Layer must be stateful.")
        if values is not None:
            self._states = self._checked_states(values, self._batch_size())
        elif self._states is not None:
            self._states = [np.zeros_like(state) for state in self._states]

    @property
    def state_size(self) -> list[Any]:
        """The cell's state sizes, always a list, as in Keras 3."""
        size = self.cell.state_size
        return size if isinstance(size, list) else [size]

    @property
    def output_size(self) -> int | Shape:
        """The size of one step's output."""
        return self.cell.output_size

    def get_initial_state(self, batch_size: int) -> States:
        """Zeros, a list of an array [batch_size, units] for each state, nested for stacked cells."""
        return self.cell.get_initial_state(batch_size)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Any:
        """The shape, or with ``return_state`` the list of shapes nested as the arrays are, of what a call returns.

        Args:
            input_shape: of ``x``; None where unknown.
        """
        first, second = input_shape[:2]
        batch = second if self.options.time_major else first
        size = shape_of(self.output_size)
        output = (first, second, *size) if self.options.return_sequences else (batch, *size)
        states = self.cell.nest_states([(batch, *spec.shape) for spec in self.cell.state_specs()])
        return [output, *states] if self.options.return_state else output

    def _time_major_inputs(self, x: ArrayLike) -> np.ndarray:
        array = _cast("inputs", x, self.cell)
        features = "features" if self.cell.input_dim is None else self.cell.input_dim
        expected = f"shape [{'time, batch' if self.options.time_major else 'batch, time'}, {features}]"
        if array.ndim < 3 or (self.cell.input_dim is not None and array.shape[2:] != (self.cell.input_dim,)):
            raise InputError("inputs", expected, _got(array))
        array = array if self.options.time_major else array.swapaxes(0, 1)
        if len(array) == 0:
            raise InputError("inputs", "at least one time step", "none")
        if self._states is not None and self._batch_size() not in (None, array.shape[1]):
            raise InputError("inputs", f"batch size {self._batch_size()}, as in the first call", f"{array.shape[1]}")
        return array

    def _time_major_mask(self, mask: ArrayLike | None, steps: int, batch: int) -> np.ndarray | None:
        if mask is None:
            return None
        array = np.asarray(mask)
        got = _got(array)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if array.ndim == 2 and not self.options.time_major:
            array = array.swapaxes(0, 1)
        if array.shape not in ((steps, batch), (steps, 1)):
            expected = [steps, batch] if self.options.time_major else [batch, steps]
            raise InputError("mask", f"shape {expected}", got)
        return array

    def _batch_size(self) -> int | None:
        """The rows of the recorded states; None where any number will do."""
        return len(self._states[0]) if self._states else None

    def _zeros(self, batch: int) -> list[np.ndarray]:
        return self.cell.flat_states(self.get_initial_state(batch))

    def _nested(self, states: list[np.ndarray]) -> States:
        """A copy for the caller, who may write to it."""
        return self.cell.nest_states([state.copy() for state in states])

    def _checked_states(self, given: Any, batch: int | None) -> list[np.ndarray]:
        """The given states, flat and copied; with ``batch`` None, the first says how many rows there are."""
        states = []
        for spec, value in zip(self.cell.state_specs(), self._flattened(given, self.get_initial_state(0)), strict=True):
            field = f"initial_states.{spec.name}"
            array = np.array(_cast(field, value, self.cell))
            if batch is None and array.ndim:
                batch = len(array)
            if array.shape != (batch, *spec.shape):
                raise InputError(field, f"shape {['batch' if batch is None else batch, *spec.shape]}", _got(array))
            states.append(array)
        return states

    def _flattened(self, given: Any, template: States) -> list[Any]:
        """The leaves of ``given``, which must nest as ``template`` does."""
        entries = given if isinstance(given, (list, tuple)) else [given]
        if len(entries) != len(template):
            raise InputError(
                "initial_states", f"arrays nested as {self.state_size}", f"{len(entries)} where {len(template)} belong"
            )
        flat = []
        for entry, part in zip(entries, template, strict=True):
            flat += self._flattened(entry, part) if isinstance(part, list) else [entry]
        return flat


def _cast(field: str, value: ArrayLike, cell: Cell) -> np.ndarray:
    """Converts to the cell's dtype, as Keras 3 does with integers and floats of any precision."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(field, f"an array of {cell.dtype}", f"what is no array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise InputError(field, f"numbers that convert to {cell.dtype}", f"dtype {array.dtype}")
    with np.errstate(over="ignore"):  # what float16 cannot hold is infinite in it
        return array.astype(cell.dtype, copy=False)


def _got(array: np.ndarray) -> str:
    return f"shape {list(array.shape)}"
