"""Activation functions by their Keras names, and what they are called in ONNX.

Every function takes a float16, float32 or float64 array of any shape and returns one of the same shape and dtype.
Definitions are those of ``keras.activations``; none overflows on the way to a finite result.
"""

from __future__ import annotations

import math
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
}

ACTIVATION_NAMES = tuple(_ACTIVATIONS)
"""The names that `activation` knows."""


def activation(name: str | None) -> Activation:
    """The function of that Keras name; None is ``linear``.

    ``gelu`` is the exact one, by erf. ``softmax`` is over the last axis. ``hard_sigmoid`` is Keras 3's,
    relu6(x + 3) / 6; ``hard_sigmoid_keras2`` is Keras 2's, clip(0.2 x + 0.5, 0, 1).

    Raises:
        ModelError: there is no such function; the message lists those there are.
    """
    if name is None:
        return _linear
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelError(f"unknown activation {name!r}; the activations are {', '.join(ACTIVATION_NAMES)}")
    return _ACTIVATIONS[name]


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


def onnx_activation(name: str | None) -> OnnxActivation | None:
    """What the recurrent operators of ONNX call it (onnxruntime has them all), or None where they have no such."""
    return _ONNX_ACTIVATIONS.get("linear" if name is None else name)
