"""A graph in the making: ONNX nodes written down as expressions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from onnx import helper, numpy_helper

from rnnserve_models.activations import LEAKY_RELU_SLOPE, SELU_ALPHA, SELU_SCALE, parameters
from rnnserve_models.errors import ModelError

# The activations that are one operator of ONNX, of which onnxruntime has float32 and float64. It has no others, such as
# Elu, in float64; and its float32 ones give an element other bits at the end of a tensor than in the middle. So these
# are written out in arithmetic.
_OPERATORS = {"tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "exponential": "Exp", "gelu": "Gelu"}


class GraphBuilder:
    """Nodes and initializers of a graph, or of the body of one of its nodes. Values are known by their names."""

    def __init__(self, dtype: np.dtype[Any], numbers: Iterator[int] | None = None) -> None:
        """Begins a graph whose inputs and outputs are of ``dtype``, and whose own names are ``v<number>``.

        It computes in ``wide``, float32 if ``dtype`` is float16: onnxruntime's CPU operators have little float16.
        """
        self.dtype = dtype
        self.wide = np.dtype(np.float32) if dtype == np.float16 else dtype
        self._numbers = count() if numbers is None else numbers
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []

    def typed(self, dtype: DTypeLike) -> GraphBuilder:
        """The same graph, for a part of it that is of another dtype."""
        view = GraphBuilder(np.dtype(dtype), self._numbers)
        view._nodes, view._initializers = self._nodes, self._initializers
        return view

    def body(self) -> GraphBuilder:
        """Begins the body of a node: a graph whose names differ from those of the graph around it."""
        return GraphBuilder(self.dtype, self._numbers)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of one output, and names the output."""
        (output,) = self.add_node(operator, inputs, [self.name()], **attributes)
        return output

    def add_node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> Sequence[str]:
        """Adds a node whose outputs have names; "" is an input or output that is not there."""
        self._nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs

    def constant(self, array: np.ndarray) -> str:
        """Adds an initializer."""
        name = self.name()
        self._initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def weight(self, array: np.ndarray) -> str:
        """Adds an initializer, to compute with."""
        return self.constant(array.astype(self.wide))

    def ints(self, *values: int) -> str:
        """Adds a vector of int64."""
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """Adds a scalar of int64."""
        return self.constant(np.array(value, np.int64))

    def number(self, value: float) -> str:
        """Adds a scalar, to compute with."""
        return self.weight(np.array(value))

    def widened(self, value: str) -> str:
        """Converts from ``dtype``, to compute with."""
        return value if self.wide == self.dtype else self.cast(value, self.wide)

    def narrowed(self, value: str) -> str:
        """Converts to ``dtype``, once computed."""
        return value if self.wide == self.dtype else self.cast(value, self.dtype)

    def cast(self, value: str, dtype: DTypeLike) -> str:
        """Converts to a dtype."""
        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def name(self) -> str:
        """A new name."""
        return f"v{next(self._numbers)}"

    def split(self, value: str, parts: int) -> list[str]:
        """Cuts the last axis into equal parts."""
        return list(self.add_node("Split", [value], [self.name() for _ in range(parts)], axis=-1, num_outputs=parts))

    def activation(self, name: str | None, x: str) -> str:
        """Applies an activation, by its Keras name."""
        match name:
            case None | "linear":
                return x
            case "softmax":
                return self.add("Softmax", x, axis=-1)
            case "relu6":
                return self._clip(x, 0, 6)
            case "leaky_relu":
                return self.add("Max", x, self._scaled(x, LEAKY_RELU_SLOPE))
            case "elu":
                return self._elu(x, 1)
            case "selu":
                return self._scaled(self._elu(x, SELU_ALPHA), SELU_SCALE)
            case "softsign":
                return self.add("Div", x, self._plus(self.add("Abs", x), 1))
            case "silu" | "swish":
                return self.add("Mul", x, self.add("Sigmoid", x))
            case "hard_sigmoid":
                return self._clip(self._plus(self._scaled(x, 1 / 6), 0.5), 0, 1)
            case "hard_sigmoid_keras2":
                return self._clip(self._plus(self._scaled(x, 0.2), 0.5), 0, 1)
            case "hard_silu" | "hard_swish":
                return self.add("Mul", x, self.activation("hard_sigmoid", x))
            case "softplus":  # max(x, 0) + log(1 + exp(-|x|))
                decay = self.add("Exp", self.add("Neg", self.add("Abs", x)))
                return self.add("Add", self.add("Relu", x), self.add("Log", self._plus(decay, 1)))
            case "mish":  # tanh(log(1 + p)) = n / (n + 2) for n = p (p + 2); it is 1 long before x = 20
                power = self.add("Exp", self.add("Min", x, self.number(20)))
                n = self.add("Mul", power, self._plus(power, 2))
                return self.add("Mul", x, self.add("Div", n, self._plus(n, 2)))
            case "gelu" if self.wide == np.float64:  # onnxruntime has no erf of float64: 1e-7 is all one gets
                erf = self.cast(self.add("Erf", self.cast(self._scaled(x, 0.5**0.5), np.float32)), self.wide)
                return self._scaled(self.add("Mul", x, self._plus(erf, 1)), 0.5)
            case _ if name in _OPERATORS:
                return self.add(_OPERATORS[name], x)
            case _:
                return self._less_common(name, x)

    def _less_common(self, name: str, x: str) -> str:
        """Activations that came with Keras 3, and those with parameters."""
        base, numbers = parameters(name)
        match base:
            case "relu":
                slope, most, threshold = numbers
                low = self._scaled(self._plus(x, -threshold), slope)
                high = self.add("Min", x, self.number(most))
                return self.add("Where", self.add("Less", x, self.number(threshold)), low, high)
            case "leaky_relu":  # max(x, slope * x) would not do for a slope above 1
                return self.add("Where", self._above(x, 0), x, self._scaled(x, numbers[0]))
            case "elu":
                return self._elu(x, numbers[0])
            case "celu":
                return self._elu(x, 1)
            case "log_sigmoid":
                return self.add("Neg", self.activation("softplus", self.add("Neg", x)))
            case "log_softmax":
                return self.add("LogSoftmax", x, axis=-1)
            case "hard_tanh":
                return self._clip(x, -1, 1)
            case "tanh_shrink":
                return self.add("Sub", x, self.add("Tanh", x))
            case "soft_shrink":
                low = self.add("Min", self._plus(x, 0.5), self.number(0))
                return self.add("Add", self.add("Relu", self._plus(x, -0.5)), low)
            case "hard_shrink":
                return self.add("Where", self._above(self.add("Abs", x), 0.5), x, self.number(0))
            case "squareplus":
                return self._scaled(self.add("Add", x, self.add("Sqrt", self._plus(self.add("Mul", x, x), 4))), 0.5)
            case "sparse_plus":
                near = self._clip(self._plus(x, 1), 0, 2)
                square = self._scaled(self.add("Mul", near, near), 0.25)
                return self.add("Where", self._above(x, 1), x, square)
            case "sparse_sigmoid":
                return self._clip(self._scaled(self._plus(x, 1), 0.5), 0, 1)
            case "sparsemax":
                return self._sparsemax(x)
            case _:
                raise ModelError(f"the activation {name!r} has no form in ONNX; it needs engine: numpy")

    def _sparsemax(self, x: str) -> str:
        last = self.constant(np.array(-1))
        size = self.add("Shape", x, start=-1)
        falling, _ = self.add_node("TopK", [x, size], [self.name(), self.name()], axis=-1)
        sums = self.add("CumSum", falling, last)
        ranks = self.add("CumSum", self._plus(self._scaled(falling, 0), 1), last)
        gap = self.add("Sub", falling, self.add("Div", self._plus(sums, -1), ranks))
        support = self.cast(self._above(gap, 0), self.wide)
        axis = self.ints(-1)
        total = self.add("ReduceSum", self.add("Mul", support, sums), axis, keepdims=1)
        size = self.add("ReduceSum", support, axis, keepdims=1)
        return self.add("Relu", self.add("Sub", x, self.add("Div", self._plus(total, -1), size)))

    def _above(self, x: str, bound: float) -> str:
        return self.add("Greater", x, self.number(bound))

    def _elu(self, x: str, alpha: float) -> str:
        power = self.add("Exp", self.add("Min", x, self.number(0)))
        return self.add("Add", self.add("Relu", x), self._scaled(self._plus(power, -1), alpha))

    def _scaled(self, x: str, factor: float) -> str:
        return self.add("Mul", x, self.number(factor))

    def _plus(self, x: str, term: float) -> str:
        return self.add("Add", x, self.number(term))

    def _clip(self, x: str, low: float, high: float) -> str:
        return self.add("Clip", x, self.number(low), self.number(high))

    def info(self, name: str, axes: Sequence[str | int] | None = None, dtype: DTypeLike | None = None) -> Any:
        """A graph's input or output: its type and, unless None, its axes."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype if dtype is None else dtype))
        return helper.make_tensor_value_info(name, element, axes)

    def graph(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """The GraphProto."""
        return helper.make_graph(self._nodes, name, inputs, outputs, self._initializers)
