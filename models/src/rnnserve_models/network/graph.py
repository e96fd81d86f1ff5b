"""Sequential and functional models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from rnnserve_models.network.config import Config
from rnnserve_models.network.layer import Info, Layer, Masked, Shape, told
from rnnserve_models.network.wiring import Call, Ref, Wiring, functional, sequential
from rnnserve_models.onnx_builder import GraphBuilder
from rnnserve_models.spec import StateSpec

A = TypeVar("A")
Apply = Callable[[Layer, list[Masked[A]], list[A]], tuple[list[Masked[A]], list[A]]]


@dataclass(frozen=True)
class Node:
    """A call of a layer.

    Attributes:
        key: the layer's name and the number of the call.
        layer: what is called.
        call: on what.
        start: where its states begin among the network's; -1 where they come from another layer.
    """

    key: str
    layer: Layer
    call: Call
    start: int


class Network(Layer):
    """Layers in a row, or wired by name.

    Its states are those of all its recurrent layers, but for one whose initial state comes from another layer. Inputs
    of the model that are nothing but initial states are not inputs of the network: they are those states
    (`state_inputs`).

    Keras: ``Sequential``, ``Model``.

    Attributes:
        input_names: of the inputs that are not states.
        declared: their shapes, as the config has them.
        order: the model's inputs as Keras has them: the index of an input, or (the index of a state,).
        batch_size: that the config fixes, or None.
    """

    def __init__(self, config: Config) -> None:
        """Makes the layers and wires them."""
        from rnnserve_models.network.registry import make_layer  # it names this class

        super().__init__(config)
        wiring = sequential(config) if config.class_name == "Sequential" else functional(config)
        self.layers: dict[str, Layer] = {name: make_layer(part) for name, part in wiring.layers.items()}
        self._wire(wiring)
        recurrent = [layer for layer in self.layers.values() if layer.states]
        self.time_major = any(layer.time_major for layer in recurrent)
        if self.time_major and not all(layer.time_major for layer in recurrent):
            raise self.error("either every recurrent layer is time_major or none")
        self.stateful = any(layer.stateful for layer in recurrent)

    def _wire(self, wiring: Wiring) -> None:
        states: list[StateSpec] = []
        seen: dict[str, tuple[int, int]] = {}  # inputs that are states: (state, uses)
        self.nodes: list[Node] = []
        uses = [ref for call in wiring.calls.values() for ref in (*call.inputs, call.mask)] + wiring.outputs
        entry = 0
        for key, call in wiring.calls.items():
            layer = self.layers[call.layer]
            if len(call.inputs) != (count := len(layer.input_dtypes)):
                raise layer.error(f"takes {count} input(s), got {len(call.inputs)}")
            given = call.states
            if given and len(given) != len(layer.states):
                raise layer.error(f"initial_state: expected {len(layer.states)} tensors, got {len(given)}")
            from_inputs = given and all(
                ref[0] in wiring.inputs and ref not in uses and ref[0] not in seen for ref in given
            )
            start = -1
            if layer.states and (not given or from_inputs):
                start = len(states)
                for index, ref in enumerate(given):
                    seen[ref[0]] = (start + index, 1)
                many = sum(other.layer == call.layer for other in wiring.calls.values()) > 1
                prefix = key if many else layer.name
                states += [replace(s, name=f"{prefix}.{s.name}", path=(entry, *s.path)) for s in layer.states]
                entry += 1
                call = replace(call, states=())
            self.nodes.append(Node(key, layer, call, start))
        self.states = tuple(states)
        self.state_inputs = {name: state for name, (state, _) in seen.items()}
        self.input_names = [name for name in wiring.inputs if name not in seen]
        self.order = [
            (self.state_inputs[name],) if name in seen else self.input_names.index(name) for name in wiring.inputs
        ]
        self.all_input_names = list(wiring.inputs)
        self.declared = [wiring.inputs[name].shape for name in self.input_names]
        self.batch_size = next((i.batch for i in wiring.inputs.values() if i.batch is not None), None)
        self._outputs = wiring.outputs

    @property
    def weight_count(self) -> int:
        """Those of the layers, in the order of the config."""
        return sum(layer.weight_count for layer in self.layers.values())

    @property
    def input_dtypes(self) -> list[np.dtype[Any]]:
        """What the first layer to take an input converts it to."""
        found = []
        for name in self.input_names:
            dtype = self.dtype
            for node in self.nodes:
                if (name, 0) in node.call.inputs:
                    dtype = node.layer.input_dtypes[node.call.inputs.index((name, 0))]
                    break
                if node.call.mask == (name, 0):
                    dtype = np.dtype(bool)
                    break
            found.append(dtype)
        return found

    @property
    def bounds(self) -> list[tuple[int, int] | None]:
        """Those of the layers that take the inputs."""
        found: list[tuple[int, int] | None] = [None] * len(self.input_names)
        for node in self.nodes:
            for (name, _), bounds in zip(node.call.inputs, node.layer.bounds, strict=False):
                if bounds is not None and name in self.input_names:
                    found[self.input_names.index(name)] = bounds
        return found

    @property
    def roles(self) -> list[int | None]:
        """Outputs that are final states of a recurrent layer are states."""
        found: list[int | None] = []
        nodes = {node.key: node for node in self.nodes}
        for key, index in self._outputs if self._outputs else []:
            role = nodes[key].layer.roles[index] if key in nodes else None
            found.append(None if role is None or nodes[key].start < 0 else nodes[key].start + role)
        return found

    @property
    def recorded(self) -> list[bool]:
        """Those of stateful layers."""
        return [each for node in self.nodes if node.start >= 0 for each in node.layer.recorded]

    @property
    def unrolls(self) -> bool:
        """Whether any layer does."""
        return any(layer.unrolls for layer in self.layers.values())

    @property
    def output_names(self) -> list[str]:
        """The name of the layer that gives each output, with a number where a layer gives several."""
        return [key.partition("/")[0] + (f"_{index}" if index else "") for key, index in self._outputs]

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """That of the first layer whose weights say, if those before it change no shape."""
        if len(self.input_names) != 1:
            return None
        start = 0
        for node in self.nodes:
            count = node.layer.weight_count
            shape = node.layer.input_shape_of(weights[start : start + count])
            if shape is not None:
                return shape
            if node.layer.class_name not in ("Masking", "Activation", "Dropout", "SpatialDropout1D", "GaussianNoise"):
                return None
            start += count
        return None

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        own, start = {}, 0
        for name, layer in self.layers.items():
            own[name] = weights[start : start + layer.weight_count]
            start += layer.weight_count
        known = {(name, 0): info for name, info in zip(self.input_names, self.inputs, strict=True)}
        built: set[str] = set()
        for node in self.nodes:
            infos = [self._known(ref, known) for ref in node.call.inputs]
            if node.call.mask is not None and len(self._known(node.call.mask, known).shape) != 1:
                raise node.layer.error(f"mask: expected [batch, time], got {told(known[node.call.mask].shape)}")
            if node.call.layer in built and infos != node.layer.inputs:
                raise node.layer.error("is called on inputs of different shapes")
            outputs = node.layer.outputs if node.call.layer in built else node.layer.build(infos, own[node.call.layer])
            built.add(node.call.layer)
            if self.class_name == "Sequential" and len(outputs) > 1 and node is not self.nodes[-1]:
                raise node.layer.error(f"must have one output to stand before another layer, has {len(outputs)}")
            for spec, ref in zip(node.layer.states, node.call.states, strict=False):
                if self._known(ref, known).shape != spec.shape:
                    expected, got = told(spec.shape), told(known[ref].shape)
                    raise node.layer.error(f"initial_state {spec.name}: expected {expected}, got {got}")
            known.update({(node.key, index): info for index, info in enumerate(outputs)})
        if not self._outputs and self.nodes:
            last = self.nodes[-1]
            self._outputs = [(last.key, index) for index in range(len(last.layer.outputs))]
        return [self._known(ref, known) for ref in self._outputs]

    def _known(self, ref: Ref, known: Mapping[Ref, Info]) -> Info:
        """What is known of an output that the config names."""
        if ref not in known:
            raise self.error(f"layers: {ref[0]!r} has no output {ref[1]}")
        return known[ref]

    def forward(
        self, inputs: list[Masked[np.ndarray]], states: list[np.ndarray]
    ) -> tuple[list[Masked[np.ndarray]], list[np.ndarray]]:
        """See `Layer.forward`."""
        return self._walk(inputs, states, lambda layer, args, own: layer.forward(args, own))

    def emit(
        self, graph: GraphBuilder, inputs: list[Masked[str]], states: list[str]
    ) -> tuple[list[Masked[str]], list[str]]:
        """See `Layer.emit`."""
        return self._walk(inputs, states, lambda layer, args, own: layer.emit(graph.typed(layer.dtype), args, own))

    def _walk(self, inputs: list[Masked[A]], states: list[A], apply: Apply[A]) -> tuple[list[Masked[A]], list[A]]:
        values: dict[Ref, Masked[A]] = {(n, 0): x for n, x in zip(self.input_names, inputs, strict=True)}
        carried = list(states)
        for node in self.nodes:
            args = [values[ref] for ref in node.call.inputs]
            mask = args[0].mask if node.call.mask is None else values[node.call.mask].x
            args[0] = Masked(args[0].x, None if node.call.unmasked else mask)
            count = len(node.layer.states)
            if node.start < 0:
                own = [values[ref].x for ref in node.call.states]
            else:
                own = states[node.start : node.start + count]
            outputs, after = apply(node.layer, args, own)
            if node.start >= 0:
                carried[node.start : node.start + count] = after
            if node.call.unmasked and len(node.layer.outputs[0].shape) == 2:
                outputs[0] = Masked(outputs[0].x, mask)
            values.update({(node.key, index): output for index, output in enumerate(outputs)})
        return [values[ref] for ref in self._outputs], carried

    def check(self, inputs: Sequence[np.ndarray]) -> None:
        """What the layers that take the inputs refuse."""
        for node in self.nodes:
            if node.call.inputs and all(ref[0] in self.input_names for ref in node.call.inputs):
                node.layer.check([inputs[self.input_names.index(ref[0])] for ref in node.call.inputs])

    def nest_states(self, flat: Sequence[Any]) -> list[Any]:
        """A list for each recurrent layer, in their order."""
        return [
            node.layer.nest_states(flat[node.start : node.start + len(node.layer.states)])
            for node in self.nodes
            if node.start >= 0
        ]
