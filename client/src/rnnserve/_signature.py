"""What a model takes and gives under given options: checks and casts what goes out, shapes what comes back. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rnnserve import nest
from rnnserve._chunks import Chunk, Columns, Form
from rnnserve.codec import Array
from rnnserve.errors import InvalidInput, ServerError
from rnnserve.models import Model, StateSpec, TensorSpec
from rnnserve.options import LayerOptions


class Signature:
    """The signature of one model under one set of options, for a fixed batch size or (None) for any.

    A call is a chunk, [batch, time, ...] as in Keras ([time, batch, ...] with time_major), or one step, without the
    time axis, and for a batch size of 1 without the batch axis either. Every method that takes arrays raises
    InvalidInput when a name, element type, rank or extent is wrong.
    """

    def __init__(self, model: Model, options: LayerOptions, batch_size: int | None = None) -> None:
        self.model = model
        self.options = options
        self.batch_size = batch_size
        self._names = tuple(spec.name for spec in model.inputs)
        self._one = model.inputs[0] if len(model.inputs) == 1 else None
        self._output = model.outputs[0].name if len(model.outputs) == 1 else None
        rows = batch_size or 1
        lead = (1, rows) if options.time_major else (rows, 1)
        bare = () if rows == 1 else (rows,)
        shapes = tuple([(*lead, *spec.shape) for spec in model.inputs])
        self._step_bare = tuple([(*bare, *spec.shape) for spec in model.inputs])
        self._step_dtype = model.inputs[0].dtype if self._one is not None else None
        reply = sum([_nbytes(spec) for spec in model.outputs]) * rows
        states = sum([_nbytes(spec) for spec in model.states]) * rows if options.return_state else 0
        self._reply = (states, reply) if options.return_sequences else (states + reply, 0)  # and for each time step
        key = self._key(shapes, masked=False)
        self._step_form = Form(self._names, shapes, 1, key, sum(self._reply), paced=True)
        # Where one step of one row stands in a result: without the axes of length 1 that the step did not have.
        every: tuple[Any, ...] = (0,) if rows == 1 else (slice(None),)
        timed = (0, *every) if options.time_major else (*every, 0)
        self._step_place = timed if options.return_sequences else every

    # Going out

    def step(self, x: Any, ticket: Any = None) -> Chunk:
        """One time step for one session: each input [*features] for a batch size of 1, else [batch, *features]."""
        if (
            type(x) is np.ndarray
            and x.dtype is self._step_dtype
            and x.shape == self._step_bare[0]
            and x.flags.c_contiguous
        ):
            return Chunk(self._step_form, (x,), None, ticket)  # as it is to be: most often
        arrays = self._arrays(x)
        for array, spec, shape in zip(arrays, self.model.inputs, self._step_bare, strict=True):
            if array.shape != shape:
                raise self._wrong_shape(spec, shape, array, "a step" if self.batch_size == 1 else "a step [batch, ...]")
        return Chunk(self._step_form, arrays, None, ticket)

    def step_all(self, x: Any, sessions: int, ticket: Any = None) -> Chunk:
        """One time step for each of several sessions: each input as for `step`, with a leading axis of sessions."""
        arrays = self._arrays(x)
        for array, spec, shape in zip(arrays, self.model.inputs, self._step_bare, strict=True):
            if array.shape != (sessions, *shape):
                raise self._wrong_shape(spec, (sessions, *shape), array, "a step [sessions, ...]")
        return Chunk(self._step_form, arrays, None, ticket)

    def chunk(self, x: Any, mask: Any = None, ticket: Any = None) -> Chunk:
        """Time steps for one session: each input [batch, time, *features], mask [batch, time]."""
        arrays, shapes, time = self._checked(x, ())
        valid = None if mask is None else self._mask(mask, shapes[0][:2], ())
        return self._whole(arrays, valid, shapes, time, ticket)

    def chunk_all(self, x: Any, sessions: int, mask: Any = None, ticket: Any = None) -> Chunk:
        """Time steps for each of several sessions: inputs and mask as for `chunk`, with a leading axis of sessions."""
        arrays, shapes, time = self._checked(x, (sessions,))
        valid = None if mask is None else self._mask(mask, shapes[0][:2], (sessions,))
        return self._whole(arrays, valid, shapes, time, ticket)

    def _whole(
        self, arrays: list[Array], valid: Array | None, shapes: tuple[tuple[int, ...], ...], time: int, ticket: Any
    ) -> Chunk:
        key, (once, each) = self._key(shapes, masked=valid is not None), self._reply
        return Chunk(Form(self._names, shapes, time, key, once + each * time), arrays, valid, ticket)

    def call(self, x: Any, mask: Any = None) -> tuple[dict[str, Array], Array | None, int]:
        """A call without a session: the inputs by name, the mask as bool [batch, time], and the batch size."""
        arrays, shapes, _ = self._checked(x, ())
        valid = None if mask is None else self._mask(mask, shapes[0][:2], ())
        return dict(zip(self._names, arrays, strict=True)), valid, shapes[0][1 if self.options.time_major else 0]

    def batch_of(self, x: Any) -> int:
        """The batch size of a chunk."""
        _, shapes, _ = self._checked(x, ())
        return shapes[0][1 if self.options.time_major else 0]

    def _key(self, shapes: tuple[tuple[int, ...], ...], *, masked: bool) -> tuple[Any, ...]:
        types = tuple([spec.dtype.char for spec in self.model.inputs])
        return (self._names, shapes, types, masked, self.options.time_major)

    def _arrays(self, x: Any) -> list[Array]:
        """The inputs in the model's order and element types, in C order."""
        spec = self._one
        if spec is not None and not isinstance(x, Mapping):
            return [_cast(x, spec, "inputs")]
        if not isinstance(x, Mapping):
            got = type(x).__name__
            raise InvalidInput.of("inputs", f"a mapping with an array for each of {list(self._names)}", got)
        if set(x) != set(self._names):
            raise InvalidInput.of("inputs", f"the names {list(self._names)}", str(list(x)))
        return [_cast(x[each.name], each, "inputs") for each in self.model.inputs]

    def _checked(self, x: Any, lead: tuple[int, ...]) -> tuple[list[Array], tuple[tuple[int, ...], ...], int]:
        arrays = self._arrays(x)
        named = "[time, batch, ...]" if self.options.time_major else "[batch, time, ...]"
        skip = len(lead)
        outer: tuple[int, ...] | None = None
        for array, spec in zip(arrays, self.model.inputs, strict=True):
            rank = skip + 2 + len(spec.shape)
            if array.ndim != rank or array.shape[:skip] != lead or array.shape[skip + 2 :] != spec.shape:
                features = "".join(f", {extent}" for extent in spec.shape)
                before = "".join(f"{extent}, " for extent in lead)
                wanted = f"shape [{before}{named[1:-6]}{features}] ({rank} axes)"
                raise InvalidInput.of(f"inputs.{spec.name}", wanted, f"shape {list(array.shape)}")
            if outer is None:
                outer = array.shape[skip : skip + 2]
            elif outer != array.shape[skip : skip + 2]:
                wanted = f"the batch and time of {self._names[0]!r}, {list(outer)}"
                raise InvalidInput.of(f"inputs.{spec.name}", wanted, f"{list(array.shape[skip : skip + 2])}")
        assert outer is not None
        batch, time = outer[::-1] if self.options.time_major else outer
        if self.batch_size not in (None, batch):
            got = f"{batch} rows in shape {list(arrays[0].shape)}"
            raise InvalidInput.of(f"inputs.{self._names[0]}", f"{self.batch_size} rows, the fixed batch size", got)
        if batch < 1 or time < 1:
            got = f"shape {list(arrays[0].shape)}"
            raise InvalidInput.of(f"inputs.{self._names[0]}", "at least one row and one time step", got)
        return arrays, tuple([array.shape[skip:] for array in arrays]), time

    def _mask(self, mask: Any, outer: tuple[int, ...], lead: tuple[int, ...]) -> Array:
        """A mask of any type (nonzero counts), [batch, time] or [batch, time, 1], the batch 1 for all rows."""
        valid = np.asarray(mask)
        if valid.dtype.kind not in "biuf":
            raise InvalidInput.of("mask", "booleans or numbers", valid.dtype.name)
        wanted = (*lead, *outer)
        given = valid.shape
        if valid.ndim == len(wanted) + 1 and given[-1] == 1:
            given = given[:-1]
        axis = len(lead) + (1 if self.options.time_major else 0)
        fits = len(given) == len(wanted) and all(
            have == want or (have == 1 and place == axis)
            for place, (have, want) in enumerate(zip(given, wanted, strict=True))
        )
        if not fits:
            raise InvalidInput.of(
                "mask", f"shape {list(wanted)}, the batch 1 for all rows", f"shape {list(valid.shape)}"
            )
        spread = np.broadcast_to((valid != 0).reshape(given), wanted)
        return np.ascontiguousarray(spread)

    def _wrong_shape(self, spec: TensorSpec, shape: tuple[int, ...], array: Array, what: str) -> InvalidInput:
        return InvalidInput.of(
            f"inputs.{spec.name}",
            f"shape {list(shape)}, {what} of batch size {self.batch_size}",
            f"shape {list(array.shape)}",
        )

    # Coming back

    def step_result(self, columns: Columns, row: int) -> Any:
        """The result of `step`."""
        place = (row, *self._step_place)
        name = self._output
        try:
            if name is not None and not self.options.return_state:
                return columns.outputs[name][place]
            output = (
                columns.outputs[name][place]
                if name is not None
                else {spec.name: columns.outputs[spec.name][place] for spec in self.model.outputs}
            )
            return self._with_states(output, columns.states, row)
        except (KeyError, IndexError) as error:
            raise self._wrong_answer(columns.outputs, columns.states) from error

    def chunk_result(self, columns: Columns, row: int) -> Any:
        """The result of `chunk`."""
        return self.result(
            {name: array[row] for name, array in columns.outputs.items()},
            {name: array[row] for name, array in columns.states.items()},
        )

    def step_all_result(self, columns: Columns) -> Any:
        """The result of `step_all`: as for `step`, with a leading axis of sessions."""
        place = (slice(None), *self._step_place)
        return self.result({name: array[place] for name, array in columns.outputs.items()}, columns.states)

    def chunk_all_result(self, columns: Columns) -> Any:
        """The result of `chunk_all`: as for `chunk`, with a leading axis of sessions."""
        return self.result(columns.outputs, columns.states)

    def result(self, outputs: Mapping[str, Array], states: Mapping[str, Array]) -> Any:
        """Outputs and states by name, as Keras returns them: the output, or [output, *states] with return_state."""
        try:
            name = self._output
            output = (
                outputs[name] if name is not None else {spec.name: outputs[spec.name] for spec in self.model.outputs}
            )
            return self._with_states(output, states, ...)
        except KeyError as error:
            raise self._wrong_answer(outputs, states) from error

    def _with_states(self, output: Any, states: Mapping[str, Array], place: Any) -> Any:
        if not self.options.return_state:
            return output
        return [output, *nest.pack(self.model.states, lambda spec: states[spec.name][place])]

    def _wrong_answer(self, outputs: Mapping[str, Array], states: Mapping[str, Array]) -> ServerError:
        got = ", ".join(f"{name} {list(array.shape)}" for name, array in {**outputs, **states}.items())
        return ServerError(f"the server's answer does not fit the description of {self.model.name!r}: got {got}")


