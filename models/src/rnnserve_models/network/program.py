"""A network that runs: in NumPy, or as a graph under onnxruntime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper

from rnnserve_models.engine.base import EngineError
from rnnserve_models.errors import InputError, ModelError
from rnnserve_models.export import IR_VERSION, OPSET
from rnnserve_models.network.layer import Info, Layer, Masked
from rnnserve_models.onnx_builder import GraphBuilder

Arrays = list[np.ndarray]

MAX_GRAPHS = 8
"""How many graphs a program keeps: with and without masks, and for ``unroll`` one for each number of time steps."""

MAX_UNROLLED_STEPS = 128
"""A longer sequence is not unrolled, which changes no result."""


# onnxruntime 1.32 crashes in it over the Cast between a Transpose and a MatMul, which every float16 layer has.
_DISABLED = ["MatmulTransposeFusion"]


class Program(ABC):
    """Runs a layer, or a network, that was built."""

    name: str

    @abstractmethod
    def run(self, inputs: Sequence[Masked[np.ndarray]], states: Arrays) -> tuple[Arrays, Arrays]:
        """Computes the outputs, and the states after the last step.

        Args:
            inputs: each [B, *shape], batch-major, of the dtypes that the layer takes, at least one step each.
            states: each [B, *shape]; not written to.

        Raises:
            InputError: the layer is not defined for a value or for a number of steps.
            EngineError: it cannot be computed.
        """


class NumpyProgram(Program):
    """The reference."""

    name = "numpy"

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def run(self, inputs: Sequence[Masked[np.ndarray]], states: Arrays) -> tuple[Arrays, Arrays]:
        """See `Program.run`."""
        try:
            outputs, finals = self._layer.forward(list(inputs), states)
        except ModelError as error:  # too few steps for a convolution
            raise InputError("inputs", "a sequence that every layer takes", str(error)) from error
        return [output.x for output in outputs], finals


class OnnxProgram(Program):
    """The layer as graphs under onnxruntime, made when they are first needed."""

    name = "onnx"

    def __init__(self, layer: Layer, rebuild: Callable[[list[Info]], Layer], *, threads: int = 1) -> None:
        """Makes the graph without masks.

        Args:
            layer: what to run.
            rebuild: builds the layer for inputs of other shapes: of a known number of time steps, to unroll it.
            threads: of onnxruntime, for one operator.

        Raises:
            ModelError: a layer has no form in ONNX, or onnxruntime refuses it.
        """
        self._layer = layer
        self._rebuild = rebuild
        self._threads = threads
        self._sessions: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._session((False,) * len(layer.inputs), None)

    def run(self, inputs: Sequence[Masked[np.ndarray]], states: Arrays) -> tuple[Arrays, Arrays]:
        """See `Program.run`."""
        if len(inputs[0].x) == 0:  # onnxruntime's operators are not made for no rows
            return NumpyProgram(self._layer).run(inputs, states)
        self._layer.check([tensor.x for tensor in inputs])
        steps = self._unrolled_steps(inputs)
        session = self._session(tuple(tensor.mask is not None for tensor in inputs), steps)
        feeds = {f"x{i}": np.ascontiguousarray(tensor.x) for i, tensor in enumerate(inputs)}
        feeds |= {f"mask{i}": tensor.mask for i, tensor in enumerate(inputs) if tensor.mask is not None}
        feeds |= {f"state{i}": np.ascontiguousarray(state) for i, state in enumerate(states)}
        try:
            results = session.run(None, feeds)
        except Exception as error:  # onnxruntime raises a dozen types of its own
            raise EngineError(f"onnxruntime failed: {error}") from error
        return results[: len(self._layer.outputs)], results[len(self._layer.outputs) :]

    def _unrolled_steps(self, inputs: Sequence[Masked[np.ndarray]]) -> tuple[int | None, ...] | None:
        if not self._layer.unrolls:
            return None
        found = tuple(
            tensor.x.shape[1] if info.shape and info.shape[0] is None else None
            for tensor, info in zip(inputs, self._layer.inputs, strict=True)
        )
        return None if max((n or 0 for n in found), default=0) > MAX_UNROLLED_STEPS else found

    def _session(self, masked: tuple[bool, ...], steps: tuple[int | None, ...] | None) -> Any:
        key = (masked, steps)
        if key in self._sessions:
            self._sessions.move_to_end(key)
            return self._sessions[key]
        layer = self._layer
        if steps is not None:
            layer = self._rebuild(
                [
                    info if count is None else Info((count, *info.shape[1:]), info.dtype)
                    for info, count in zip(layer.inputs, steps, strict=True)
                ]
            )
        self._sessions[key] = _load(export_layer(layer, masked), layer, self._threads)
        while len(self._sessions) > MAX_GRAPHS:
            self._sessions.popitem(last=False)
        return self._sessions[key]


def export_layer(layer: Layer, masked: Sequence[bool] = ()) -> bytes:
    """The graph of a layer or network that was built.

    It takes ``x0``, ``x1``, ... [batch, ...], bool ``mask0``, ... [batch, time] for the inputs that are ``masked``, and
    ``state0``, ... [batch, ...]; it gives ``y0``, ... and ``final0``, ...

    Returns:
        A serialized ModelProto.

    Raises:
        ModelError: a layer has no form in ONNX.
    """
    graph = GraphBuilder(layer.dtype)
    flags = [*masked, *[False] * (len(layer.inputs) - len(masked))]
    inputs = [Masked(f"x{i}", f"mask{i}" if flag else None) for i, flag in enumerate(flags)]
    states = [f"state{i}" for i in range(len(layer.states))]
    outputs, finals = layer.emit(graph, inputs, states)
    taken = [
        graph.info(x.x, _axes(info, i), info.dtype)
        for i, (x, info) in enumerate(zip(inputs, layer.inputs, strict=True))
    ]
    taken += [graph.info(x.mask, ["batch", f"time{i}"], np.bool_) for i, x in enumerate(inputs) if x.mask]
    taken += [
        graph.info(name, ["batch", *spec.shape], spec.dtype) for name, spec in zip(states, layer.states, strict=True)
    ]
    given = []
    for index, (output, info) in enumerate(zip(outputs, layer.outputs, strict=True)):
        graph.add_node("Identity", [output.x], [f"y{index}"])
        given.append(graph.info(f"y{index}", ["batch", *(n if n else f"steps{index}" for n in info.shape)], info.dtype))
    for index, (final, spec) in enumerate(zip(finals, layer.states, strict=True)):
        graph.add_node("Identity", [final], [f"final{index}"])
        given.append(graph.info(f"final{index}", ["batch", *spec.shape], spec.dtype))
    model = helper.make_model(
        graph.graph("network", taken, given),
        producer_name="rnnserve",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    serialized: bytes = model.SerializeToString()
    return serialized


def _axes(info: Info, index: int) -> list[str | int]:
    axes: list[str | int] = ["batch"]
    for place, extent in enumerate(info.shape):
        axes.append(extent if extent is not None else f"time{index}" + (f"_{place}" if place else ""))
    return axes


def _load(graph: bytes, layer: Layer, threads: int) -> Any:
    import onnxruntime as ort  # takes a second to import

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(graph, options, ["CPUExecutionProvider"], disabled_optimizers=_DISABLED)
    except Exception as error:  # onnxruntime raises a dozen types of its own for a bad graph
        raise layer.error(f"onnxruntime refuses the graph: {error}") from error
