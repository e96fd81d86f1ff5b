"""What a request asks for beyond its tensors: its parameters, read and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rnnserve_models.spec import OPTION_NAMES
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.errors import InvalidRequest

_OURS = "rnnserve_"
_MAX_STEP = (1 << 64) - 1


@dataclass(slots=True)
class Asked:
    """The parameters of a request.

    Attributes:
        sequence: the id of its sequence; None: it has none.
        start: whether the sequence begins.
        end: whether it ends.
        step: the time steps that the sequence has had before, if the client says it.
        timeout: seconds until its turn must have come, or None.
        options: layer options that the client set.
        idle_lifetime: seconds, of a new sequence, or None.
        lifetime: likewise.
        typed: whether the answer's elements are to be typed.
    """

    sequence: int | str | None = None
    start: bool = False
    end: bool = False
    step: int | None = None
    timeout: float | None = None
    options: dict[str, bool] = field(default_factory=dict)
    idle_lifetime: float | None = None
    lifetime: float | None = None
    typed: bool = False

    @classmethod
    def of(cls, request: pb.ModelInferRequest) -> Asked:
        """Reads a request's parameters.

        Raises:
            InvalidRequest: one has a value that it cannot have, or is none of ours although its name says so.
        """
        asked = cls()
        for name, parameter in request.parameters.items():
            if read := _READERS.get(name):
                read(asked, name, parameter)
            elif name.startswith(_OURS):
                known = [known for known in _READERS if known.startswith(_OURS)]
                raise InvalidRequest(f"parameters.{name}", f"one of {known}", repr(name[:80]))
        if asked.sequence is None:
            for name, said in (("sequence_start", asked.start), ("sequence_end", asked.end)):
                if said:
                    raise InvalidRequest(
                        f"parameters.{name}", "a sequence_id, a number other than 0 or a text", "none",
                        f"inference request to model {request.model_name!r} must specify a non-zero or non-empty "
                        "correlation ID",
                    )  # fmt: skip
            if asked.step is not None:
                raise InvalidRequest("parameters.rnnserve_step", "a sequence_id beside it", "none")
        elif asked.start and asked.step:
            raise InvalidRequest("parameters.rnnserve_step", "0, where a sequence starts", str(asked.step))
        elif not asked.start:
            for name in ("idle_lifetime", "lifetime"):
                if getattr(asked, name) is not None:
                    raise InvalidRequest(f"parameters.{_OURS}{name}", "sequence_start beside it", "none")
        return asked


def _value(name: str, parameter: pb.InferParameter, *kinds: type) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    value = None if chosen is None else getattr(parameter, chosen)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise InvalidRequest(f"parameters.{name}", expected, "nothing" if value is None else repr(value)[:80])
    return value


_KINDS: dict[type, str] = {bool: "a bool_param", int: "an int64_param", str: "a string_param", float: "a double_param"}


def _sequence(asked: Asked, name: str, parameter: pb.InferParameter) -> None:
    asked.sequence = _value(name, parameter, int, str) or None  # 0 and an empty text are none


def _step(asked: Asked, name: str, parameter: pb.InferParameter) -> None:
    asked.step = _value(name, parameter, int)
    if not 0 <= asked.step <= _MAX_STEP:
        raise InvalidRequest(f"parameters.{name}", "0 or more", str(asked.step))


def _timeout(asked: Asked, name: str, parameter: pb.InferParameter) -> None:
    microseconds = _value(name, parameter, int)
    if microseconds < 0:
        raise InvalidRequest(f"parameters.{name}", "0 or more microseconds", str(microseconds))
    asked.timeout = microseconds / 1e6 or None


def _contents(asked: Asked, name: str, parameter: pb.InferParameter) -> None:
    said = _value(name, parameter, str)
    if said not in ("typed", "raw"):
        raise InvalidRequest(f"parameters.{name}", "typed or raw", repr(said[:80]))
    asked.typed = said == "typed"


def _truth(attribute: str) -> Callable[[Asked, str, pb.InferParameter], None]:
    def read(asked: Asked, name: str, parameter: pb.InferParameter) -> None:
        if parameter.WhichOneof("parameter_choice") == "bool_param":  # with every request: the fast way
            setattr(asked, attribute, parameter.bool_param)
        else:
            setattr(asked, attribute, _value(name, parameter, bool))

    return read


def _option(asked: Asked, name: str, parameter: pb.InferParameter) -> None:
    asked.options[name.removeprefix(_OURS)] = _value(name, parameter, bool)


def _seconds(asked: Asked, name: str, parameter: pb.InferParameter) -> None:
    seconds = float(_value(name, parameter, int, float))
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"parameters.{name}", "a positive number of seconds", str(seconds))
    setattr(asked, name.removeprefix(_OURS), seconds)


_READERS: dict[str, Callable[[Asked, str, pb.InferParameter], None]] = {
    "sequence_id": _sequence,
    "sequence_start": _truth("start"),
    "sequence_end": _truth("end"),
    "timeout": _timeout,
    "rnnserve_step": _step,
    "rnnserve_contents": _contents,
    "rnnserve_idle_lifetime": _seconds,
    "rnnserve_lifetime": _seconds,
    **{f"{_OURS}{option}": _option for option in OPTION_NAMES},
}
