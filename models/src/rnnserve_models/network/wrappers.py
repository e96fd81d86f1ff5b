"""Bidirectional and TimeDistributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rnnserve_models.network.config import Config
from rnnserve_models.network.layer import Info, Layer, Masked, Shape, told
from rnnserve_models.network.recurrent import Recurrent
from rnnserve_models.network.recurrent_onnx import flip
from rnnserve_models.onnx_builder import GraphBuilder

RECURRENT = ("RNN", "SimpleRNN", "LSTM", "GRU")
_OF_VECTORS = ("Dense", "LayerNormalization", "BatchNormalization", "Sequential", "Functional", "Model")
_MERGES = {"sum": "Add", "mul": "Mul", "ave": "Add"}


class Bidirectional(Layer):
    """A recurrent layer and another that goes backwards, whose sequence is flipped back, merged.

    ``merge_mode`` is concat, sum, mul, ave, or None for two outputs. Both halves give zeros at masked steps where they
    return sequences, and only there, whatever they were told. States are the forward ones, then the backward ones.

    Keras: ``Bidirectional``.
    """

    def __init__(self, config: Config) -> None:
        """Makes both halves, the backward one from the forward one's config unless it has its own."""
        super().__init__(config)
        self.merge = config.choice("merge_mode", ("concat", "sum", "mul", "ave", None), "concat")
        inner = config.child("layer")
        if inner.class_name not in RECURRENT:
            raise self.error(f"layer: expected one of {list(RECURRENT)}, got {inner.class_name}")
        backwards = inner.flag("go_backwards", False)
        if backwards and self.version == 3:
            raise self.error("layer: expected one that goes forward, got go_backwards=True")
        if config.get("backward_layer") is None:
            name = f"backward_{inner.name.removeprefix('forward_')}"
            values = {**inner.values, "go_backwards": not backwards, "name": name}
            other = Config({"class_name": inner.class_name, "config": values}, inner.version)
        else:
            other = config.child("backward_layer")
            if other.class_name not in RECURRENT:
                raise self.error(f"backward_layer: expected one of {list(RECURRENT)}, got {other.class_name}")
        config.done()
        self.halves = [Recurrent(inner), Recurrent(other)]
        ahead, back = (half.options for half in self.halves)
        if ahead.go_backwards == back.go_backwards:
            raise self.error("backward_layer: expected another go_backwards than of layer")
        for key in ("return_sequences", "return_state", "stateful", "time_major"):
            if getattr(ahead, key) != getattr(back, key):
                raise self.error(f"backward_layer: expected {key} as of layer, {str(getattr(ahead, key)).lower()}")
        for half in self.halves:
            half.options = replace(half.options, zero_output_for_mask=half.options.return_sequences)
        self.options = ahead
        self.stateful, self.time_major = ahead.stateful, ahead.time_major
        self._split = len(self.halves[0].states)
        named = [
            replace(spec, name=f"{direction}.{spec.name}")
            for direction, half in zip(("forward", "backward"), self.halves, strict=True)
            for spec in half.states
        ]
        offset = len(self.halves[0].nest_states(self.halves[0].states))
        self.states = tuple(
            replace(spec, path=(spec.path[0] + offset, *spec.path[1:])) if index >= self._split else spec
            for index, spec in enumerate(named)
        )

    @property
    def weight_count(self) -> int:
        """The forward layer's, then the backward layer's."""
        return sum(half.weight_count for half in self.halves)

    @property
    def roles(self) -> list[int | None]:
        """One result or two, then the states with ``return_state``."""
        states = range(len(self.states)) if self.options.return_state else ()
        return [None] * (2 if self.merge is None else 1) + [*states]

    @property
    def unrolls(self) -> bool:
        """The option of either half."""
        return any(half.unrolls for half in self.halves)

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """As of the forward layer."""
        return self.halves[0].input_shape_of(weights)

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        split = self.halves[0].weight_count
        dtype = self.inputs[0].dtype
        ahead, *states = self.halves[0].build([Info(shapes[0], dtype)], weights[:split])
        back, *others = self.halves[1].build([Info(shapes[0], dtype)], weights[split:])
        if self.merge is None:
            return [ahead, back, *states, *others]
        if self.merge == "concat":
            units = (ahead.shape[-1] or 0) + (back.shape[-1] or 0)
            return [Info((*ahead.shape[:-1], units), self.halves[0].dtype), *states, *others]
        if ahead.shape != back.shape:
            raise self.error(f"merge_mode {self.merge!r}: expected halves of the same units")
        return [ahead, *states, *others]

    def forward(
        self, inputs: list[Masked[np.ndarray]], states: list[np.ndarray]
    ) -> tuple[list[Masked[np.ndarray]], list[np.ndarray]]:
        """See `Layer.forward`."""
        (ahead, *_), finals = self.halves[0].forward(inputs, states[: self._split])
        (back, *_), others = self.halves[1].forward(inputs, states[self._split :])
        a, b = ahead.x, back.x[:, ::-1] if self.options.return_sequences else back.x
        results: list[np.ndarray]
        with np.errstate(over="ignore", invalid="ignore"):
            match self.merge:
                case "concat":
                    results = [np.concatenate([a, b], axis=-1)]
                case "sum":
                    results = [a + b]
                case "mul":
                    results = [a * b]
                case "ave":
                    results = [(a + b) / a.dtype.type(2)]
                case _:
                    results = [a, b]
        carried = [*finals, *others]
        outputs = [Masked(y, ahead.mask) for y in results]
        return outputs + [Masked(state) for state in carried if self.options.return_state], carried

    def emit(
        self, graph: GraphBuilder, inputs: list[Masked[str]], states: list[str]
    ) -> tuple[list[Masked[str]], list[str]]:
        """See `Layer.emit`."""
        builders = [graph.typed(half.dtype) for half in self.halves]
        (ahead, *_), finals = self.halves[0].emit(builders[0], inputs, states[: self._split])
        (back, *_), others = self.halves[1].emit(builders[1], inputs, states[self._split :])
        a, b = ahead.x, flip(graph, back.x) if self.options.return_sequences else back.x
        results = [a, b]
        if self.merge == "concat":
            results = [graph.add("Concat", a, b, axis=-1)]
        elif self.merge is not None:
            wide = builders[0]
            y = wide.add(_MERGES[self.merge], wide.widened(a), wide.widened(b))
            results = [wide.narrowed(wide.add("Mul", y, wide.number(0.5)) if self.merge == "ave" else y)]
        carried = [*finals, *others]
        outputs = [Masked(y, ahead.mask) for y in results]
        return outputs + [Masked(state) for state in carried if self.options.return_state], carried

    def nest_states(self, flat: Sequence[Any]) -> list[Any]:
        """The forward layer's, then the backward layer's."""
        return [
            *self.halves[0].nest_states(flat[: self._split]),
            *self.halves[1].nest_states(flat[self._split :]),
        ]


