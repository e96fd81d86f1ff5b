"""Keras's own files, ``.keras`` and ``.h5``, of Keras 2 and 3, read without Keras or TensorFlow.

A ``.keras`` file is a zip of ``metadata.json``, ``config.json`` and ``model.weights.h5``, in which a layer's weights
are found by its place and class: ``layers/lstm_1/cell/vars/0``. An ``.h5`` file has the config in the attribute
``model_config`` and a layer's weights in ``model_weights/<layer>``, in the order of the attribute ``weight_names``.

Nothing in a file is run, and none is believed: sizes are checked before anything is read, links and storage outside of
the file are refused, and what a layer of the config should have is compared with what the file holds.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import yaml

from rnnserve_models.errors import InputError, ModelError
from rnnserve_models.importers.hdf5 import MAX_BYTES, MAX_RATIO, Hdf5, Hdf5Error, read_hdf5
from rnnserve_models.network import LocalLayer, Network, Source, layer_from_config
from rnnserve_models.network.config import guess_version
from rnnserve_models.network.files import save_network
from rnnserve_models.network.layer import Info, Layer, told

SUFFIXES = (".keras", ".h5", ".hdf5")
"""Of the files that `read_keras_file` reads."""

MAX_CONFIG_BYTES = 32 << 20
MAX_DEPTH = 24
"""Of layers in layers."""

_SLACK = 1 << 20

_RECURRENT = frozenset({"SimpleRNN", "LSTM", "GRU"})
_CELLS = frozenset({"SimpleRNNCell", "LSTMCell", "GRUCell"})
_MODELS = frozenset({"Sequential", "Functional", "Model"})
_KERNELS = frozenset({"Dense", "Conv1D"})
_NORMALIZATIONS = frozenset({"LayerNormalization", "BatchNormalization"})
_WEIGHTLESS = frozenset(
    {
        *("InputLayer", "Masking", "Activation", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"),
        *("AlphaDropout", "GaussianDropout", "GaussianNoise", "ActivityRegularization", "Identity", "Flatten"),
        *("Reshape", "RepeatVector", "Permute", "GlobalAveragePooling1D", "GlobalMaxPooling1D", "MaxPooling1D"),
        *("AveragePooling1D", "ZeroPadding1D", "Cropping1D", "UpSampling1D", "ReLU", "LeakyReLU", "ELU", "Softmax"),
        *("Concatenate", "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Dot", "UnitNormalization"),
        *("Rescaling", "GlobalAvgPool1D", "GlobalMaxPool1D"),
    }
)


class KerasFile(NamedTuple):
    """What is in a file of Keras.

    Attributes:
        config: ``{"class_name": ..., "config": {...}}`` of the whole model, as that Keras wrote it.
        weights: in the order of the model's ``get_weights()``, in the dtypes of the file.
        keras_version: 2 or 3.
        notes: what was found and left aside, each a sentence for a person.
    """

    config: dict[str, Any]
    weights: list[np.ndarray]
    keras_version: int
    notes: list[str]


def read_keras_file(path: Path | str) -> KerasFile:
    """Reads a ``.keras`` or ``.h5`` file; its content decides which of them it is, not its name.

    Raises:
        ModelError: it is no such file, is damaged or too large, has no config (weights alone are not a model), has a
            layer of an unknown class, or lacks weights of a layer, which the message names.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(8)
            file.seek(0)
            if magic.startswith(b"PK"):
                return _read_zip(path, file)
            if magic == b"\x89HDF\r\n\x1a\n":
                return _read_h5(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if path.is_dir():
        raise ModelError(f"{path}: is a directory; a SavedModel cannot be imported, save it as .keras")
    raise ModelError(f"{path}: is not a file of Keras: expected a zip (.keras) or HDF5 (.h5), got bytes {magic!r}")


def import_keras(path: Path, target: Path) -> list[str]:
    """Writes a model directory of a ``.keras`` or ``.h5`` file into ``target``, which exists and is empty.

    ``network.json`` and ``weights.safetensors`` are as `rnnserve_models.network.files` says; ``model.yaml`` names them.

    Returns:
        What was found, for a person: layers, inputs, outputs and states with their axes and dtypes, and by how much the
        engines differ on random input.

    Raises:
        ModelError: as `read_keras_file` and `rnnserve_models.layer_from_config` do.
    """
    found = read_keras_file(path)
    source = Source(found.config, found.weights, found.keras_version)
    layer = source.default()
    if layer is None:
        raise ModelError(f"{path}: does not say what its inputs are like; save a model that was built or called")
    findings = [*found.notes, *_described(layer, found), *_compared(path, layer, found, source.batch_size or 2)]
    save_network(target, {"keras_version": str(found.keras_version), **found.config}, found.weights)
    spec = {
        "description": f"Imported from {path.name}, {found.notes[0]}.",
        "network": "network.json",
        "weights": "weights.safetensors",
    }
    (target / "model.yaml").write_text(yaml.safe_dump(spec, sort_keys=False, width=120), encoding="utf-8")
    return findings


def _described(layer: Layer, found: KerasFile) -> Iterator[str]:
    """The layers, and what goes in and comes out."""
    layers = list(layer.layers.values()) if isinstance(layer, Network) else [layer]
    numbers = sum(array.size for array in found.weights)
    yield f"{layer.class_name} {layer.name!r}: {len(layers)} layers, {len(found.weights)} weights of {numbers} numbers"
    for part in layers:
        takes, gives = (", ".join(told(info.shape) for info in infos) for infos in (part.inputs, part.outputs))
        yield f"layer {part.class_name} {part.name!r}: {takes} -> {gives}, {part.dtype}"
    for infos, kind in ((layer.inputs, "input"), (layer.outputs, "output")):
        for number, info in enumerate(infos):
            yield f"{kind} {number}: {told(info.shape)}, {info.dtype}"
    for state in layer.states:
        yield f"state {state.name}: [batch, {', '.join(map(str, state.shape))}], {state.dtype}"
    if not layer.states:
        yield "no states: a session of this model remembers nothing"


def _compared(path: Path, layer: Layer, found: KerasFile, batch: int) -> Iterator[str]:
    """By how much NumPy and onnxruntime differ on random input, which must be little."""
    generator = np.random.default_rng(0)
    ids = min(_vocabularies(found.config), default=0)
    inputs = [_random(generator, info, ids, batch) for info in layer.inputs]
    numpy, auto = (
        layer_from_config(found.config, found.weights, engine, found.keras_version) for engine in ("numpy", "auto")
    )
    if auto.engine == "numpy":
        yield f"runs in NumPy only: {auto.engine_reason}"
        return
    try:
        pairs = list(zip(_outputs(numpy, inputs), _outputs(auto, inputs), strict=True))
    except InputError as error:
        yield f"the engines were not compared: {error}"
        return
    worst = max(float(np.abs(left.astype("float64") - right.astype("float64")).max(initial=0)) for left, right in pairs)
    if not worst <= (4e-3 if layer.dtype == np.float16 else 2e-5) * max(
        1.0, *(float(np.abs(left).max()) for left, _ in pairs)
    ):
        raise ModelError(f"{path}: NumPy and onnxruntime differ by {worst:.1e} on random input")
    yield f"NumPy and onnxruntime agree to {worst:.1e} on random input"


def _outputs(local: LocalLayer, inputs: list[np.ndarray]) -> Iterator[np.ndarray]:
    waiting = [local(inputs if len(inputs) > 1 else inputs[0])]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, (list, tuple)):
            waiting = [*value, *waiting]
        else:
            yield value


