"""The way between the axes of a graph's tensor and those of an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnnserve_models.engine.base import Array, EngineError
from rnnserve_models.spec import Axis


class Axes:
    """Turns [*leading, *features] into a tensor with the graph's axes, and back. Both are views.

    ``leading`` is ("time", "batch") for inputs and outputs, ("batch",) for states and for tensors without time. What
    can be known beforehand is worked out once: a run of a small graph takes microseconds.

    Attributes:
        same: the graph has the engine's axes.
    """

    def __init__(self, name: str, axes: Sequence[Axis], *leading: str) -> None:
        self._name = name
        self._axes = tuple(axes)
        features = iter(range(len(leading), len(axes)))
        order = [leading.index(axis) if isinstance(axis, str) else next(features) for axis in axes if axis != "squeeze"]
        moved = order != sorted(order)
        self._order = tuple(order) if moved else None
        self._inverse = tuple(int(axis) for axis in np.argsort(order)) if moved else None
        self._squeezed = tuple(index for index, axis in enumerate(axes) if axis == "squeeze")
        self.same = not (moved or self._squeezed)
        self._insert = tuple(None if axis == "squeeze" else slice(None) for axis in axes)
        self._remove = tuple(0 if axis == "squeeze" else slice(None) for axis in axes)

    def to_graph(self, x: Array) -> Array:
        """[*leading, *features] to the graph's axes."""
        if self._order is not None:
            x = x.transpose(self._order)
        return x[self._insert] if self._squeezed else x

    def from_graph(self, y: Array, shape: tuple[int, ...]) -> Array:
        """The graph's axes to [*leading, *features], which must be of that shape.

        Raises:
            EngineError: it is of another.
        """
        if y.shape == shape and self.same:
            return y
        if y.ndim == len(self._axes):
            found = y[self._remove] if self._squeezed else y
            if self._inverse is not None:
                found = found.transpose(self._inverse)
            if found.shape == shape and found.size == y.size:  # what was left out had one element
                return found
        raise EngineError(
            f"{self._name}: the graph gave shape {list(y.shape)}, which is not what model.yaml says: axes "
            f"{list(self._axes)} for {list(shape)}"
        )
