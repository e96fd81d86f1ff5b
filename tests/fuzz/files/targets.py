"""What reads files of others, and files to give it that are nearly right."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import yaml
from safetensors.numpy import save

import graphs
from fuzz.files import messages, trees
from fuzz.files.damage import damaged
from rnnserve_models.errors import ModelError
from rnnserve_models.importers import keras_file
from rnnserve_models.importers.files import write_model
from rnnserve_models.importers.hdf5 import Hdf5, Hdf5Error, read_hdf5
from rnnserve_models.load import load_model
from rnnserve_models.spec import ModelSpec
from rnnserve_server import blob
from rnnserve_server.access.principals import PrincipalsError, read_principals
from rnnserve_server.access.tls import TlsError, server_credentials
from rnnserve_server.errors import BlobInvalid
from rnnserve_server.records import unpack_answers
from rnnserve_server.replay import Limits
from rnnserve_server.resets import ResetRules
from rnnserve_server.store.base import StoreCorrupt

TESTS = Path(__file__).parents[2]
ZOO = TESTS.parent / "models" / "zoo"
VECTORS = TESTS / "vectors"

Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        make: files for it, by their names in a folder.
        read: reads those of a folder.
        refuses: how it says no.
        forbidden: whether such files must be refused.
        apart: whether servers have such files read in a process of its own, because what they hold is run: an attempt
            that takes long, takes much or ends the process is made again there.
    """

    make: Callable[[Random], Files]
    read: Callable[[Path], Any]
    refuses: type[Exception] = ModelError
    forbidden: Callable[[Files], bool] = lambda files: False
    apart: bool = False


# Manifests

_SNIPPETS = (
    *("&a", "*a", "<<: *a\n", "? [a]\n: b\n", "---\n", "...\n", "\t", "\ufeff", "%YAML 9.9\n---\n", "!!python/none x"),
    *(
        "!!python/object/apply:os.system ['touch escaped']\n",
        "!!python/name:os.system",
        "!!binary ///=",
        "!!set {a, b}",
    ),
    *("!!timestamp 2024-99-99", "2024-13-45", "2024-02-30T25:61:61Z", "190:20:30", "0x" + "f" * 5000, "1" * 5000),
    *(
        "1e99999",
        ".nan",
        "-.inf",
        "0b2",
        "!!int x",
        "!!float x",
        "~",
        "\x00",
        "\x85",
        "'",
        '"\\ud800"',
        "|9\n x",
        ">\n",
    ),
    *("[" * 300, "{a: " * 300, "- " * 300, "? " * 300, "!<tag:x> y", "!!omap [a]", "key: [1, 2", "\u2028"),
)


def _words(*models: type[Any]) -> tuple[str, ...]:
    return tuple(name for model in models for name in model.model_fields)


@functools.cache
def _manifests() -> tuple[tuple[Any, Files], ...]:
    weights = {"weights.safetensors": (ZOO / "lstm-32-64" / "1" / "weights.safetensors").read_bytes()}
    cells = yaml.safe_load((ZOO / "lstm-32-64" / "1" / "model.yaml").read_text())
    small = {"cell": {"class_name": "GRUCell", "config": {"units": 2}}, "input_dim": 1, "weights": "w"}
    gru = {
        "0.kernel": np.ones((1, 6), np.float32),
        "0.recurrent_kernel": np.ones((2, 6), np.float32),
        "0.bias": np.ones((2, 6), np.float32),
    }
    graph = {"graph.onnx": graphs.lstm(lengths=True)}
    one_step = {"graph.onnx": graphs.step_lstm()}
    stepwise = {
        "options": {"return_sequences": True},
        "oip": {"axes": {"x": ["batch", 2]}, "max_batch_size": 4, "idle_lifetime": 1.5},
        "graph": {
            "file": "graph.onnx",
            "inputs": [{"name": "x", "axes": ["batch", 2], "finite": True}],
            "outputs": [{"name": "y", "axes": ["batch", 3]}],
            "states": graphs.CELL_STATES,
            "constants": [],
        },
    }
    network = {"description": "x", "network": "network.json", "weights": "weights.safetensors"}
    return (
        (cells, weights),
        (small, {"w": save(gru)}),
        (graphs.lstm_spec(lengths=True), graph),
        (stepwise, one_step),
        (network, _network()[0]),
    )


