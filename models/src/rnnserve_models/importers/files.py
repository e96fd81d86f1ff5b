"""From a file made elsewhere to a model directory that serves as it is."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import save

from rnnserve_models.cells import StackedRNNCells
from rnnserve_models.errors import ModelError
from rnnserve_models.importers.onnx.stateful import WHOLE_CALLS_REFUSE, import_onnx
from rnnserve_models.importers.torch_state import Nonlinearity, read_torch_state
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

    Returns:
        What was found and measured, line by line.

    Raises:
        ModelError: the file cannot be made a served model, or the version exists; the message says why.
    """
    for label, value in (("name", name), ("version", version)):
        if not _NAME.match(value):
            raise ModelError(
                f"{label} {value!r}: expected letters, digits, '.', '_' and '-', beginning with a letter or digit"
            )
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ModelError(f"{path}: expected a file {', '.join(SUFFIXES)}, got {suffix or 'one without a suffix'!r}")
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    target = models / name / version
    if target.exists():
        raise ModelError(f"{target}: the version exists; choose another with --version, or remove it")
    made_name = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the models, under a name that no server looks into: */*/model.yaml does not match it.
    scratch = Path(tempfile.mkdtemp(prefix=".import-", dir=models))
    try:
        draft = scratch / name / version
        draft.mkdir(parents=True)
        if suffix == ".onnx":
            findings = _import_onnx(path, draft)
        elif suffix == ".safetensors":
            findings = _import_torch(path, draft, prefix, nonlinearity)
        else:
            findings = _import_keras(path, draft)
        from rnnserve_models.load import load_model

        load_model(draft)
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
    return findings


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
