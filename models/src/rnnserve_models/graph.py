"""Looking into ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx.inliner

from rnnserve_models.errors import ModelError
from rnnserve_models.spec import GraphSpec

_RECURRENT = {"LSTM": ("initial_h", "initial_c"), "GRU": ("initial_h",), "RNN": ("initial_h",)}
_INITIAL_H = 5  # the index of initial_h among the inputs of ONNX's recurrent operators; initial_c is the next


def check_states(graph: bytes, spec: GraphSpec, *, origin: str) -> None:
    """Refuses a graph that would forget: a recurrent operator that no declared state reaches.

    Such an operator starts every call from zeros or from a constant, so that what it has seen before is lost.

    Args:
        graph: a serialized ModelProto.
        spec: its description.
        origin: the file, for messages.

    Raises:
        ModelError: the graph cannot be parsed, keeps tensors in other files, or has an undeclared state.
    """
    try:
        model = onnx.load_model_from_string(graph)
        outside = next(external_tensors(model), None)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # protobuf's DecodeError, whose type depends on its implementation
        raise ModelError(f"{origin}: is not an ONNX model: {error}") from error
    if outside is not None:
        raise ModelError(f"{origin}: keeps tensors in other files; save it as one file")
    declared = {state.input for state in spec.states}
    producers: dict[str, Any] = {}
    for node in _nodes(model.graph):
        producers.update(dict.fromkeys(node.output, node))
        for subgraph in _subgraphs(node):  # the inputs of a Loop's or Scan's body come from those of its node
            producers.update((value.name, node) for value in subgraph.input)
    for alternatives in _recurrent(model.graph):
        forgetful = [name for node in alternatives if (name := _forgotten(node, declared, producers))]
        if len(forgetful) == len(alternatives):
            node = alternatives[0]
            raise ModelError(
                f"{origin}: {forgetful[0]} of the {node.op_type} node {node.name or node.output[0]!r} is not fed from "
                "a declared state, so every call would start anew; make it an input of the graph and list it under "
                "states"
            )


def _forgotten(node: Any, declared: set[str], producers: Mapping[str, Any]) -> str:
    """The initial state of a recurrent node that no declared state reaches, or nothing."""
    for index, name in enumerate(_RECURRENT[node.op_type], _INITIAL_H):
        if not _reaches(node.input[index] if len(node.input) > index else "", declared, producers):
            return name
    return ""


def _recurrent(graph: Any) -> Iterator[list[Any]]:
    """Every recurrent node, those in the branches of one If together: exported models fall back to zeros in one."""
    for node in graph.node:
        if node.op_type in _RECURRENT:
            yield [node]
        inner = [group for subgraph in _subgraphs(node) for group in _recurrent(subgraph)]
        if node.op_type == "If" and inner:
            yield [each for group in inner for each in group]
        else:
            yield from inner


def _nodes(graph: Any) -> Iterator[Any]:
    """Every node, those of subgraphs too."""
    for node in graph.node:
        yield node
        for subgraph in _subgraphs(node):
            yield from _nodes(subgraph)


def external_tensors(message: Any) -> Iterator[Any]:
    """The tensors of a ModelProto that are kept in other files: wherever they stand, in functions, sparse initializers
    and parts that nothing reads too.
    """
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if isinstance(value, Sequence) else (value,):
                yield from external_tensors(each)


def _subgraphs(node: Any) -> Iterator[Any]:
    """The bodies of an If, a Loop or a Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def _reaches(name: str, declared: set[str], producers: Mapping[str, Any]) -> bool:
    """Whether the value of a tensor depends on a declared state, other than on its shape."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        tensor = waiting.pop()
        if tensor in declared:
            return True
        if not tensor or tensor in seen:
            continue
        seen.add(tensor)
        node = producers.get(tensor)
        if node is not None and node.op_type != "Shape":
            waiting.extend(node.input)
            waiting.extend(value.name for subgraph in _subgraphs(node) for value in subgraph.output)
    return False