class TimeDistributed(Layer):
    """A layer applied to every step by itself: [B, T, ...] to [B, T, ...]. Keras: ``TimeDistributed``."""

    def __init__(self, config: Config) -> None:
        """Makes the layer inside, which must not be stateful."""
        from rnnserve_models.network.registry import make_layer  # it names this class

        super().__init__(config)
        self.layer = make_layer(config.child("layer"))
        config.done()
        if self.layer.stateful:
            raise self.error(f"layer: {self.layer.name!r} is stateful, and each step is by itself")
        if len(self.layer.input_dtypes) != 1:
            raise self.error(f"layer: {self.layer.name!r} takes several inputs")

    @property
    def weight_count(self) -> int:
        """The layer's."""
        return self.layer.weight_count

    @property
    def input_dtypes(self) -> list[np.dtype[Any]]:
        """The layer's."""
        return self.layer.input_dtypes

    @property
    def bounds(self) -> list[tuple[int, int] | None]:
        """The layer's."""
        return self.layer.bounds

    @property
    def unrolls(self) -> bool:
        """The layer's."""
        return self.layer.unrolls

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """[time, ...], what the layer takes."""
        inner = self.layer.input_shape_of(weights)
        if inner is None:
            return None
        # Their weights do not say whether they take a vector or a sequence; here it is a vector.
        vector = inner[0] is None and not self.layer.states and self.layer.class_name in _OF_VECTORS
        return (None, *(inner[1:] if vector else inner))

    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        (shape,) = shapes
        if len(shape) < 2 and not isinstance(self.layer.input_dtypes[0].type(0), np.integer):
            raise self.error(f"expected inputs [batch, time, ...], got {told(shape)}")
        outputs = self.layer.build([Info(shape[1:], self.inputs[0].dtype)], weights)
        if len(outputs) != 1:
            raise self.error(f"layer: {self.layer.name!r} must have one output, has {len(outputs)}")
        return [Info((shape[0], *outputs[0].shape), outputs[0].dtype)]

    def forward(
        self, inputs: list[Masked[np.ndarray]], states: list[np.ndarray]
    ) -> tuple[list[Masked[np.ndarray]], list[np.ndarray]]:
        """See `Layer.forward`. The steps become rows."""
        x, mask = inputs[0]
        rows = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        (y, *_), _ = self.layer.forward([Masked(rows)], [spec.initial(len(rows)) for spec in self.layer.states])
        return [Masked(y.x.reshape(*x.shape[:2], *y.x.shape[1:]), mask)], []

    def emit(
        self, graph: GraphBuilder, inputs: list[Masked[str]], states: list[str]
    ) -> tuple[list[Masked[str]], list[str]]:
        """See `Layer.emit`."""
        x, mask = inputs[0]
        rows = graph.add("Reshape", x, graph.add("Concat", graph.ints(-1), graph.add("Shape", x, start=2), axis=0))
        zeros = [zero_state(graph, rows, spec.shape, spec.dtype) for spec in self.layer.states]
        (y, *_), _ = self.layer.emit(graph.typed(self.layer.dtype), [Masked(rows)], zeros)
        lead, rest = graph.add("Shape", x, start=0, end=2), graph.add("Shape", y.x, start=1)
        return [Masked(graph.add("Reshape", y.x, graph.add("Concat", lead, rest, axis=0)), mask)], []

    def check(self, inputs: Sequence[np.ndarray]) -> None:
        """What the layer refuses."""
        self.layer.check(inputs)


def zero_state(graph: GraphBuilder, rows: str, shape: Sequence[int], dtype: np.dtype[Any]) -> str:
    """Zeros [B, *shape], where ``rows`` is [B, ...]."""
    from onnx import numpy_helper

    extents = graph.add("Concat", graph.add("Shape", rows, start=0, end=1), graph.ints(*shape), axis=0)
    return graph.add("ConstantOfShape", extents, value=numpy_helper.from_array(np.zeros(1, dtype)))
