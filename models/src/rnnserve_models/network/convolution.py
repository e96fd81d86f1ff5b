"""Convolution and pooling over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnnserve_models.activations import activation
from rnnserve_models.network.config import Config
from rnnserve_models.network.core import wide
from rnnserve_models.network.layer import Info, Map, Shape, told
from rnnserve_models.onnx_builder import GraphBuilder


class Window(Map):
    """A window that slides over time: [B, T, features] to [B, T', units].

    ``same`` pads so that T' = ceil(T / strides), more at the end than at the beginning; ``causal`` pads the beginning
    only; ``valid`` does not pad.
    """

    size: int
    strides: int
    dilation: int = 1
    padding: str = "valid"

    @property
    def reach(self) -> int:
        """The steps from a window's first to its last, and one."""
        return (self.size - 1) * self.dilation + 1

    def steps(self, steps: int | None) -> int | None:
        """T' of T."""
        if steps is None:
            return None
        padded = steps if self.padding == "valid" else steps + self.reach - 1
        if self.padding == "same":
            return -(-steps // self.strides)
        if padded < self.reach:
            raise self.error(f"expected at least {self.reach} time steps, got {steps}")
        return (padded - self.reach) // self.strides + 1

    def taps(self, x: np.ndarray, fill: float) -> list[np.ndarray]:
        """The steps under each place of the window: ``size`` arrays [B, T', features]."""
        count = self.steps(x.shape[1])
        assert count is not None
        before, after = 0, 0
        if self.padding == "causal":
            before = self.reach - 1
        elif self.padding == "same":
            total = max((count - 1) * self.strides + self.reach - x.shape[1], 0)
            before, after = total // 2, total - total // 2
        x = np.pad(x, ((0, 0), (before, after), (0, 0)), constant_values=x.dtype.type(fill))
        last = (count - 1) * self.strides + 1
        return [x[:, k * self.dilation : k * self.dilation + last : self.strides] for k in range(self.size)]

    def express_taps(self, graph: GraphBuilder, x: str, fill: float) -> list[str]:
        """`taps`, in ONNX, for any T."""
        zero, one = graph.ints(0), graph.ints(1)
        if self.padding != "valid":
            before, after = graph.ints(self.reach - 1), zero
            if self.padding == "same":
                steps = graph.add("Shape", x, start=1, end=2)
                stride = graph.ints(self.strides)
                count = graph.add("Div", graph.add("Add", steps, graph.ints(self.strides - 1)), stride)
                span = graph.add("Mul", graph.add("Sub", count, one), stride)
                total = graph.add("Sub", graph.add("Add", span, graph.ints(self.reach)), steps)
                total = graph.add("Max", total, zero)
                before = graph.add("Div", total, graph.ints(2))
                after = graph.add("Sub", total, before)
            pads = graph.add("Concat", zero, before, zero, zero, after, zero, axis=0)
            x = graph.add("Pad", x, pads, graph.number(fill))
        steps = graph.add("Shape", x, start=1, end=2)
        last = graph.add("Sub", steps, graph.ints(self.reach))  # where the last window may begin
        found = []
        for k in range(self.size):
            end = graph.add("Add", last, graph.ints(k * self.dilation + 1))
            found.append(graph.add("Slice", x, graph.ints(k * self.dilation), end, one, graph.ints(self.strides)))
        return found


class Conv1D(Window):
    """y_t = act(sum over k of x_(t s + k d) W_k + b). Keras: ``Conv1D``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.units, self.size = config.size("filters"), config.size("kernel_size")
        self.strides, self.dilation = config.size("strides", 1), config.size("dilation_rate", 1)
        self.padding = str(config.choice("padding", ("valid", "same", "causal"), "valid")).lower()
        config.choice("data_format", (None, "channels_last"), None)
        self.groups = config.size("groups", 1)
        self.activation = config.activation("activation", None)
        self.use_bias = config.flag("use_bias", True)
        config.done()
        if self.units % self.groups:
            raise self.error(f"groups: expected a divisor of filters, {self.units}, got {self.groups}")

    @property
    def weight_count(self) -> int:
        """The kernel, and the bias."""
        return 1 + self.use_bias

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """[time, features]."""
        return (None, weights[0].shape[1] * self.groups) if len(weights) and weights[0].ndim == 3 else None

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if len(shape) != 2:
            raise self.error(f"expected inputs [batch, time, features], got {told(shape)}")
        features = self.known(shape, 1)
        if features % self.groups:
            raise self.error(f"groups: expected a divisor of the features, {features}, got {self.groups}")
        kernel = self.checked(0, "kernel", weights, (self.size, features // self.groups, self.units))
        self.kernel = _ungrouped(kernel, self.groups)
        self.bias = self.checked(1, "bias", weights, (self.units,)) if self.use_bias else None
        return [Info((self.steps(shape[0]), self.units), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """[B, T, features] to [B, T', filters]."""
        taps = self.taps(wide(x), 0)
        y = sum(np.matmul(tap, wide(kernel)) for tap, kernel in zip(taps, self.kernel, strict=True))
        assert isinstance(y, np.ndarray)
        return activation(self.activation)(y if self.bias is None else y + wide(self.bias))

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """A MatMul for each place of the window: onnxruntime's Conv has no float64."""
        taps = self.express_taps(graph, graph.widened(x), 0)
        y, *rest = (graph.add("MatMul", tap, graph.weight(k)) for tap, k in zip(taps, self.kernel, strict=True))
        for part in rest:
            y = graph.add("Add", y, part)
        if self.bias is not None:
            y = graph.add("Add", y, graph.weight(self.bias))
        return graph.narrowed(graph.activation(self.activation, y))


class MaxPooling1D(Window):
    """The maximum under the window. Keras: ``MaxPooling1D``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.size = config.size("pool_size", 2)
        if config.get("strides") is None:
            config.values["strides"] = self.size
        self.strides = config.size("strides")
        self.padding = str(config.choice("padding", ("valid", "same"), "valid"))
        config.choice("data_format", (None, "channels_last"), None)
        config.done()

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if len(shape) != 2:
            raise self.error(f"expected inputs [batch, time, features], got {told(shape)}")
        return [Info((self.steps(shape[0]), shape[1]), self.dtype)]

    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """[B, T, features] to [B, T', features]."""
        y: np.ndarray = np.maximum.reduce(self.taps(x, -np.inf))
        return y

    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """Max."""
        return graph.narrowed(graph.add("Max", *self.express_taps(graph, graph.widened(x), -np.inf)))


def _ungrouped(kernel: np.ndarray, groups: int) -> np.ndarray:
    """[size, features / groups, filters] to [size, features, filters], zeros between groups."""
    if groups == 1:
        return kernel
    size, features, filters = kernel.shape
    whole = np.zeros((size, features * groups, filters), kernel.dtype)
    for group in range(groups):
        inner = slice(group * filters // groups, (group + 1) * filters // groups)
        whole[:, group * features : (group + 1) * features, inner] = kernel[:, :, inner]
    return whole
