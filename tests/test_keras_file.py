"""Files of real Keras 2 and 3, and files that nobody should be able to hurt anyone with."""

from __future__ import annotations

import io
import json
import time
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from rnnserve_models import ModelError, layer_from_config, model_from_file
from rnnserve_models.importers import hdf5
from rnnserve_models.importers.keras_file import import_keras, read_keras_file
from rnnserve_models.load import load_model

FILES = Path(__file__).parent / "vectors" / "keras" / "files"
ARRAYS = load_file(FILES / "files.safetensors")
NAMES = sorted(path.name for path in FILES.iterdir() if path.suffix != ".safetensors")
KERAS, H5 = FILES / "stacked3.keras", FILES / "stacked2.h5"


def arrays(prefix):
    """The arrays named ``<prefix>0``, ``<prefix>1`` and so on."""
    count = sum(name.startswith(prefix) for name in ARRAYS)
    return [ARRAYS[f"{prefix}{index}"] for index in range(count)]


def calls(name):
    """The calls of a file: inputs and outputs."""
    numbers = sorted({int(key.split(":")[1]) for key in ARRAYS if key.startswith(f"{name}:") and ":x" in key})
    return [(arrays(f"{name}:{number}:x"), arrays(f"{name}:{number}:y")) for number in numbers]


