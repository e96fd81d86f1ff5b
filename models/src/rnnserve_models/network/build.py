"""From a config and a list of weights to a layer that can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rnnserve_models.errors import ModelError, reading
from rnnserve_models.network.config import Config, guess_version
from rnnserve_models.network.graph import Network
from rnnserve_models.network.layer import Info, Layer, Shape
from rnnserve_models.network.program import NumpyProgram, OnnxProgram, Program
from rnnserve_models.network.registry import make_layer
from rnnserve_models.network.wiring import declared_input

MAX_DEPTH = 100
"""Of lists and mappings inside one another in a config. A layer inside a layer is two or three of them."""


class Source:
    """A config and its weights, from which layers are built for inputs of one shape or another."""

    def __init__(self, config: Any, weights: Sequence[ArrayLike], keras_version: int | None = None) -> None:
        """Reads both.

        Args:
            config: ``{"class_name": ..., "config": {...}}``, as Keras 2 or Keras 3 writes it.
            weights: in the order of Keras's ``get_weights()``.
            keras_version: 2 or 3; None: guessed from the config.

        Raises:
            ModelError: the config is wrong, or the number of weights; the message names the layer.
        """
        if keras_version not in (None, 2, 3):
            raise ModelError(f"keras_version: expected 2, 3 or None, got {keras_version!r}")
        _check_depth(config)
        self._document = config
        self._version = keras_version or guess_version(config)
        if isinstance(weights, np.ndarray) or not isinstance(weights, Sequence):
            raise ModelError(f"weights: expected a list of arrays, got {type(weights).__name__}")
        self.weights = [_array(index, weight) for index, weight in enumerate(weights)]
        for index, weight in enumerate(self.weights):
            if weight.dtype.kind not in "biuf":
                raise ModelError(f"weights.{index}: expected numbers, got dtype {weight.dtype}")
        with reading("config"):
            layer = self.unbuilt()
        if len(self.weights) != layer.weight_count:
            raise layer.error(f"expected {layer.weight_count} weights, got {len(self.weights)}")
        self.shapes = self._shapes(layer)
        self.batch_size = layer.batch_size if isinstance(layer, Network) else self._declared_batch()

    def build(self, infos: list[Info]) -> Layer:
        """The layer for inputs of given shapes.

        Raises:
            ModelError: they do not fit, or a weight does not; the message names the layer.
        """
        with reading("config"):
            layer = self.unbuilt()
            layer.build(infos, self.weights)
        return layer

    def default(self) -> Layer | None:
        """The layer for inputs as the config, or else the weights, say; None if neither does.

        Time is left free where the layers allow it, whatever number of steps the config has.
        """
        if any(shape is None for shape in self.shapes):
            return None
        shapes = [shape for shape in self.shapes if shape is not None]
        free: list[Shape] = [(None, *shape[1:]) if shape else shape for shape in shapes]
        dtypes = self.unbuilt().input_dtypes
        try:
            return self.build([Info(*pair) for pair in zip(free, dtypes, strict=True)])
        except ModelError:
            if free == shapes:
                raise
        return self.build([Info(*pair) for pair in zip(shapes, dtypes, strict=True)])

    def unbuilt(self) -> Layer:
        """The layer without its weights."""
        return make_layer(Config(self._document, self._version))

    def _shapes(self, layer: Layer) -> list[Shape | None]:
        if isinstance(layer, Network):
            declared = layer.declared
        else:
            own = declared_input(Config(self._document, self._version))
            declared = [None if own is None else own.shape]
        if declared == [None]:
            return [layer.input_shape_of(self.weights)]
        return declared

    def _declared_batch(self) -> int | None:
        own = declared_input(Config(self._document, self._version))
        return None if own is None else own.batch


def make_program(layer: Layer, source: Source, engine: str, *, threads: int = 1) -> tuple[Program, str]:
    """What runs the layer, and why it is not onnxruntime: "" where it is, or was not asked for.

    Args:
        layer: that was built from the source.
        source: to build it again, unrolled.
        engine: "numpy", "onnx", or "auto", which is onnx where the layer has a form in it.
        threads: of onnxruntime, for one operator.

    Raises:
        ModelError: the engine is none of these, or is "onnx" and the layer has no form in it.
    """
    if engine not in ("auto", "numpy", "onnx"):
        raise ModelError(f"engine: expected auto, numpy or onnx, got {engine!r}")
    if engine == "numpy":
        return NumpyProgram(layer), ""
    try:
        return OnnxProgram(layer, source.build, threads=threads), ""
    except (ModelError, ImportError) as error:
        if engine == "onnx":
            raise
        return NumpyProgram(layer), str(error)


def _check_depth(config: Any) -> None:
    waiting = [(config, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ModelError(f"config: has more than {MAX_DEPTH} lists and mappings inside one another")
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        waiting += [(part, depth + 1) for part in parts]


def _array(index: int, weight: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(weight)
    except ValueError as error:
        raise ModelError(f"weights.{index}: expected an array, got what is none: {error}") from error
