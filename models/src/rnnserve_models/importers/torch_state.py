"""PyTorch's ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` from their state dicts, without PyTorch.

A state dict has, for each layer k, ``weight_ih_l<k>`` [gates * hidden, features], ``weight_hh_l<k>``
[gates * hidden, hidden] and, unless the module has no bias, ``bias_ih_l<k>`` and ``bias_hh_l<k>`` [gates * hidden]; for
the backward direction the same names with ``_reverse``. PyTorch's gates are i, f, g, o in an LSTM, as Keras's are, and
r, z, n in a GRU, where Keras has z, r, h and PyTorch always is what Keras calls ``reset_after``.

Layers of one direction become cells, which both engines run. Bidirectional ones become ONNX's operators.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import helper

from rnnserve_models.cell import Cell
from rnnserve_models.cells import GRUCell, LSTMCell, SimpleRNNCell
from rnnserve_models.errors import ModelError
from rnnserve_models.export import IR_VERSION, OPSET
from rnnserve_models.onnx_builder import GraphBuilder
from rnnserve_models.spec import GraphInput, GraphSpec, GraphState, GraphTensor
from rnnserve_models.stack import StackedRNNCells
from rnnserve_models.weights import load_tensors

Nonlinearity = Literal["tanh", "relu"]

_KEY = re.compile(
    r"^(?P<prefix>.*?)(?P<part>weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(?P<layer>\d+)(?P<back>_reverse)?$"
)
_KINDS = {4: "LSTM", 3: "GRU", 1: "RNN"}
_CELLS: dict[str, type[Any]] = {"LSTM": LSTMCell, "GRU": GRUCell, "RNN": SimpleRNNCell}
_KERAS_GATES = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}
"""Keras's gates among PyTorch's."""

_ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX's gates, i, o, f, c and z, r, h, among PyTorch's."""


@dataclass(frozen=True)
class _Direction:
    """One direction of one layer: w_ih [gates * hidden, features], w_hh [gates * hidden, hidden], biases or None."""

    w_ih: np.ndarray
    w_hh: np.ndarray
    b_ih: np.ndarray | None
    b_hh: np.ndarray | None


