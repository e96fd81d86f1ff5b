"""Networks: layers and models of Keras, computed a whole call at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rnnserve_models.engine.base import Array, Arrays, Engine, EngineError
from rnnserve_models.errors import InputError, ModelError
from rnnserve_models.network.build import Source, make_program
from rnnserve_models.network.graph import Network
from rnnserve_models.network.layer import Info, Layer, Masked
from rnnserve_models.spec import TensorSpec


class NetworkEngine(Engine):
    """Runs a layer or model of Keras under NumPy or onnxruntime.

    Its states are those of all its recurrent layers; the initial states that a functional model takes as inputs, and
    the final ones that it gives as outputs, are among them and not among its inputs and outputs. A mask is an input
    named ``mask``, of the first input.

    Attributes:
        reason: why engine "auto" did not take onnx; "" if it did.
    """

    whole = True
    bit_identical = False

    def __init__(self, source: Source, *, engine: str = "auto", threads: int = 1, finite: bool = False) -> None:
        """Builds the network.

        Args:
            source: its config and weights.
            engine: "auto", "numpy" or "onnx".
            threads: of onnxruntime, for one operator.
            finite: whether to forbid NaN and infinity in the inputs.

        Raises:
            ModelError: it cannot be built, or not for this engine; nothing says what its inputs are like; or inputs or
                outputs are of a kind that no session can have.
        """
        layer = source.default()
        if layer is None:
            raise ModelError("nothing says what the inputs are like; give the first layer a batch_shape")
        self._layer = layer
        self._program, self.reason = make_program(layer, source, engine, threads=threads)
        self.name = self._program.name
        self._timed = [_has_time(info) for info in layer.inputs]
        self.timesteps = _timesteps(layer, self._timed)
        names = layer.input_names if isinstance(layer, Network) and len(layer.inputs) > 1 else ["input"]
        self.inputs = tuple(
            TensorSpec(name, info.dtype, _fixed(info, timed), finite and info.dtype.kind == "f", bounds)
            for name, info, timed, bounds in zip(names, layer.inputs, self._timed, layer.bounds, strict=True)
        )
        self._results = [index for index, role in enumerate(layer.roles) if role is None]
        if not self._results:
            raise layer.error("all its outputs are states")
        infos = [layer.outputs[index] for index in self._results]
        self._sequences = [len(info.shape) > 1 for info in infos]
        self.outputs = tuple(
            TensorSpec(name, info.dtype, _fixed(info, timed))
            for name, info, timed in zip(_output_names(layer, self._results), infos, self._sequences, strict=True)
        )
        self.states = layer.states

    @property
    def time_major(self) -> bool:
        """Whether Keras has time before batch in its sequences."""
        return self._layer.time_major

    @property
    def return_sequences(self) -> bool:
        """Whether an output has a time axis."""
        return any(self._sequences)

    def run(self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """See `Engine.run`; all the ``lengths`` are T."""
        arrays = [
            np.ascontiguousarray(inputs[spec.name].swapaxes(0, 1)) if timed else inputs[spec.name][0]
            for spec, timed in zip(self.inputs, self._timed, strict=True)
        ]  # [R, T, ...] or [R, ...]
        tensors = [Masked(x) for x in arrays]
        if "mask" in inputs:
            tensors[0] = Masked(arrays[0], np.ascontiguousarray(inputs["mask"].T))
        try:
            outputs, finals = self._program.run(tensors, [states[spec.name] for spec in self.states])
        except (InputError, ModelError, ValueError, ArithmeticError, LookupError) as error:
            raise EngineError(str(error)) from error
        return (
            {
                spec.name: outputs[index].swapaxes(0, 1) if timed else outputs[index][None]
                for spec, index, timed in zip(self.outputs, self._results, self._sequences, strict=True)
            },
            {spec.name: final for spec, final in zip(self.states, finals, strict=True)},
        )


def _has_time(info: Info) -> bool:
    """Whether the first axis of a row is time: a vector of a fixed size is not a sequence."""
    return bool(info.shape) and (info.shape[0] is None or len(info.shape) > 1)


def _timesteps(layer: Layer, timed: list[bool]) -> int | None:
    fixed = {info.shape[0] if time else 1 for info, time in zip(layer.inputs, timed, strict=True)}
    if len(fixed) > 1:
        raise layer.error(f"its inputs differ in their numbers of time steps: {sorted(map(str, fixed))}")
    return fixed.pop()


def _fixed(info: Info, timed: bool) -> tuple[int, ...]:
    shape = info.shape[1:] if timed else info.shape
    if None in shape:
        raise ModelError(f"an input or output has an axis of no fixed size besides batch and time: {info.shape}")
    return tuple(extent for extent in shape if extent is not None)


def _output_names(layer: Layer, results: list[int]) -> list[str]:
    if len(results) == 1:
        return ["output"]
    if isinstance(layer, Network):
        return [layer.output_names[index] for index in results]
    return ["forward", "backward"]
