"""The local twin of any served model: what a server computes from a model directory, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.errors import InputError
from rnnserve_models.load import LoadedModel
from rnnserve_models.masking import Compacted, compact
from rnnserve_models.network.given import cast_input, leaves, read_mask
from rnnserve_models.options import LayerOptions


class LocalModel:
    """A loaded model, called as a recurrent layer is.

    Attributes:
        engine: "numpy" or "onnx": what computes it.
        engine_reason: why ``engine="auto"`` did not take onnx; "" if it did.
        options: of the layer.
    """

    def __init__(self, model: LoadedModel, **options: bool) -> None:
        """Takes a model.

        Args:
            model: what to run.
            options: options of the layer, instead of the model's defaults; ``stateful`` keeps the states between calls.

        Raises:
            InputError: an option is unknown, or the model cannot honour it.
        """
        defaults = model.spec.default_options
        for name, value in options.items():
            if not hasattr(defaults, name) or (
                value != getattr(defaults, name) and name not in (*model.spec.settable_options, "stateful")
            ):
                raise InputError(f"options.{name}", f"one of {list(model.spec.settable_options)}", str(value))
        self.options: LayerOptions = replace(defaults, **options)
        self.engine, self.engine_reason = model.engine.name, model.engine.reason
        self._model = model
        self._engine = model.engine
        self._recorded: Arrays | None = None

    def __call__(self, x: Any, mask: Any = None, initial_state: Any = None) -> Any:
        """Computes the model.

        Args:
            x: [B, T, ...], or [T, B, ...] with ``time_major``; for several inputs a list, or a mapping by their names.
            mask: [B, T] or [B, T, 1] (time first with ``time_major``), where B may be 1; any nonzero is valid.
            initial_state: arrays [B, ...], nested as `get_initial_state` nests them. Default: the recorded states of a
                stateful model, else the model's own.

        Returns:
            The output: [B, T, ...] with ``return_sequences`` ([T, B, ...] with ``time_major`` too), else [B, ...]; a
            list where there are several, or with ``return_state`` the states behind.

        Raises:
            InputError: a tensor does not fit the model, the others, or the batch size that a stateful model began with.
            EngineError: the engine failed.
        """
        arrays = self._inputs(x)
        batch = len(next(iter(arrays.values())))
        if self._recorded and batch != (fixed := len(next(iter(self._recorded.values())))):
            raise InputError("inputs", f"batch size {fixed}, as the stateful model has", str(batch))
        if initial_state is not None:
            states = self._flat(initial_state, batch)
        else:
            states = self._recorded or {spec.name: spec.initial(batch) for spec in self._engine.states}
        call = self._call(arrays, mask)
        outputs, states = self._run(call, states)
        if self.options.stateful:
            self._recorded = states
        results = [self._shown(call, y) for y in outputs.values()]
        if self.options.return_state:
            results += self._nested([states[spec.name].copy() for spec in self._engine.states])
        return results[0] if len(results) == 1 else results

    @property
    def states(self) -> list[Any] | None:
        """A copy of the recorded states; None if there are none, before the first call or if not ``stateful``."""
        if self._recorded is None:
            return None
        return self._nested([self._recorded[spec.name].copy() for spec in self._engine.states])

    def reset_states(self, values: Any = None) -> None:
        """Sets the recorded states to ``values``, nested as ``initial_state`` is, or to the model's default.

        Raises:
            AttributeError: the model is not ``stateful``.
            InputError: the values do not fit the model or its batch size.
        """
        if not self.options.stateful:
            raise AttributeError("Layer must be stateful.")
        batch = len(next(iter(self._recorded.values()))) if self._recorded else None
        if values is not None:
            self._recorded = self._flat(values, batch)
        elif batch is not None:
            self._recorded = {spec.name: spec.initial(batch) for spec in self._engine.states}

    def get_initial_state(self, batch_size: int) -> list[Any]:
        """The model's default states, each [batch_size, ...], nested as Keras nests them."""
        return self._nested([spec.initial(batch_size) for spec in self._engine.states])

    @property
    def state_size(self) -> list[Any]:
        """The size of each state, nested as Keras nests them."""
        return self._nested([spec.shape[0] if len(spec.shape) == 1 else spec.shape for spec in self._engine.states])

    def _inputs(self, x: Any) -> Arrays:
        """Every input, [B, T, ...]."""
        specs = self._engine.inputs
        given = x if isinstance(x, Mapping) else {specs[0].name: x}
        if not isinstance(x, Mapping) and len(specs) > 1:
            given = {spec.name: value for spec, value in zip(specs, x, strict=False)}
        if set(given) != {spec.name for spec in specs}:
            raise InputError("inputs", str([spec.name for spec in specs]), str(list(given)))
        arrays: Arrays = {}
        for spec in specs:
            field = f"inputs.{spec.name}"
            array = cast_input(field, given[spec.name], spec.dtype)
            if self.options.time_major and array.ndim > 1:
                array = array.swapaxes(0, 1)
            first = next(iter(arrays.values()), array)
            if array.ndim != 2 + len(spec.shape) or array.shape[2:] != spec.shape or 0 in array.shape[:2]:
                raise InputError(field, f"shape {['batch', 'time', *spec.shape]}, none of them 0", str(array.shape))
            if array.shape[:2] != first.shape[:2]:
                raise InputError(field, f"batch and time {first.shape[:2]}", str(array.shape[:2]))
            if self._engine.timesteps not in (None, array.shape[1]):
                raise InputError(field, f"{self._engine.timesteps} time steps", str(array.shape[1]))
            arrays[spec.name] = array
        return arrays

    def _call(self, arrays: Arrays, mask: Any) -> Compacted:
        if mask is not None and not self._model.spec.masking:
            raise InputError("mask", "none: the model takes no mask", "one")
        first = next(iter(arrays.values()))
        valid = read_mask(mask, first, self.options.time_major)  # [B, T]
        inputs = {name: array.swapaxes(0, 1) for name, array in arrays.items()}  # [T, B, ...]
        if not self._engine.whole:
            return compact(inputs, None if valid is None else valid.T, go_backwards=self.options.go_backwards)
        if valid is not None:
            inputs["mask"] = valid.T
        return Compacted(inputs, np.full(len(first), first.shape[1]), first.shape[1], None)

    def _run(self, call: Compacted, states: Arrays) -> tuple[Arrays, Arrays]:
        """Runs the rows that have a step; the others keep their states."""
        live = np.flatnonzero(call.lengths)
        if len(live) == len(call.lengths):
            return self._engine.run(call.inputs, call.lengths, states)
        steps, rows = int(call.lengths.max(initial=0)), len(call.lengths)
        outputs = {spec.name: np.zeros((steps, rows, *spec.shape), spec.dtype) for spec in self._engine.outputs}
        states = {name: state.copy() for name, state in states.items()}
        if len(live):
            part, after = self._engine.run(
                {name: x[:, live] for name, x in call.inputs.items()},
                call.lengths[live],
                {name: state[live] for name, state in states.items()},
            )
            for name, y in part.items():
                outputs[name][:, live] = y
            for name, state in after.items():
                states[name][live] = state
        return outputs, states

    def _shown(self, call: Compacted, y: Array) -> Array:
        options = self.options
        y = call.expand(y, return_sequences=options.return_sequences, zero_output_for_mask=options.zero_output_for_mask)
        return y.swapaxes(0, 1) if options.return_sequences and not options.time_major else y

    def _flat(self, given: Any, batch: int | None) -> Arrays:
        specs = self._engine.states
        found: Arrays = {}
        for spec, value in zip(specs, leaves(given, self._nested(list(specs)), self.state_size), strict=True):
            field = f"initial_state.{spec.name}"
            array = np.array(cast_input(field, value, spec.dtype))
            if batch is None and array.ndim:
                batch = len(array)
            if array.shape != (batch, *spec.shape):
                raise InputError(field, f"shape {['batch' if batch is None else batch, *spec.shape]}", str(array.shape))
            found[spec.name] = array
        return found

    def _nested(self, values: Sequence[Any]) -> list[Any]:
        return _nest([(spec.path, value) for spec, value in zip(self._engine.states, values, strict=True)])


def _nest(leaves: Sequence[tuple[tuple[int, ...], Any]]) -> list[Any]:
    """Lists of lists, by the path of each leaf."""
    branches: dict[int, list[tuple[tuple[int, ...], Any]]] = {}
    for path, value in leaves:
        branches.setdefault(path[0], []).append((path[1:], value))
    return [branch[0][1] if not branch[0][0] else _nest(branch) for _, branch in sorted(branches.items())]