def _json(document: Any) -> str:
    try:
        return json.dumps(document)
    except RecursionError:  # by chance it was put into itself again and again
        return "[" * 100_000


def _yaml(document: Any) -> str:
    try:
        return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    except (yaml.YAMLError, RecursionError):
        return _json(document)


def _text(text: str, chance: Random) -> bytes:
    """A text with something in it that it should not have."""
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(text) + 1)
        if chance.random() < 0.5:  # where a value is
            at = text.find(": ", at) + 2 if text.find(": ", at) >= 0 else at
        text = text[:at] + chance.choice(_SNIPPETS) + text[at + chance.choice((0, 0, 1, 8)) :]
    return text.encode("utf-8", "surrogatepass")


def _bomb(chance: Random) -> str:
    """Names for lists of names, ten times ten times ten, where a value is read, or where nobody knows the key."""
    depth = chance.choice((3, 9, 30))
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, depth)]
    key = chance.choice(("description", "graph", "cell", "options", "settable_options", "unknown", "input_dim"))
    if chance.random() < 0.5:
        return "\n".join(lines) + f"\n{key}: *a{depth - 1}\n"
    inner = ", ".join(line.partition(": ")[2] for line in lines)
    tail = f"cell: {{class_name: LSTMCell, config: {{units: [{inner}, *a{depth - 1}]}}}}\ninput_dim: 3\n"
    itself = "cell: {class_name: LSTMCell, config: &a {units: *a}}\ninput_dim: 1\n"
    return chance.choice((tail, itself))


def _manifest(chance: Random) -> Files:
    document, files = chance.choice(_manifests())
    words = (
        *_words(ModelSpec),
        "units",
        "axes",
        "value",
        "tensor",
        "context",
        "batch",
        "time",
        "squeeze",
        "kind",
        "start",
    )
    kind = chance.random()
    if kind < 0.6:
        content = _yaml(trees.changed(document, chance, words)).encode("utf-8", "surrogatepass")
    elif kind < 0.85:
        content = _text(_yaml(document), chance)
    elif kind < 0.92:
        content = _bomb(chance).encode()
    else:
        content = damaged(_yaml(document).encode(), chance)
    return {**files, "model.yaml": content}


def _escapes(files: Files) -> bool:
    """Whether a manifest names a file elsewhere where the name of a file stands."""
    try:
        document = yaml.safe_load(files["model.yaml"])
        names = [document.get(key) for key in ("weights", "python", "network")]
        names += [(document.get("graph") or {}).get(key) for key in ("file", "defaults")]
    except Exception:
        return False
    return any(isinstance(name, str) and (name.startswith("/") or ".." in name.split("/")) for name in names)


def _load(folder: Path) -> Any:
    return load_model(folder)


# Networks

_LAYERS = (
    *("Dense", "LSTM", "GRU", "SimpleRNN", "RNN", "LSTMCell", "StackedRNNCells", "Bidirectional", "TimeDistributed"),
    *(
        "Embedding",
        "Conv1D",
        "Masking",
        "Dropout",
        "Flatten",
        "Reshape",
        "RepeatVector",
        "Permute",
        "Lambda",
        "Softmax",
    ),
    *(
        "ZeroPadding1D",
        "UpSampling1D",
        "Cropping1D",
        "Concatenate",
        "Dot",
        "BatchNormalization",
        "Sequential",
        "Functional",
    ),
    *(
        "units",
        "n",
        "padding",
        "size",
        "axis",
        "axes",
        "target_shape",
        "activation",
        "batch_shape",
        "unroll",
        "stateful",
    ),
    *("go_backwards", "return_sequences", "layers", "cells", "layer", "cell", "inbound_nodes", "input_layers", "dtype"),
    *(
        "keras_history",
        "shape",
        "filters",
        "kernel_size",
        "strides",
        "dilation_rate",
        "groups",
        "epsilon",
        "merge_mode",
    ),
    *("float16", "mixed_float16", "relu(1, 2, 3)", "leaky_relu(nan)", "elu(1e400)", "causal", "channels_first"),
)


