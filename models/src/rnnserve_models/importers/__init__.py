"""Model files made elsewhere, read without the frameworks that made them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rnnserve_models.network import LocalLayer


def model_from_file(path: Path | str, engine: Literal["auto", "numpy", "onnx"] = "auto") -> LocalLayer:
    """The whole model in a ``.keras`` or ``.h5`` file of Keras 2 or 3, to call in this process.

    Args:
        path: the file, whose weights are read at once.
        engine: "auto" prefers onnx.

    Returns:
        What `rnnserve_models.layer_from_config` gives for the file's config and weights.

    Raises:
        ModelError: it is no such file, or holds what cannot be computed; the message names the layer.
    """
    from rnnserve_models.importers.keras_file import read_keras_file  # HDF5 takes a while to import
    from rnnserve_models.network import layer_from_config

    found = read_keras_file(path)
    return layer_from_config(found.config, found.weights, engine, found.keras_version)
