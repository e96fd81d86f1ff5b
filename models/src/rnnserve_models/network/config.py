"""Configs of layers as Keras 2 and Keras 3 write them, read one key at a time.

A config is ``{"class_name": ..., "config": {...}}``. Keras 3 adds ``module``, ``registered_name`` and
``build_config``, writes dtype policies as dicts, and names other activations by ``hard_sigmoid`` than Keras 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rnnserve_models.activations import activation
from rnnserve_models.errors import ModelError

# What a config says about how a layer is trained, built or drawn, and nothing about what it computes.
_IGNORED = frozenset(
    f"{part}_{rule}"
    for part in ("kernel", "recurrent", "bias", "activity", "embeddings", "gamma", "beta", "moving_mean")
    for rule in ("initializer", "regularizer", "constraint")
) | {
    *("moving_variance_initializer", "name", "dtype", "trainable", "seed", "dropout", "recurrent_dropout"),
    *("dropout_seed", "implementation", "unit_forget_bias", "lora_rank", "lora_alpha", "quantization_config"),
    *("build_config", "build_input_shape", "batch_input_shape", "batch_shape", "input_shape", "input_length", "shape"),
    *("sparse", "ragged", "optional", "autocast", "reverse_state_order", "use_cudnn", "noise_shape", "dynamic"),
}

_POLICIES = {name: np.dtype(name) for name in ("float16", "float32", "float64")} | {
    "mixed_float16": np.dtype("float16"),
    "float": np.dtype("float32"),
    "half": np.dtype("float16"),
    "double": np.dtype("float64"),
}
_PARAMETRIC = {"ReLU": "relu", "LeakyReLU": "leaky_relu", "ELU": "elu"}


class Config:
    """A layer's config, whose keys are taken one by one; `done` refuses those that nobody took."""

    def __init__(self, document: Any, version: int, where: str = "config") -> None:
        """Opens ``{"class_name": ..., "config": {...}}``.

        Args:
            document: the config.
            version: of Keras, 2 or 3.
            where: what to call it in messages, until it is known to have a name.

        Raises:
            ModelError: it is not such a mapping.
        """
        if not isinstance(document, Mapping) or not isinstance(document.get("class_name"), str):
            raise ModelError(f"{where}: expected {{'class_name': ..., 'config': {{...}}}}, got {_short(document)}")
        inner = document.get("config")
        if document["class_name"] == "Sequential" and isinstance(inner, list):  # as the first releases wrote it
            inner = {"layers": inner}
        if not isinstance(inner, Mapping):
            raise ModelError(f"{where}: {document['class_name']}: config must be a mapping, got {_short(inner)}")
        self.class_name: str = document["class_name"].rpartition(">")[2]
        self.values: dict[str, Any] = dict(inner)
        self.version = version
        self.name = str(inner.get("name") or document.get("name") or self.class_name.lower())
        self._taken: set[str] = set()
        self.dtype = self._dtype()

    def error(self, message: str) -> ModelError:
        """What is wrong, by the layer's name."""
        return ModelError(f"{self.class_name} {self.name!r}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """Any value."""
        self._taken.add(key)
        return self.values.get(key, default)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key}: expected true or false, got {_short(value)}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list of one will do, as Keras writes for the axes of a convolution."""
        value = self.get(key, default)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
            value = value[0]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{key}: expected a positive integer, got {_short(value)}")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key}: expected a number, got {_short(value)}")
        return float(value)

    def choice(self, key: str, choices: Sequence[Any], default: Any) -> Any:
        """One of some values."""
        value = self.get(key, default)
        if value not in choices:
            raise self.error(f"{key}: expected one of {list(choices)}, got {_short(value)}")
        return value

    def activation(self, key: str, default: str | None) -> str | None:
        """An activation by a name that `rnnserve_models.activation` knows."""
        try:
            name = activation_name(self.get(key, default), self.version)
            activation(name)
        except ModelError as error:
            raise self.error(f"{key}: {error}") from error
        return name

    def child(self, key: str) -> Config:
        """The config of a layer or cell inside this one, which takes this one's dtype if it has none."""
        value = self.get(key)
        if isinstance(value, Mapping) and isinstance(value.get("config"), Mapping) and "dtype" in self.values:
            value = {**value, "config": {"dtype": self.values["dtype"], **value["config"]}}
        return Config(value, self.version, f"{self.class_name} {self.name!r}: {key}")

    def done(self) -> None:
        """Refuses keys that nobody took and that mean something, or may.

        Raises:
            ModelError: there are such.
        """
        if unknown := sorted(set(self.values) - self._taken - _IGNORED):
            raise self.error(f"unknown keys {unknown}; the keys are {sorted(self._taken)}")

    def _dtype(self) -> np.dtype[Any]:
        policy = self.values.get("dtype")
        if isinstance(policy, Mapping):
            inner = policy.get("config")
            policy = inner.get("name", "float32") if isinstance(inner, Mapping) else policy.get("name")
        if policy is None:
            return np.dtype(np.float32)
        if isinstance(policy, np.dtype):
            policy = policy.name
        if not isinstance(policy, str) or policy not in _POLICIES:
            if self.class_name == "InputLayer":  # whose dtype is of its input, and may be anything
                return np.dtype(np.float32)
            raise self.error(f"dtype: expected one of {list(_POLICIES)}, got {_short(policy)}")
        return _POLICIES[policy]


