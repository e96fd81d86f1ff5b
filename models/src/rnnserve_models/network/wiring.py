"""How the layers of a model are wired, from the configs of Keras 2 and Keras 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rnnserve_models.network.config import Config
from rnnserve_models.network.layer import Shape

Ref = tuple[str, int]
"""An output: the key of a call, or the name of an input, and which of its outputs."""

_MASK_OPERATIONS = ("NotEqual", "Any", "Equal", "Not", "LogicalNot", "Cast", "ExpandDims")


@dataclass(frozen=True)
class InputLayer:
    """An input of a model: the shape of a row, None where the config does not say, and the batch size if fixed."""

    shape: Shape | None
    batch: int | None = None


@dataclass(frozen=True)
class Call:
    """A call of the layer of that name.

    ``unmasked``: the layer does not look at the mask of its input, but passes it on. So Keras 3 calls a recurrent layer
    that is given an initial state: it takes a mask from an input only where that is the only tensor.
    """

    layer: str
    inputs: tuple[Ref, ...]
    states: tuple[Ref, ...] = ()
    mask: Ref | None = None
    unmasked: bool = False


@dataclass
class Wiring:
    """A model: its inputs, its layers in the order of their weights, its calls in an order that can be computed."""

    inputs: dict[str, InputLayer] = field(default_factory=dict)
    layers: dict[str, Config] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    outputs: list[Ref] = field(default_factory=list)


def declared_input(config: Config) -> InputLayer | None:
    """What a layer's config says of its input."""
    for key in ("batch_shape", "batch_input_shape", "build_input_shape"):
        shape = config.values.get(key)
        if isinstance(shape, list | tuple) and shape and all(n is None or isinstance(n, int) for n in shape):
            return InputLayer(tuple(shape[1:]), shape[0] if key != "build_input_shape" else None)
    for key in ("input_shape", "shape"):
        shape = config.values.get(key)
        if isinstance(shape, list | tuple) and all(n is None or isinstance(n, int) for n in shape):
            return InputLayer(tuple(shape))
    return None


def sequential(config: Config) -> Wiring:
    """The wiring of a Sequential.

    Raises:
        ModelError: the config is not that of one.
    """
    parts = _layers(config)
    wiring = Wiring()
    declared = declared_input(config)
    if parts and parts[0].class_name == "InputLayer":
        declared = declared_input(parts.pop(0)) or declared
    elif parts:
        declared = declared_input(parts[0]) or declared
    if not parts:
        raise config.error("layers: expected at least one")
    wiring.inputs["input"] = declared or InputLayer(None)
    ref: Ref = ("input", 0)
    for part in parts:
        if part.class_name == "InputLayer":
            raise config.error("layers: an InputLayer must be the first")
        name = _distinct(part.name, wiring.layers)
        wiring.layers[name] = part
        wiring.calls[f"{name}/0"] = Call(name, (ref,))
        ref = (f"{name}/0", 0)
    return wiring  # outputs: all of the last layer's


def functional(config: Config) -> Wiring:
    """The wiring of a functional model.

    Raises:
        ModelError: the config is not that of one, or has branches that are not supported.
    """
    wiring, made = Wiring(), Wiring()
    dropped: set[str] = set()
    documents = config.get("layers")
    for part, document in zip(_layers(config), documents or [], strict=True):
        name = str(document.get("name") or part.name)
        if part.class_name == "InputLayer":
            made.inputs[name] = declared_input(part) or InputLayer(None)
            continue
        nodes = document.get("inbound_nodes")
        if not isinstance(nodes, list | tuple) or not nodes:
            raise part.error("inbound_nodes: expected the layers that feed it")
        if part.class_name in _MASK_OPERATIONS:  # Keras 3 writes the masks out; here they go with the tensors
            dropped.add(name)
            continue
        part.name = name
        wiring.layers[name] = part
        for number, node in enumerate(nodes):
            made.calls[f"{name}/{number}"] = _call(part, name, node)
    for source, _ in _refs(config.get("input_layers"), config, "input_layers"):
        if source not in made.inputs:
            raise config.error(f"input_layers: {source!r} is not an InputLayer")
        wiring.inputs[source] = made.inputs[source]
    outputs = _refs(config.get("output_layers"), config, "output_layers")
    _renumber(made, outputs)
    wiring.outputs = [_resolved(ref, made) for ref in outputs]
    waiting = {key: _connected(call, made, dropped, wiring.layers[call.layer]) for key, call in made.calls.items()}
    while waiting:
        ready = [key for key, call in waiting.items() if not any(ref[0] in waiting for ref in _all(call))]
        if not ready:
            raise config.error(f"layers: {sorted(waiting)} feed each other")
        for key in ready:
            call = waiting.pop(key)
            if missing := [ref[0] for ref in _all(call) if ref[0] not in wiring.calls and ref[0] not in wiring.inputs]:
                raise config.error(f"layers: {call.layer!r} takes {missing[0]!r}, which is not there")
            wiring.calls[key] = call
    for key, _ in wiring.outputs:
        if key not in wiring.calls and key not in wiring.inputs:
            raise config.error(f"output_layers: {key!r} is not a layer of the model")
    return wiring


def _layers(config: Config) -> list[Config]:
    layers = config.get("layers")
    if not isinstance(layers, list | tuple) or not layers:
        raise config.error(f"layers: expected a list of layers, got {layers!r:.80}")
    where = f"{config.class_name} {config.name!r}: layers"
    return [Config(layer, config.version, f"{where}.{index}") for index, layer in enumerate(layers)]