@functools.cache
def _network() -> tuple[Files, ...]:
    found = []
    for path in sorted((VECTORS / "keras" / "files").glob("*3.keras")):
        try:
            whole = keras_file.read_keras_file(path)
        except ModelError:
            continue
        weights = {str(index): np.ascontiguousarray(weight) for index, weight in enumerate(whole.weights)}
        width = len(str(max(len(weights) - 1, 0)))
        content = save({f"{int(name):0{width}}": weight for name, weight in weights.items()})
        found.append({"network.json": json.dumps(whole.config).encode(), "weights.safetensors": content})
    return tuple(found)


def _net(chance: Random) -> Files:
    files = dict(chance.choice(_network()))
    config = json.loads(files["network.json"])
    if chance.random() < 0.9:
        files["network.json"] = _json(trees.changed(config, chance, _LAYERS)).encode("utf-8", "surrogatepass")
    else:
        files["network.json"] = damaged(files["network.json"], chance)
    return {**files, "model.yaml": b"network: network.json\nweights: weights.safetensors\n"}


# Safetensors


def _torch(chance: Random) -> Files:
    path = chance.choice(sorted((VECTORS / "onnx").glob("torch_*.safetensors")))
    return {"model.safetensors": tensors(path.read_bytes(), chance)}


def _weights(chance: Random) -> Files:
    folder = ZOO / "lstm-32-64" / "1"
    content = tensors((folder / "weights.safetensors").read_bytes(), chance)
    return {"model.yaml": (folder / "model.yaml").read_bytes(), "weights.safetensors": content}


def _numbered(chance: Random) -> Files:
    files = dict(chance.choice(_network()))
    files["weights.safetensors"] = tensors(files["weights.safetensors"], chance)
    return {**files, "model.yaml": b"network: network.json\nweights: weights.safetensors\n"}


_TENSOR_WORDS = (
    *("F16", "F32", "F64", "BF16", "F8_E4M3", "F8_E5M2", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"),
    *("C64", "F4", "E8M0", "dtype", "shape", "data_offsets", "__metadata__", "0", "00", "1", "١", "weight_ih_l0"),
    *(
        "weight_ih_l" + "9" * 30,
        "weight_ih_l" + "9" * 5000,
        "weight_hr_l0",
        "weight_hh_l0_reverse",
        "0.kernel",
        "1.bias",
    ),
)


def tensors(content: bytes, chance: Random) -> bytes:
    """A safetensors file whose header says something else than it did, or is damaged."""
    if chance.random() < 0.25:
        return damaged(content, chance)
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[chance.choice(names)] if names else {}
    match chance.randrange(8):
        case 0 | 1 | 2:
            header = trees.changed(header, chance, _TENSOR_WORDS)
        case 3:
            entry["shape"] = chance.choice(
                ([0, 2**62, 4], [0], [], [1] * 40, [2**63], [2**32, 2**32], [-1, -1], [1.0], ["1"], [0] * 200)
            )
            if chance.random() < 0.5:
                entry["data_offsets"] = [0, 0]
        case 4:
            entry["dtype"] = chance.choice(_TENSOR_WORDS)
        case 5:
            start = chance.choice((0, 1, -1, len(body), 2**63, 2**64))
            entry["data_offsets"] = [start, start + chance.choice((0, 1, 4, len(body), -4))]
        case 6:  # tensors without elements, whose axes may be as long as they say
            at = len(body)
            header["empty"] = {
                "dtype": "F32",
                "shape": chance.choice(([0], [0, 2**62], [2**40, 0, 2**40])),
                "data_offsets": [at, at],
            }
        case _:
            other = header[chance.choice(names)] if names else {}
            entry["data_offsets"] = other.get("data_offsets", [0, 0])
    text = _json(header).encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        text = text.replace(b"}", b',"dtype":"F32"}', 1)
    said = (
        len(text)
        if chance.random() < 0.9
        else chance.choice((0, 1, len(text) + 1, len(content), 2**31, 2**63, 2**64 - 1))
    )
    return struct.pack("<Q", said) + text + body


# Files of Keras


@functools.cache
def _archives() -> tuple[dict[str, bytes], ...]:
    found = []
    for kind in ("stacked3", "bidirectional3", "masking3", "shared3", "encoder_decoder3", "cells2", "convolution2"):
        path = VECTORS / "keras" / "files" / f"{kind}.keras"
        with zipfile.ZipFile(path) as archive:
            found.append({name: archive.read(name) for name in archive.namelist()})
    return tuple(found)


def _keras(chance: Random) -> Files:
    """An archive whose config, or whose directory, is another. The weights in it are what they were."""
    members = dict(chance.choice(_archives()))
    kind = chance.random()
    if kind < 0.75:
        config = json.loads(members["config.json"])
        members["config.json"] = _json(trees.changed(config, chance, _LAYERS)).encode("utf-8", "surrogatepass")
    elif kind < 0.85:
        metadata = json.loads(members.get("metadata.json", b"{}"))
        members["metadata.json"] = _json(trees.changed(metadata, chance)).encode("utf-8", "surrogatepass")
    pairs = list(members.items())
    if chance.random() < 0.2:
        match chance.randrange(4):
            case 0:
                pairs.pop(chance.randrange(len(pairs)))
            case 1:
                pairs.append(chance.choice(pairs))
            case 2:
                pairs.append((chance.choice(("../../escaped", "/tmp/escaped-fuzz", "a" * 5000, "")), b"x"))
            case _:
                pairs[chance.randrange(len(pairs))] = (pairs[0][0], bytes(chance.choice((0, 1 << 20, 1 << 24))))
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    ) as archive:
        for name, content in pairs:
            archive.writestr(zipfile.ZipInfo(name), content)
    content = file.getvalue()
    return {"model.keras": damaged(content, chance) if kind > 0.9 else content}


