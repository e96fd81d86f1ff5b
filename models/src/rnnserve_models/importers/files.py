"""From a file made elsewhere to a model directory that serves as it is."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save

from rnnserve_models.cells import StackedRNNCells
from rnnserve_models.errors import ModelError, reading
from rnnserve_models.importers.apart import write_apart
from rnnserve_models.importers.onnx.stateful import WHOLE_CALLS_REFUSE, import_onnx
from rnnserve_models.importers.torch_state import Nonlinearity, read_torch_state
from rnnserve_models.load import LoadedModel, load_model
from rnnserve_models.network.files import save_network
from rnnserve_models.spec import OPTION_NAMES
from rnnserve_models.weights import save_weights

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")

KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
SUFFIXES = (".onnx", ".safetensors", *KERAS_SUFFIXES)
"""Of the files that `import_file` takes."""


def import_file(
    path: Path,
    models: Path,
    name: str,
    *,
    version: str = "1",
    prefix: str | None = None,
    nonlinearity: Nonlinearity = "tanh",
    apart: bool = False,
) -> list[str]:
    """Makes ``<models>/<name>/<version>/`` of a file.

    The directory appears at once and whole, after what is in it was loaded as the server would load it; if anything is
    wrong, there is no trace of it.

    Args:
        path: an ONNX graph, a safetensors state dict of PyTorch's, or a file of Keras's, by its suffix.
        models: the folder of models.
        name: of the new model.
        version: of the new model.
        prefix: of the tensors to take from a state dict; see `read_torch_state`.
        nonlinearity: of an nn.RNN, which a state dict does not say.
        apart: read and try it in a process of its own, with bounds on time and memory.

    Returns:
        What was found and measured, line by line.

    Raises:
        ModelError: the file cannot be made a served model, or the version exists; the message says why.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    write = partial(write_apart if apart else write_model, path, prefix=prefix, nonlinearity=nonlinearity)
    return place_model(models, name, version, write)[1]


def place_model(
    models: Path,
    name: str,
    version: str,
    write: Callable[[Path], list[str]],
    load: Callable[[Path], LoadedModel] | None = None,
) -> tuple[LoadedModel, list[str]]:
    """Makes ``<models>/<name>/<version>/``, which appears at once and whole, after it was loaded; or leaves no trace.

    Args:
        models: the folder of models.
        name: of the model.
        version: of the model.
        write: writes ``model.yaml`` and its files into the empty directory that it is given; says what it found.
        load: loads the directory; `load_model` unless told.

    Returns:
        The model as it was loaded, and what ``write`` said.

    Raises:
        ModelError: the name, the version or what was written will not do, or the version exists.
        OSError: the folder cannot be written to.
    """
    for label, value in (("name", name), ("version", version)):
        if not _NAME.match(value):
            raise ModelError(
                f"{label} {value!r}: expected letters, digits, '.', '_' and '-', beginning with a letter or digit"
            )
    target = models / name / version
    if target.exists():
        raise ModelError(f"{target}: the version exists; choose another, or remove it")
    made_name = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the models, because a rename is atomic only within a file system; the name is not one that a server looks
    # into, for */*/model.yaml does not match it.
    scratch = Path(tempfile.mkdtemp(prefix=".import-", dir=models))
    try:
        draft = scratch / name / version
        draft.mkdir(parents=True)
        try:
            with reading("it"):
                findings = write(draft)
                loaded = (load or load_model)(draft)
        except ModelError as error:  # the scratch directory is nobody's business
            raise ModelError(str(error).replace(f"{draft}{os.sep}", "")) from error
        try:
            os.rename(draft, target)
        except OSError as error:
            raise ModelError(f"{target}: cannot be put in place: {error}") from error
    except BaseException:
        if made_name and target.parent.is_dir() and not any(target.parent.iterdir()):
            target.parent.rmdir()
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return loaded, findings


