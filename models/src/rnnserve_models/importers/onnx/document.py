"""An ONNX graph with an index: who makes a tensor, and what it is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import inliner

from rnnserve_models.errors import ModelError
from rnnserve_models.graph import external_tensors

RECURRENT = {"LSTM": ("h", "c"), "GRU": ("h",), "RNN": ("h",)}
"""ONNX's recurrent operators, and what their states are called."""

INITIAL = 5
"""The index of a recurrent operator's first initial state among its inputs."""

LENGTHS = 4
"""The index of its ``sequence_lens``."""

_SHAPES = frozenset({"Shape", "Size"})
_MOVES = frozenset(
    {
        *("Identity", "Cast", "CastLike", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Concat", "Split", "Slice"),
        *("Gather", "Expand", "Tile", "Flatten", "Dropout"),
    }
)
"""Operators that hand on the elements of their first input (of all inputs, for Concat)."""


class Document:
    """A parsed graph.

    Attributes:
        model: the ModelProto, its local functions inlined.
        inputs: the graph's inputs that are no initializers, by name.
        outputs: the names of its outputs.
        constants: every initializer and Constant node, by name; those of subgraphs too.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        graph = model.graph
        stored = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
        self.inputs = {value.name: value for value in graph.input if value.name not in stored}
        self.outputs = [value.name for value in graph.output]
        self.constants: dict[str, np.ndarray] = {}
        self._producers: dict[str, Any] = {}
        self._sources: dict[str, list[str]] = {}  # of a tensor inside a subgraph: where it comes from, outside
        self._index(graph)

    @classmethod
    def parse(cls, content: bytes, origin: str) -> Document:
        """Reads a file.

        Raises:
            ModelError: it is not ONNX, keeps tensors in other files, or has no inputs.
        """
        try:
            model = onnx.load_model_from_string(content)
        except Exception as error:  # protobuf's DecodeError, whose type depends on its implementation
            raise ModelError(f"{origin}: is not an ONNX model: {error}") from error
        if not model.graph.node:
            raise ModelError(f"{origin}: is not an ONNX model: it has no nodes")
        for tensor in external_tensors(model):
            raise ModelError(
                f"{origin}: keeps {tensor.name!r} and maybe more in other files (external data); save it as one file"
            )
        if model.functions:
            model = inliner.inline_local_functions(model)
        try:
            document = cls(model)
        except ModelError as error:
            raise ModelError(f"{origin}: {error}") from error
        if not document.inputs:
            raise ModelError(f"{origin}: the graph takes no input")
        return document

    def copy(self) -> Any:
        """A ModelProto of one's own to change."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return model

    def producer(self, name: str) -> Any | None:
        """The node that makes a tensor, the node of the subgraph for what a subgraph takes in, or None."""
        return self._producers.get(name)

    def nodes(self) -> Iterator[Any]:
        """The nodes of the graph itself, in order."""
        yield from self.model.graph.node

    def origins(self, name: str, stop: Callable[[Any], bool]) -> tuple[set[str], list[Any]]:
        """What the elements of a tensor come from, shapes aside.

        Args:
            name: the tensor.
            stop: whether to look no further back than a node.

        Returns:
            The graph's inputs, and the nodes that ``stop`` chose.
        """
        found: set[str] = set()
        stops: list[Any] = []
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            tensor = waiting.pop()
            if not tensor or tensor in seen:
                continue
            seen.add(tensor)
            if tensor in self.inputs:
                found.add(tensor)
            node = self.producer(tensor)
            if node is None or node.op_type in _SHAPES:
                continue
            if stop(node):
                stops.append(node)
                continue
            waiting.extend(self._sources.get(tensor, node.input))
            for subgraph in subgraphs(node):
                waiting.extend(value.name for value in subgraph.output)
        return found, stops

    def moved_from(self, name: str) -> str | None:
        """The graph's input of which a tensor holds some or all elements, only moved about; None if there is none."""
        while name not in self.inputs:
            node = self.producer(name)
            if node is None or node.op_type not in _MOVES or (node.op_type == "Concat" and len(set(node.input)) > 1):
                return None
            name = node.input[0]
        return name

    def _index(self, graph: Any) -> None:
        for tensor in graph.initializer:
            self.constants[tensor.name] = _array(tensor, tensor.name)
        for node in graph.node:
            self._producers.update(dict.fromkeys(node.output, node))
            if node.op_type == "Constant" and node.output and [each.name for each in node.attribute][:1] == ["value"]:
                self.constants[node.output[0]] = _array(node.attribute[0].t, node.output[0])
            for subgraph in subgraphs(node):
                self._index(subgraph)
                for value in subgraph.input:
                    self._producers[value.name] = node
                    self._sources[value.name] = list(node.input)


def _array(tensor: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except (TypeError, ValueError, LookupError) as error:  # its elements are not as many as its axes say, or of no type
        raise ModelError(f"the tensor {name!r:.100} is damaged: {error}") from error


def subgraphs(node: Any) -> Iterator[Any]:
    """The bodies of an If, a Loop or a Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value; a string's as str."""
    for each in node.attribute:
        if each.name == name and not each.ref_attr_name:  # those of functions, which are inlined
            value = onnx.helper.get_attribute_value(each)
            return value.decode() if isinstance(value, bytes) else value
    return default


def label(node: Any) -> str:
    """What to call a node in messages."""
    return f"{node.op_type} node {node.name or next(iter(node.output), '')!r}"


def dims(value: Any) -> list[int | str | None]:
    """The axes that a graph's input or output declares: a size, a symbol, or None where it says nothing."""
    shape = value.type.tensor_type.shape
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in shape.dim]


def dtype(value: Any) -> str:
    """NumPy's name of the element type that a graph's input or output declares."""
    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)


def session(model: Any, origin: str, *, outputs: list[str] | None = None) -> ort.InferenceSession:
    """Loads a ModelProto, with these inner tensors among its outputs.

    Raises:
        ModelError: onnxruntime refuses it.
    """
    if missing := [name for name in outputs or () if name not in {value.name for value in model.graph.output}]:
        extended = onnx.ModelProto()
        extended.CopyFrom(model)
        extended.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in missing)
        model = extended
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen types of its own for a bad graph
        raise ModelError(f"{origin}: onnxruntime refuses the graph: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's text, not too long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