def _hdf5(chance: Random) -> Files:
    path = chance.choice(sorted((VECTORS / "keras" / "files").glob("*.h5")))
    return {"model.h5": damaged(path.read_bytes(), chance)}


_READ: dict[str, Hdf5] = {}


def _known_hdf5(path: Path, *, leave: tuple[str, ...] = ()) -> Hdf5:
    """`read_hdf5`, which takes a process, once for each file that is in order."""
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    if key not in _READ:
        if key not in _sound():
            raise Hdf5Error("is damaged or not HDF5: this is asked by the target hdf5")
        _READ[key] = read_hdf5(path, leave=leave)
    found = _READ[key]
    return found._replace(arrays=dict(found.arrays))


@functools.cache
def _sound() -> frozenset[str]:
    return frozenset(hashlib.sha256(members["model.weights.h5"]).hexdigest() for members in _archives())


def _import_keras(folder: Path) -> Any:
    real, keras_file.read_hdf5 = keras_file.read_hdf5, _known_hdf5
    try:
        return _import(folder)
    finally:
        keras_file.read_hdf5 = real


def _import(folder: Path) -> Any:
    """What a deployment does with a file."""
    (path,) = folder.iterdir()
    target = folder / "written" / "1"
    target.mkdir(parents=True)
    write_model(path, target)
    return load_model(target)


# Graphs


@functools.cache
def _graphs() -> tuple[onnx.ModelProto, ...]:
    kinds = (
        "script_lstm",
        "script_gru",
        "script_rnn",
        "script_lstm_explicit",
        "script_lstm_tokens",
        "script_lstm_packed",
    )
    kinds += (
        "keras2_lstm",
        "keras3_masked_gru",
        "keras2_simple",
        "dynamo_lstm",
        "keras3_conv",
        "script_lstm_bidirectional",
    )
    found = [onnx.load_model(VECTORS / "onnx" / f"{kind}.onnx") for kind in kinds]
    return (*found, graphs.parsed(graphs.step_lstm()))


def _onnx(chance: Random) -> Files:
    model = chance.choice(_graphs())
    if chance.random() < 0.2:
        return {"model.onnx": damaged(model.SerializeToString(), chance)}
    return {"model.onnx": messages.changed(model, chance).SerializeToString()}


def _outside(files: Files) -> bool:
    try:
        return messages.refers(onnx.load_model_from_string(files["model.onnx"]))
    except Exception:
        return False


# What servers keep


