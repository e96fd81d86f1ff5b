"""Model files made elsewhere, read without the frameworks that made them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rnnserve_models.network import LocalLayer
    from rnnserve_models.twin import LocalModel


def model_from_file(
    path: Path | str, engine: Literal["auto", "numpy", "onnx"] = "auto", **options: bool
) -> LocalLayer | LocalModel:
    """The model in a file, or in a model directory, to call in this process.

    Args:
        path: a ``.keras`` or ``.h5`` file of Keras 2 or 3, an ``.onnx`` export, a ``.safetensors`` state dict of
            PyTorch, or a directory with a ``model.yaml``. It is read at once.
        engine: "auto" prefers onnx; a graph runs under onnx always.
        options: options of the layer, such as ``stateful``, instead of those that the model has.

    Returns:
        For a file of Keras, without options, what `rnnserve_models.layer_from_config` gives; else a `LocalModel`.

    Raises:
        ModelError: it is no such file, or holds what cannot be computed; the message names the layer or the tensor.
        InputError: the model cannot honour an option.
    """
    # These take a while to import.
    from rnnserve_models.importers.files import KERAS_SUFFIXES, write_model
    from rnnserve_models.load import load_model
    from rnnserve_models.twin import LocalModel

    path = Path(path)
    choice = None if engine == "auto" else engine
    if path.is_dir():
        return LocalModel(load_model(path.resolve(), engine=choice), **options)
    if path.suffix.lower() in KERAS_SUFFIXES and not options:
        from rnnserve_models.importers.keras_file import read_keras_file
        from rnnserve_models.network import layer_from_config

        found = read_keras_file(path)
        return layer_from_config(found.config, found.weights, engine, found.keras_version)
    with tempfile.TemporaryDirectory(prefix="rnnserve-") as scratch:
        directory = Path(scratch) / (path.stem or "model") / "1"
        directory.mkdir(parents=True)
        write_model(path, directory)
        return LocalModel(load_model(directory, engine=choice), **options)
