"""Inputs of a graph that tell it where its sequence stands: fed by the engine, from a state or an input of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rnnserve_models.engine.axes import Axes
from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.spec import GraphControl, StateSpec, TensorSpec


class Control:
    """One of them. See `GraphControl`."""

    def __init__(self, spec: GraphControl) -> None:
        self._spec = spec
        self._dtype = np.dtype(spec.dtype)
        self._axes = Axes(spec.tensor, spec.axes, "batch")
        self._false, self._true = np.array(spec.values).astype(self._dtype)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What whoever sends a step gives."""
        return (TensorSpec(self._spec.tensor, self._dtype, self._spec.shape),) if self._spec.kind == "end" else ()

    def states(self, index: int) -> tuple[StateSpec, ...]:
        """What a session keeps, at an index among its states."""
        spec = self._spec
        if spec.kind == "start":
            first = np.full(spec.shape, self._true, self._dtype)
            return (StateSpec(spec.tensor, self._dtype, spec.shape, (index,), first),)
        if spec.kind == "corrid":
            return (StateSpec(spec.tensor, spec.kept_as, spec.shape, (index,)),)
        return ()

    def feed(self, feeds: Arrays, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]) -> None:
        """Adds what the graph is to be told in a run.

        Args:
            feeds: where to add it.
            inputs: every input, [T, R, *shape].
            lengths: int64 [R].
            states: every state, [R, *shape].
        """
        spec, rows = self._spec, len(lengths)
        if spec.kind == "end":
            value = inputs[spec.tensor][lengths - 1, np.arange(rows)]
        elif spec.kind == "ready":
            value = np.full((rows, *spec.shape), self._true, self._dtype)
        else:
            value = states[spec.tensor].astype(self._dtype, copy=False)
        feeds[spec.tensor] = self._axes.to_graph(value)

    def follow(self, after: Arrays, states: Mapping[str, Array]) -> None:
        """Adds what a session keeps after a run."""
        if self._spec.kind == "start":
            after[self._spec.tensor] = np.full_like(states[self._spec.tensor], self._false)
        elif self._spec.kind == "corrid":
            after[self._spec.tensor] = states[self._spec.tensor]
