"""The contract of a recurrent cell, Keras's: one time step of many rows."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from rnnserve_models.errors import ModelError
from rnnserve_models.spec import StateSpec

Shape = tuple[int, ...]
StateSize = int | list[Any]
"""As Keras writes it: the units of a single state; else a list, of the size (an int) or shape (a tuple) of each
state, or for stacked cells of the state sizes of each cell."""

States = list[Any]
"""The states of a cell, a list of arrays [R, ...]; for stacked cells, a list of such lists."""

_FLOATS = ("float16", "float32", "float64")


class Cell(ABC):
    """One time step of a recurrence. Cells are immutable: `with_weights` gives a new one.

    A cell of one's own needs ``call``, ``state_size`` and ``output_size``; ``weight_shapes`` too if it has weights,
    which it then finds in ``self.weights``.

    Attributes:
        bit_identical: the bits of a row's results are the same whatever the other rows and their number. A cell of
            one's own has this if it multiplies matrices by `project` and is otherwise elementwise.
        input_dim: the number of features of an input; None for a cell that was given no weights and takes any.
        dtype: of inputs, states, outputs and weights.
        weights: by name, in the order of Keras's ``get_weights()``; read-only.
    """

    bit_identical: bool = False
    input_dim: int | None = None
    dtype: np.dtype[Any] = np.dtype(np.float32)
    weights: Mapping[str, np.ndarray] = MappingProxyType({})

    @abstractmethod
    def call(self, inputs: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """Computes one step.

        Args:
            inputs: [R, input_dim] of the cell's dtype.
            states: as of `get_initial_state`; not written to.

        Returns:
            The outputs [R, output_size] and the new states, of the cell's dtype. A row's depend on that row only.
        """

    @property
    @abstractmethod
    def state_size(self) -> StateSize:
        """The sizes of the states; [] for a cell without any."""

    @property
    @abstractmethod
    def output_size(self) -> int | Shape:
        """The size, or the shape, of the output of one row."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """A name for each state."""
        return tuple(f"state_{index}" for index in range(len(_listed(self.state_size))))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes a cell, without weights, from what Keras's ``get_config()`` gives.

        Raises:
            ModelError: a key is unknown or missing, or a value is of no use.
        """
        try:
            return cls(**config)
        except TypeError as error:
            raise ModelError(f"{cls.__name__}: {error}") from error

    def weight_shapes(self, input_dim: int) -> dict[str, Shape]:
        """The shape of each weight, in the order of Keras's ``get_weights()``."""
        return {}

    def with_weights(self, weights: Mapping[str, np.ndarray], input_dim: int, dtype: DTypeLike = np.float32) -> Self:
        """This cell with those weights, converted to ``dtype``.

        Raises:
            ModelError: the dtype is no float, or weights are missing, unexpected or of another shape.
        """
        dtype = float_dtype(dtype)
        check_weights(type(self).__name__, self.weight_shapes(input_dim), weights)
        bound = copy.copy(self)
        vars(bound).update(
            input_dim=input_dim,
            dtype=dtype,
            weights=MappingProxyType(
                {name: _read_only(weights[name], dtype) for name in self.weight_shapes(input_dim)}
            ),
        )
        return bound

    def get_initial_state(self, batch_size: int, dtype: DTypeLike | None = None) -> States:
        """Zeros: a list of an array [batch_size, ...] for each state, of the cell's dtype unless told."""
        return [
            np.zeros((batch_size, *shape_of(size)), self.dtype if dtype is None else dtype)
            for size in _listed(self.state_size)
        ]

    def state_specs(self, dtype: DTypeLike | None = None) -> tuple[StateSpec, ...]:
        """Each state with its name, shape and path in the nested list of states; of the cell's dtype unless told."""
        sizes = _listed(self.state_size)
        return tuple(
            StateSpec(name, self.dtype if dtype is None else np.dtype(dtype), shape_of(size), (index,))
            for index, (name, size) in enumerate(zip(self.state_names, sizes, strict=True))
        )

    def nest_states(self, flat: Sequence[Any]) -> States:
        """States in the order of `state_specs`, as `call` takes them."""
        return list(flat)

    def flat_states(self, nested: States) -> list[Any]:
        """States as `call` gives them, in the order of `state_specs`."""
        return list(nested)


def run_cell(
    cell: Cell, x: np.ndarray, lengths: np.ndarray, states: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Runs a cell over a ragged batch.

    Args:
        cell: with its weights.
        x: [T, R, ...] of the cell's dtype, time-major.
        lengths: [R], the number of steps of each row, from the first; at most T, and 0 will do.
        states: the initial states, each [R, ...], in the order of ``cell.state_specs()``; not written to.

    Returns:
        The outputs [T, R, ...], 0 beyond a row's length, and the states after each row's last step. Infinity and NaN
        go through as IEEE 754 says, without a warning.
    """
    y = np.zeros((*x.shape[:2], *shape_of(cell.output_size)), cell.dtype)  # [T, R, ...]
    flat = list(states)
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(len(x)):
            rows = np.flatnonzero(lengths > t)
            if len(rows) == len(lengths):
                y[t], new = cell.call(x[t], cell.nest_states(flat))
                flat = cell.flat_states(new)
            else:
                y[t, rows], new = cell.call(x[t, rows], cell.nest_states([state[rows] for state in flat]))
                flat = [_updated(state, rows, part) for state, part in zip(flat, cell.flat_states(new), strict=True)]
    return y, flat


def project(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """x [R, K] times kernel [K, N]: [R, N], a row's bits being the same whatever the other rows and their number.

    A product of matrices is summed in an order that depends on the number of rows; so this is R products of a row.
    float16 is summed in float32 and rounded once.
    """
    wide = np.float32 if x.dtype == np.float16 else x.dtype
    rows = np.ascontiguousarray(x, wide)[:, None, :]  # [R, 1, K]
    product: np.ndarray = np.matmul(rows, np.asarray(kernel, wide))[:, 0, :]
    return product.astype(x.dtype, copy=False)


def float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype, which must be one that a cell can have.

    Raises:
        ModelError: it is not.
    """
    dtype = np.dtype(dtype)
    if dtype.name not in _FLOATS:
        raise ModelError(f"the dtype of a cell is one of {', '.join(_FLOATS)}, got {dtype.name}")
    return dtype


def check_weights(owner: str, shapes: Mapping[str, Shape], weights: Mapping[str, np.ndarray]) -> None:
    """Compares weights with the shapes that they should have.

    Raises:
        ModelError: some are missing, unexpected or of another shape; the message begins with ``owner``.
    """
    if missing := [name for name in shapes if name not in weights]:
        raise ModelError(f"{owner}: weights {missing} are missing; there are {sorted(weights)}")
    if unexpected := sorted(set(weights) - set(shapes)):
        raise ModelError(f"{owner}: unexpected weights {unexpected}; expected {list(shapes)}")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ModelError(f"{owner}: {name}: expected shape {list(shape)}, got {list(weights[name].shape)}")


def _read_only(weight: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    weight = np.array(weight, dtype, order="C")
    weight.flags.writeable = False
    return weight


def shape_of(size: int | Shape) -> Shape:
    """A size as a shape."""
    return size if isinstance(size, tuple) else (size,)


def _listed(state_size: StateSize) -> list[int | Shape]:
    return state_size if isinstance(state_size, list) else [state_size]


def _updated(state: np.ndarray, rows: np.ndarray, part: np.ndarray) -> np.ndarray:
    state = state.copy()
    state[rows] = part
    return state