def write_model(
    path: Path, target: Path, *, prefix: str | None = None, nonlinearity: Nonlinearity = "tanh"
) -> list[str]:
    """Writes ``model.yaml`` and its files, made of a file, into an empty directory. See `import_file`.

    Raises:
        ModelError: the file cannot be made a served model; the message says why.
    """
    match path.suffix.lower():
        case ".onnx":
            return _import_onnx(path, target)
        case ".safetensors":
            return _import_torch(path, target, prefix, nonlinearity)
        case suffix if suffix in KERAS_SUFFIXES:
            return _import_keras(path, target)
        case suffix:
            raise ModelError(f"{path}: expected a file {', '.join(SUFFIXES)}, got {suffix or 'one without a suffix'!r}")


def write_layer(
    config: Mapping[str, Any], weights: Sequence[np.ndarray], keras_version: int | None, target: Path
) -> list[str]:
    """Writes ``model.yaml`` and its files, made of a layer's config and weights, into an empty directory.

    Args:
        config: ``{"class_name": ..., "config": {...}}``, as Keras serializes a layer or a model.
        weights: in the order of Keras's ``get_weights()``.
        keras_version: 2 or 3; None to tell from the config.
        target: the directory.

    Returns:
        What was found, for a person.
    """
    if keras_version is not None:
        config = {"keras_version": str(keras_version), **config}
    save_network(target, config, weights)
    kind = str(config.get("class_name"))
    _write(
        target,
        {
            "description": f"A {kind}, deployed by a client.",
            "network": "network.json",
            "weights": "weights.safetensors",
        },
    )
    return [f"{kind}: {len(weights)} weights of {sum(weight.size for weight in weights)} numbers"]


def _import_onnx(path: Path, target: Path) -> list[str]:
    imported = import_onnx(path.read_bytes(), origin=str(path))
    (target / imported.spec.file).write_bytes(imported.graph)
    if imported.defaults and imported.spec.defaults:
        (target / imported.spec.defaults).write_bytes(save(dict(imported.defaults)))
    document: dict[str, Any] = {"description": f"Imported from {path.name}."}
    if imported.options:
        document["options"] = imported.options
    document["settable_options"] = list(imported.settable_options)
    if not imported.spec.sliceable:
        document["masking"] = False
    document["graph"] = imported.spec.model_dump(exclude_defaults=True, mode="json")
    _write(target, document)
    return list(imported.findings)


def _import_torch(path: Path, target: Path, prefix: str | None, nonlinearity: Nonlinearity) -> list[str]:
    module = read_torch_state(path, prefix=prefix, nonlinearity=nonlinearity)
    document: dict[str, Any] = {
        "description": f"Imported from {path.name}, PyTorch's nn.{module.kind}.",
        "options": {"return_sequences": True},
        "dtype": module.dtype.name,
    }
    if module.bidirectional:
        graph, spec = module.graph()
        (target / spec.file).write_bytes(graph)
        document["settable_options"] = [name for name in OPTION_NAMES if name not in WHOLE_CALLS_REFUSE]
        document["masking"] = False
        document["graph"] = spec.model_dump(exclude_defaults=True, mode="json")
    else:
        cell = module.cell()
        cells = cell.cells if isinstance(cell, StackedRNNCells) else (cell,)
        kept = ("units", "activation", "use_bias", "recurrent_activation", "reset_after")
        document["cell"] = [
            {
                "class_name": type(part).__name__,
                "config": {key: getattr(part, key) for key in kept if hasattr(part, key)},
            }
            for part in cells
        ]
        document["input_dim"] = module.features
        document["weights"] = "weights.safetensors"
        save_weights(target / "weights.safetensors", cell)
    _write(target, document)
    return module.findings()


def _import_keras(path: Path, target: Path) -> list[str]:
    from rnnserve_models.importers.keras_file import import_keras  # HDF5 takes a while to import

    return import_keras(path, target)


def _write(target: Path, document: dict[str, Any]) -> None:
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    (target / "model.yaml").write_text(text, encoding="utf-8")