@functools.cache
def _blob() -> bytes:
    states = {"cell.h": np.arange(8, dtype=np.float32).reshape(2, 4), "cell.c": np.zeros((2, 4), np.float32)}
    options = {"return_sequences": True, "return_state": False}
    session = blob.Exported(
        "m", "1", "sha256:" + "0" * 64, 2, options, 7, 60.0, 3600.0, Limits(8, 1 << 20), states, ResetRules(3, 2)
    )
    return blob.pack(session, 1.7e9)


def exported(content: bytes, chance: Random) -> bytes:
    """A blob with another header, whose checksum is right as often as not."""
    if chance.random() < 0.5:
        content = tensors(content, chance)
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        if chance.random() < 0.7:
            header["__metadata__"] = trees.changed(header["__metadata__"], chance, tuple(header["__metadata__"]))
        if chance.random() < 0.8:
            header["__metadata__"]["checksum"] = "0" * 64
        text = _json(header).encode("utf-8", "surrogatepass")
        content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError, struct.error):
        return content
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


_PRINCIPALS = {
    "principals": {
        "alice": {
            "roles": ["use", "deploy"],
            "tokens": [{"id": "5f0c9a1b", "sha256": "a" * 64, "created": "2026-11-23T14:00:00Z", "expires": None}],
            "certificates": ["alice.example"],
            "quotas": {"sessions": 100, "rows_per_second": 5e4, "state_bytes": 10**8},
        },
        "bob": {"roles": ["admin"]},
    }
}


def _principals(chance: Random) -> Files:
    words = ("use", "admin", "tokens", "quotas", "expires", "2026-11-23T14:00:00Z", "2026-11-23", "alice", "sha256")
    kind = chance.random()
    if kind < 0.6:
        text = _yaml(trees.changed(_PRINCIPALS, chance, words)).encode("utf-8", "surrogatepass")
    elif kind < 0.9:
        text = _text(_yaml(_PRINCIPALS), chance)
    else:
        text = chance.choice((_bomb(chance).encode(), damaged(_yaml(_PRINCIPALS).encode(), chance)))
    return {"principals.yaml": text}


@functools.cache
def _pems() -> tuple[bytes, bytes, bytes]:
    import tempfile

    from certificates import Authority

    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        certificate, key = authority.issue("server")
        return certificate.read_bytes(), key.read_bytes(), authority.root.read_bytes()


def _tls(chance: Random) -> Files:
    certificate, key, root = (damaged(pem, chance) if chance.random() < 0.5 else pem for pem in _pems())
    if chance.random() < 0.1:
        key, certificate = certificate, key
    return {"server.crt": certificate, "server.key": key, "root.pem": root}


def _answers(chance: Random) -> Files:
    what = [[0, "y", "<f4", [1, 3]], [1, "h", "<f4", [1, 2]]]
    if chance.random() < 0.7:
        what = trees.changed(what, chance, ("<f8", "O", "V4", "U9", "<f4,<f4", "M8", "|S0"))
    text = _json(what).encode()
    content = len(text).to_bytes(4, "little") + text + bytes(20)
    return {"answer": damaged(content, chance) if chance.random() < 0.3 else content}


TARGETS = {
    "manifest": Target(_manifest, _load, forbidden=_escapes),
    "network": Target(_net, _load),
    "weights": Target(_weights, _load),
    "numbered": Target(_numbered, _load),
    "torch": Target(_torch, _import, apart=True),
    "keras": Target(_keras, _import_keras, apart=True),
    "hdf5": Target(_hdf5, _import, apart=True),
    "onnx": Target(_onnx, _import, forbidden=_outside, apart=True),
    "blob": Target(
        lambda chance: {"blob": exported(_blob(), chance)},
        lambda folder: blob.unpack((folder / "blob").read_bytes()),
        BlobInvalid,
    ),
    "answers": Target(_answers, lambda folder: unpack_answers([(folder / "answer").read_bytes()]), StoreCorrupt),
    "principals": Target(_principals, lambda folder: read_principals(folder / "principals.yaml"), PrincipalsError),
    "tls": Target(
        _tls,
        lambda folder: server_credentials(folder / "server.crt", folder / "server.key", folder / "root.pem"),
        TlsError,
    ),
}
"""By their names."""
