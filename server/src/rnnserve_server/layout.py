"""Between the wire's axes and the engine's: what Keras does around its loop, for many chunks at once.

On the wire a call is [batch, time, ...], and a frame of N chunks [N, batch, time, ...]; with time_major the batch and
time axes change places. The engine wants [T, R, ...] with R = N * batch rows. Everything here works on N chunks; a
single call is N = 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from rnnserve_models.engine.base import Array, Arrays, Engine
from rnnserve_models.masking import Compacted, compact
from rnnserve_models.options import LayerOptions
from rnnserve_models.spec import StateSpec, TensorSpec
from rnnserve_server.errors import InvalidInput, NotFinite

Signature = tuple[Hashable, ...]
"""What inputs and a mask are like, whatever the number of chunks: see `signature`."""


def signature(arrays: Mapping[str, Array], mask: Array | None) -> Signature:
    """The names, dtypes and shapes of the inputs and the mask of N chunks, without N.

    Chunks of one group either all fit it or none does if their signature is the same, so it is enough to check one.
    """
    parts: list[Hashable] = [(name, x.dtype.char, x.shape[1:]) for name, x in arrays.items()]
    if mask is not None:
        parts.append((mask.dtype.char, mask.shape[1:]))
    return tuple(parts)


def timesteps(options: LayerOptions, arrays: Mapping[str, Array]) -> int:
    """Time steps of each of N chunks whose inputs `check_call` found to fit."""
    return int(next(iter(arrays.values())).shape[1 if options.time_major else 2])


def answer_bytes(engine: Engine, options: LayerOptions, steps: int) -> int:
    """Bytes of the outputs, and states if they are returned, of one row of so many time steps."""
    outputs = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in engine.outputs)
    states = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in engine.states)
    return outputs * (steps if options.return_sequences else 1) + states * options.return_state


def check_call(
    engine: Engine, options: LayerOptions, arrays: Mapping[str, Array], mask: Array | None, *, batch_size: int | None
) -> None:
    """Checks the inputs and the mask of N chunks.

    Args:
        engine: what computes the model.
        options: the options of the layer.
        arrays: every input, [N, batch, time, *shape], or [N, time, batch, *shape] with time_major.
        mask: bool, [N, batch, time] or [N, 1, time] (time and batch changed with time_major), or None.
        batch_size: what the session has fixed; None for any.

    Raises:
        InvalidInput: an input is missing, unknown, or of the wrong dtype or shape; or the mask is.
    """
    check_names("inputs", [spec.name for spec in engine.inputs], arrays)
    chunks = len(arrays[engine.inputs[0].name]) if arrays[engine.inputs[0].name].ndim else 0
    steps = engine.timesteps
    rows = batch_size
    time_axis, batch_axis = (1, 2) if options.time_major else (2, 1)
    for spec in engine.inputs:
        x, field = arrays[spec.name], f"inputs.{spec.name}"
        check_dtype(field, spec.dtype, x)
        fits = (
            x.ndim == 3 + len(spec.shape)
            and x.shape[0] == chunks
            and x.shape[3:] == spec.shape
            and x.shape[batch_axis] == (rows if rows is not None else max(x.shape[batch_axis], 1))
            and x.shape[time_axis] == (steps if steps is not None else max(x.shape[time_axis], 1))
        )
        if not fits:
            raise InvalidInput(field, _expected(options, rows, steps, spec.shape), f"shape {list(x.shape[1:])}")
        rows, steps = x.shape[batch_axis], x.shape[time_axis]
    assert rows is not None
    assert steps is not None
    if mask is None:
        return
    check_dtype("mask", np.dtype(bool), mask)
    if mask.ndim != 3 or mask.shape[batch_axis] not in (rows, 1):
        raise InvalidInput("mask", _expected(options, rows, steps, ()), f"shape {list(mask.shape[1:])}")
    shape = list(mask.shape)
    shape[batch_axis] = rows
    if shape != [chunks, *((steps, rows) if options.time_major else (rows, steps))]:
        raise InvalidInput("mask", _expected(options, rows, steps, ()), f"shape {list(mask.shape[1:])}")


def to_call(engine: Engine, options: LayerOptions, arrays: Mapping[str, Array], mask: Array | None) -> Compacted:
    """Lays out for the engine the inputs of N chunks that `check_call` found to fit. Arguments as there.

    Returns:
        The call, its rows in the order of chunks and then of batch. For an engine that wants calls whole, it has all
        the steps, and the mask among its inputs.
    """
    time_axis = 1 if options.time_major else 2
    inputs = {name: _time_major(x, time_axis) for name, x in arrays.items()}  # [T, R, ...]
    steps, rows = next(iter(inputs.values())).shape[:2]
    if mask is not None:
        chunks = len(mask)
        shape = (chunks, steps, rows // chunks) if options.time_major else (chunks, rows // chunks, steps)
        mask = _time_major(np.broadcast_to(mask, shape), time_axis)  # [T, R]
    if engine.whole:
        if mask is not None:
            inputs["mask"] = mask
        return Compacted(inputs, same_lengths(rows, steps), steps, None)
    if mask is None and not options.go_backwards:
        return Compacted(inputs, same_lengths(rows, steps), steps, None)
    return compact(inputs, mask, go_backwards=options.go_backwards)


@lru_cache(256)
def same_lengths(rows: int, steps: int) -> Array:
    """int64 [rows], read-only: every row has so many steps."""
    lengths = np.full(rows, steps)
    lengths.flags.writeable = False
    return lengths


def faults(specs: Sequence[TensorSpec], call: Compacted, batch_size: int) -> dict[int, InvalidInput]:
    """The chunks that hold what the model forbids, and what is wrong with each, by their positions, ascending."""
    missing = {
        index: NotFinite(f"inputs.{name}", "finite numbers", "a NaN or an infinity", "mask the step, or mend the input")
        for index, name in not_finite(specs, call, batch_size).items()
    }
    return dict(sorted({**out_of_bounds(specs, call, batch_size), **missing}.items()))


def not_finite(specs: Sequence[TensorSpec], call: Compacted, batch_size: int) -> dict[int, str]:
    """The chunks that hold a NaN or an infinity, in a step that is not masked, of an input that must not.

    Returns:
        The name of the first such input, by the chunk's position.
    """
    found: dict[int, str] = {}
    for spec in specs:
        if not spec.finite or np.isfinite(call.inputs[spec.name]).all():
            continue
        x = call.inputs[spec.name]
        fine = np.isfinite(x).reshape(len(x), -1, batch_size * int(np.prod(spec.shape))).all(axis=(0, 2))  # [N]
        for index in np.flatnonzero(~fine):
            found.setdefault(int(index), spec.name)
    return found


def out_of_bounds(specs: Sequence[TensorSpec], call: Compacted, batch_size: int) -> dict[int, InvalidInput]:
    """The chunks that hold an element that an input may not have, and what is wrong with each."""
    found: dict[int, InvalidInput] = {}
    for spec in specs:
        if spec.bounds is None:
            continue
        low, high = spec.bounds
        x = call.inputs[spec.name]
        by_chunk = x.reshape(len(x), -1, batch_size * int(np.prod(spec.shape)))  # [T, N, ...]
        wrong = ((by_chunk < low) | (by_chunk > high)).any(axis=(0, 2))  # [N]
        for index in np.flatnonzero(wrong):
            part = by_chunk[:, index]
            got = f"{part.min()} to {part.max()}"
            found.setdefault(int(index), InvalidInput(f"inputs.{spec.name}", f"{low} to {high}", got))
    return found


def to_wire(
    outputs: Mapping[str, Array], states: Mapping[str, Array], options: LayerOptions, chunks: int
) -> tuple[Arrays, Arrays]:
    """Outputs and states of R times N chunks as the wire has them.

    Args:
        outputs: each [R, T, N * batch, ...] with return_sequences, else [R, N * batch, ...].
        states: each [R, N * batch, ...].
        options: the options of the layer.
        chunks: N.

    Returns:
        Each output [R, N, batch, T, ...], [R, N, T, batch, ...] or [R, N, batch, ...], and each state
        [R, N, batch, ...]; no states without return_state.
    """
    shown = {}
    for name, y in outputs.items():
        if not options.return_sequences:
            shown[name] = y.reshape(len(y), chunks, y.shape[1] // chunks, *y.shape[2:])
            continue
        y = y.reshape(*y.shape[:2], chunks, y.shape[2] // chunks, *y.shape[3:])  # [R, T, N, batch, ...]
        order = (0, 2, 1, 3) if options.time_major else (0, 2, 3, 1)
        shown[name] = y.transpose(*order, *range(4, y.ndim))
    if not options.return_state:
        return shown, {}
    return shown, {
        name: state.reshape(len(state), chunks, state.shape[1] // chunks, *state.shape[2:])
        for name, state in states.items()
    }


def check_states(specs: Sequence[StateSpec], arrays: Mapping[str, Array], batch_size: int | None, field: str) -> None:
    """Checks states that a client gave, each [batch_size, *shape]; batch_size None is any, the same for all.

    Raises:
        InvalidInput: a state is missing, unknown, or of the wrong dtype or shape.
    """
    check_names(field, [spec.name for spec in specs], arrays)
    for spec in specs:
        state = arrays[spec.name]
        check_dtype(f"{field}.{spec.name}", spec.dtype, state)
        if state.ndim and batch_size is None:
            batch_size = state.shape[0]
        if state.shape != (batch_size, *spec.shape):
            expected = f"shape {['batch' if batch_size is None else batch_size, *spec.shape]}".replace("'", "")
            raise InvalidInput(f"{field}.{spec.name}", expected, f"shape {list(state.shape)}")


def check_names(field: str, expected: Sequence[str], arrays: Mapping[str, Array]) -> None:
    """Raises InvalidInput unless the arrays have exactly the expected names."""
    if set(arrays) == set(expected):
        return
    for name in expected:
        if name not in arrays:
            raise InvalidInput(f"{field}.{name}", "a tensor", "none", f"{field} takes {list(expected)}")
    unknown = next(name for name in arrays if name not in expected)
    raise InvalidInput(f"{field}.{unknown}", f"one of {list(expected)}", f"{unknown!r}")


def check_dtype(field: str, expected: np.dtype[np.generic], array: Array) -> None:
    """Raises InvalidInput unless the array has the expected dtype."""
    if array.dtype != expected:
        raise InvalidInput(field, f"dtype {expected.name}", f"{array.dtype.name}", "the server does not convert")


def _time_major(x: Array, time_axis: int) -> Array:
    """[N, batch, time, ...] or [N, time, batch, ...] to [T, N * batch, ...]; a view where the bytes lie so."""
    if x.shape[time_axis] == 1:
        return x.reshape(1, x.shape[0] * x.shape[1] * x.shape[2], *x.shape[3:])
    order = (1, 0, 2) if time_axis == 1 else (2, 0, 1)
    x = x.transpose(*order, *range(3, x.ndim))  # [T, N, batch, ...]
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _expected(options: LayerOptions, rows: int | None, steps: int | None, shape: tuple[int, ...]) -> str:
    names: list[str] = ["batch" if rows is None else str(rows), "time" if steps is None else str(steps)]
    if options.time_major:
        names.reverse()
    return f"shape [{', '.join([*names, *map(str, shape)])}]" + ("" if rows and steps else ", none of them 0")
