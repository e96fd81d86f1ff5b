"""ONNX graphs under onnxruntime, made ragged, stateful and aware of context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from rnnserve_models.engine.axes import Axes
from rnnserve_models.engine.base import Array, Arrays, Engine, EngineError
from rnnserve_models.engine.controls import Control
from rnnserve_models.errors import ModelError
from rnnserve_models.spec import GraphInput, GraphSpec, GraphTensor, StateSpec, TensorSpec

_DTYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
}


class OnnxEngine(Engine):
    """Runs a graph whose tensors a `GraphSpec` explains.

    A graph that takes ``lengths`` runs a ragged batch at once. One that does not runs it in segments: the rows that
    are still live, up to the length of the shortest of them, and again. A graph without a time axis runs one step at
    a time, which is the same with segments of one step.
    """

    name = "onnx"

    def __init__(
        self,
        graph: bytes,
        spec: GraphSpec,
        *,
        states: Sequence[StateSpec] = (),
        defaults: Mapping[str, Array] | None = None,
        threads: int = 1,
        origin: str = "graph",
    ) -> None:
        """Loads a graph.

        Args:
            graph: the serialized ModelProto.
            spec: what its tensors mean.
            states: what the states are called and where they nest, for a spec that does not say.
            defaults: what states start from, by their names; zeros for the others. See `StateSpec.default`.
            threads: of onnxruntime, for one operator.
            origin: the file, for messages.

        Raises:
            ModelError: onnxruntime refuses the graph, or the spec does not describe it.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen types of its own for a bad graph
            raise ModelError(f"{origin}: onnxruntime refuses the graph: {error}") from error
        try:
            self._constants = {constant.tensor: constant.array() for constant in spec.constants}
        except (ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{origin}: constants: a value is not of its dtype: {error}") from error
        _check_graph(self._session, spec, origin)
        defaults = dict(defaults or {})
        _check_defaults(defaults, spec, origin)
        self.spec = self._spec = spec
        self.whole = not spec.sliceable
        self._stepwise = not spec.inputs[0].has_time
        self._lengths_dtype = next(
            (_DTYPES[node.type] for node in self._session.get_inputs() if node.name == spec.lengths), "int32"
        )
        # The wrapper's `run` checks again what `_check_graph` has, and would fall back to other providers: that takes
        # as long as a small graph.
        self._run_graph = getattr(self._session, "_sess", self._session).run
        self._fetches = [tensor.tensor or tensor.name for tensor in spec.outputs]
        self._fetches += [state.output for state in spec.states]
        self._fed = [_Tensor(t.name, t.tensor or t.name, _axes(t), t.has_time, t.shape) for t in spec.inputs]
        self._given = [_Tensor(t.name, t.tensor or t.name, _axes(t), t.has_time, t.shape) for t in spec.outputs]
        self._carried = [state.name for state in spec.states]
        self._carried += [each.tensor for each in spec.controls if each.kind in ("start", "corrid")]
        self._states = [_Tensor(t.name, t.input, Axes(t.name, t.axes, "batch"), False, t.shape) for t in spec.states]
        self._contexts = [tensor for tensor in spec.inputs if tensor.context]
        self._controls = [Control(control) for control in spec.controls]
        self.bit_identical = spec.bit_identical
        self.inputs = tuple(TensorSpec(t.name, np.dtype(t.dtype), t.shape, t.finite) for t in spec.inputs)
        self.outputs = tuple(TensorSpec(t.name, np.dtype(t.dtype), t.shape) for t in spec.outputs)
        self.states = tuple(states) or tuple(
            StateSpec(state.name, np.dtype(state.dtype), state.shape, state.path or (index,), defaults.get(state.name))
            for index, state in enumerate(spec.states)
        )
        self.states += tuple(
            StateSpec(
                _context_name(tensor),
                np.dtype(tensor.dtype),
                (*tensor.shape[:-1], tensor.context),
                (len(self.states) + index,),
            )
            for index, tensor in enumerate(self._contexts)
        )
        for control in self._controls:
            self.inputs += control.inputs
            self.states += control.states(len(self.states))
        # Whatever the batch, it takes one run of the graph and nothing else.
        self._plain = spec.lengths is not None and spec.rows is None and not (self._stepwise or self._contexts)

    def run(self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """See `Engine.run`."""
        if not len(lengths):  # at no row at all, onnxruntime's LSTM and GRU end the process
            raise EngineError("there is no row to compute")
        if self._plain:
            return self._run_once(inputs, lengths, states)
        inputs, contexts = self._with_contexts(inputs, lengths, states)
        steps = len(next(iter(inputs.values())))
        whole = self._spec.lengths is not None or bool((lengths == steps).all())
        if whole and not (self._stepwise and steps > 1):
            outputs, states = self._run(inputs, lengths, states)
        elif self.whole and not self._stepwise:
            outputs, states = self._run_alike(inputs, lengths, states)
        else:
            outputs, states = self._run_segments(inputs, lengths, states)
        return outputs, {**states, **contexts}

    def _with_contexts(
        self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]
    ) -> tuple[Mapping[str, Array], Arrays]:
        """Precedes each step by the end of the step before, and keeps the end of each row's last step."""
        if not self._contexts:
            return inputs, {}
        inputs, kept = dict(inputs), {}
        rows = np.arange(len(lengths))
        for tensor in self._contexts:
            x, name = inputs[tensor.name], _context_name(tensor)  # [T, R, ..., features]
            before = np.concatenate([states[name][None], x[:-1, ..., -tensor.context :]])  # [T, R, ..., context]
            inputs[tensor.name] = np.concatenate([before, x], axis=-1)
            kept[name] = x[lengths - 1, rows][..., -tensor.context :]  # [R, ..., context]
        return inputs, kept

    def _run_segments(
        self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays]:
        steps, rows = next(iter(inputs.values())).shape[:2]
        outputs = {spec.name: np.zeros((steps, rows, *spec.shape), spec.dtype) for spec in self.outputs}
        carried = {name: states[name].copy() for name in self._carried}  # [R, ...]
        for start, stop in _segments(lengths, stepwise=self._stepwise):
            live = np.flatnonzero(lengths > start)
            part, after = self._run(
                {name: x[start:stop, live] for name, x in inputs.items()},
                np.full(len(live), stop - start),
                {name: state[live] for name, state in carried.items()},
            )
            for name, y in part.items():
                outputs[name][start:stop, live] = y
            for name, state in after.items():
                carried[name][live] = state
        return outputs, carried

    def _run_alike(
        self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays]:
        """Rows of equal length together, each from its first step to its last."""
        steps, rows = next(iter(inputs.values())).shape[:2]
        outputs = {spec.name: np.zeros((steps, rows, *spec.shape), spec.dtype) for spec in self.outputs}
        carried = {name: states[name].copy() for name in self._carried}  # [R, ...]
        for length in np.unique(lengths):
            live = np.flatnonzero(lengths == length)
            part, after = self._run(
                {name: x[:length, live] for name, x in inputs.items()},
                np.full(len(live), length),
                {name: state[live] for name, state in carried.items()},
            )
            for name, y in part.items():
                outputs[name][:length, live] = y
            for name, state in after.items():
                carried[name][live] = state
        return outputs, carried

    def _run(self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """All rows to the end (or to ``lengths`` where the graph takes them), in one run if the graph has room."""
        rows = self._spec.rows
        if rows is None or rows == len(lengths):
            return self._run_once(inputs, lengths, states)
        parts = []
        for start in range(0, len(lengths), rows):
            # What is missing from the last part is filled up with its last row.
            taken = np.minimum(np.arange(start, start + rows), len(lengths) - 1)
            parts.append(
                self._run_once(
                    {name: x[:, taken] for name, x in inputs.items()},
                    lengths[taken],
                    {name: state[taken] for name, state in states.items()},
                )
            )
        outputs = {
            name: np.concatenate([part[name] for part, _ in parts], axis=1)[:, : len(lengths)] for name in parts[0][0]
        }
        after = {name: np.concatenate([part[name] for _, part in parts])[: len(lengths)] for name in parts[0][1]}
        return outputs, after

    def _run_once(
        self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays]:
        """One run of the graph."""
        feeds = self._constants.copy()
        for name, tensor, axes, has_time, _ in self._fed:
            x = inputs[name] if has_time else inputs[name][0]
            feeds[tensor] = x if axes.same else axes.to_graph(x)
        for name, tensor, axes, _, _ in self._states:
            feeds[tensor] = states[name] if axes.same else axes.to_graph(states[name])
        for control in self._controls:
            control.feed(feeds, inputs, lengths, states)
        if self._spec.lengths is not None:
            feeds[self._spec.lengths] = lengths.astype(self._lengths_dtype)
        try:
            results = iter(self._run_graph(self._fetches, feeds, None))
        except Exception as error:  # onnxruntime raises a dozen types of its own
            raise EngineError(f"onnxruntime failed: {error}") from error
        steps, rows = next(iter(inputs.values())).shape[:2]
        outputs, after = {}, {}
        for name, _, axes, has_time, shape in self._given:
            if has_time:
                outputs[name] = axes.from_graph(next(results), (steps, rows, *shape))
            else:  # it is of the last step
                y = axes.from_graph(next(results), (rows, *shape))
                outputs[name] = y[None] if steps == 1 else np.broadcast_to(y, (steps, *y.shape))
        for name, _, axes, _, shape in self._states:
            after[name] = axes.from_graph(next(results), (rows, *shape))
        for control in self._controls:
            control.follow(after, states)
        return outputs, after


class _Tensor(NamedTuple):
    """What is to be known of a tensor in every run.

    Attributes:
        name: the engine's.
        tensor: the graph's; of a state, what takes it.
        axes: between the two.
        has_time: whether one run has many time steps of it.
        shape: its features.
    """

    name: str
    tensor: str
    axes: Axes
    has_time: bool
    shape: tuple[int, ...]


def _axes(tensor: GraphTensor) -> Axes:
    return Axes(tensor.name, tensor.axes, *(("time", "batch") if tensor.has_time else ("batch",)))


def _context_name(tensor: GraphInput) -> str:
    return f"{tensor.name}_context"


def _segments(lengths: Array, *, stepwise: bool) -> Iterator[tuple[int, int]]:
    """The cuts of time between which the set of live rows stays the same."""
    stops = range(1, int(lengths.max()) + 1) if stepwise else np.unique(lengths)
    start = 0
    for stop in stops:
        yield start, int(stop)
        start = int(stop)


def _check_graph(session: ort.InferenceSession, spec: GraphSpec, origin: str) -> None:
    """Holds the description against the graph: every tensor there, of its type and rank, and none left over."""
    described: dict[str, tuple[str, int | None]] = {}
    for tensor in spec.inputs:
        described[tensor.tensor or tensor.name] = (tensor.dtype, len(tensor.axes))
    for state in spec.states:
        described[state.input] = (state.dtype, len(state.axes))
    for control in spec.controls:
        described[control.tensor] = (control.dtype, len(control.axes))
    for constant in spec.constants:
        described[constant.tensor] = (constant.dtype, constant.array().ndim)
    if spec.lengths is not None:
        described[spec.lengths] = ("int32 or int64", 1)
    _compare(session.get_inputs(), described, "input", origin)
    if left := [node.name for node in session.get_inputs() if node.name not in described]:
        raise ModelError(
            f"{origin}: the graph takes {left}, which model.yaml does not mention; "
            "list each under inputs, states (if the graph should get back what it gave) or constants"
        )
    outputs: dict[str, tuple[str, int | None]] = {}
    for output in spec.outputs:
        outputs[output.tensor or output.name] = (output.dtype, len(output.axes))
    for state in spec.states:
        outputs[state.output] = (state.dtype, len(state.axes))
    _compare(session.get_outputs(), outputs, "output", origin)


def _check_defaults(defaults: Mapping[str, Array], spec: GraphSpec, origin: str) -> None:
    shapes = {state.name: state.shape for state in spec.states}
    for name, value in defaults.items():
        if name not in shapes:
            raise ModelError(f"{origin}: defaults: there is no state {name!r}; the states are {list(shapes)}")
        if value.shape != shapes[name] and (not len(value) or value.shape[1:] != shapes[name]):
            raise ModelError(
                f"{origin}: defaults: {name}: expected shape {list(shapes[name])}, or that for each of some rows, got "
                f"{list(value.shape)}"
            )


def _compare(
    nodes: Sequence[ort.NodeArg], described: dict[str, tuple[str, int | None]], kind: str, origin: str
) -> None:
    graph = {node.name: node for node in nodes}
    for name, (dtype, rank) in described.items():
        if name not in graph:
            raise ModelError(f"{origin}: the graph has no {kind} {name!r}; it has {sorted(graph)}")
        node = graph[name]
        found = _DTYPES.get(node.type, node.type)
        if found not in dtype.split(" or "):
            raise ModelError(f"{origin}: {kind} {name!r} is {found} in the graph, but {dtype} in model.yaml")
        if rank is not None and isinstance(node.shape, list) and len(node.shape) not in (rank, 0):
            raise ModelError(f"{origin}: {kind} {name!r} has {len(node.shape)} axes in the graph, {rank} in model.yaml")
