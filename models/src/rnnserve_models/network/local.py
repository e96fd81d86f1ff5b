"""A layer or model of Keras on this machine: the same call, the same options, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from rnnserve_models.errors import InputError, ModelError
from rnnserve_models.network.build import Source, make_program
from rnnserve_models.network.given import cast_input, fits, leaves, read_mask
from rnnserve_models.network.graph import Network
from rnnserve_models.network.layer import Info, Layer, Masked, Shape, told
from rnnserve_models.network.program import Program
from rnnserve_models.spec import StateSpec


class LocalLayer:
    """What `layer_from_config` gives: call it as one calls the layer of Keras, at inference.

    Attributes:
        engine: "numpy" or "onnx": what computes it; before the first call of a layer whose input shape nothing says,
            what was asked for.
        engine_reason: why ``engine="auto"`` did not take onnx; "" if it did.
        name: the layer's.
    """

    def __init__(
        self, config: Any, weights: Sequence[ArrayLike], engine: str = "auto", keras_version: int | None = None
    ) -> None:
        """See `layer_from_config`."""
        self._source = Source(config, weights, keras_version)
        if engine not in ("auto", "numpy", "onnx"):
            raise ModelError(f"engine: expected auto, numpy or onnx, got {engine!r}")
        self._choice = engine
        self.engine, self.engine_reason = engine, ""
        self._layer: Layer | None = None
        self._program: Program | None = None
        self._recorded: list[np.ndarray] | None = None
        if (layer := self._source.default()) is not None:
            self._use(layer)

    def __call__(self, x: Any, mask: Any = None, initial_state: Any = None) -> Any:
        """Computes the layer.

        Args:
            x: [B, T, ...], or [T, B, ...] if ``time_major``; converted to the layer's dtype. For a model of several
                inputs a list of them in Keras's order, or a mapping by their names; initial states among them may be
                left out.
            mask: [B, T] or [B, T, 1] (time first if ``time_major``), where B may be 1; any nonzero is valid. For a
                model of several inputs it is of the first, or a list.
            initial_state: arrays [B, units], nested as `get_initial_state` nests them. Default: the recorded states of
                stateful layers, and zeros.

        Returns:
            What Keras returns: an array, or a list of the output and the states, or of the model's outputs.

        Raises:
            InputError: a tensor does not fit the layer, the others, or the batch size of a stateful layer.
            EngineError: the engine failed.
        """
        values, given = self._split(x)
        tensors = self._inputs(values, mask)
        layer, program = self._ready(tensors)
        layer.check([tensor.x for tensor in tensors])
        batch = len(tensors[0].x)
        if layer.stateful:
            self._check_batch(batch)
        states = self._initial(layer, batch, given if initial_state is None else initial_state)
        outputs, finals = program.run(tensors, states)
        if layer.stateful:
            self._recorded = finals
        return self._returned(layer, outputs)

    @property
    def states(self) -> list[Any] | None:
        """A copy of the recorded states; None if there are none, before the first call or if not ``stateful``."""
        if self._recorded is None or self._layer is None:
            return None
        return self._layer.nest_states([state.copy() for state in self._recorded])

    def reset_states(self, values: Any = None) -> None:
        """Sets the recorded states to ``values``, nested as ``initial_state`` is, or to zeros.

        Raises:
            AttributeError: the layer is not ``stateful``, as in Keras 2.
            InputError: the values do not fit the layer or its batch size.
        """
        layer = self._built()
        if not layer.stateful:
            raise AttributeError(f"Layer must be stateful: {layer.name!r} is not.")
        if values is not None:
            batch = self._source.batch_size if self._recorded is None else len(self._recorded[0])
            self._recorded = self._flat(layer, values, batch)
        elif self._recorded is not None:
            self._recorded = [np.zeros_like(state) for state in self._recorded]

    reset_state = reset_states

    def get_initial_state(self, batch_size: int) -> list[Any]:
        """Zeros [batch_size, units] for each state, nested as Keras nests them."""
        layer = self._built()
        return layer.nest_states([spec.initial(batch_size) for spec in layer.states])

    @property
    def name(self) -> str:
        """The layer's."""
        return self._built().name

    @property
    def dtype(self) -> str:
        """That it computes in."""
        return self._built().dtype.name

    @property
    def stateful(self) -> bool:
        """Whether any state is carried from call to call."""
        return self._built().stateful

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """The states, flat."""
        return self._built().states

    @property
    def state_size(self) -> list[Any]:
        """The size of each state, nested as Keras nests them; always a list, as in Keras 3."""
        layer = self._built()
        return layer.nest_states([spec.shape[0] if len(spec.shape) == 1 else spec.shape for spec in layer.states])

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Any:
        """The shape of what a call returns, with the batch axis; a list of shapes, nested, where it returns several.

        Args:
            input_shape: of ``x``; None where unknown.
        """
        flat = list(input_shape)
        if self._built().time_major:
            flat[:2] = flat[1::-1]
        layer = self._source.build([Info(tuple(flat[1:]), self._built().input_dtypes[0])])
        shapes = [(flat[0], *info.shape) for info in layer.outputs]
        if layer.time_major:
            shapes = [(s[1], s[0], *s[2:]) if len(s) > 2 else s for s in shapes]
        return _arranged(layer, shapes)

    def _use(self, layer: Layer) -> None:
        self._program, self.engine_reason = make_program(layer, self._source, self._choice)
        self._layer, self.engine = layer, self._program.name

    def _built(self) -> Layer:
        if self._layer is None:
            raise ModelError("nothing says what the layer's inputs are like; call it first")
        return self._layer

    def _ready(self, tensors: list[Masked[np.ndarray]]) -> tuple[Layer, Program]:
        """The layer and what runs it, built for such inputs if it was not."""
        shapes = [tensor.x.shape[1:] for tensor in tensors]
        layer = self._layer
        if layer is None or not all(fits(s, info.shape) for s, info in zip(shapes, layer.inputs, strict=True)):
            infos: list[Info] = []
            for shape, tensor in zip(shapes, tensors, strict=True):
                timed = len(shape) > 1 or (len(shape) == 1 and tensor.x.dtype == np.int32)
                free: Shape = (None, *shape[1:]) if timed else shape
                infos.append(Info(free, tensor.x.dtype))
            expected = "a shape that the layer takes" if layer is None else f"shape {told(layer.inputs[0].shape)}"
            try:
                try:
                    layer = self._source.build(infos)
                except ModelError:
                    layer = self._source.build([Info(t.x.shape[1:], t.x.dtype) for t in tensors])
            except ModelError as error:
                raise InputError("inputs", expected, f"shape {list(tensors[0].x.shape)}", str(error)) from error
            if self._layer is not None and any(shape is not None for shape in self._source.shapes[1:]):
                raise InputError("inputs", expected, f"shape {list(tensors[0].x.shape)}")
            self._use(layer)
        assert self._program is not None
        return layer, self._program

    def _split(self, x: Any) -> tuple[list[Any], Any]:
        """The inputs, and the initial states that were among them."""
        layer = self._layer
        if not isinstance(layer, Network) or len(layer.order) == 1:
            return [x], None
        if isinstance(x, Mapping):
            names = layer.all_input_names
            if unknown := sorted(set(x) - set(names)):
                raise InputError(f"inputs.{unknown[0]}", f"one of {names}", repr(unknown[0]))
            x = [x[name] for name in names if name in x]
        if not isinstance(x, list | tuple):
            x = [x]
        if len(x) == len(layer.order):
            pairs = list(zip(layer.order, x, strict=True))
            flat: dict[int, Any] = {place[0]: value for place, value in pairs if isinstance(place, tuple)}
            values = [value for place, value in pairs if isinstance(place, int)]
            if len(flat) == len(layer.states) and flat:
                return values, layer.nest_states([flat[index] for index in range(len(flat))])
            if not flat:
                return values, None
            raise InputError("inputs", "the other initial states too", f"{len(flat)} of {len(layer.states)}")
        if len(x) == len(layer.inputs):
            return list(x), None
        raise InputError("inputs", f"{len(layer.order)} tensors, {layer.all_input_names}", f"{len(x)}")

    def _inputs(self, values: list[Any], mask: Any) -> list[Masked[np.ndarray]]:
        layer = self._layer
        probe = layer if layer is not None else self._source.unbuilt()
        arrays: list[np.ndarray] = []
        for value, dtype in zip(values, probe.input_dtypes, strict=True):
            array = cast_input("inputs", value, dtype)
            if probe.time_major and array.ndim > 1:
                array = array.swapaxes(0, 1)
            if array.ndim == 0 or 0 in array.shape[1:]:
                raise InputError("inputs", "at least one time step, and one feature", f"shape {list(array.shape)}")
            if array.shape[0] != (len(arrays[0]) if arrays else array.shape[0]):
                raise InputError("inputs", f"the same batch size, {len(arrays[0])}", f"shape {list(array.shape)}")
            arrays.append(array)
        masks = list(mask) if isinstance(mask, list | tuple) and len(values) > 1 else [mask]
        masks += [None] * (len(arrays) - len(masks))
        return [
            Masked(array, read_mask(given, array, probe.time_major)) for array, given in zip(arrays, masks, strict=True)
        ]

    def _check_batch(self, batch: int) -> None:
        fixed = len(self._recorded[0]) if self._recorded else self._source.batch_size
        if fixed is not None and batch != fixed:
            raise InputError("inputs", f"batch size {fixed}, as the stateful layer has", f"{batch}")

    def _initial(self, layer: Layer, batch: int, given: Any) -> list[np.ndarray]:
        if given is not None:
            return self._flat(layer, given, batch)
        zeros = [spec.initial(batch) for spec in layer.states]
        if self._recorded is None:
            return zeros
        return [old if keep else zero for keep, old, zero in zip(layer.recorded, self._recorded, zeros, strict=True)]

    def _flat(self, layer: Layer, given: Any, batch: int | None) -> list[np.ndarray]:
        """The given states, flat and copied; with ``batch`` None, the first says how many rows there are."""
        template = layer.nest_states(list(layer.states))
        found = []
        for spec, value in zip(layer.states, leaves(given, template, self.state_size), strict=True):
            field = f"initial_state.{spec.name}"
            array = np.array(cast_input(field, value, spec.dtype))
            if batch is None and array.ndim:
                batch = len(array)
            if array.shape != (batch, *spec.shape):
                expected = f"shape {['batch' if batch is None else batch, *spec.shape]}"
                raise InputError(field, expected, f"shape {list(array.shape)}")
            found.append(array)
        return found

    def _returned(self, layer: Layer, outputs: list[np.ndarray]) -> Any:
        if layer.time_major:
            outputs = [
                np.swapaxes(y, 0, 1) if len(info.shape) > 1 else y
                for y, info in zip(outputs, layer.outputs, strict=True)
            ]
        # What the layer recorded is its own.
        return _arranged(
            layer, [np.array(y) if role is not None else y for y, role in zip(outputs, layer.roles, strict=True)]
        )


