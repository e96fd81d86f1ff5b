"""The recurrent layers: RNN, SimpleRNN, LSTM and GRU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from rnnserve_models.cell import Cell, run_cell, shape_of
from rnnserve_models.cells import CELL_CLASSES, DenseCell, GRUCell, LSTMCell, SimpleRNNCell
from rnnserve_models.errors import ModelError
from rnnserve_models.masking import compact
from rnnserve_models.network import recurrent_onnx
from rnnserve_models.network.config import Config
from rnnserve_models.network.layer import Info, Layer, Masked, Shape, told
from rnnserve_models.onnx_builder import GraphBuilder
from rnnserve_models.options import LayerOptions
from rnnserve_models.stack import StackedRNNCells

_CELLS: dict[str, type[Cell]] = {"LSTM": LSTMCell, "GRU": GRUCell, "SimpleRNN": SimpleRNNCell}
_BUILTIN: dict[str, type[Cell]] = {
    "LSTMCell": LSTMCell,
    "GRUCell": GRUCell,
    "SimpleRNNCell": SimpleRNNCell,
    "DenseCell": DenseCell,
}


class Recurrent(Layer):
    """A cell iterated over time: [B, T, features] to [B, T, units], or [B, units] of the last step.

    Masks of any shape, by `masking.compact`. The mask goes on where there is a sequence, in the order of its steps: it
    is flipped if ``go_backwards``.

    Keras: ``RNN``, ``SimpleRNN``, ``LSTM``, ``GRU``.
    """

    def __init__(self, config: Config) -> None:
        """Reads the options and the cell, or the cells."""
        super().__init__(config)
        flags = {field.name: config.flag(field.name, False) for field in fields(LayerOptions)}
        self.options = LayerOptions(**flags)
        self.stateful = self.options.stateful
        config.choice("num_constants", (None, 0), None)
        self.time_major = self.options.time_major
        self.cell = cell_of(config) if config.class_name in _CELLS else self._listed_cell(config)
        config.done()
        self.states = self.cell.state_specs(self.dtype)

    def _listed_cell(self, config: Config) -> Cell:
        if isinstance(config.values.get("cell"), list | tuple):
            cells = {"name": "cell", "cells": list(config.values["cell"])}
            config.values["cell"] = {"class_name": "StackedRNNCells", "config": cells}
        cell = stacked_or_cell(config.child("cell"))
        if not cell.state_names:
            raise self.error("its cell must have a state")
        return cell

    @property
    def weight_count(self) -> int:
        """Those of the cells."""
        return len(self.cell.weight_shapes(1))

    @property
    def roles(self) -> list[int | None]:
        """The output, then the states with ``return_state``."""
        return [None, *(range(len(self.states)) if self.options.return_state else ())]

    @property
    def unrolls(self) -> bool:
        """The option."""
        return self.options.unroll

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """[time, features], as the first kernel says."""
        return (None, weights[0].shape[0]) if len(weights) and weights[0].ndim == 2 else None

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if len(shape) != 2 or shape[1] is None:
            raise self.error(f"expected inputs [batch, time, features], got {told(shape)}")
        for index, (name, expected) in enumerate(self.cell.weight_shapes(shape[1]).items()):
            self.checked(index, name, weights, expected)
        named = dict(zip(self.cell.weight_shapes(shape[1]), map(np.asarray, weights), strict=True))
        self.cell = self.cell.with_weights(named, shape[1], self.dtype)
        size = shape_of(self.cell.output_size)
        output: Shape = (shape[0], *size) if self.options.return_sequences else size
        states = [Info(spec.shape, self.dtype) for spec in self.states] if self.options.return_state else []
        return [Info(output, self.dtype), *states]

    def forward(
        self, inputs: list[Masked[np.ndarray]], states: list[np.ndarray]
    ) -> tuple[list[Masked[np.ndarray]], list[np.ndarray]]:
        """See `Layer.forward`."""
        x, mask = inputs[0]
        options = self.options
        x = x.astype(self.dtype, copy=False).swapaxes(0, 1)  # [T, B, features]
        packed = compact({"x": x}, None if mask is None else mask.swapaxes(0, 1), go_backwards=options.go_backwards)
        y, finals = run_cell(self.cell, packed.inputs["x"], packed.lengths, states)
        y = packed.expand(
            y, return_sequences=options.return_sequences, zero_output_for_mask=options.zero_output_for_mask
        )
        if not options.return_sequences:
            output = Masked(y)
        elif mask is not None and options.go_backwards:
            output = Masked(y.swapaxes(0, 1), mask[:, ::-1])
        else:
            output = Masked(y.swapaxes(0, 1), mask)
        return [output, *map(Masked, finals if options.return_state else ())], finals

    def emit(
        self, graph: GraphBuilder, inputs: list[Masked[str]], states: list[str]
    ) -> tuple[list[Masked[str]], list[str]]:
        """See `Layer.emit`."""
        x, mask = inputs[0]
        if self.inputs[0].dtype != self.dtype:
            x = graph.cast(x, self.dtype)
        steps = self.inputs[0].shape[0] if self.options.unroll else None
        output, finals = recurrent_onnx.emit_layer(graph, self.cell, self.options, Masked(x, mask), states, steps)
        return [output, *map(Masked, finals if self.options.return_state else ())], finals

    def nest_states(self, flat: Sequence[Any]) -> list[Any]:
        """A list, of lists for stacked cells."""
        return self.cell.nest_states(flat)


def stacked_or_cell(config: Config) -> Cell:
    """A cell, or stacked cells, without weights."""
    if config.class_name != "StackedRNNCells":
        return cell_of(config)
    cells = config.get("cells")
    if not isinstance(cells, list | tuple):
        raise config.error(f"cells: expected a list, got {cells!r:.80}")
    config.done()
    where = f"StackedRNNCells {config.name!r}: cells"
    try:
        return StackedRNNCells([cell_of(Config(cell, config.version, f"{where}.{i}")) for i, cell in enumerate(cells)])
    except ModelError as error:
        if str(error).startswith("StackedRNNCells: "):
            raise config.error(str(error).removeprefix("StackedRNNCells: ")) from error
        raise


def cell_of(config: Config) -> Cell:
    """The cell of a layer's config, or of a cell's own."""
    kind = _CELLS.get(config.class_name) or _BUILTIN.get(config.class_name)
    if kind is None:
        kind = CELL_CLASSES.get(config.class_name)
        if kind is None or kind is StackedRNNCells:
            raise config.error(f"unknown cell class; the classes are {', '.join(CELL_CLASSES)}")
        return kind.from_config({key: value for key, value in config.values.items() if key not in ("name", "dtype")})
    values: dict[str, Any] = {"units": config.size("units")}
    defaults = {"activation": "linear" if kind is DenseCell else "tanh", "recurrent_activation": "sigmoid"}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in defaults:
            values[field.name] = config.activation(field.name, defaults[field.name])
        elif field.name != "units":
            values[field.name] = config.flag(field.name, True)
    if config.class_name in _BUILTIN:
        config.done()
    try:
        return kind(**values)
    except ModelError as error:
        raise config.error(str(error)) from error
