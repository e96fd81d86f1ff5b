"""A batch axis for graphs that have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import compose, helper, numpy_helper

from rnnserve_models.errors import ModelError

_PREFIX = "inner/"
_AXES = "outer/axes"
_AXES_AS_INPUT = 13  # the opset since which Squeeze and Unsqueeze take their axes as an input


def with_batch_axis(content: bytes, *, origin: str) -> bytes:
    """A graph that puts an axis of 1 before every input's and every output's axes.

    Args:
        content: a serialized ModelProto.
        origin: the file, for messages.

    Raises:
        ModelError: it is not an ONNX graph.
    """
    try:
        model = onnx.load_model_from_string(content)
        inner = compose.add_prefix(model, _PREFIX)
    except Exception as error:  # protobuf's DecodeError, whose type depends on its implementation
        raise ModelError(f"{origin}: is not an ONNX model: {error}") from error
    graph = inner.graph
    opset = next((each.version for each in inner.opset_import if each.domain in ("", "ai.onnx")), 1)
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [_outer(value) for value in graph.input if value.name not in stored]
    outputs = [_outer(value) for value in graph.output]
    before = [_node("Squeeze", value.name, _PREFIX + value.name, opset) for value in inputs]
    after = [_node("Unsqueeze", _PREFIX + value.name, value.name, opset) for value in outputs]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    if opset >= _AXES_AS_INPUT:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), _AXES))
    serialized: bytes = inner.SerializeToString()
    return serialized


def _outer(value: Any) -> Any:
    """An input or output by its own name, with the new axis."""
    made = onnx.ValueInfoProto()
    made.CopyFrom(value)
    made.name = value.name.removeprefix(_PREFIX)
    shape = made.type.tensor_type.shape
    inner = [each.SerializeToString() for each in shape.dim]
    del shape.dim[:]
    shape.dim.add().dim_value = 1
    for each in inner:
        shape.dim.add().ParseFromString(each)
    return made


def _node(kind: str, source: str, target: str, opset: int) -> Any:
    if opset >= _AXES_AS_INPUT:
        return helper.make_node(kind, [source, _AXES], [target])
    return helper.make_node(kind, [source], [target], axes=[0])
