"""What can go wrong, as a tree. `rnnserve_server.api.errors` turns each into a gRPC status, and nothing else does.

A `ServiceError` is expected: the caller made a mistake, or the server is full or leaving. Anything else that is raised
is a bug, is logged with its traceback, and reaches the caller as INTERNAL without its text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

_SHOWN = 16  # steps that an error names


class ServiceError(Exception):
    """An expected failure.

    Attributes:
        reason: the reason of google.rpc.ErrorInfo, as listed in error.proto.
        metadata: facts for a program.
        violations: (field, description) of each wrong field of the request.
        retry_after: seconds after which trying again may help, or None.
    """

    reason: ClassVar[str]

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        violations: tuple[tuple[str, str], ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.violations = violations
        self.retry_after = retry_after


class InvalidInput(ServiceError):
    """A tensor does not fit the model."""

    reason = "INVALID_INPUT"

    def __init__(self, field: str, expected: str, got: str, hint: str = "") -> None:
        description = f"expected {expected}, got {got}" + (f"; {hint}" if hint else "")
        super().__init__(
            f"{field}: {description}",
            metadata={"field": field, "expected": expected, "got": got},
            violations=((field, description),),
        )


class NotFinite(InvalidInput):
    """A NaN or an infinity where the model forbids it."""

    reason = "NOT_FINITE"


class InvalidRequest(InvalidInput):
    """A field of the request other than a tensor is wrong."""

    reason = "INVALID_REQUEST"


class OptionUnsupported(ServiceError):
    """The model cannot honour an option."""

    reason = "OPTION_UNSUPPORTED"


class ModelUnknown(ServiceError):
    """No model of that name."""

    reason = "MODEL_UNKNOWN"


class VersionUnknown(ServiceError):
    """The model has no such version."""

    reason = "VERSION_UNKNOWN"


class ModelUnavailable(ServiceError):
    """The model is known but could not be loaded."""

    reason = "MODEL_UNAVAILABLE"


class ModelInvalid(InvalidInput):
    """What was deployed is no model."""

    reason = "MODEL_INVALID"


class VersionExists(ServiceError):
    """The model has that version already."""

    reason = "VERSION_EXISTS"


class DeployDisabled(ServiceError):
    """The server does not allow models to be changed by clients."""

    reason = "DEPLOY_DISABLED"


class SessionError(ServiceError):
    """There is no such live session."""

    ended: ClassVar[str]

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id!r} {self.ended}", metadata={"session_id": session_id})
        self.session_id = session_id


class SessionUnknown(SessionError):
    """No session of that id was ever seen here."""

    reason = "SESSION_UNKNOWN"
    ended = "is unknown here"


class SessionClosed(SessionError):
    """The session was deleted."""

    reason = "SESSION_CLOSED"
    ended = "was deleted"


class SessionExpired(SessionError):
    """The session's idle lifetime ran out."""

    reason = "SESSION_EXPIRED"
    ended = "was idle for longer than its lifetime and expired"


class SessionAged(SessionError):
    """The session's absolute lifetime ran out."""

    reason = "SESSION_AGED"
    ended = "came to the end of its lifetime"


class SessionEvicted(SessionError):
    """The session had to make room for others."""

    reason = "SESSION_EVICTED"
    ended = "was not used for long and had to make room for others"


class SessionUnloaded(SessionError):
    """The session's model was unloaded, and its sessions ended with it."""

    reason = "SESSION_UNLOADED"
    ended = "ended because its model was unloaded"


class SessionTakenOver(SessionError):
    """Another server has taken the session over."""

    reason = "SESSION_TAKEN_OVER"
    ended = "was taken over by another server; open it again to take it back"


class SessionAway(SessionError):
    """The session is stored, but not in memory any more, or not the one that the chunk came for: the store did not
    answer, or it has come back meanwhile.
    """

    reason = "STORE_DOWN"
    ended = "has left memory, and is to be fetched from the store again; send the chunk again"

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.retry_after = 0.5


class SessionExists(SessionError):
    """A live session has that id."""

    reason = "SESSION_EXISTS"
    ended = "is live already; take it by its id, or choose another id"


class SequenceNotLive(ServiceError):
    """A request of a sequence of the Open Inference Protocol came without its start."""

    reason = "SEQUENCE_NOT_LIVE"

    def __init__(self, model: str, sequence_id: int | str, why: SessionError, ended: str) -> None:
        """``ended`` says what ``why`` is, of a sequence."""
        super().__init__(
            f"inference request for sequence {sequence_id} to model {model!r} must specify the START flag on the first "
            f"request of the sequence: {ended}",
            metadata={**why.metadata, "why": why.reason, "sequence_id": sequence_id, "model": model},
        )


class ModelChanged(ServiceError):
    """A stored session's model is not served any more."""

    reason = "MODEL_CHANGED"


class BlobInvalid(InvalidRequest):
    """What was to be imported is no exported session."""

    reason = "BLOB_INVALID"

    def __init__(self, expected: str, got: str, hint: str = "") -> None:
        super().__init__("blob", expected, got, hint)


