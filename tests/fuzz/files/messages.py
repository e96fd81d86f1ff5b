"""Protobuf messages with some of their fields changed: graphs of ONNX, whose fields all are there to be changed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import TensorProto, helper

_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    5,
    7,
    11,
    16,
    64,
    1000,
    2**20,
    2**31 - 1,
    2**31,
    2**40,
    2**62,
    2**63 - 1,
    -(2**31),
    -(2**63),
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = (b"", b"\0", b"x" * 300, b"../../etc/passwd", b"\xff\xfe", "é".encode(), b"%n%s")
_OPERATORS = (
    *("LSTM", "GRU", "RNN", "Loop", "Scan", "If", "Constant", "ConstantOfShape", "Expand", "Tile", "Range", "Shape"),
    *(
        "Gather",
        "GatherND",
        "Slice",
        "Pad",
        "Resize",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Concat",
        "Split",
    ),
    *("Cast", "MatMul", "Gemm", "Conv", "Einsum", "TopK", "OneHot", "NonZero", "Where", "Identity", "SequenceEmpty"),
    *("Add", "Tanh", "Softmax", "ReduceSum", "CumSum", "ScatterND", "Compress", "EyeLike", "RandomNormal", "Nonsense"),
)
_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def changed(model: onnx.ModelProto, chance: Random) -> onnx.ModelProto:
    """A copy of a graph with some of it changed."""
    model_ = onnx.ModelProto()
    model_.CopyFrom(model)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        chance.choice((*[_field] * 8, *[_dims] * 4, *[_edge] * 4, *[_operator] * 4, _outside, _grown))(model_, chance)
    return model_


def refers(model: onnx.ModelProto) -> bool:
    """Whether a graph refers to another file anywhere."""
    return any(
        isinstance(each, TensorProto) and (each.external_data or each.data_location == TensorProto.EXTERNAL)
        for each in _messages(model)
    )


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            for each in value if field.is_repeated else (value,):
                yield from _messages(each)


def _any(model: onnx.ModelProto, chance: Random, *kinds: type[Any]) -> Any:
    found = [each for each in _messages(model) if not kinds or isinstance(each, kinds)]
    return chance.choice(found) if found else None


def _field(model: onnx.ModelProto, chance: Random) -> None:
    """Any field of any message: another value, none, twice, or that of another message of its kind."""
    message = _any(model, chance)
    field = chance.choice(message.DESCRIPTOR.fields)
    if chance.random() < 0.15:
        message.ClearField(field.name)
        return
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        others = [each for each in _messages(model) if each.DESCRIPTOR is field.message_type]
        if not others:
            return
        other = type(others[0])()
        other.CopyFrom(chance.choice(others))
        if field.is_repeated:
            for _ in range(chance.choice((1, 1, 2, 30))):
                getattr(message, field.name).add().CopyFrom(other)
        else:
            getattr(message, field.name).CopyFrom(other)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if values and chance.random() < 0.5:
            at = chance.randrange(len(values))
            if chance.random() < 0.4:
                del values[at]
            else:
                values[at] = _scalar(field, chance)
        else:
            values.append(_scalar(field, chance))
    else:
        setattr(message, field.name, _scalar(field, chance))


def _dims(model: onnx.ModelProto, chance: Random) -> None:
    """A size that is not that of what there is."""
    message = _any(model, chance, TensorProto, onnx.TensorShapeProto)
    if isinstance(message, TensorProto):
        if message.dims and chance.random() < 0.7:
            message.dims[chance.randrange(len(message.dims))] = chance.choice(_NUMBERS)
        else:
            message.dims.append(chance.choice(_NUMBERS))
    elif message is not None:
        dim = message.dim[chance.randrange(len(message.dim))] if message.dim else message.dim.add()
        if chance.random() < 0.7:
            dim.dim_value = chance.choice(_NUMBERS)
        else:
            dim.dim_param = chance.choice(("", "batch", "time", "x"))


def _edge(model: onnx.ModelProto, chance: Random) -> None:
    """A node takes what another gives, or nothing: circles too."""
    nodes = [each for each in _messages(model) if isinstance(each, onnx.NodeProto)]
    names = [name for node in nodes for name in (*node.input, *node.output)] or [""]
    if not nodes:
        return
    node = chance.choice(nodes)
    side = chance.choice((node.input, node.input, node.output))
    if side and chance.random() < 0.7:
        side[chance.randrange(len(side))] = chance.choice((*names, ""))
    elif side and chance.random() < 0.5:
        del side[chance.randrange(len(side))]
    else:
        side.append(chance.choice((*names, "")))


def _operator(model: onnx.ModelProto, chance: Random) -> None:
    """A node is of another kind, or has another attribute."""
    node = _any(model, chance, onnx.NodeProto)
    if node is None:
        return
    if chance.random() < 0.5:
        node.op_type = chance.choice(_OPERATORS)
        return
    name = chance.choice(
        ("hidden_size", "direction", "layout", "axis", "axes", "perm", "to", "num_scan_inputs", "body")
    )
    value = chance.choice((chance.choice(_NUMBERS), "sideways", [1, 2, 3], [-1], chance.choice(_FLOATS)))
    node.attribute.append(helper.make_attribute(name, value))


def _outside(model: onnx.ModelProto, chance: Random) -> None:
    """A tensor that is said to be in another file."""
    tensor = _any(model, chance, TensorProto)
    if tensor is None:
        return
    tensor.data_location = TensorProto.EXTERNAL
    if chance.random() < 0.8:
        place = chance.choice(("/etc/passwd", "../../etc/passwd", "canary", "model.yaml", "", "x" * 300))
        tensor.external_data.add(key="location", value=place)
        tensor.external_data.add(key="offset", value=chance.choice(("0", "-1", str(2**63), "x")))


def _grown(model: onnx.ModelProto, chance: Random) -> None:
    """More than there was: another input, an endless loop, or what makes much of little."""
    graph = model.graph
    names = [name for node in graph.node for name in node.output] or ["x"]
    match chance.randrange(4):
        case 0:
            graph.input.append(
                helper.make_tensor_value_info(
                    f"more{len(graph.input)}",
                    chance.choice((1, 6, 7, 8, 9, 10, 16)),
                    chance.choice(([], [1], ["b", 2], None)),
                )
            )
        case 1:
            size = chance.choice(([2**20, 2**20], [10**9], [2**40], [0], [-1]))
            graph.initializer.append(helper.make_tensor("size", TensorProto.INT64, [len(size)], size))
            graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["much"]))
        case 2:
            graph.initializer.append(helper.make_tensor("limit", TensorProto.INT64, [], [2**62]))
            graph.initializer.append(helper.make_tensor("go", TensorProto.BOOL, [], [True]))
            body = helper.make_graph(
                [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["s"], ["t"])],
                "endless",
                [
                    helper.make_tensor_value_info("i", TensorProto.INT64, []),
                    helper.make_tensor_value_info("c", TensorProto.BOOL, []),
                    helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
                ],
                [
                    helper.make_tensor_value_info("d", TensorProto.BOOL, []),
                    helper.make_tensor_value_info("t", TensorProto.FLOAT, None),
                ],
            )
            source = chance.choice([value.name for value in graph.input] or ["x"])
            graph.node.insert(0, helper.make_node("Loop", ["limit", "go", source], ["looped"], body=body))
        case _:
            node = chance.choice(graph.node) if graph.node else graph.node.add()
            for index in range(chance.choice((2, 100))):
                other = graph.node.add()
                other.CopyFrom(node)
                for k, name in enumerate(other.output):
                    other.output[k] = f"{name}_{index}"
                if other.input:
                    other.input[0] = chance.choice(names)


def _scalar(field: FieldDescriptor, chance: Random) -> Any:
    kind = field.cpp_type
    if kind in _LIMITS:
        low, high = _LIMITS[kind]
        return max(low, min(high, chance.choice(_NUMBERS)))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return chance.choice(field.enum_type.values).number
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return chance.choice(_FLOATS)
    text = chance.choice(_TEXTS)
    return text if field.type == FieldDescriptor.TYPE_BYTES else text.decode("utf-8", "replace")
