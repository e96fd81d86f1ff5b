"""Activation functions by their Keras names, and what they are called in ONNX.

Every function takes a float16, float32 or float64 array of any shape and returns one of the same shape and dtype.
Definitions are those of ``keras.activations``; none overflows on the way to a finite result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rnnserve_models.errors import ModelError

Activation = Callable[[np.ndarray], np.ndarray]

LEAKY_RELU_SLOPE = 0.2
"""Keras's ``negative_slope``; ONNX's default, 0.01, is another."""

SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805

# The functions are typed as NumPy's own are, which give Any.

# The C library's erf, an element at a time: accurate to the last bit or so of float64, and needs no SciPy.
_erf = np.frompyfunc(math.erf, 1, 1)


def _linear(x: np.ndarray) -> Any:
    return x


def _sigmoid(x: np.ndarray) -> Any:
    decay = np.exp(-np.abs(x))  # never more than 1
    return np.where(x >= 0, 1, decay) / (1 + decay)


def _relu(x: np.ndarray) -> Any:
    return np.maximum(x, 0)


def _relu6(x: np.ndarray) -> Any:
    return np.clip(x, 0, 6)


def _elu(x: np.ndarray) -> Any:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def _selu(x: np.ndarray) -> Any:
    return SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0)))


def _gelu(x: np.ndarray) -> Any:
    return 0.5 * x * (1 + np.asarray(_erf(x / math.sqrt(2)), x.dtype))


def _softplus(x: np.ndarray) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _softsign(x: np.ndarray) -> Any:
    return x / (1 + np.abs(x))


def _silu(x: np.ndarray) -> Any:
    return x * _sigmoid(x)


def _mish(x: np.ndarray) -> Any:
    return x * np.tanh(_softplus(x))


def _exponential(x: np.ndarray) -> Any:
    with np.errstate(over="ignore"):  # infinity is the answer, not an accident
        return np.exp(x)


def _softmax(x: np.ndarray) -> Any:
    with np.errstate(over="ignore"):  # a difference too large for the dtype is a power of 0 all the same
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _leaky_relu(x: np.ndarray) -> Any:
    return np.where(x > 0, x, LEAKY_RELU_SLOPE * x)


def _hard_sigmoid(x: np.ndarray) -> Any:
    return _relu6(x + 3) / 6


def _hard_sigmoid_keras2(x: np.ndarray) -> Any:
    return np.clip(0.2 * x + 0.5, 0, 1)


def _hard_silu(x: np.ndarray) -> Any:
    return x * _hard_sigmoid(x)


def _celu(x: np.ndarray, alpha: float = 1.0) -> Any:
    return np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / alpha)


def _log_sigmoid(x: np.ndarray) -> Any:
    return -_softplus(-x)


def _log_softmax(x: np.ndarray) -> Any:
    with np.errstate(over="ignore"):  # as above
        below = x - x.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def _hard_tanh(x: np.ndarray) -> Any:
    return np.clip(x, -1, 1)


def _tanh_shrink(x: np.ndarray) -> Any:
    return x - np.tanh(x)


def _soft_shrink(x: np.ndarray) -> Any:
    return np.maximum(x - 0.5, 0) + np.minimum(x + 0.5, 0)


def _hard_shrink(x: np.ndarray) -> Any:
    return np.where(np.abs(x) > 0.5, x, 0)


def _squareplus(x: np.ndarray) -> Any:
    return x / 2 + np.hypot(x, 2) / 2


def _sparse_plus(x: np.ndarray) -> Any:
    return np.where(x <= -1, 0, np.where(x < 1, (np.clip(x, -1, 1) + 1) ** 2 / 4, x))


def _sparse_sigmoid(x: np.ndarray) -> Any:
    return np.clip((x + 1) / 2, 0, 1)


def _sparsemax(x: np.ndarray) -> Any:
    falling = -np.sort(-x, axis=-1)
    sums, ranks = np.cumsum(falling, axis=-1), np.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    support = falling - (sums - 1) / ranks > 0
    # Keras adds up all the partial sums of the support, where the paper takes the last of them; so its
    # result does not add up to 1; but it is what trained models were trained with.
    total = np.where(support, sums, 0).sum(axis=-1, keepdims=True)
    size = np.maximum(support.sum(axis=-1, keepdims=True), 1)
    return np.maximum(x - (total - 1) / size.astype(x.dtype), 0)


def _scaled_elu(x: np.ndarray, alpha: float) -> Any:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _sloped_relu(x: np.ndarray, slope: float) -> Any:
    return np.where(x > 0, x, slope * x)


def _general_relu(x: np.ndarray, slope: float, most: float, threshold: float) -> Any:
    return np.where(x >= threshold, np.minimum(x, most), slope * (x - threshold))


_ACTIVATIONS: dict[str, Activation] = {
    "linear": _linear,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "relu6": _relu6,
    "elu": _elu,
    "selu": _selu,
    "gelu": _gelu,
    "softplus": _softplus,
    "softsign": _softsign,
    "silu": _silu,
    "swish": _silu,
    "mish": _mish,
    "exponential": _exponential,
    "softmax": _softmax,
    "leaky_relu": _leaky_relu,
    "hard_sigmoid": _hard_sigmoid,
    "hard_sigmoid_keras2": _hard_sigmoid_keras2,
    "hard_silu": _hard_silu,
    "hard_swish": _hard_silu,
    "celu": _celu,
    "log_sigmoid": _log_sigmoid,
    "log_softmax": _log_softmax,
    "hard_tanh": _hard_tanh,
    "tanh_shrink": _tanh_shrink,
    "soft_shrink": _soft_shrink,
    "hard_shrink": _hard_shrink,
    "squareplus": _squareplus,
    "sparse_plus": _sparse_plus,
    "sparse_sigmoid": _sparse_sigmoid,
    "sparsemax": _sparsemax,
}

_PARAMETRIC: dict[str, tuple[Callable[..., Any], int]] = {
    "elu": (_scaled_elu, 1),
    "leaky_relu": (_sloped_relu, 1),
    "relu": (_general_relu, 3),
}

ACTIVATION_NAMES = tuple(_ACTIVATIONS)
"""The names that `activation` knows."""


def activation(name: str | None) -> Activation:
    """The function of that Keras name; None is ``linear``.

    ``gelu`` is the exact one, by erf. ``softmax`` is over the last axis. ``hard_sigmoid`` is Keras 3's,
    relu6(x + 3) / 6; ``hard_sigmoid_keras2`` is Keras 2's, clip(0.2 x + 0.5, 0, 1).

    Three take parameters, as Keras's layers of that name do: ``elu(alpha)``, ``leaky_relu(negative_slope)`` and
    ``relu(negative_slope, max_value, threshold)``.

    Raises:
        ModelError: there is no such function; the message lists those there are.
    """
    if name is None:
        return _linear
    if isinstance(name, str) and name not in _ACTIVATIONS:
        base, numbers = parameters(name)
        if numbers and _PARAMETRIC.get(base, (None, 0))[1] == len(numbers):
            function = _PARAMETRIC[base][0]
            return lambda x: np.asarray(function(x, *numbers), x.dtype)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelError(f"unknown activation {name!r}; the activations are {', '.join(ACTIVATION_NAMES)}")
    return _ACTIVATIONS[name]


def parameters(name: str) -> tuple[str, tuple[float, ...]]:
    """An activation's name without its parameters, and these: ("elu", (0.5,)) of ``elu(0.5)``."""
    match = re.fullmatch(r"(\w+)\(([^()]*)\)", name)
    if match is None:
        return name, ()
    try:
        return match[1], tuple(float(number) for number in match[2].split(","))
    except ValueError:
        return name, ()