@cache
def found_in(name):
    """What is in a file, which takes a process to read."""
    return read_keras_file(FILES / name)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_get_weights(name):
    """In order, to the bit, whatever order the file has them in."""
    found = found_in(name)
    assert found.keras_version == int(Path(name).stem[-1])
    expected = arrays(f"{name}:w")
    assert len(found.weights) == len(expected) > 0
    for left, right in zip(found.weights, expected, strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize("name", NAMES)
def test_the_local_twin_computes_what_keras_did(name, engine):
    """One call after another: stateful models go on."""
    found = found_in(name)
    model = layer_from_config(found.config, found.weights, engine, found.keras_version)
    assert calls(name)
    for inputs, expected in calls(name):
        got = model(inputs if len(inputs) > 1 else inputs[0])
        got = got if isinstance(got, list) else [got]
        assert [(y.shape, y.dtype) for y in got] == [(y.shape, y.dtype) for y in expected]
        for left, right in zip(got, expected, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["stacked3.keras", "stacked2.h5"])
def test_a_model_from_a_file(name):
    """Is that twin."""
    (inputs, expected), *_ = calls(name)
    np.testing.assert_allclose(model_from_file(FILES / name)(inputs[0]), expected[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["stacked3.keras", "bidirectional2.h5", "encoder_decoder3.keras", "stateful2.h5"])
def test_importing_writes_the_model_and_says_what_it_is(name, tmp_path):
    """A directory that loads, and findings that name layers, states, axes and dtypes."""
    target = tmp_path / "model" / "1"
    target.mkdir(parents=True)
    findings = "\n".join(import_keras(FILES / name, target))
    assert sorted(path.name for path in target.iterdir()) == ["model.yaml", "network.json", "weights.safetensors"]
    tensors = load_file(target / "weights.safetensors")
    for tensor, weight in zip(sorted(tensors), arrays(f"{name}:w"), strict=True):
        np.testing.assert_array_equal(tensors[tensor], weight)
    assert json.loads((target / "network.json").read_text())["keras_version"] == Path(name).stem[-1]
    for word in ("written by Keras", "layer ", "state ", "[batch, ", "float32", "agree to"):
        assert word in findings
    assert load_model(target).engine.states


# Files that are not what they should be


def rezipped(path, target, **changes):
    """A .keras file with some members changed, or None to leave one out."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in archive.namelist():
            content = changes.pop(name, archive.read(name))
            if content is not None:
                copy.writestr(name, content)
        for name, content in changes.items():
            copy.writestr(name, content)
    return target


def without_weight(path, tmp_path, weight):
    """A .keras file whose weights lack one."""
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r+") as file:
        del file[weight]
    return rezipped(path, tmp_path / "less.keras", **{"model.weights.h5": content.getvalue()})


def test_a_missing_weight_names_its_layer(tmp_path):
    """In both formats."""
    with pytest.raises(ModelError, match=r"LSTM(Cell)? 'lower'.*missing.*layers/lstm/cell/vars/1"):
        read_keras_file(without_weight(KERAS, tmp_path, "layers/lstm/cell/vars/1"))
    target = tmp_path / "less.h5"
    target.write_bytes(H5.read_bytes())
    with h5py.File(target, "r+") as file:
        group = file["model_weights/lower"]
        group.attrs["weight_names"] = group.attrs["weight_names"][:2]
    with pytest.raises(ModelError, match=r"LSTM 'lower': expected 3 weights, the file has 2"):
        read_keras_file(target)
    with h5py.File(target, "r+") as file:
        del file["model_weights/head"]
    with pytest.raises(ModelError, match=r"LSTM 'lower'|Dense 'head': has no weights in the file, expected 2"):
        read_keras_file(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": None}, "expected one member config.json, got 0"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": "[]"}, "expected a JSON object"),
        ({"config.json": "[" * 100_000}, "is not JSON"),
        ({"config.json": '{"class_name": "Lambda", "config": {"name": "evil"}}'}, "Lambda 'evil'.*never run"),
        ({"config.json": '{"class_name": "Sequential", "config": {"layers": 3}}'}, "expected a list of layers, got 3"),
        ({"config.json": '{"class_name": "Bidirectional", "config": {}}'}, "expected a config"),
        ({"config.json": " " * 40_000_000}, "config.json holds 40000000 bytes"),
        ({"model.weights.h5": None}, "has no model.weights.h5"),
        ({"model.weights.h5": b"no HDF5"}, "damaged or not HDF5"),
        ({"model.weights.h5": bytes(50_000_000)}, "holds 50000000 bytes"),
        ({"metadata.json": '{"keras_version": "1.2.2"}'}, "written by Keras 1.2.2; files of Keras 2 and 3"),
        ({"metadata.json": "nothing"}, "is not JSON"),
    ],
)
def test_a_keras_file_that_is_not_one(changes, message, tmp_path):
    """Is refused, with the reason."""
    with pytest.raises(ModelError, match=message):
        read_keras_file(rezipped(KERAS, tmp_path / "bad.keras", **changes))


def test_a_file_cut_short(tmp_path):
    """At any place: an error that names the file, and nothing else."""
    for path in (KERAS, H5):
        content = path.read_bytes()
        for end in range(0, len(content) - 1, 4999):
            target = tmp_path / path.name
            target.write_bytes(content[:end])
            with pytest.raises(ModelError, match=path.name):
                read_keras_file(target)


@pytest.mark.parametrize("path", [KERAS, H5])
def test_bytes_turned_over(path, tmp_path, monkeypatch):
    """A damaged file is read as something, or refused with a ModelError: it never ends otherwise, and never late.

    One of these makes the HDF5 library loop forever.
    """
    monkeypatch.setattr(hdf5, "SECONDS", 2.0)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    began = time.monotonic()
    for _ in range(25):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 20):
            damaged[place] ^= int(generator.integers(1, 256))
        target = tmp_path / path.name
        target.write_bytes(damaged)
        with suppress(ModelError):
            read_keras_file(target)
    assert time.monotonic() - began < 60


def h5_with(tmp_path, change):
    """A copy of the .h5 file with its first kernel deleted and ``change(group)`` called on the group that had it."""
    target = tmp_path / "changed.h5"
    target.write_bytes(H5.read_bytes())
    with h5py.File(target, "r+") as file:
        group = file["model_weights/lower/lower/lstm_cell"]
        del group["kernel:0"]
        change(group)
    return target


def test_links_and_outside_storage_are_not_followed(tmp_path):
    """A file says what it holds, not what to read on the host."""
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["secret"] = np.zeros((2, 16), "float32")
    layout = h5py.VirtualLayout((2, 16), "float32")
    layout[:] = h5py.VirtualSource(str(outside), "secret", (2, 16))
    changes = {
        "external link": lambda group: group.__setitem__("kernel:0", h5py.ExternalLink(str(outside), "secret")),
        "dangling link": lambda group: group.__setitem__("kernel:0", h5py.ExternalLink("nowhere.h5", "secret")),
        "soft link": lambda group: group.__setitem__("kernel:0", h5py.SoftLink("/model_weights")),
        "external storage": lambda group: group.create_dataset(
            "kernel:0", (2, 16), "float32", external=[(str(tmp_path / "raw"), 0, 128)]
        ),
        "virtual": lambda group: group.create_virtual_dataset("kernel:0", layout),
    }
    for what, change in changes.items():
        reason = "in another file" if what in ("external storage", "virtual") else "a link to elsewhere"
        with pytest.raises(ModelError, match=rf"LSTM 'lower': .*kernel:0: is .*{reason}"):
            read_keras_file(h5_with(tmp_path, change))


def test_arrays_larger_than_the_file_and_of_other_types(tmp_path):
    """Sizes are looked at before anything is read."""
    changes = {
        "larger than the file can hold": lambda group: group.create_dataset(
            "kernel:0", (1 << 20, 1 << 16), "float32", chunks=(1024, 1024), compression="gzip"
        ),
        "expected float16, float32 or float64, got int64": lambda group: group.create_dataset(
            "kernel:0", (2, 16), "int64"
        ),
        "got object": lambda group: group.create_dataset("kernel:0", (2, 16), h5py.string_dtype()),
        "expected an array, got a group": lambda group: group.create_group("kernel:0"),
        "got nothing": lambda group: group.create_dataset("kernel:0", data=h5py.Empty("float32")),
    }
    for message, change in changes.items():
        with pytest.raises(ModelError, match=message):
            read_keras_file(h5_with(tmp_path, change))


def test_what_is_no_model_at_all(tmp_path):
    """Weights alone, other formats, directories, nothing."""
    weights = tmp_path / "weights.h5"
    with h5py.File(weights, "w") as file:
        file.create_group("model_weights")
    with pytest.raises(ModelError, match=r"has no model_config.*model\.save\(\)"):
        read_keras_file(weights)
    other = tmp_path / "other.keras"
    other.write_bytes(b"GIF89a")
    with pytest.raises(ModelError, match="is not a file of Keras"):
        read_keras_file(other)
    for path in (tmp_path, tmp_path / "missing.h5"):
        with pytest.raises(ModelError, match="cannot be read"):
            read_keras_file(path)


def test_a_sparse_directory_of_layers_in_layers(tmp_path):
    """A config nests only so deep."""
    config = {"class_name": "Dense", "config": {"name": "deep"}}
    for _ in range(60):
        config = {"class_name": "TimeDistributed", "config": {"name": "outer", "layer": config}}
    with pytest.raises(ModelError, match="more than 24 layers inside one another"):
        read_keras_file(rezipped(KERAS, tmp_path / "deep.keras", **{"config.json": json.dumps(config)}))
