"""Layers that move elements about, and pooling over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rnnserve_models.network.config import Config
from rnnserve_models.network.core import wide
from rnnserve_models.network.layer import Info, Map, Shape, told
from rnnserve_models.onnx_builder import GraphBuilder


class Flatten(Map):
    """[B, ...] to [B, all of them]. Keras: ``Flatten``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        config.choice("data_format", (None, "channels_last"), None)
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        return [Info((math.prod(self.known(shape, axis) for axis in range(len(shape))),), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Row by row."""
        return x.reshape(len(x), *(extent or 0 for extent in self.outputs[0].shape))

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Reshape."""
        return graph.add("Reshape", x, graph.ints(-1, *(extent or 0 for extent in self.outputs[0].shape)))


class Reshape(Map):
    """[B, ...] to [B, *target_shape]; the time may stay any where it is the axis that is -1. Keras: ``Reshape``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        target = config.get("target_shape")
        if not isinstance(target, list | tuple) or not all(isinstance(n, int) and n != 0 for n in target):
            raise config.error(f"target_shape: expected a list of integers, got {target!r}")
        self.target = tuple(target)
        if self.target.count(-1) > 1 or min(self.target, default=1) < -1:
            raise config.error(f"target_shape: expected -1 at most once, got {list(self.target)}")
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        fixed = math.prod(extent for extent in shape if extent is not None)
        wanted = math.prod(extent for extent in self.target if extent != -1)
        if None in shape:
            if -1 not in self.target or fixed % wanted or (fixed != wanted and self.target[0] != -1):
                raise self.error(f"cannot reshape {told(shape)} to {['batch', *self.target]}")
            return [Info(tuple(None if extent == -1 else extent for extent in self.target), self.dtype)]
        if fixed % wanted or (-1 not in self.target and fixed != wanted):
            raise self.error(f"cannot reshape {told(shape)} to {['batch', *self.target]}")
        return [Info(tuple(fixed // wanted if extent == -1 else extent for extent in self.target), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Row by row."""
        if len(x) == 0:
            return x.reshape(0, *(1 if extent == -1 else extent for extent in self.target))
        return x.reshape(len(x), *self.target)

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Reshape."""
        return graph.add("Reshape", x, graph.ints(0, *self.target))


class RepeatVector(Map):
    """[B, features] to [B, n, features]. Keras: ``RepeatVector``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.count = config.size("n")
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if len(shape) != 1:
            raise self.error(f"expected inputs [batch, features], got {told(shape)}")
        return [Info((self.count, self.known(shape, 0)), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """The same vector at every step."""
        return np.repeat(x[:, None], self.count, axis=1)

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Tile."""
        return graph.add("Tile", graph.add("Unsqueeze", x, graph.ints(1)), graph.ints(1, self.count, 1))


class Permute(Map):
    """The axes after the batch, in the order ``dims``. Keras: ``Permute``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        dims = config.get("dims")
        if not isinstance(dims, list | tuple) or sorted(dims) != list(range(1, len(dims) + 1)):
            raise config.error(f"dims: expected an order of 1, 2, ..., got {dims!r}")
        self.axes = [0, *dims]
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if len(shape) + 1 != len(self.axes):
            raise self.error(f"expected inputs of {len(self.axes)} axes, got {told(shape)}")
        return [Info(tuple(shape[axis - 1] for axis in self.axes[1:]), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Axes moved."""
        return x.transpose(self.axes)

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Transpose."""
        return graph.add("Transpose", x, perm=self.axes)


class GlobalPooling1D(Map):
    """The mean of the valid steps, or the maximum of all: [B, T, features] to [B, features].

    Keras: ``GlobalAveragePooling1D``, which is NaN for a row without a valid step, and ``GlobalMaxPooling1D``, which
    does not look at the mask.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        config.choice("data_format", (None, "channels_last"), None)
        self.keepdims = config.flag("keepdims", False)
        self.mean = "Average" in config.class_name
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if len(shape) != 2:
            raise self.error(f"expected inputs [batch, time, features], got {told(shape)}")
        return [Info((1, shape[1]) if self.keepdims else (shape[1],), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Over the steps."""
        y: np.ndarray
        if not self.mean:
            y = x.max(axis=1, keepdims=self.keepdims)
            return y
        x = wide(x)
        if mask is None:
            y = x.mean(axis=1, keepdims=self.keepdims)
            return y
        valid = mask[:, :, None]
        total = np.where(valid, x, x.dtype.type(0)).sum(axis=1, keepdims=self.keepdims)
        y = total / valid.sum(axis=1, keepdims=self.keepdims).astype(x.dtype)
        return y

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """ReduceMax, ReduceMean, or ReduceSum over ReduceSum."""
        keep, time, x = int(self.keepdims), graph.ints(1), graph.widened(x)
        if not self.mean:
            return graph.narrowed(graph.add("ReduceMax", x, time, keepdims=keep))
        if mask is None:
            return graph.narrowed(graph.add("ReduceMean", x, time, keepdims=keep))
        valid = graph.add("Unsqueeze", mask, graph.ints(2))
        total = graph.add("ReduceSum", graph.add("Where", valid, x, graph.number(0)), time, keepdims=keep)
        count = graph.add("ReduceSum", graph.cast(valid, graph.wide), time, keepdims=keep)
        return graph.narrowed(graph.add("Div", total, count))
