"""The cells of Keras, with their configs and equations, and cells by the names of their classes.

Shapes: x [R, input_dim] are the inputs of R rows, h and c [R, units] their states, W [input_dim, gates * units] the
``kernel``, U [units, gates * units] the ``recurrent_kernel``, b the ``bias``. Gates lie side by side in the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from rnnserve_models.activations import activation
from rnnserve_models.cell import Cell, Shape, States, StateSize, project
from rnnserve_models.errors import ModelError
from rnnserve_models.spec import CellSpec
from rnnserve_models.stack import StackedRNNCells

__all__ = [
    "CELL_CLASSES",
    "Cell",
    "DenseCell",
    "GRUCell",
    "LSTMCell",
    "SimpleRNNCell",
    "StackedRNNCells",
    "cells_from_specs",
]

# Keys of Keras configs that say how to train, build or name a cell, and nothing about what it computes.
_IGNORED_KEYS = frozenset(
    f"{part}_{rule}"
    for part in ("kernel", "recurrent", "bias", "activity")
    for rule in ("initializer", "regularizer", "constraint")
) | {
    *("name", "dtype", "trainable", "seed", "dropout", "recurrent_dropout", "dropout_seed"),
    *("implementation", "unit_forget_bias", "lora_rank", "lora_alpha", "quantization_config", "build_config"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class _KerasCell(Cell):
    """A cell with a kernel, whose fields are the keys of its Keras config."""

    units: int
    activation: str | None
    use_bias: bool = True

    bit_identical = True
    gates: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.units, bool) or not isinstance(self.units, int) or self.units < 1:
            raise ModelError(f"{type(self).__name__}: units must be a positive integer, got {self.units!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("activation"):
                activation(value)
            elif field.name != "units" and not isinstance(value, bool):
                raise ModelError(f"{type(self).__name__}: {field.name} must be true or false, got {value!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """See `Cell.from_config`. What concerns training only is ignored."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(config) - set(known) - _IGNORED_KEYS):
            raise ModelError(f"{cls.__name__}: unknown keys {unknown}; the keys are {known}")
        return super().from_config({key: config[key] for key in known if key in config})

    @property
    def output_size(self) -> int:
        """``units``."""
        return self.units

    def weight_shapes(self, input_dim: int) -> dict[str, Shape]:
        """``kernel`` [input_dim, gates * units], and ``bias`` [gates * units] if ``use_bias``."""
        shapes: dict[str, Shape] = {"kernel": (input_dim, self.gates * self.units)}
        if self.use_bias:
            shapes["bias"] = (self.gates * self.units,)
        return shapes

    def _weight(self, name: str) -> np.ndarray:
        if not self.weights:
            raise ModelError(f"{type(self).__name__} has no weights; give it some by with_weights")
        return self.weights[name]

    def _biased(self, z: np.ndarray) -> np.ndarray:
        return z + self._weight("bias") if self.use_bias else z


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseCell(_KerasCell):
    """A layer that remembers nothing, to end a stack with: y = act(x W + b).

    Keras: ``Dense``, applied to every step.
    """

    activation: str | None = "linear"

    @property
    def state_size(self) -> StateSize:
        """[]."""
        return []

    def call(self, inputs: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """x [R, input_dim] to y [R, units]."""
        return activation(self.activation)(self._biased(project(inputs, self._weight("kernel")))), []


@dataclass(frozen=True, eq=False, kw_only=True)
class _RecurrentCell(_KerasCell):
    """A cell whose first state, h, is its output."""

    activation: str | None = "tanh"

    @property
    def state_size(self) -> StateSize:
        """``units``."""
        return self.units

    @property
    def state_names(self) -> tuple[str, ...]:
        """("h",)."""
        return ("h",)

    def weight_shapes(self, input_dim: int) -> dict[str, Shape]:
        """``recurrent_kernel`` [units, gates * units] stands between the others."""
        kernel, *bias = super().weight_shapes(input_dim).items()
        return dict([kernel, ("recurrent_kernel", (self.units, self.gates * self.units)), *bias])


@dataclass(frozen=True, eq=False, kw_only=True)
class SimpleRNNCell(_RecurrentCell):
    """h' = act(x W + h U + b).

    Keras: ``SimpleRNNCell``.
    """

    def call(self, inputs: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """x [R, input_dim], [h] to h', [h'], each [R, units]."""
        (h,) = states
        z = self._biased(project(inputs, self._weight("kernel")) + project(h, self._weight("recurrent_kernel")))
        h = activation(self.activation)(z)
        return h, [h]


@dataclass(frozen=True, eq=False, kw_only=True)
class LSTMCell(_RecurrentCell):
    """i, f, g, o = split(x W + h U + b);  c' = rec(f) * c + rec(i) * act(g);  h' = rec(o) * act(c').

    Keras: ``LSTMCell``, gates i, f, c, o. ``unit_forget_bias`` is already in the bias.
    """

    recurrent_activation: str | None = "sigmoid"

    gates: ClassVar[int] = 4

    @property
    def state_size(self) -> StateSize:
        """[units, units]."""
        return [self.units, self.units]

    @property
    def state_names(self) -> tuple[str, ...]:
        """("h", "c")."""
        return ("h", "c")

    def call(self, inputs: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """x [R, input_dim], [h, c] to h', [h', c'], each [R, units]."""
        h, c = states
        act, rec = activation(self.activation), activation(self.recurrent_activation)
        z = self._biased(project(inputs, self._weight("kernel")) + project(h, self._weight("recurrent_kernel")))
        i, f, g, o = np.split(z, self.gates, axis=-1)  # each [R, units]
        c = rec(f) * c + rec(i) * act(g)
        h = rec(o) * act(c)
        return h, [h, c]


@dataclass(frozen=True, eq=False, kw_only=True)
class GRUCell(_RecurrentCell):
    """z, r = rec(x W + h U + b), by their gates;  h' = z * h + (1 - z) * g.

    g = act(x Wg + bg + r * (h Ug + b'g)) with ``reset_after``, whose bias [2, 3 * units] is of the input and of the
    recurrence; else g = act(x Wg + (r * h) Ug + bg), and the bias is [3 * units].

    Keras: ``GRUCell``, gates z, r, h.
    """

    recurrent_activation: str | None = "sigmoid"
    reset_after: bool = True

    gates: ClassVar[int] = 3

    def weight_shapes(self, input_dim: int) -> dict[str, Shape]:
        """``bias`` is [2, 3 * units] with ``reset_after``."""
        shapes = super().weight_shapes(input_dim)
        if self.use_bias and self.reset_after:
            shapes["bias"] = (2, *shapes["bias"])
        return shapes

    def call(self, inputs: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """x [R, input_dim], [h] to h', [h'], each [R, units]."""
        (h,) = states
        act, rec = activation(self.activation), activation(self.recurrent_activation)
        x = project(inputs, self._weight("kernel"))  # [R, 3 * units]
        recurrent_kernel = self._weight("recurrent_kernel")
        if self.reset_after:
            recurrent = project(h, recurrent_kernel)  # [R, 3 * units]
            if self.use_bias:
                x, recurrent = x + self._weight("bias")[0], recurrent + self._weight("bias")[1]
            x_z, x_r, x_g = np.split(x, self.gates, axis=-1)
            h_z, h_r, h_g = np.split(recurrent, self.gates, axis=-1)
            z, r = rec(x_z + h_z), rec(x_r + h_r)
            g = act(x_g + r * h_g)
        else:
            x_z, x_r, x_g = np.split(self._biased(x), self.gates, axis=-1)
            h_z, h_r = np.split(project(h, recurrent_kernel[:, : 2 * self.units]), 2, axis=-1)
            z, r = rec(x_z + h_z), rec(x_r + h_r)
            g = act(x_g + project(r * h, recurrent_kernel[:, 2 * self.units :]))
        h = z * h + (1 - z) * g
        return h, [h]


CELL_CLASSES: dict[str, type[Cell]] = {
    "LSTMCell": LSTMCell,
    "GRUCell": GRUCell,
    "SimpleRNNCell": SimpleRNNCell,
    "DenseCell": DenseCell,
    "Dense": DenseCell,
    "StackedRNNCells": StackedRNNCells,
}
"""Cells by class name. Add a class of one's own here to have it served."""


def cells_from_specs(specs: Sequence[CellSpec], own: Mapping[str, type[Cell]] | None = None) -> Cell:
    """The cell, or the stack of the cells, so described; without weights.

    Args:
        specs: the cells, the lowest first.
        own: classes beside `CELL_CLASSES`, by name.

    Raises:
        ModelError: there are none, or one is not a cell; the message names it.
    """
    classes = {**CELL_CLASSES, **(own or {})}
    cells = [_cell(spec, classes) for spec in specs]
    return cells[0] if len(cells) == 1 else StackedRNNCells(cells)


def _cell(spec: CellSpec, classes: Mapping[str, type[Cell]]) -> Cell:
    if spec.class_name not in classes:
        raise ModelError(f"unknown cell class {spec.class_name!r}; the classes are {', '.join(classes)}")
    return classes[spec.class_name].from_config(spec.config)