def activation_name(value: Any, version: int) -> str | None:
    """The name of an activation, of a config of Keras of that version: a name, a serialized function or a layer.

    ``hard_sigmoid`` is another function in Keras 2: `hard_sigmoid_keras2`. A layer with parameters becomes such a name
    as ``leaky_relu(0.3)``.

    Raises:
        ModelError: it is none of these.
    """
    if isinstance(value, Mapping):
        name, inner = value.get("class_name"), value.get("config")
        if isinstance(inner, Mapping) and name in (*_PARAMETRIC, "Softmax", "Activation"):
            return _layer_activation(Config(value, version))
        value = inner if isinstance(inner, str) else name
    if value is None:
        return None
    if not isinstance(value, str):
        raise ModelError(f"expected the name of an activation, got {_short(value)}")
    value = value.rpartition(">")[2]
    return "hard_sigmoid_keras2" if value == "hard_sigmoid" and version == 2 else value


def parametric_activation(config: Config) -> str:
    """The activation that a ReLU, LeakyReLU or ELU layer is, as a name with parameters: ``relu(0.1, 6, 0)``."""
    if config.class_name == "ELU":
        return f"elu({config.number('alpha', 1.0)!r})"
    if config.class_name == "LeakyReLU":
        slope = config.number("alpha", 0.3) if "alpha" in config.values else config.number("negative_slope", 0.3)
        return f"leaky_relu({slope!r})"
    ceiling = config.get("max_value")
    most = float("inf") if ceiling is None else config.number("max_value", 0)
    slope, threshold = config.get("negative_slope") or 0.0, config.get("threshold") or 0.0
    if isinstance(slope, list | tuple):  # Keras 2 writes arrays
        slope = slope[0]
    return f"relu({float(slope)!r}, {most!r}, {float(threshold)!r})"


def guess_version(document: Any) -> int:
    """2 or 3: which Keras wrote a config, by the keys that only one of them writes; 3 where none tells."""
    waiting = [document]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Mapping):
            keras_version = value.get("keras_version")
            if isinstance(keras_version, str) and keras_version[:1] in "23":
                return int(keras_version[0])
            if isinstance(value.get("dtype"), Mapping) and value["dtype"].get("class_name") == "DTypePolicy":
                return 3
            if "time_major" in value or "batch_input_shape" in value or value.get("implementation") is not None:
                return 2
            if "batch_shape" in value or "zero_output_for_mask" in value or "quantization_config" in value:
                return 3
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return 3


def _layer_activation(config: Config) -> str | None:
    if config.class_name == "Activation":
        return activation_name(config.get("activation"), config.version)
    if config.class_name == "Softmax":
        if config.get("axis", -1) not in (-1, [-1]):
            raise ModelError("a Softmax as an activation must be over the last axis")
        return "softmax"
    return parametric_activation(config)


def _short(value: Any) -> str:
    return f"{value!r:.80}"
