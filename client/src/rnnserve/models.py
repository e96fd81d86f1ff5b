"""What the server tells of its models and sessions, as plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from rnnserve.codec import DTYPES
from rnnserve.errors import ServerError
from rnnserve.options import LayerOptions, ReplayWindow
from rnnserve.v1 import model_pb2, session_pb2


@dataclass(frozen=True)
class TensorSpec:
    """An input or output at one time step of one row: `shape` is without the batch and time axes.

    `finite`: a NaN or an infinity is refused.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    finite: bool = False


@dataclass(frozen=True)
class StateSpec:
    """A state of one row: `shape` is without the batch axis, `path` is its place in Keras's nesting."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model:
    """One version of one model; the fields are those of `Model` in `model.proto`."""

    name: str
    version: str
    digest: str
    description: str
    engine: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    default_options: LayerOptions
    settable_options: frozenset[str]
    bit_identical: bool
    masking: bool

    @classmethod
    def from_message(cls, message: model_pb2.Model) -> Model:
        """Raises ServerError for an element type that this client does not know, and for no inputs or no outputs."""
        if not message.inputs or not message.outputs:
            raise ServerError(f"the server describes model {message.name!r} without inputs or outputs")
        return cls(
            name=message.name,
            version=message.version,
            digest=message.digest,
            description=message.description,
            engine=message.engine,
            inputs=tuple(_tensor(each) for each in message.inputs),
            outputs=tuple(_tensor(each) for each in message.outputs),
            states=tuple(
                StateSpec(each.name, _dtype(each.name, each.data_type), tuple(each.shape), tuple(each.path))
                for each in message.states
            ),
            default_options=LayerOptions.from_message(message.default_options),
            settable_options=frozenset(message.settable_options),
            bit_identical=message.bit_identical,
            masking=message.masking,
        )


@dataclass(frozen=True)
class SessionInfo:
    """A session as the server had it when asked.

    Attributes:
        step: the number of time steps it has consumed.
        create_time: when it was made, in UTC.
        idle_lifetime: seconds without use after which it expires.
        lifetime: seconds after which it ends in any case, or None.
        replay_window: how much of its last answers the server remembers.
        reset_every: its states are reset whenever its step is a multiple of it, or None.
        reset_after_masked: a row's states are reset with the so many-th masked step in a row, or None.
    """

    session_id: str
    model: str
    version: str
    digest: str
    batch_size: int
    options: LayerOptions
    step: int
    create_time: datetime
    idle_lifetime: float
    lifetime: float | None = None
    replay_window: ReplayWindow | None = None
    reset_every: int | None = None
    reset_after_masked: int | None = None

    @classmethod
    def from_message(cls, message: session_pb2.Session) -> SessionInfo:
        """What the message says."""
        return cls(
            session_id=message.session_id,
            model=message.model,
            version=message.version,
            digest=message.digest,
            batch_size=message.batch_size,
            options=LayerOptions.from_message(message.options),
            step=message.step,
            create_time=message.create_time.ToDatetime(tzinfo=UTC),
            idle_lifetime=message.idle_lifetime.seconds + message.idle_lifetime.nanos / 1e9,
            lifetime=message.lifetime.seconds + message.lifetime.nanos / 1e9 if message.HasField("lifetime") else None,
            replay_window=ReplayWindow(message.replay_window.max_chunks, message.replay_window.max_bytes),
            reset_every=message.reset_rules.every_steps or None,
            reset_after_masked=message.reset_rules.masked_steps or None,
        )


def _tensor(message: model_pb2.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, _dtype(message.name, message.data_type), tuple(message.shape), message.finite)


def _dtype(name: str, number: int) -> np.dtype[Any]:
    dtype = DTYPES.get(number)
    if dtype is None:
        raise ServerError(f"the server describes {name!r} with element type {number}, which this client does not know")
    return np.dtype(dtype.char)  # NumPy's own object for it, which every array of it shares
