"""Activations: Keras's definitions, stable and of the same dtype."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rnnserve_models import ModelError, activation
from rnnserve_models.activations import ACTIVATION_NAMES, onnx_activation

SCALAR = {
    "linear": lambda x: x,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: min(max(x, 0), 6),
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (math.exp(x) - 1)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "softsign": lambda x: x / (1 + abs(x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log(1 + math.exp(x))),
    "exponential": math.exp,
    "leaky_relu": lambda x: x if x > 0 else 0.2 * x,
    "hard_sigmoid": lambda x: min(max(x + 3, 0), 6) / 6,
    "hard_sigmoid_keras2": lambda x: min(max(0.2 * x + 0.5, 0), 1),
    "hard_silu": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "hard_swish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "celu": lambda x: x if x > 0 else math.exp(x) - 1,
    "log_sigmoid": lambda x: -math.log(1 + math.exp(-x)),
    "hard_tanh": lambda x: min(max(x, -1), 1),
    "tanh_shrink": lambda x: x - math.tanh(x),
    "soft_shrink": lambda x: math.copysign(max(abs(x) - 0.5, 0), x),
    "hard_shrink": lambda x: x if abs(x) > 0.5 else 0,
    "squareplus": lambda x: (x + math.sqrt(x * x + 4)) / 2,
    "sparse_plus": lambda x: 0 if x <= -1 else (x + 1) ** 2 / 4 if x < 1 else x,
    "sparse_sigmoid": lambda x: min(max((x + 1) / 2, 0), 1),
    "elu(0.5)": lambda x: x if x > 0 else 0.5 * (math.exp(x) - 1),
    "leaky_relu(0.3)": lambda x: x if x > 0 else 0.3 * x,
    "relu(0.1, 4.0, 1.0)": lambda x: 4 if x >= 4 else x if x >= 1 else 0.1 * (x - 1),
}
ROWWISE = {"softmax", "log_softmax", "sparsemax"}


def test_every_activation_is_checked_here():
    """The scalar definitions below leave no activation out."""
    assert {name for name in SCALAR if "(" not in name} | ROWWISE == set(ACTIVATION_NAMES)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", SCALAR)
def test_definition(name, dtype):
    """Each function is its textbook definition, an element at a time, in the dtype that it was given."""
    x = np.linspace(-8, 8, 321).astype(dtype).reshape(3, 107)
    y = activation(name)(x)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    expected = np.vectorize(SCALAR[name], otypes=[np.float64])(x.astype(np.float64))
    # Some subtract nearly equal numbers (elu near 0): the error is relative to 1 there.
    np.testing.assert_allclose(y, expected, rtol=8 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_extremes(name, dtype):
    """The largest numbers of either sign give no NaN and no warning, and infinity only where that is the answer."""
    largest = np.finfo(dtype).max
    y = activation(name)(np.array([[-largest, -1e4, -30, 0, 30, 1e4, largest / 2]], dtype))
    assert not np.isnan(y).any()
    assert name in ("exponential", "log_softmax") or np.isfinite(y[:, :-1]).all()


def test_softmax():
    """softmax is over the last axis and does not care for a common offset."""
    x = np.array([[1.0, 2.0, 4.0], [1000.0, 1000.0, 1000.0]])
    expected = np.exp([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(activation("softmax")(x), expected / expected.sum(-1, keepdims=True), rtol=1e-14)


def test_none_is_linear():
    """Keras's None changes nothing, here and in ONNX."""
    x = np.array([-1.0, 2.0])
    assert activation(None)(x) is x
    assert onnx_activation(None) == ("Affine", 1.0, 0.0)


@pytest.mark.parametrize("name", ["tahn", "", 3])
def test_unknown_name(name):
    """An unknown name is refused with the names that there are."""
    with pytest.raises(ModelError, match=r"unknown activation .*tanh, sigmoid"):
        activation(name)


def test_onnx_has_no_selu():
    """ONNX's recurrent operators have no form of these."""
    assert [onnx_activation(name) for name in ("selu", "gelu", "silu", "mish", "exponential", "softmax")] == [None] * 6
