"""Stacked cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike
from pydantic import ValidationError

from rnnserve_models.cell import Cell, Shape, States, StateSize, check_weights
from rnnserve_models.errors import ModelError
from rnnserve_models.spec import CellSpec, StateSpec


class StackedRNNCells(Cell):
    """Cells in a row: at each step, the output of one is the input of the next.

    States are a list with an entry, itself a list, for each cell that has any. Names of weights and states begin with
    the cell's index in the stack: ``0.kernel``, ``1.h``.

    Keras: ``StackedRNNCells``.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        """Stacks cells, which have their weights or will get them by `with_weights`.

        Raises:
            ModelError: there are none, one is itself a stack, or one's dtype or ``input_dim`` is not what comes to it.
        """
        if not cells:
            raise ModelError("StackedRNNCells: cells is empty")
        self.cells = tuple(cells)
        size: int | Shape | None = self.cells[0].input_dim
        for index, cell in enumerate(self.cells):
            if isinstance(cell, StackedRNNCells):
                raise ModelError(f"StackedRNNCells: cells.{index} is a stack; list its cells instead")
            if cell.input_dim not in (None, size):
                raise ModelError(f"StackedRNNCells: cells.{index} takes {cell.input_dim} features, but gets {size}")
            if cell.dtype != self.cells[0].dtype:
                raise ModelError(f"StackedRNNCells: cells.{index} is {cell.dtype}, cells.0 {self.cells[0].dtype}")
            size = cell.output_size
            if not isinstance(size, int) and index + 1 < len(self.cells):
                raise ModelError(f"StackedRNNCells: cells.{index} must give one number of features, gives {size}")
        self.input_dim = self.cells[0].input_dim
        self.dtype = self.cells[0].dtype
        self.bit_identical = all(cell.bit_identical for cell in self.cells)
        self.weights = {f"{i}.{name}": array for i, cell in enumerate(cells) for name, array in cell.weights.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes the cells that ``config["cells"]`` lists, each with a ``class_name`` and a ``config``."""
        if unknown := sorted(set(config) - {"cells", "name", "dtype", "trainable"}):
            raise ModelError(f"StackedRNNCells: unknown keys {unknown}; the keys are ['cells']")
        # Not above: the classes that a stack may be made of include the stack itself.
        from rnnserve_models.cells import cells_from_specs

        try:
            specs = [CellSpec(class_name=cell["class_name"], config=cell["config"]) for cell in config.get("cells", ())]
        except (KeyError, TypeError, ValidationError) as error:
            raise ModelError(f"StackedRNNCells: each of cells must have a class_name and a config: {error}") from error
        return cls([cells_from_specs([spec]) for spec in specs])

    @property
    def state_size(self) -> StateSize:
        """The state sizes of the cells that have states."""
        return [cell.state_size for cell in self._with_states()]

    @property
    def output_size(self) -> int | Shape:
        """The last cell's."""
        return self.cells[-1].output_size

    @property
    def state_names(self) -> tuple[str, ...]:
        """The cells' names for their states, after their index."""
        return tuple(f"{i}.{name}" for i, cell in enumerate(self.cells) for name in cell.state_names)

    def call(self, inputs: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """inputs [R, input_dim] to outputs [R, output_size] of the last cell."""
        old, new = iter(states), []
        for cell in self.cells:
            inputs, after = cell.call(inputs, next(old) if cell.state_names else [])
            if cell.state_names:
                new.append(after)
        return inputs, new

    def weight_shapes(self, input_dim: int) -> dict[str, Shape]:
        """The cells' weights, after their index."""
        return {
            f"{index}.{name}": shape
            for index, (cell, size) in enumerate(zip(self.cells, self._input_dims(input_dim), strict=True))
            for name, shape in cell.weight_shapes(size).items()
        }

    def with_weights(self, weights: Mapping[str, np.ndarray], input_dim: int, dtype: DTypeLike = np.float32) -> Self:
        """A stack of the cells with their weights."""
        check_weights("StackedRNNCells", self.weight_shapes(input_dim), weights)
        return type(self)(
            [
                cell.with_weights({name: weights[f"{index}.{name}"] for name in cell.weight_shapes(size)}, size, dtype)
                for index, (cell, size) in enumerate(zip(self.cells, self._input_dims(input_dim), strict=True))
            ]
        )

    def get_initial_state(self, batch_size: int, dtype: DTypeLike | None = None) -> States:
        """Zeros, a list for each cell that has states."""
        return [cell.get_initial_state(batch_size, dtype) for cell in self._with_states()]

    def state_specs(self, dtype: DTypeLike | None = None) -> tuple[StateSpec, ...]:
        """Each state: ``1.h`` of path (0, 0), say, if the cell before has none."""
        entries = (index for index, cell in enumerate(self.cells) if cell.state_names)
        return tuple(
            replace(spec, name=f"{index}.{spec.name}", path=(entry, *spec.path))
            for entry, index in enumerate(entries)
            for spec in self.cells[index].state_specs(dtype)
        )

    def nest_states(self, flat: Sequence[Any]) -> States:
        """A list for each cell that has states."""
        rest = iter(flat)
        return [list(islice(rest, len(cell.state_names))) for cell in self._with_states()]

    def flat_states(self, nested: States) -> list[Any]:
        """The lists, joined."""
        return list(chain.from_iterable(nested))

    def _with_states(self) -> Iterator[Cell]:
        return (cell for cell in self.cells if cell.state_names)

    def _input_dims(self, input_dim: int) -> Iterator[int]:
        for cell in self.cells:
            yield input_dim
            if isinstance(cell.output_size, int):
                input_dim = cell.output_size