class OnnxActivation(NamedTuple):
    """An activation of ONNX's LSTM, GRU and RNN operators; ``alpha`` and ``beta`` are None where it takes none."""

    name: str
    alpha: float | None = None
    beta: float | None = None


_ONNX_ACTIVATIONS = {
    "linear": OnnxActivation("Affine", 1.0, 0.0),
    "tanh": OnnxActivation("Tanh"),
    "sigmoid": OnnxActivation("Sigmoid"),
    "relu": OnnxActivation("Relu"),
    "elu": OnnxActivation("Elu", 1.0),
    "softplus": OnnxActivation("Softplus"),
    "softsign": OnnxActivation("Softsign"),
    "leaky_relu": OnnxActivation("LeakyRelu", LEAKY_RELU_SLOPE),
    "hard_sigmoid": OnnxActivation("HardSigmoid", 1 / 6, 0.5),
    "hard_sigmoid_keras2": OnnxActivation("HardSigmoid", 0.2, 0.5),
}

_ONNX_PARAMETRIC = {"elu": "Elu", "leaky_relu": "LeakyRelu"}


def onnx_activation(name: str | None) -> OnnxActivation | None:
    """What the recurrent operators of ONNX call it (onnxruntime has them all), or None where they have no such."""
    if name is not None and name not in _ACTIVATIONS:
        base, numbers = parameters(name)
        return OnnxActivation(_ONNX_PARAMETRIC[base], *numbers) if base in _ONNX_PARAMETRIC else None
    return _ONNX_ACTIVATIONS.get("linear" if name is None else name)
