"""Networks in model directories: ``network.json``, the config, and ``weights.safetensors``.

The config is ``{"class_name": ..., "config": {...}}`` as Keras writes it; a ``keras_version`` beside these, such as
"2.15.0", says which Keras it was. The weights are named ``0``, ``1``, ... in the order of Keras's ``get_weights()``,
all with as many digits as the last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import save

from rnnserve_models.engine.base import Engine
from rnnserve_models.engine.network import NetworkEngine
from rnnserve_models.errors import ModelError
from rnnserve_models.network.build import Source
from rnnserve_models.spec import ModelSpec
from rnnserve_models.weights import load_tensors

SETTABLE = ("stateful", "unroll", "return_state", "time_major")
"""The options that a client may set; the others are the layers' own."""


def save_network(directory: Path, config: Mapping[str, Any], weights: Sequence[ArrayLike]) -> None:
    """Writes ``network.json`` and ``weights.safetensors``."""
    document = json.dumps(config, indent=1, default=_plain)
    (directory / "network.json").write_text(document + "\n", encoding="utf-8")
    width = len(str(max(len(weights) - 1, 0)))
    tensors = {f"{i:0{width}}": np.ascontiguousarray(weight) for i, weight in enumerate(weights)}
    (directory / "weights.safetensors").write_bytes(save(tensors))


def load_network(directory: Path, spec: ModelSpec) -> Source:
    """Reads them.

    Raises:
        ModelError: a file cannot be read or is not what it should be; the message names the file and the layer.
    """
    assert spec.network is not None  # the spec was validated
    assert spec.weights is not None
    path, weights_path = directory / spec.network, directory / spec.weights
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    tensors = load_tensors(weights_path)
    if not all(name.isdecimal() and name.isascii() for name in tensors):
        raise ModelError(f"{weights_path}: expected tensors named 0, 1, ..., got {sorted(tensors)[:5]}")
    numbered = {int(name): tensor for name, tensor in tensors.items()}
    if sorted(numbered) != list(range(len(tensors))):
        raise ModelError(f"{weights_path}: expected tensors named 0 to {len(tensors) - 1}, got {sorted(tensors)[:5]}")
    try:
        return Source(config, [numbered[index] for index in range(len(numbered))])
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def load_engine(directory: Path, spec: ModelSpec, choice: str, *, threads: int = 1) -> NetworkEngine:
    """The engine of a network.

    Raises:
        ModelError: see `load_network` and `NetworkEngine`.
    """
    source = load_network(directory, spec)
    try:
        return NetworkEngine(source, engine=choice, threads=threads, finite=spec.finite)
    except ModelError as error:
        raise ModelError(f"{directory / str(spec.network)}: {error}") from error


def with_options(spec: ModelSpec, engine: Engine) -> ModelSpec:
    """The description with the options that the network's config fixes."""
    assert isinstance(engine, NetworkEngine)
    options = {"time_major": engine.time_major, **spec.options, "return_sequences": engine.return_sequences}
    settable = tuple(name for name in spec.settable_options if name in SETTABLE)
    return spec.model_copy(update={"options": options, "settable_options": settable})


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a config cannot hold a {type(value).__name__}")
