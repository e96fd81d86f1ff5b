"""Dense, Embedding, Masking, activations, and the layers that do nothing at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rnnserve_models.activations import activation
from rnnserve_models.errors import InputError
from rnnserve_models.network.config import Config, parametric_activation
from rnnserve_models.network.layer import Info, Map, Shape, told
from rnnserve_models.onnx_builder import GraphBuilder


def wide(x: np.ndarray) -> np.ndarray:
    """float16 as float32, to compute with; others as they are."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


class Dense(Map):
    """y = act(x W + b), over the last axis. Keras: ``Dense``."""

    keeps_mask = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.units = config.size("units")
        self.activation = config.activation("activation", None)
        self.use_bias = config.flag("use_bias", True)
        config.done()

    @property
    def weight_count(self) -> int:
        """The kernel, and the bias."""
        return 1 + self.use_bias

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """[time, features]."""
        return (None, weights[0].shape[0]) if len(weights) and weights[0].ndim == 2 else None

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if not shape:
            raise self.error(f"expected inputs [batch, ..., features], got {told(shape)}")
        self.kernel = self.checked(0, "kernel", weights, (self.known(shape, -1), self.units))
        self.bias = self.checked(1, "bias", weights, (self.units,)) if self.use_bias else None
        return [Info((*shape[:-1], self.units), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """[B, ..., features] to [B, ..., units]."""
        y = np.matmul(wide(x), wide(self.kernel))
        if self.bias is not None:
            y = y + wide(self.bias)
        return activation(self.activation)(y)

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """MatMul, Add and the activation."""
        y = graph.add("MatMul", graph.widened(x), graph.weight(self.kernel))
        if self.bias is not None:
            y = graph.add("Add", y, graph.weight(self.bias))
        return graph.narrowed(graph.activation(self.activation, y))


class Embedding(Map):
    """A row of a table for each id. With ``mask_zero``, a step whose id is 0 is masked. Keras: ``Embedding``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.size = config.size("input_dim")
        self.units = config.size("output_dim")
        self.mask_zero = config.flag("mask_zero", False)
        config.done()

    @property
    def weight_count(self) -> int:
        """The table."""
        return 1

    @property
    def input_dtypes(self) -> list[np.dtype[Any]]:
        """Ids are int32."""
        return [np.dtype(np.int32)]

    @property
    def bounds(self) -> list[tuple[int, int] | None]:
        """Ids in the table; Keras 3 counts negative ones from its end."""
        return [(-self.size if self.version == 3 else 0, self.size - 1)]

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """[time]."""
        return (None,)

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        self.table = self.checked(0, "embeddings", weights, (self.size, self.units))
        return [Info((*shapes[0], self.units), self.dtype)]

    def check(self, inputs: Sequence[np.ndarray]) -> None:
        """Refuses ids that are not in the table."""
        (low, high), ids = self.bounds[0] or (0, 0), inputs[0]
        if ids.size and (ids.min() < low or ids.max() > high):
            raise InputError("inputs", f"ids from {low} to {high} for {self.name!r}", told_range(ids))

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Ids [B, ...] to [B, ..., output_dim]."""
        self.check([x])
        rows: np.ndarray = self.table[x]
        return rows

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Gather."""
        return graph.add("Gather", graph.constant(self.table), x, axis=0)

    def call_mask(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
        """id != 0."""
        return x != 0 if self.mask_zero else None

    def express_mask(self, graph: GraphBuilder, x: str, mask: str | None) -> str | None:
        """id != 0."""
        if not self.mask_zero:
            return None
        return graph.add("Not", graph.add("Equal", x, graph.constant(np.array(0, np.int32))))


class Masking(Map):
    """Masks the steps whose features all are ``mask_value``, and makes them 0. Keras: ``Masking``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.value = config.number("mask_value", 0.0)
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        return [Info(shapes[0], self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """[B, T, features], the same."""
        return np.where(self._valid(x)[..., None], x, x.dtype.type(0))

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Where."""
        valid = graph.add("Unsqueeze", self.express_mask(graph, x, mask), graph.ints(-1))
        return graph.add("Where", valid, x, graph.constant(np.zeros((), self.dtype)))

    def call_mask(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
        """Whether any feature is another."""
        return self._valid(x)

    def express_mask(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Whether any feature is another."""
        same = graph.add("Equal", x, graph.constant(np.array(self.value, self.dtype)))
        other = graph.cast(graph.add("Not", same), np.int32)
        return graph.cast(graph.add("ReduceMax", other, graph.ints(-1), keepdims=0), np.bool_)

    def _valid(self, x: np.ndarray) -> np.ndarray:
        valid: np.ndarray = (x != x.dtype.type(self.value)).any(axis=-1)
        return valid


class Activation(Map):
    """An activation. Keras: ``Activation``, ``ReLU``, ``LeakyReLU``, ``ELU``, ``Softmax``."""

    keeps_mask = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.activation: str | None
        if config.class_name == "Activation":
            self.activation = config.activation("activation", None)
        elif config.class_name == "Softmax":
            if config.get("axis", -1) not in (-1, [-1], (-1,)):
                raise config.error("axis: expected -1, the last")
            self.activation = "softmax"
        else:
            self.activation = parametric_activation(config)
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        return [Info(shapes[0], self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Any shape, the same."""
        return activation(self.activation)(wide(x))

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """See `GraphBuilder.activation`."""
        return graph.narrowed(graph.activation(self.activation, graph.widened(x)))


class Identity(Map):
    """What does something in training only. Keras: ``Dropout`` and its kin, ``GaussianNoise``, ``Identity``."""

    keeps_mask = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for key in ("rate", "stddev", "l1", "l2", "data_format", "name"):
            config.get(key)
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        return [Info(shapes[0], self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Any shape, the same."""
        return x

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Nothing."""
        return x


def told_range(x: np.ndarray) -> str:
    """The least and the greatest element, in a message."""
    return f"{x.min()} to {x.max()}"
