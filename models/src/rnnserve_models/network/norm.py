"""Normalizations, at inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnnserve_models.network.config import Config
from rnnserve_models.network.core import wide
from rnnserve_models.network.layer import Info, Map, Shape
from rnnserve_models.onnx_builder import GraphBuilder


class LayerNormalization(Map):
    """y = gamma (x - mean) / sqrt(variance + epsilon) + beta, of each step's features.

    Keras: ``LayerNormalization``; with ``rms_scaling``, x / sqrt(variance + epsilon) * gamma.
    """

    keeps_mask = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.axis = config.get("axis", -1)
        self.epsilon = config.number("epsilon", 1e-3)
        self.rms = config.flag("rms_scaling", False)
        self.center = config.flag("center", True) and not self.rms
        self.scale = config.flag("scale", True) or self.rms
        config.done()

    @property
    def weight_count(self) -> int:
        """Gamma and beta."""
        return self.scale + self.center

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """[time, features], or as the axes say."""
        axes = self.axis if isinstance(self.axis, list | tuple) else [self.axis]
        return _shape_with(axes, weights[0].shape) if len(weights) else None

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        rank = len(shape) + 1
        axes = self.axis if isinstance(self.axis, list | tuple) else [self.axis]
        if not all(isinstance(axis, int) and -rank <= axis < rank for axis in axes):
            raise self.error(f"axis: expected axes of an input of {rank} axes, got {self.axis!r}")
        self.axes = sorted(axis % rank for axis in axes)
        if not self.axes or self.axes[0] == 0 or len(set(self.axes)) < len(self.axes):
            raise self.error(f"axis: expected different axes, not that of the batch, got {self.axis!r}")
        own = tuple(self.known(shape, axis - 1) for axis in self.axes)
        wide_dtype = np.float64 if self.dtype == np.float64 else np.float32
        aligned = [shape[axis - 1] if axis in self.axes else 1 for axis in range(1, rank)]
        names = [*(["gamma"] if self.scale else []), *(["beta"] if self.center else [])]
        found = {
            name: self.checked(index, name, weights, own, wide_dtype).reshape(aligned)  # type: ignore[arg-type]
            for index, name in enumerate(names)
        }
        self.gamma, self.beta = found.get("gamma"), found.get("beta")
        return [Info(shape, self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Any shape, the same."""
        x, axes = wide(x), tuple(self.axes)
        variance = x.var(axis=axes, keepdims=True)
        centred = x if self.rms else x - x.mean(axis=axes, keepdims=True)
        y: np.ndarray = centred / np.sqrt(variance + x.dtype.type(self.epsilon))
        y = y if self.gamma is None else y * self.gamma
        return y if self.beta is None else y + self.beta

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """In arithmetic: onnxruntime's operator has its own order of rounding."""
        x, axes = graph.widened(x), graph.ints(*self.axes)
        centred = graph.add("Sub", x, graph.add("ReduceMean", x, axes, keepdims=1))
        variance = graph.add("ReduceMean", graph.add("Mul", centred, centred), axes, keepdims=1)
        deviation = graph.add("Sqrt", graph.add("Add", variance, graph.number(self.epsilon)))
        y = graph.add("Div", x if self.rms else centred, deviation)
        y = y if self.gamma is None else graph.add("Mul", y, graph.weight(self.gamma))
        y = y if self.beta is None else graph.add("Add", y, graph.weight(self.beta))
        return graph.narrowed(y)


class BatchNormalization(Map):
    """y = gamma (x - moving mean) / sqrt(moving variance + epsilon) + beta. Keras: ``BatchNormalization``."""

    keeps_mask = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        axis = config.get("axis", -1)
        self.axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
        if not isinstance(self.axis, int):
            raise config.error(f"axis: expected one axis, got {axis!r}")
        self.epsilon = config.number("epsilon", 1e-3)
        self.center, self.scale = config.flag("center", True), config.flag("scale", True)
        for key in (
            "momentum",
            "renorm",
            "synchronized",
            "virtual_batch_size",
            "fused",
            "renorm_clipping",
            "renorm_momentum",
        ):
            config.get(key)
        config.done()

    @property
    def weight_count(self) -> int:
        """Gamma, beta, the moving mean and the moving variance."""
        return self.scale + self.center + 2

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """[time, features], or as the axis says."""
        return _shape_with([self.axis], weights[0].shape) if len(weights) else None

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        rank = len(shape) + 1
        if not -rank < self.axis < rank or self.axis % rank == 0:
            raise self.error(f"axis: expected an axis of an input of {rank} axes, got {self.axis}")
        axis = self.axis % rank
        size = self.known(shape, axis - 1)
        names = [*(["gamma"] if self.scale else []), *(["beta"] if self.center else [])]
        names += ["moving_mean", "moving_variance"]
        computed = np.float64 if self.dtype == np.float64 else np.float32
        found = {name: self.checked(i, name, weights, (size,), computed) for i, name in enumerate(names)}
        aligned = [1] * (rank - 1)
        aligned[axis - 1] = size
        dtype = found["moving_mean"].dtype
        factor = 1 / np.sqrt(found["moving_variance"] + dtype.type(self.epsilon))
        factor = factor * found.get("gamma", dtype.type(1))
        self.factor = factor.reshape(aligned)
        self.shift = (found.get("beta", dtype.type(0)) - found["moving_mean"] * factor).reshape(aligned)
        return [Info(shape, self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Any shape, the same."""
        y: np.ndarray = wide(x) * self.factor + self.shift
        return y

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Mul and Add."""
        y = graph.add("Mul", graph.widened(x), graph.weight(self.factor))
        return graph.narrowed(graph.add("Add", y, graph.weight(self.shift)))


def _shape_with(axes: Sequence[int], sizes: Sequence[int]) -> Shape | None:
    """The shape of least rank whose axes have those sizes; with negative axes, of a sequence if there is only one."""
    if len(axes) != len(sizes) or not all(isinstance(axis, int) for axis in axes):
        return None
    if min(axes) < 1:
        return (None, *sizes) if len(sizes) == 1 else tuple(sizes)
    known = dict(zip(sorted(axes), sizes, strict=True))
    return tuple(known.get(axis) for axis in range(1, max(axes) + 1))