def flat_states(model: Model, states: nest.Nest, batch_size: int) -> dict[str, Array]:
    """States in Keras's nesting, or by name, as arrays [batch_size, ...] by name, cast to the model's element types.

    Raises InvalidInput when the nesting, an element type or a shape is wrong.
    """
    flat = {}
    for spec, value in zip(model.states, nest.flatten(model.states, states).values(), strict=True):
        array = _cast(value, spec, "initial_state")
        if array.shape != (batch_size, *spec.shape):
            wanted = f"shape {[batch_size, *spec.shape]}"
            raise InvalidInput.of(f"initial_state.{spec.name}", wanted, f"shape {list(array.shape)}")
        flat[spec.name] = array
    return flat


def zero_states(specs: Sequence[StateSpec], batch_size: int) -> list[nest.Nest]:
    """Zeros [batch_size, ...] in Keras's nesting."""
    return nest.pack(specs, lambda spec: np.zeros((batch_size, *spec.shape), spec.dtype))


def _nbytes(spec: TensorSpec | StateSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _cast(value: Any, spec: TensorSpec | StateSpec, field: str) -> Array:
    """The value as an array of the spec's element type, in C order and the machine's byte order.

    As Keras 3 does, floats of any width and integers become the layer's float type. Integers narrow only when every
    value survives. Anything else changes the meaning, and is InvalidInput.
    """
    dtype = spec.dtype
    if type(value) is np.ndarray and value.dtype is dtype and value.flags.c_contiguous:
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged lists
        raise InvalidInput.of(f"{field}.{spec.name}", f"an array of {dtype.name}", str(error)) from error
    if array.dtype != dtype:
        to_float = dtype.kind == "f" and array.dtype.kind in "iuf"
        if not (to_float or (dtype.kind in "iu" and array.dtype.kind in "iu")):
            raise InvalidInput.of(
                f"{field}.{spec.name}", f"an array of {dtype.name}", f"an array of {array.dtype.name}"
            )
        with np.errstate(over="ignore"):
            cast: Array = array.astype(dtype)
        if not to_float and not np.array_equal(cast, array):
            raise InvalidInput.of(f"{field}.{spec.name}", f"values that fit {dtype.name}", "values beyond it")
        return np.ascontiguousarray(cast).reshape(array.shape)
    if not array.dtype.isnative:
        array = array.astype(dtype)
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar [1]