def _random(generator: np.random.Generator, info: Info, ids: int, batch: int) -> np.ndarray:
    """An input: ids where there are words, and numbers elsewhere."""
    shape = (batch, *(5 if extent is None else extent for extent in info.shape))
    if ids and len(shape) == 2:
        return generator.integers(0, ids, shape).astype(info.dtype)
    return generator.normal(size=shape).astype(info.dtype)


def _vocabularies(config: Any) -> Iterator[int]:
    """``input_dim`` of every Embedding inside a config."""
    if isinstance(config, Mapping):
        inner = config.get("config")
        if config.get("class_name") == "Embedding" and isinstance(inner, Mapping):
            yield int(inner["input_dim"])
        for value in config.values():
            yield from _vocabularies(value)
    elif isinstance(config, list):
        for value in config:
            yield from _vocabularies(value)


# .keras


def _read_zip(path: Path, file: IO[bytes]) -> KerasFile:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            config = _json(str(path), _member(path, archive, "config.json", MAX_CONFIG_BYTES))
            metadata: Any = {}
            if "metadata.json" in names:
                metadata = _json(f"{path}: metadata.json", _member(path, archive, "metadata.json", _SLACK))
            if "model.weights.h5" not in names:
                raise ModelError(
                    f"{path}: has no model.weights.h5, its members are {sorted(names)[:10]}; "
                    "sharded and NumPy weights cannot be imported, save the model with model.save()"
                )
            content = _member(path, archive, "model.weights.h5", MAX_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is a damaged zip: {error}") from error
    version = metadata.get("keras_version") if isinstance(metadata, Mapping) else None
    notes: list[str] = []
    major = _major(str(path), version, config, notes)
    model = _Part.of(f"{path}", config)
    with tempfile.TemporaryDirectory(prefix="rnnserve-keras-") as folder:
        member = Path(folder) / "model.weights.h5"
        member.write_bytes(content)
        weights = _weights(f"{path}: model.weights.h5", member, "optimizer")
    arrays = list(_from_paths(weights, model, ""))
    if "optimizer" in weights.content.groups:
        notes.append("the optimizer's state is left aside")
    if config.get("compile_config"):
        notes.append("what the model was compiled with is left aside")
    return KerasFile({key: config[key] for key in ("class_name", "config")}, arrays, major, notes)


def _member(path: Path, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member's content, which must be of a sane size."""
    found = [info for info in archive.infolist() if info.filename == name]
    if len(found) != 1:
        raise ModelError(
            f"{path}: expected one member {name}, got {len(found)}; its members are {sorted(archive.namelist())[:10]}"
        )
    (info,) = found
    if info.flag_bits & 1:
        raise ModelError(f"{path}: {name} is encrypted")
    if info.file_size > min(limit, MAX_RATIO * info.compress_size + _SLACK):
        raise ModelError(
            f"{path}: {name} holds {info.file_size} bytes in {info.compress_size} compressed ones; "
            f"at most {limit}, and {MAX_RATIO} times as many, are read"
        )
    with archive.open(info) as stream:
        content = stream.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise ModelError(f"{path}: {name} is not of the size that the zip states, {info.file_size} bytes")
    return content


def _from_paths(weights: _Weights, part: _Part, group: str) -> Iterator[np.ndarray]:
    """The weights of a layer of a ``.keras`` file and of those inside it, in order."""
    for index in range(len(part.own)):
        yield weights.array(f"{group}vars/{index}", part)
    used: dict[str, int] = {}
    for attribute, child in part.children:
        inner = f"{group}{attribute}/"
        if attribute in ("layers", "cells"):  # a list: by class, and by number from the second of a class
            name = _snake_case(child.class_name)
            used[name] = used.get(name, -1) + 1
            inner += f"{name}_{used[name]}/" if used[name] else f"{name}/"
        yield from _from_paths(weights, child, inner)


def _snake_case(name: str) -> str:
    """A class as Keras writes it in a path: LSTM is lstm, SimpleRNN is simple_rnn, Conv1D is conv1d."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


# .h5


def _read_h5(path: Path) -> KerasFile:
    weights = _weights(str(path), path, "optimizer_weights")
    texts = weights.content.texts
    if "model_config" not in texts:
        raise ModelError(
            f"{path}: has no model_config, so it holds weights and no model; save it with model.save(), "
            "not with save_weights()"
        )
    config = _json(f"{path}: model_config", texts["model_config"])
    notes: list[str] = []
    major = _major(str(path), texts.get("keras_version"), config, notes)
    model = _Part.of(str(path), config)
    arrays: list[np.ndarray] = []
    for _, layer in model.children if model.class_name in _MODELS else [("", model)]:
        arrays += _from_names(weights, layer)
    if "optimizer_weights" in weights.content.groups:
        notes.append("the optimizer's state is left aside")
    if "training_config" in texts:
        notes.append("what the model was compiled with is left aside")
    return KerasFile({key: config[key] for key in ("class_name", "config")}, arrays, major, notes)


def _from_names(weights: _Weights, layer: _Part) -> list[np.ndarray]:
    """The weights of a layer of an ``.h5`` file, in order.

    The file has those that are trained first and the others after them; ``get_weights()`` of a model in a model goes
    layer by layer.
    """
    trained = layer.trained()
    group = f"model_weights/{layer.name}"
    if not trained and group not in weights.content.groups:
        return []
    names = weights.content.names.get(group)
    if names is None:
        raise ModelError(f"{weights.where}: {layer}: has no weights in the file, expected {len(trained)}")
    if len(names) != len(trained):
        raise ModelError(
            f"{weights.where}: {layer}: expected {len(trained)} weights, the file has {len(names)}: {names}"
        )
    arrays: list[np.ndarray] = [np.empty(0)] * len(names)
    order = sorted(range(len(trained)), key=lambda index: not trained[index])
    for name, index in zip(names, order, strict=True):
        arrays[index] = weights.array(f"{group}/{name}", layer)
    return arrays


# What both have


class _Part:
    """A layer or cell of a config, as far as its weights are concerned.

    Attributes:
        class_name: without a package's name.
        name: of the layer.
        own: for every weight that is the layer's own, whether it is trained.
        children: what is inside it, by the attribute of the layer that holds it, in order of ``get_weights()``.
    """

    def __init__(self, class_name: str, name: str, own: list[bool], children: list[tuple[str, _Part]]) -> None:
        self.class_name = class_name
        self.name = name
        self.own = own
        self.children = children

    def __str__(self) -> str:
        return f"{self.class_name} {self.name!r}"

    def trained(self) -> list[bool]:
        """For every weight in order of ``get_weights()``, whether it is trained."""
        return [*self.own, *(flag for _, child in self.children for flag in child.trained())]

    @classmethod
    def of(cls, where: str, document: Any, depth: int = 0) -> _Part:
        """Reads a config.

        Raises:
            ModelError: it is not one, or has a class whose weights are not known.
        """
        if not isinstance(document, Mapping) or not isinstance(document.get("class_name"), str):
            raise ModelError(
                f"{where}: expected a config {{'class_name': ..., 'config': {{...}}}}, got {document!r:.80}"
            )
        if depth > MAX_DEPTH:
            raise ModelError(f"{where}: more than {MAX_DEPTH} layers inside one another")
        class_name = document["class_name"].rpartition(">")[2]
        config = document.get("config")
        if isinstance(config, list) and class_name == "Sequential":
            config = {"layers": config}  # Keras before 2.2.3
        if not isinstance(config, Mapping):
            raise ModelError(f"{where}: {class_name}: expected a mapping as its config, got {config!r:.80}")
        name = str(document.get("name") or config.get("name") or class_name)
        told = f"{where}: {class_name} {name!r}"
        trainable = config.get("trainable", True) is not False
        children = [
            (attribute, cls.of(told, child, depth + 1)) for attribute, child in _inside(told, class_name, config)
        ]
        return cls(
            class_name, name, [flag and trainable for flag in _own(told, document, class_name, config)], children
        )


def _own(where: str, document: Mapping[str, Any], class_name: str, config: Mapping[str, Any]) -> list[bool]:
    """For every weight that a layer has itself, whether it can be trained."""
    if class_name in _CELLS:
        return [True, True] + [True] * bool(config.get("use_bias", True))
    if class_name in _KERNELS:
        if (
            config.get("quantization_config")
            or "int8" in str(config.get("dtype"))
            or "int4" in str(config.get("dtype"))
        ):
            raise ModelError(f"{where}: is quantized; only float16, float32 and float64 weights can be imported")
        return [True] + [True] * bool(config.get("use_bias", True))
    if class_name == "Embedding":
        return [True]
    if class_name in _NORMALIZATIONS:
        if config.get("renorm"):
            raise ModelError(f"{where}: batch renormalization cannot be imported; expected renorm: false")
        affine = [True] * (bool(config.get("scale", True)) + bool(config.get("center", True)))
        return affine + [False, False] * (class_name == "BatchNormalization")
    known = class_name in (
        _RECURRENT | _MODELS | _WEIGHTLESS | {"RNN", "StackedRNNCells", "Bidirectional", "TimeDistributed"}
    )
    # Keras 3 records what it did to find a mask (NotEqual, Any) as operations, which have no weights.
    operation = str(document.get("module", "")).startswith("keras.src.ops.")
    if not known and not operation:
        raise ModelError(f"{where}: layers of this class cannot be imported; Python code of a model is never run")
    return []


def _inside(where: str, class_name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The configs inside a config, by the attributes that hold them."""
    if class_name in _RECURRENT:
        yield "cell", {"class_name": f"{class_name}Cell", "config": config}
    elif class_name == "RNN":
        yield "cell", config.get("cell")
    elif class_name in ("StackedRNNCells", *_MODELS):
        key = "cells" if class_name == "StackedRNNCells" else "layers"
        parts = config.get(key)
        if not isinstance(parts, list):
            raise ModelError(f"{where}: expected a list of {key}, got {parts!r:.80}")
        yield from ((key, part) for part in parts)
    elif class_name == "TimeDistributed":
        yield "layer", config.get("layer")
    elif class_name == "Bidirectional":
        forward = config.get("layer")
        yield "forward_layer", forward
        yield "backward_layer", config.get("backward_layer") or forward


class _Weights:
    """The arrays of an HDF5 file, taken by the layers that they are of."""

    def __init__(self, where: str, content: Hdf5) -> None:
        self.where = where
        self.content = content

    def array(self, path: str, layer: _Part) -> np.ndarray:
        """The array at a path.

        Raises:
            ModelError: there is none, or none that may be read.
        """
        if (array := self.content.arrays.get(path)) is not None:
            return array
        where = f"{self.where}: {layer}"
        if path in self.content.groups:
            raise ModelError(f"{where}: {path}: expected an array, got a group")
        parts = path.split("/")
        for end in range(len(parts)):
            if (reason := self.content.refused.get("/".join(parts[: end + 1]))) is not None:
                raise ModelError(f"{where}: {path}: {reason}")
        raise ModelError(f"{where}: its weight is missing from the file: expected it at {path}")


def _weights(where: str, path: Path, leave: str) -> _Weights:
    try:
        return _Weights(where, read_hdf5(path, leave=(leave,)))
    except Hdf5Error as error:
        raise ModelError(f"{where}: {error}") from error


def _json(where: str, text: bytes | str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{where}: expected a JSON object, got {document!r:.80}")
    return document


def _major(where: str, version: Any, config: Any, notes: list[str]) -> int:
    """Keras 2 or 3, by what the file says of itself, else by its config."""
    if isinstance(version, str) and (found := re.match(r"(\d+)\.", version)):
        if found[1] not in ("2", "3"):
            raise ModelError(f"{where}: was written by Keras {version}; files of Keras 2 and 3 can be imported")
        notes.append(f"written by Keras {version}")
        return int(found[1])
    major = guess_version(config)
    notes.append(f"the file does not say which Keras wrote it; its config is of Keras {major}")
    return major