def layer_from_config(
    config: Mapping[str, Any],
    weights: Sequence[ArrayLike],
    engine: Literal["auto", "numpy", "onnx"] = "auto",
    keras_version: int | None = None,
) -> LocalLayer:
    """A layer or model of Keras, to call in this process.

    Args:
        config: ``{"class_name": ..., "config": {...}}`` of a layer, a Sequential or a functional model, as Keras 2 or
            Keras 3 writes it.
        weights: in the order of Keras's ``get_weights()``.
        engine: "auto" prefers onnx; `LocalLayer.engine_reason` says why not, where it does not.
        keras_version: 2 or 3, which decides what ``hard_sigmoid`` is; None: guessed from the config.

    Raises:
        ModelError: the config or the weights are wrong; the message names the layer and what was expected.
    """
    return LocalLayer(config, weights, engine, keras_version)


def _arranged(layer: Layer, outputs: list[Any]) -> Any:
    """Outputs as Keras returns them."""
    if isinstance(layer, Network):
        return outputs[0] if len(outputs) == 1 else outputs
    results = [output for output, role in zip(outputs, layer.roles, strict=True) if role is None]
    states = [output for output, role in zip(outputs, layer.roles, strict=True) if role is not None]
    arranged = [*results, *(layer.nest_states(states) if states else ())]
    return arranged[0] if len(arranged) == 1 else arranged
