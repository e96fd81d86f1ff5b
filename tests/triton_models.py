"""Model directories as Triton has them: config.pbtxt, <version>/model.onnx, maybe initial_state/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from graphs import FLOAT, INT32, info, model, node

UNITS, FEATURES = 3, 2
STEP, CHUNK, BARE = "step", "chunk", "bare"

_STEP = """
name: "step"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "INPUT" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [
  { name: "OUTPUT" data_type: TYPE_FP32 dims: [ 2 ] },
  { name: "TOLD" data_type: TYPE_FP32 dims: [ 4 ] }
]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  oldest { max_candidate_sequences: 64 }
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ -1, 5 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } ] },
    { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
  ]
  state [
    {
      input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_FP32 dims: [ 2 ]
      initial_state: { data_type: TYPE_FP32 dims: [ 2 ] data_file: "sum" name: "from a file" }
    }
  ]
}
instance_group [ { kind: KIND_CPU } ]
parameters { key: "nothing" value: { string_value: "of ours" } }
"""

_LSTM = """
name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {batch}
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ -1, 2 ] }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ -1, 3 ] }} ]
sequence_batching {{
  direct {{ }}
  state [
    {{ input_name: "h" output_name: "hn" data_type: TYPE_FP32 dims: [ 3 ]
      initial_state: {{ data_type: TYPE_FP32 dims: [ 3 ] zero_data: true name: "h" }} }},
    {{ input_name: "c" output_name: "cn" data_type: TYPE_FP32 dims: [ 3 ]
      initial_state: {{ data_type: TYPE_FP32 dims: [ 3 ] zero_data: true name: "c" }} }}
  ]
}}
"""


def step(folder: Path) -> Path:
    """One step a request: the sum of what came, from an initial state in a file, and what the graph was told."""
    directory = folder / STEP
    (directory / "1").mkdir(parents=True)
    (directory / "initial_state").mkdir()
    (directory / "initial_state" / "sum").write_bytes(np.array([100, 200], np.float32).tobytes())
    (directory / "config.pbtxt").write_text(_STEP)
    (directory / "1" / "model.onnx").write_bytes(step_graph())
    return directory


def step_graph() -> bytes:
    return model(
        [
            node("Add", ["INPUT", "SUM_IN"], ["SUM_OUT"]),
            node("Identity", ["SUM_OUT"], ["OUTPUT"]),
            *(
                node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT)
                for name in ("START", "END", "READY", "CORRID")
            ),
            node("Concat", ["START_f", "END_f", "READY_f", "CORRID_f"], ["TOLD"], axis=1),
        ],
        [
            info("INPUT", ["batch", FEATURES]),
            info("SUM_IN", ["batch", FEATURES]),
            info("START", ["batch", 1]),
            info("END", ["batch", 1], INT32),
            info("READY", ["batch", 1], TensorProto.BOOL),
            info("CORRID", ["batch", 1], TensorProto.UINT64),
        ],
        [info("SUM_OUT", ["batch", FEATURES]), info("OUTPUT", ["batch", FEATURES]), info("TOLD", ["batch", 4])],
    )


def lstm(folder: Path, *, batched: bool) -> Path:
    """Chunks of any length: an LSTM, its states [batch, 3], or [3] where there is no batch axis."""
    name = CHUNK if batched else BARE
    directory = folder / name
    (directory / "3").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(_LSTM.format(name=name, batch=4 if batched else 0))
    (directory / "3" / "model.onnx").write_bytes(lstm_graph(batched=batched))
    return directory


def lstm_graph(*, batched: bool) -> bytes:
    rng = np.random.default_rng(5)
    weights = {
        "W": rng.normal(size=(1, 4 * UNITS, FEATURES)).astype(np.float32),
        "R": rng.normal(size=(1, 4 * UNITS, UNITS)).astype(np.float32) / 2,
        "B": rng.normal(size=(1, 8 * UNITS)).astype(np.float32),
        "one": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "both": np.array([0, 1], np.int64),
    }
    if batched:
        nodes = [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            node("Unsqueeze", ["h", "zero"], ["h0"]),
            node("Unsqueeze", ["c", "zero"], ["c0"]),
            node("LSTM", ["xt", "W", "R", "B", "", "h0", "c0"], ["y4", "h1", "c1"], hidden_size=UNITS),
            node("Squeeze", ["y4", "one"], ["y3"]),
            node("Transpose", ["y3"], ["y"], perm=[1, 0, 2]),
            node("Squeeze", ["h1", "zero"], ["hn"]),
            node("Squeeze", ["c1", "zero"], ["cn"]),
        ]
        leading: list[str | int] = ["batch"]
    else:
        nodes = [
            node("Unsqueeze", ["x", "one"], ["xt"]),
            node("Unsqueeze", ["h", "both"], ["h0"]),
            node("Unsqueeze", ["c", "both"], ["c0"]),
            node("LSTM", ["xt", "W", "R", "B", "", "h0", "c0"], ["y4", "h1", "c1"], hidden_size=UNITS),
            node("Squeeze", ["y4", "axes"], ["y"]),
            node("Squeeze", ["h1", "both"], ["hn"]),
            node("Squeeze", ["c1", "both"], ["cn"]),
        ]
        weights["axes"] = np.array([1, 2], np.int64)
        leading = []
    states = [UNITS]
    return model(
        nodes,
        [info("x", [*leading, "time", FEATURES]), info("h", [*leading, *states]), info("c", [*leading, *states])],
        [info("y", [*leading, "time", UNITS]), info("hn", [*leading, *states]), info("cn", [*leading, *states])],
        weights,
    )


def page_graph() -> bytes:
    """The graph that the page on moving from Triton speaks of: x [batch, 40], h [batch, 128], START -> y, hn."""
    rng = np.random.default_rng(6)
    weights = {
        "Wx": rng.normal(size=(40, 128)).astype(np.float32) / 8,
        "Wh": rng.normal(size=(128, 128)).astype(np.float32) / 16,
        "Wy": rng.normal(size=(128, 29)).astype(np.float32),
        "one": np.ones(1, np.float32),
    }
    return model(
        [
            node("Sub", ["one", "START"], ["goes_on"]),
            node("Mul", ["h", "goes_on"], ["before"]),
            node("MatMul", ["x", "Wx"], ["from_x"]),
            node("MatMul", ["before", "Wh"], ["from_h"]),
            node("Add", ["from_x", "from_h"], ["sum"]),
            node("Tanh", ["sum"], ["hn"]),
            node("MatMul", ["hn", "Wy"], ["y"]),
        ],
        [info("x", ["batch", 40]), info("h", ["batch", 128]), info("START", ["batch", 1])],
        [info("y", ["batch", 29]), info("hn", ["batch", 128])],
        weights,
    )


__all__ = [
    "BARE",
    "CHUNK",
    "FEATURES",
    "FLOAT",
    "STEP",
    "UNITS",
    "lstm",
    "lstm_graph",
    "page_graph",
    "step",
    "step_graph",
]