class StoreDown(ServiceError):
    """The store of sessions cannot be reached."""

    reason = "STORE_DOWN"

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"the store of sessions does not answer ({cause}); a chunk may have been applied or not: send it again",
            retry_after=0.5,
        )


class SessionsFull(ServiceError):
    """The server holds as many sessions as it may."""

    reason = "SESSIONS_FULL"


class QuotaExceeded(ServiceError):
    """The principal has, or does, as much as it may."""

    reason = "QUOTA_EXCEEDED"


class SessionQuotaExceeded(SessionsFull):
    """The principal has as many sessions, or states of as many bytes, as it may."""

    reason = "QUOTA_EXCEEDED"


class Unauthenticated(ServiceError):
    """The call does not show who makes it."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(ServiceError):
    """The principal may not do that."""

    reason = "PERMISSION_DENIED"


class LaneUnknown(ServiceError):
    """The lane is not open."""

    reason = "LANE_UNKNOWN"

    def __init__(self, lane: int) -> None:
        super().__init__(f"lane {lane} is not open on this stream; open it first", metadata={"lane": lane})


class LaneOpen(ServiceError):
    """The lane is open already."""

    reason = "LANE_OPEN"

    def __init__(self, lane: int) -> None:
        super().__init__(
            f"lane {lane} is open on this stream already; close it first or choose another", metadata={"lane": lane}
        )


class LaneRepeated(ServiceError):
    """A frame names a lane twice."""

    reason = "LANE_REPEATED"

    def __init__(self, lane: int) -> None:
        description = f"lane {lane} is named twice in one frame; send its second chunk in another frame"
        super().__init__(description, metadata={"lane": lane}, violations=(("frames.lanes", description),))


class StepMismatch(ServiceError):
    """A chunk does not start at the step that its session expects."""

    def __init__(self, session_step: int, first_step: int, oldest_step: int | None = None) -> None:
        """``oldest_step`` is the first step in the replay window, if there is any."""
        remembered = "" if oldest_step is None else f"; answers are remembered from step {oldest_step} on"
        super().__init__(
            f"the session expects a chunk at step {session_step}, got one at step {first_step}{remembered}",
            metadata={
                "field": "first_step",
                "expected": session_step,
                "got": first_step,
                "expected_step": session_step,
                **({} if oldest_step is None else {"oldest_step": oldest_step}),
            },
        )


class StepAhead(StepMismatch):
    """The chunk starts after the expected step."""

    reason = "STEP_AHEAD"


class StepBehind(StepMismatch):
    """The chunk starts before the expected step, and what was answered there is not remembered any more."""

    reason = "STEP_BEHIND"


class StepConflict(StepMismatch):
    """Another chunk than this one was applied at its step."""

    reason = "STEP_CONFLICT"

    def __init__(self, session_step: int, first_step: int) -> None:
        super().__init__(session_step, first_step)
        self.args = (f"another chunk was applied at step {first_step}; the session expects one at {session_step}",)


class NotRemembered(StepBehind):
    """A session cannot be taken back so far, or not to the middle of a chunk."""

    def __init__(self, session_step: int, step: int, known: Sequence[int]) -> None:
        """``known`` are the steps that it can be taken back to, ascending."""
        super().__init__(session_step, step, known[0] if known else None)
        steps = ", ".join(map(str, known[-_SHOWN:]))
        self.args = (
            f"the session is at step {session_step} and cannot be taken back to {step}: the states are remembered "
            + (
                f"where its last {len(known)} chunks began, at {'...' * (len(known) > _SHOWN)}{steps}"
                if known
                else "of no chunk"
            )
            + "; a session that came from the store remembers those since then",
        )


class QueueFull(ServiceError):
    """More work is waiting than the server accepts."""

    reason = "QUEUE_FULL"


class TooLarge(ServiceError):
    """A chunk or batch is larger than the server accepts."""

    reason = "TOO_LARGE"

    def __init__(self, field: str, most: int, got: int) -> None:
        super().__init__(
            f"{field}: expected at most {most}, got {got}; send it in several calls",
            metadata={"field": field, "expected": f"at most {most}", "got": got},
        )


class DeadlinePassed(ServiceError):
    """The deadline passed before the work was run."""

    reason = "DEADLINE_PASSED"


class Cancelled(ServiceError):
    """The call ended before the work was run."""

    reason = "CANCELLED"


class Draining(ServiceError):
    """The server is shutting down."""

    reason = "DRAINING"


class EngineFailed(ServiceError):
    """The engine could not compute the batch."""

    reason = "ENGINE_FAILED"


class InternalError(ServiceError):
    """A fault of the server's own."""

    reason = "INTERNAL"


def step_mismatch(session_step: int, first_step: int) -> StepMismatch:
    """The error for a chunk at the wrong step."""
    return (StepAhead if first_step > session_step else StepBehind)(session_step, first_step)