def _distinct(name: str, taken: Mapping[str, Any]) -> str:
    number = 1
    found = name
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


def _call(part: Config, name: str, node: Any) -> Call:
    """A call, from an inbound node; references name layers, not yet calls."""
    arguments: Any
    keywords: Any
    if isinstance(node, Mapping):  # Keras 3
        arguments, keywords = node.get("args", ()), node.get("kwargs", {})
        if not isinstance(arguments, list | tuple) or not isinstance(keywords, Mapping):
            raise part.error(f"inbound_nodes: expected a list as args and a mapping as kwargs, got {node!r:.80}")
        keywords = dict(keywords)
    elif isinstance(node, list | tuple):  # Keras 2: [layer, node, tensor, keywords] for each tensor
        if node and isinstance(node[0], str):
            node = [node]
        if not all(isinstance(tensor, list | tuple) for tensor in node):
            raise part.error(f"inbound_nodes: expected lists [layer, node, tensor, keywords], got {node!r:.80}")
        arguments = [tuple(tensor[:3]) for tensor in node]
        keywords = {}
        for tensor in node:
            keywords.update(tensor[3] if len(tensor) > 3 and isinstance(tensor[3], Mapping) else {})
    else:
        raise part.error(f"inbound_nodes: expected a list or a mapping, got {node!r:.80}")
    refs = [ref for argument in arguments for ref in _tensors(argument, part)]
    if "inputs" in keywords or "sequences" in keywords:
        refs = [*_tensors(keywords.pop("inputs", keywords.pop("sequences", None)), part), *refs]
    states = tuple(_tensors(keywords.pop("initial_state", None), part))
    mask = next(_tensors(keywords.pop("mask", None), part), None)
    for key, value in keywords.items():
        if next(_tensors(value, part), None) is not None:
            raise part.error(f"inbound_nodes: a tensor as {key} is not supported")
    if not refs:
        raise part.error("inbound_nodes: expected an input")
    recurrent = part.class_name in ("RNN", "SimpleRNN", "LSTM", "GRU", "Bidirectional")
    if recurrent and len(refs) > 1:  # Keras 2 lists the initial states after the input
        refs, states = refs[:1], (*refs[1:], *states)
    return Call(name, tuple(refs), states, mask, bool(part.version == 3 and states and mask is None))


def _tensors(value: Any, part: Config) -> Iterator[Ref]:
    """The tensors in an argument, as (layer, node, tensor) packed into a Ref "layer/node".

    Raises:
        ModelError: one does not say of which layer it is.
    """
    if isinstance(value, Mapping):
        if value.get("class_name") != "__keras_tensor__":
            return
        inner = value.get("config")
        history: Any = inner.get("keras_history") if isinstance(inner, Mapping) else None
        if not _is_history(history):
            raise part.error(f"keras_history: expected [layer, node, tensor], got {history!r:.80}")
        yield (f"{history[0]}/{history[1]}", history[2])
    elif isinstance(value, list | tuple):
        if _is_history(value[:3]):
            if value[0] != "_CONSTANT_VALUE":
                yield (f"{value[0]}/{value[1]}", value[2])
            return
        for item in value:
            yield from _tensors(item, part)


def _is_history(value: Any) -> bool:
    """Whether it is [layer, node, tensor]."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in value[1:])
    return isinstance(value[0], str) and numbers


def _refs(value: Any, config: Config, key: str) -> list[Ref]:
    if isinstance(value, Mapping):
        value = list(value.values())
    found = list(_tensors(value, config))
    if not found:
        raise config.error(f"{key}: expected at least one of [layer, node, tensor], got {value!r:.80}")
    if key == "input_layers":
        return [(name.rpartition("/")[0], index) for name, index in found]
    return found


def _renumber(made: Wiring, outputs: list[Ref]) -> None:
    """Gives calls the numbers that the rest of the model knows them by.

    A model inside a model may be counted from 1: its call 0 is that by which it was made, which no one lists.
    """
    known: dict[str, int] = {}  # the greatest number by which a layer's calls are known
    for ref in [*outputs, *(ref for call in made.calls.values() for ref in _all(call))]:
        name, _, number = ref[0].rpartition("/")
        known[name] = max(known.get(name, 0), int(number))
    renumbered = {}
    for name in dict.fromkeys(call.layer for call in made.calls.values()):
        own = [call for call in made.calls.values() if call.layer == name]
        first = max(known.get(name, 0) - len(own) + 1, 0)
        renumbered.update({f"{name}/{first + index}": call for index, call in enumerate(own)})
    made.calls = renumbered


def _resolved(ref: Ref, made: Wiring) -> Ref:
    """Inputs by their names, calls by their keys."""
    name = ref[0].rpartition("/")[0]
    return (name, 0) if name in made.inputs else ref


def _connected(call: Call, made: Wiring, dropped: set[str], part: Config) -> Call:
    mask = call.mask
    if mask is not None and mask[0].rpartition("/")[0] in dropped:
        mask = None
    for ref in call.inputs:
        if ref[0].rpartition("/")[0] in dropped:
            raise part.error(f"inbound_nodes: takes {ref[0]!r}, an operation that is not supported")
    return Call(
        call.layer,
        tuple(_resolved(ref, made) for ref in call.inputs),
        tuple(_resolved(ref, made) for ref in call.states),
        None if mask is None else _resolved(mask, made),
        call.unmasked,
    )


def _all(call: Call) -> list[Ref]:
    return [*call.inputs, *call.states, *([] if call.mask is None else [call.mask])]
