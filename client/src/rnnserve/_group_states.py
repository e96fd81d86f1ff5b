"""State in hand for groups: what `_states` does, with every session of a group. Runs on the event loop.

Arrays have a leading axis of sessions. Where something fails for some of the sessions, GroupError tells which; what was
made for the others is ended again, and what was done to them stays done.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rnnserve import _states, nest
from rnnserve._connection import Connection
from rnnserve._live import Live
from rnnserve._signature import flat_states
from rnnserve._states import Rollout
from rnnserve.codec import Array
from rnnserve.errors import GroupError, InvalidInput, RequestError

T = TypeVar("T")

_AT_ONCE = 64  # calls that are under way at a time
_SUFFIX = ".session"


async def get_states(live: Live, limit: float | None) -> list[nest.Nest]:
    """The states, each [sessions, batch_size, ...], nested as Keras nests them."""
    found = await _each(len(live.session_ids), lambda place: _states.named_states(live, place, limit))
    return nest.pack(live.signature.model.states, lambda spec: np.stack([states[spec.name] for states in found]))


async def set_states(live: Live, states: nest.Nest, limit: float | None) -> None:
    """Puts the states to given values, each [sessions, batch_size, ...], nested as Keras nests them."""
    signature, count = live.signature, len(live.session_ids)
    specs = signature.model.states
    whole = {name: np.asarray(value) for name, value in nest.flatten(specs, states).items()}
    for name, value in whole.items():
        if value.shape[:1] != (count,):
            wanted = f"a leading axis of {count} sessions"
            raise InvalidInput.of(f"states.{name}", wanted, f"shape {list(value.shape)}")
    each = [
        flat_states(
            signature.model,
            nest.pack(specs, lambda spec, place=place: whole[spec.name][place]),  # type: ignore[misc]
            signature.batch_size or 1,
        )
        for place in range(count)
    ]
    await live.reset_each(each, limit)


async def fork(live: Live, limit: float | None) -> Live:
    """A group of new sessions, each of which goes on where one of these is."""
    made = await _made(live.connection, len(live.session_ids), lambda place: _forked(live, place, limit), limit)
    return await _attached(live.connection, made, limit)


async def _forked(live: Live, place: int, limit: float | None) -> str:
    (session_id,) = await _states.forked(live, place, 1, limit)
    return session_id


async def export(live: Live, limit: float | None) -> list[bytes]:
    """Each session as a blob."""
    return await _each(len(live.session_ids), lambda place: _states.export(live, limit, place))


async def save(live: Live, folder: str | os.PathLike[str], limit: float | None) -> None:
    """Writes a file for each session into a folder, which is made."""
    blobs = await export(live, limit)
    await asyncio.to_thread(_write, Path(folder), blobs)


async def restore(
    connection: Connection, source: str | os.PathLike[str] | Sequence[bytes], limit: float | None
) -> Live:
    """A group of new sessions, each of which goes on where a saved or exported one was."""
    blobs = source
    if isinstance(source, (str, os.PathLike)):
        blobs = await asyncio.to_thread(_read, Path(source))
    assert not isinstance(blobs, (str, os.PathLike))
    if not blobs:
        raise ValueError("at least one session, got none")
    made = await _made(
        connection, len(blobs), lambda place: _states.imported(connection, blobs[place], "", limit), limit
    )
    return await _attached(connection, made, limit)


async def rewind(live: Live, step: int | Sequence[int], limit: float | None) -> None:
    """Takes every session back to where a chunk of it began."""
    count = len(live.session_ids)
    steps = [step] * count if isinstance(step, int) else list(step)
    if len(steps) != count:
        raise ValueError(f"step must be one number or {count}, one for each session, got {len(steps)}")
    await _each(count, lambda place: _states.rewind(live, steps[place], limit, place))


async def rollout(
    live: Live,
    steps: int,
    x: Any,
    feedback: Mapping[str, str] | None,
    rule: str,
    temperature: float | None,
    seed: int | None,
    limit: float | None,
) -> Rollout:
    """Lets the model go on by itself from where each session is."""
    count = len(live.session_ids)

    def one(place: int) -> Awaitable[Rollout]:
        mine = {name: value[place] for name, value in x.items()} if isinstance(x, Mapping) else x
        if x is not None and not isinstance(x, Mapping):
            mine = x[place]
        own = None if seed is None else seed + place  # else all of them would draw the same
        return _states.rollout(live, steps, mine, feedback, rule, temperature, own, limit, place)

    for value in x.values() if isinstance(x, Mapping) else [] if x is None else [x]:
        if len(value) != count:
            raise InvalidInput.of("x", f"a leading axis of {count} sessions", f"one of {len(value)}")
    found = await _each(count, one)
    return Rollout(_stacked([each.outputs for each in found]), _stacked([each.inputs for each in found]))


async def _each(count: int, action: Callable[[int], Awaitable[T]]) -> list[T]:
    """Does something with each session, and raises GroupError if it fails for some."""
    results, errors = await _tried(count, action)
    if errors:
        raise _group_error(count, errors)
    return [results[place] for place in range(count)]


async def _made(
    connection: Connection, count: int, make: Callable[[int], Awaitable[str]], limit: float | None
) -> list[str]:
    """The ids of sessions that are made, all of them or none."""
    made, errors = await _tried(count, make)
    if errors:
        await _ended(connection, list(made.values()), limit)
        raise _group_error(count, errors)
    return [made[place] for place in range(count)]


async def _attached(connection: Connection, made: list[str], limit: float | None) -> Live:
    """A group of sessions that were just made; if it cannot be, they are ended."""
    try:
        return await Live.attach_all(connection, made, limit)
    except BaseException:
        await _ended(connection, made, limit)
        raise


async def _ended(connection: Connection, session_ids: list[str], limit: float | None) -> None:
    await _tried(len(session_ids), lambda place: _states.delete(connection, session_ids[place], limit))


async def _tried(count: int, action: Callable[[int], Awaitable[T]]) -> tuple[dict[int, T], dict[int, RequestError]]:
    free = asyncio.Semaphore(_AT_ONCE)
    results: dict[int, T] = {}
    errors: dict[int, RequestError] = {}

    async def one(place: int) -> None:
        async with free:
            try:
                results[place] = await action(place)
            except RequestError as error:
                errors[place] = error

    await asyncio.gather(*[one(place) for place in range(count)])
    return results, errors


def _group_error(count: int, errors: dict[int, RequestError]) -> GroupError:
    place = min(errors)
    return GroupError(f"{len(errors)} of {count} sessions failed; {place}: {errors[place]}", errors)


def _stacked(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: np.stack([each[name] for each in values]) for name in values[0]}
    stacked: Array = np.stack(values)
    return stacked


def _write(folder: Path, blobs: Sequence[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected a new or an empty folder for {len(blobs)} sessions, got one in use")
    for place, blob in enumerate(blobs):
        _states.write(folder / f"{place:06d}{_SUFFIX}", blob)


def _read(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob(f"*{_SUFFIX}"))]
