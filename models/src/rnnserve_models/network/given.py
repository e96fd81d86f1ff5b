"""What a caller gives, checked and converted: arrays, masks and nested states."""

from __future__ import annotations

from typing import Any

import numpy as np

from rnnserve_models.errors import InputError
from rnnserve_models.network.layer import Shape


def fits(shape: Shape, expected: Shape) -> bool:
    """Whether a row's shape is the expected one, in which None is any extent."""
    return len(shape) == len(expected) and all(e in (None, n) for n, e in zip(shape, expected, strict=True))


def leaves(given: Any, template: Any, size: Any) -> list[Any]:
    """The arrays in ``given``, which nest as ``template`` does; a layer's only state may stand without its list."""
    entries = given if isinstance(given, list | tuple) else [given]
    if len(entries) != len(template):
        raise InputError("initial_state", f"arrays nested as {size}", f"{len(entries)} where {len(template)} belong")
    found = []
    for entry, part in zip(entries, template, strict=True):
        found += leaves(entry, part, size) if isinstance(part, list) else [entry]
    return found


def read_mask(given: Any, x: np.ndarray, time_major: bool) -> np.ndarray | None:
    """bool [B, T], of what Keras takes for a mask."""
    if given is None:
        return None
    mask = np.asarray(given)
    got = f"shape {list(mask.shape)}"
    batch, steps = x.shape[0], x.shape[1] if x.ndim > 1 else 1
    if mask.ndim == 3 and mask.shape[2] == 1:
        mask = mask[:, :, 0]
    if mask.ndim == 2 and time_major:
        mask = mask.T
    if mask.dtype.kind not in "biuf" or mask.shape not in ((batch, steps), (1, steps)):
        expected = [steps, batch] if time_major else [batch, steps]
        raise InputError("mask", f"shape {expected}", got if mask.dtype.kind in "biuf" else f"dtype {mask.dtype}")
    return np.ascontiguousarray(np.broadcast_to(mask != 0, (batch, steps)))


def cast_input(field: str, value: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Converts as Keras 3 does: integers, and floats of any precision."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(field, f"an array of {dtype}", f"what is no array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise InputError(field, f"numbers that convert to {dtype}", f"dtype {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # what float16 cannot hold is infinite in it
        return array.astype(dtype, copy=False)