@dataclass(frozen=True)
class TorchModule:
    """What a state dict holds.

    Attributes:
        kind: "LSTM", "GRU" or "RNN".
        hidden: units of a direction.
        features: of the input.
        bidirectional: whether each layer has two directions.
        layers: the directions of each layer.
        dtype: of all tensors.
        nonlinearity: of an RNN.
    """

    kind: str
    hidden: int
    features: int
    bidirectional: bool
    layers: tuple[tuple[_Direction, ...], ...]
    dtype: np.dtype[Any]
    nonlinearity: Nonlinearity

    def cell(self) -> Cell:
        """The layers as a cell or stacked cells, for one direction."""
        cells = [self._cell(layer[0]) for layer in self.layers]
        return cells[0] if len(cells) == 1 else StackedRNNCells(cells)

    def graph(self) -> tuple[bytes, GraphSpec]:
        """The layers as ONNX operators: ``input`` [time, batch, features] to ``output`` [time, batch, 2 * hidden].

        Layer k has the states ``<k>.h`` and, in an LSTM, ``<k>.c``, each [2, batch, hidden], forward first.
        """
        builder = GraphBuilder(self.dtype)
        value, states = "input", []
        for index, layer in enumerate(self.layers):
            names = [f"{index}.h", f"{index}.c"] if self.kind == "LSTM" else [f"{index}.h"]
            states += names
            options: dict[str, Any] = {"linear_before_reset": 1} if self.kind == "GRU" else {}
            if self.kind == "RNN":
                options["activations"] = [self.nonlinearity.capitalize()] * 2
            builder.add_node(
                self.kind,
                [
                    value,
                    builder.weight(np.stack([_gates(d.w_ih, _ONNX_GATES[self.kind]) for d in layer])),
                    builder.weight(np.stack([_gates(d.w_hh, _ONNX_GATES[self.kind]) for d in layer])),
                    builder.weight(np.stack([self._onnx_bias(d) for d in layer])),
                    "lengths",
                    *names,
                ],
                [y := builder.name(), *(f"{name}_out" for name in names)],
                hidden_size=self.hidden,
                direction="bidirectional",
                **options,
            )  # y: [time, 2, batch, hidden]
            y = builder.add("Transpose", y, perm=[0, 2, 1, 3])
            value = builder.add("Reshape", y, builder.constant(np.array([0, 0, 2 * self.hidden])))
        builder.add_node("Identity", [value], ["output"])
        kind: Any = self.dtype.name
        spec = GraphSpec(
            file="model.onnx",
            inputs=(GraphInput(name="input", dtype=kind, axes=("time", "batch", self.features)),),
            outputs=(GraphTensor(name="output", dtype=kind, axes=("time", "batch", 2 * self.hidden)),),
            states=tuple(
                GraphState(name=name, input=name, output=f"{name}_out", dtype=kind, axes=(2, "batch", self.hidden))
                for name in states
            ),
            lengths="lengths",
            sliceable=False,
        )
        inputs = [builder.info("input", ["time", "batch", self.features]), builder.info("lengths", ["batch"], np.int32)]
        inputs += [builder.info(name, [2, "batch", self.hidden]) for name in states]
        outputs = [builder.info("output", ["time", "batch", 2 * self.hidden])]
        outputs += [builder.info(f"{name}_out", [2, "batch", self.hidden]) for name in states]
        model = helper.make_model(
            builder.graph("torch", inputs, outputs),
            producer_name="rnnserve",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        content: bytes = model.SerializeToString()
        return content, spec

    def findings(self) -> list[str]:
        """What was found, for people."""
        gates = {
            "LSTM": "gates i, f, g, o as Keras's i, f, c, o",
            "GRU": "gates r, z, n put in Keras's order z, r, h; reset_after",
            "RNN": f"nonlinearity {self.nonlinearity}",
        }
        count = f"{len(self.layers)} layer{'s' * (len(self.layers) > 1)}"
        both = "bidirectional, " if self.bidirectional else ""
        bias = "" if self.layers[0][0].b_ih is not None else ", no bias"
        lines = [
            f"PyTorch nn.{self.kind}: {count}, {both}{self.hidden} hidden units, {self.features} features, "
            f"{self.dtype.name}{bias}; {gates[self.kind]}",
            f"input: {self.dtype.name} [batch, time, {self.features}]",
            f"output: {self.dtype.name} [batch, time, {self.hidden * (1 + self.bidirectional)}]",
        ]
        for index in range(len(self.layers)):
            names = [f"{index}.h", f"{index}.c"] if self.kind == "LSTM" else [f"{index}.h"]
            if len(self.layers) == 1 and not self.bidirectional:
                names = [name[2:] for name in names]
            shape = f"[batch, {'2, ' if self.bidirectional else ''}{self.hidden}]"
            lines += [f"state {name}: {self.dtype.name} {shape}, starts from zeros" for name in names]
        if self.bidirectional:
            lines.append(
                "a call must hold a whole sequence, and is never cut: the backward direction begins at its end; the "
                "states of both directions are carried from call to call"
            )
        return lines

    def _cell(self, direction: _Direction) -> Cell:
        use_bias = direction.b_ih is not None
        options: dict[str, Any] = {"activation": self.nonlinearity} if self.kind == "RNN" else {}
        cell = _CELLS[self.kind](units=self.hidden, use_bias=use_bias, **options)
        order = _KERAS_GATES[self.kind]
        weights = {"kernel": _gates(direction.w_ih, order).T, "recurrent_kernel": _gates(direction.w_hh, order).T}
        if direction.b_ih is not None and direction.b_hh is not None:
            both = [_gates(direction.b_ih, order), _gates(direction.b_hh, order)]
            weights["bias"] = np.stack(both) if self.kind == "GRU" else both[0] + both[1]
        made: Cell = cell.with_weights(weights, direction.w_ih.shape[1], self.dtype)
        return made

    def _onnx_bias(self, direction: _Direction) -> np.ndarray:
        """[2 * gates * hidden]: of the input, then of the recurrence."""
        if direction.b_ih is None or direction.b_hh is None:
            return np.zeros(2 * len(direction.w_ih), self.dtype)
        order = _ONNX_GATES[self.kind]
        return np.concatenate([_gates(direction.b_ih, order), _gates(direction.b_hh, order)])


def read_torch_state(path: Path, *, prefix: str | None = None, nonlinearity: Nonlinearity = "tanh") -> TorchModule:
    """Reads a state dict from a safetensors file.

    Args:
        path: the file.
        prefix: what the names of the module's tensors begin with, such as ``encoder.rnn.``; by default the one prefix
            that there is. Tensors of other names are refused unless a prefix leaves them aside.
        nonlinearity: of an nn.RNN, which the file does not say.

    Raises:
        ModelError: the file has no such module, several, something else besides, or tensors that do not fit.
    """
    tensors = load_tensors(path)
    parts: dict[tuple[int, bool], dict[str, np.ndarray]] = {}
    found = {match["prefix"] for name in tensors if (match := _KEY.match(name))}
    if not found:
        raise ModelError(
            f"{path}: has no recurrent layer of PyTorch (weight_ih_l0, weight_hh_l0); its tensors are "
            f"{_listed(tensors)}"
        )
    if prefix is None and len(found) > 1:
        raise ModelError(f"{path}: has several recurrent modules, {sorted(found)}; choose one with --prefix")
    chosen = next(iter(found)) if prefix is None else prefix
    if chosen not in found:
        dotted = f"{chosen}."
        if dotted not in found:
            raise ModelError(f"{path}: has no recurrent module under {chosen!r}; there is {sorted(found)}")
        chosen = dotted
    extra = [name for name in tensors if not (match := _KEY.match(name)) or match["prefix"] != chosen]
    if extra and prefix is None:
        raise ModelError(
            f"{path}: has tensors beside the recurrent module's: {_listed(extra)}; to leave them aside, name the "
            f"module with --prefix {chosen or repr('')}"
        )
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None or match["prefix"] != chosen:
            continue
        if match["part"] == "weight_hr":
            raise ModelError(
                f"{path}: {name}: the module has proj_size, a projection of h that cells here do not have; train it "
                "with proj_size 0"
            )
        parts.setdefault((int(match["layer"]), bool(match["back"])), {})[match["part"]] = tensor
    return _module(path, parts, nonlinearity)


def _module(
    path: Path, parts: Mapping[tuple[int, bool], Mapping[str, np.ndarray]], nonlinearity: Nonlinearity
) -> TorchModule:
    count = 1 + max(layer for layer, _ in parts)
    bidirectional = any(back for _, back in parts)
    biased = any("bias_ih" in part for part in parts.values())
    wanted = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if biased else [])]
    layers = []
    first = parts.get((0, False), {})
    if "weight_hh" not in first or first["weight_hh"].ndim != 2 or "weight_ih" not in first:
        raise ModelError(f"{path}: weight_ih_l0 and weight_hh_l0, each of two axes, are missing")
    hidden = first["weight_hh"].shape[1]
    gates = first["weight_hh"].shape[0] // max(hidden, 1)
    if gates not in _KINDS or first["weight_hh"].shape[0] != gates * hidden:
        raise ModelError(
            f"{path}: weight_hh_l0: expected shape [hidden, hidden] of an RNN, [3 * hidden, hidden] of a GRU or "
            f"[4 * hidden, hidden] of an LSTM, got {list(first['weight_hh'].shape)}"
        )
    features = first["weight_ih"].shape[-1]
    dtype = first["weight_ih"].dtype
    if dtype.name not in ("float16", "float32", "float64"):
        raise ModelError(f"{path}: weight_ih_l0: expected float16, float32 or float64, got {dtype}")
    if bidirectional and dtype != np.float32:
        raise ModelError(f"{path}: weight_ih_l0: a bidirectional module must be float32 for onnxruntime, got {dtype}")
    for layer in range(count):
        size = features if layer == 0 else hidden * (1 + bidirectional)
        shapes = {
            "weight_ih": (gates * hidden, size),
            "weight_hh": (gates * hidden, hidden),
            "bias_ih": (gates * hidden,),
            "bias_hh": (gates * hidden,),
        }
        directions = []
        for back in (False, True) if bidirectional else (False,):
            part = parts.get((layer, back), {})
            for name in wanted:
                full = f"{name}_l{layer}{'_reverse' if back else ''}"
                if name not in part:
                    raise ModelError(f"{path}: {full} is missing")
                if part[name].shape != shapes[name] or part[name].dtype != dtype:
                    raise ModelError(
                        f"{path}: {full}: expected {dtype} {list(shapes[name])}, got {part[name].dtype} "
                        f"{list(part[name].shape)}"
                    )
            directions.append(
                _Direction(part["weight_ih"], part["weight_hh"], part.get("bias_ih"), part.get("bias_hh"))
            )
        layers.append(tuple(directions))
    return TorchModule(_KINDS[gates], hidden, features, bidirectional, tuple(layers), dtype, nonlinearity)


def _gates(weight: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Puts the gates, which lie one below the other in the first axis, in another order."""
    parts = np.split(weight, len(order))
    return np.concatenate([parts[gate] for gate in order])


def _listed(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")
