"""The reference engine: a cell, step by step, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping

from rnnserve_models.cell import Cell, run_cell, shape_of
from rnnserve_models.engine.base import Array, Arrays, Engine, EngineError
from rnnserve_models.errors import ModelError
from rnnserve_models.spec import TensorSpec


class NumpyEngine(Engine):
    """Runs a cell with its weights, by the loop ``output_t, states_t+1 = cell.call(input_t, states_t)``."""

    name = "numpy"

    def __init__(self, cell: Cell, *, finite: bool = False) -> None:
        """Takes a cell.

        Args:
            cell: with its weights.
            finite: whether to forbid NaN and infinity in the input.

        Raises:
            ModelError: the cell has no weights yet.
        """
        if cell.input_dim is None:
            raise ModelError(f"{type(cell).__name__} has no weights; give it some by with_weights")
        self.cell = cell
        self.inputs = (TensorSpec("input", cell.dtype, (cell.input_dim,), finite),)
        self.outputs = (TensorSpec("output", cell.dtype, shape_of(cell.output_size)),)
        self.states = cell.state_specs()
        self.bit_identical = cell.bit_identical

    def run(self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """See `Engine.run`."""
        names = [spec.name for spec in self.states]
        try:
            y, after = run_cell(self.cell, inputs["input"], lengths, [states[name] for name in names])
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # a cell of the user's own may fail
            raise EngineError(f"the cell {type(self.cell).__name__} failed: {error}") from error
        return {"output": y}, dict(zip(names, after, strict=True))
