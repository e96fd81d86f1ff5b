"""Small ONNX graphs for the tests, and model directories to put them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

UNITS, FEATURES = 3, 2
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def info(name: str, shape: list[Any] | None, dtype: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, **attributes)


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any = (), functions: Any = ()) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, [tensor(key, value) for key, value in dict(weights).items()])
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(each.domain, 1) for each in functions)]
    made = helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=list(functions))
    content: bytes = made.SerializeToString()
    return content


def tensor(name: str, value: np.ndarray) -> Any:
    return numpy_helper.from_array(value, name)


def lstm_weights(seed: int = 0, features: int = FEATURES, units: int = UNITS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "W": rng.normal(size=(1, 4 * units, features)).astype(np.float32),
        "R": rng.normal(size=(1, 4 * units, units)).astype(np.float32) / 2,
        "B": rng.normal(size=(1, 8 * units)).astype(np.float32),
    }


STATE = [1, "batch", UNITS]
TIME_MAJOR = ["time", "batch", FEATURES]
CELL_STATES = [
    {"name": "h", "input": "h", "output": "hn", "axes": ["squeeze", "batch", UNITS]},
    {"name": "c", "input": "c", "output": "cn", "axes": ["squeeze", "batch", UNITS]},
]


def lstm(*, lengths: bool = False, initial: tuple[str, str] = ("h", "c"), batch_major: bool = False) -> bytes:
    """x [T, B, 2] (or [B, T, 2]), maybe lengths, h, c -> y [T, 1, B, 3] (or [B, T, 3]), hn, cn."""
    nodes = [node("LSTM", ["x", "W", "R", "B", "n" if lengths else "", *initial], ["y", "hn", "cn"], hidden_size=UNITS)]
    x, y = info("x", TIME_MAJOR), info("y", ["time", 1, "batch", UNITS])
    if batch_major:
        nodes[0].input[0], nodes[0].output[0] = "xt", "yt"
        nodes = [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            *nodes,
            node("Squeeze", ["yt", "one"], ["ys"]),
            node("Transpose", ["ys"], ["y"], perm=[1, 0, 2]),
        ]
        x, y = info("x", ["batch", "time", FEATURES]), info("y", ["batch", "time", UNITS])
    inputs = [x, *([info("n", ["batch"], INT32)] if lengths else []), info("h", STATE), info("c", STATE)]
    weights = {**lstm_weights(), "one": np.array([1]), "zeros": np.zeros((1, 1, UNITS), np.float32)}
    return model(nodes, inputs, [y, info("hn", STATE), info("cn", STATE)], weights)


def lstm_spec(*, lengths: bool = False, batch_major: bool = False, **changes: Any) -> dict[str, Any]:
    """The description of `lstm`, with its keys changed; a key set to None is left out."""
    time = ["batch", "time"] if batch_major else ["time", "batch"]
    graph = {
        "file": "graph.onnx",
        "inputs": [{"name": "x", "axes": [*time, FEATURES]}],
        "outputs": [{"name": "y", "axes": [*time, UNITS] if batch_major else ["time", "squeeze", "batch", UNITS]}],
        "states": CELL_STATES,
        "lengths": "n" if lengths else None,
        "bit_identical": True,
        **changes,
    }
    return {"graph": {key: value for key, value in graph.items() if value is not None}}


def step_lstm() -> bytes:
    """One step: x [B, 2], h [1, B, 3], c -> y [B, 3], hn, cn."""
    nodes = [
        node("Unsqueeze", ["x", "zero"], ["xt"]),
        node("LSTM", ["xt", "W", "R", "B", "", "h", "c"], ["yt", "hn", "cn"], hidden_size=UNITS),
        node("Squeeze", ["yt", "axes"], ["y"]),
    ]
    inputs = [info("x", ["batch", FEATURES]), info("h", STATE), info("c", STATE)]
    outputs = [info("y", ["batch", UNITS]), info("hn", STATE), info("cn", STATE)]
    return model(nodes, inputs, outputs, {**lstm_weights(), "zero": np.array([0]), "axes": np.array([0, 1])})


def directory(folder: Path, spec: Any, *, name: str = "m", version: str = "1", **files: bytes) -> Path:
    """Writes <name>/<version>/ with a model.yaml (a dict, or text) and files (graph=... is graph.onnx)."""
    path = folder / name / version
    path.mkdir(parents=True, exist_ok=True)
    text = spec if isinstance(spec, str) else yaml.safe_dump(spec)
    (path / "model.yaml").write_text(text, encoding="utf-8")
    for key, content in files.items():
        (path / {"graph": "graph.onnx", "weights": "weights.safetensors"}.get(key, key)).write_bytes(content)
    return path


def parsed(content: bytes) -> Any:
    return onnx.load_model_from_string(content)
