"""The options of `tf.keras.layers.RNN`, with Keras's meaning and Keras's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypedDict

from rnnserve.v1 import options_pb2, session_pb2


@dataclass(frozen=True)
class LayerOptions:
    """The options of a recurrent layer.

    Attributes:
        return_sequences: an output for every time step rather than for the last one.
        return_state: the final states beside the output.
        go_backwards: iterate time from its last step to its first; a returned sequence stays in that order.
        stateful: the state of one call is the initial state of the next.
        unroll: accepted because Keras has it; never changes a result.
        time_major: inputs, masks and output sequences are [time, batch, ...]; states never are.
        zero_output_for_mask: the output at a masked step is zeros rather than the previous output.
    """

    return_sequences: bool = False
    return_state: bool = False
    go_backwards: bool = False
    stateful: bool = False
    unroll: bool = False
    time_major: bool = False
    zero_output_for_mask: bool = False

    def to_message(self) -> options_pb2.LayerOptions:
        """Every option, set explicitly: what the caller sees is what the server is asked for."""
        return options_pb2.LayerOptions(**asdict(self))

    @classmethod
    def from_message(cls, message: options_pb2.LayerOptions) -> LayerOptions:
        """What the server says holds."""
        return cls(**{name: getattr(message, name) for name in NAMES})


_LONGEST = 1e10  # seconds, as the contract has it
NAMES = tuple(field.name for field in fields(LayerOptions))


class ReplayWindow(NamedTuple):
    """How much the server remembers of a session's last answers; None takes the server's default, its most.

    Attributes:
        chunks: chunks at most; 0 for none.
        nbytes: bytes of their answers at most, but for the last one.
    """

    chunks: int | None = None
    nbytes: int | None = None


@dataclass(frozen=True)
class Terms:
    """What a new session is beside its model and its options: how long it lives, how much of it is remembered, and when
    its states are reset by themselves. None is not asked for.
    """

    idle_lifetime: float | None = None
    lifetime: float | None = None
    replay_window: ReplayWindow | tuple[int | None, int | None] | None = None
    reset_every: int | None = None
    reset_after_masked: int | None = None

    def write(self, config: session_pb2.SessionConfig) -> None:
        """Puts them into a message. ValueError for what cannot be."""
        for name in ("idle_lifetime", "lifetime"):
            seconds = getattr(self, name)
            if seconds is not None:
                if not 0 < seconds <= _LONGEST:
                    raise ValueError(f"{name} must be positive seconds, at most {_LONGEST:.0f}, got {seconds}")
                getattr(config, name).FromNanoseconds(round(seconds * 1e9))
        if self.replay_window is not None:
            chunks, nbytes = self.replay_window
            for name, least, value in (("chunks", 0, chunks), ("nbytes", 1, nbytes)):
                if value is not None and value < least:
                    raise ValueError(f"replay_window: {name} must be at least {least}, got {value}")
            config.replay_window.CopyFrom(session_pb2.ReplayWindow(max_chunks=chunks, max_bytes=nbytes))
        for name, field in (("reset_every", "every_steps"), ("reset_after_masked", "masked_steps")):
            steps = getattr(self, name)
            if steps is not None:
                if not 0 < steps < 1 << 32:
                    raise ValueError(f"{name} must be a number of steps, at least 1, got {steps}")
                setattr(config.reset_rules, field, steps)


NO_TERMS = Terms()


class SessionOptions(TypedDict, total=False):
    """The options that a session may be given; what is left out takes the model's default."""

    return_sequences: bool
    return_state: bool
    go_backwards: bool
    unroll: bool
    time_major: bool
    zero_output_for_mask: bool


def given_options(given: Mapping[str, Any]) -> options_pb2.LayerOptions:
    """Only the options that were given. Raises TypeError for a name that is no option of a session."""
    known = SessionOptions.__annotations__
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{name!r} is not an option of a session; the options are {list(known)}")
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    return options_pb2.LayerOptions(**given)
