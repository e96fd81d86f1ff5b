"""How clients of the Open Inference Protocol see a tensor: between their axes and those of rnnserve.v1.

A tensor is [batch, time, *shape] unless the model says otherwise, as one that was imported from Triton does. One that
has an axis less than that has no time axis: it is one step. A model whose tensors are one step takes many steps with a
time axis behind the batch axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_models.spec import Axis, TensorSpec
from rnnserve_server.errors import InvalidInput


class Seen:
    """One tensor, with or without a time axis.

    Args:
        axes: as the client has them.
        time_major: whether rnnserve.v1 has time before batch.
    """

    def __init__(self, axes: Sequence[Axis], *, time_major: bool) -> None:
        self.axes = tuple(axes)
        leading = ["time", "batch"] if time_major else ["batch", "time"]
        self.timed = "time" in self.axes
        self._batched = "batch" in self.axes
        present = [axis for axis in leading if axis in self.axes]
        features = iter(range(len(present), len(self.axes)))
        kept = [axis for axis in self.axes if axis != "squeeze"]
        # Of each axis that the client sees, its place among those of rnnserve.v1 that the client sees too.
        order = [present.index(axis) if isinstance(axis, str) else next(features) for axis in kept]
        self._order = tuple(order) if order != sorted(order) else None
        self._inverse = tuple(int(axis) for axis in np.argsort(order))
        self._squeezed = tuple(index for index, axis in enumerate(self.axes) if axis == "squeeze")
        self._missing = tuple(index for index, axis in enumerate(leading) if axis not in self.axes)
        self._time_axis = leading.index("time")
        self._batch_axis = leading.index("batch")

    def fits(self, x: Array) -> bool:
        """Whether an array has as many axes, and of those that must have one element no more."""
        return x.ndim == len(self.axes) and all(x.shape[axis] == 1 for axis in self._squeezed)

    def take(self, x: Array) -> Array:
        """An array that fits, as rnnserve.v1 has it: [batch, time, *shape], or [time, batch, *shape]."""
        if self._squeezed:
            x = x.squeeze(self._squeezed)
        if self._order is not None:
            x = x.transpose(self._inverse)
        return np.expand_dims(x, self._missing) if self._missing else x

    def give(self, y: Array, *, timed: bool) -> Array:
        """An output of rnnserve.v1, with a time axis or without, as the client has it."""
        if timed and not self.timed:
            y = y.squeeze(self._time_axis)
        if not self._batched:
            y = y.squeeze(self._batch_axis if timed and self.timed else 0)
        if self._order is not None:
            y = y.transpose(self._order)
        return np.expand_dims(y, self._squeezed) if self._squeezed else y


class View:
    """All tensors of a model.

    Args:
        model: the model.
        time_major: an option of the layer.
    """

    def __init__(self, model: LoadedModel, *, time_major: bool) -> None:
        self._time_major = time_major
        own = model.spec.oip.axes if model.spec.oip is not None else {}
        engine = model.engine
        self._inputs = {spec.name: self._variants(spec, own) for spec in engine.inputs}
        self._outputs = {spec.name: self._variants(spec, own) for spec in engine.outputs}

    def take(self, inputs: Mapping[str, Array]) -> tuple[Arrays, bool]:
        """Inputs as rnnserve.v1 has them, and whether they have a time axis. Those that the model has not stay.

        Raises:
            InvalidInput: one has another number of axes; or some have a time axis and others have not.
        """
        taken: Arrays = {}
        timed: bool | None = None
        for name, x in inputs.items():
            variants = self._inputs.get(name)
            if variants is None:
                taken[name] = x
                continue
            seen = next((each for each in variants if each.fits(x) and timed in (None, each.timed)), None)
            if seen is None:
                expected = " or ".join(_shown(each.axes) for each in variants if timed in (None, each.timed))
                raise InvalidInput(f"inputs.{name}", f"shape {expected}", f"shape {list(x.shape)}")
            timed = seen.timed
            taken[name] = seen.take(x)
        return taken, timed is not False

    def give(self, name: str, y: Array, *, timed: bool, sequences: bool) -> Array:
        """An output as the client has it.

        Args:
            name: its name.
            y: as rnnserve.v1 has it.
            timed: whether the request's inputs had a time axis.
            sequences: whether the output has one.
        """
        with_time, without = self._outputs[name]
        return (with_time if timed and sequences else without).give(y, timed=sequences)

    def axes(self, spec: TensorSpec, *, output: bool, timed: bool) -> tuple[Axis, ...]:
        """The axes that a tensor has, with or without time."""
        with_time, without = (self._outputs if output else self._inputs)[spec.name]
        return (with_time if timed else without).axes

    def _variants(self, spec: TensorSpec, own: Mapping[str, tuple[Axis, ...]]) -> tuple[Seen, Seen]:
        """With and without a time axis."""
        leading: tuple[Axis, ...] = ("time", "batch") if self._time_major else ("batch", "time")
        axes = own.get(spec.name, (*leading, *spec.shape))
        without = tuple(axis for axis in axes if axis != "time")
        if "time" not in axes:
            at = axes.index("batch") + 1 if "batch" in axes else 0
            axes = (*axes[:at], "time", *axes[at:])
        return Seen(axes, time_major=self._time_major), Seen(without, time_major=self._time_major)


def _shown(axes: Sequence[Axis]) -> str:
    return f"[{', '.join('1' if axis == 'squeeze' else str(axis) for axis in axes)}]"
