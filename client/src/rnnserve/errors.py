"""Everything that can go wrong, as one tree of exceptions under `RnnserveError`.

The names say what happened and carry no `Error`, as httpx's do; the classes follow the reasons of
`rnnserve/v1/error.proto`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import grpc
from google.protobuf.message import DecodeError

from rnnserve.v1 import error_pb2

if TYPE_CHECKING:
    from rnnserve.codec import TensorError

DOMAIN = "rnnserve"
DETAILS_KEY = "grpc-status-details-bin"


class Violation(NamedTuple):
    """One wrong field of a request."""

    field: str
    description: str


class RnnserveError(Exception):
    """The root of every exception that this package raises of its own."""


class ClientClosed(RnnserveError):
    """The client was closed before or during the call."""


class RequestError(RnnserveError):
    """A request that failed: what the server answered, or what the client found before it sent anything.

    Attributes:
        status: the gRPC status.
        reason: why, for a program: one of the reasons of `error.proto`; empty when nobody gave one.
        metadata: facts: `field`, `expected`, `got`, `session_id`, `expected_step`, where they apply.
        violations: the wrong fields of an invalid request.
        retry_after: seconds to wait before trying again, or None when the server gave no hint.
    """

    status: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = ""

    def __init__(
        self,
        message: str = "",
        *,
        status: grpc.StatusCode | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[Violation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = type(self).status if status is None else status
        self.reason = type(self).reason if reason is None else reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        """The sentence for a person."""
        return str(self.args[0])


class InvalidInput(RequestError, ValueError):
    """An input, mask or state has a wrong name, type, rank, shape or length, or a value that the model forbids."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_INPUT"

    @classmethod
    def of(cls, field: str, expected: str, got: str) -> InvalidInput:
        """The error for a field, found before anything was sent."""
        facts = {"field": field, "expected": expected, "got": got}
        description = f"expected {expected}, got {got}"
        return cls(f"{field}: {description}", metadata=facts, violations=[Violation(field, description)])


class InvalidRequest(RequestError, ValueError):
    """A field of the request other than a tensor is wrong."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class OptionUnsupported(RequestError):
    """The model cannot honour an option of the layer."""

    status = grpc.StatusCode.UNIMPLEMENTED
    reason = "OPTION_UNSUPPORTED"


class NotFound(RequestError):
    """Something that the request names does not exist."""

    status = grpc.StatusCode.NOT_FOUND


class ModelNotFound(NotFound):
    """No model of that name, or no such version of it."""

    reason = "MODEL_UNKNOWN"


class ModelUnavailable(RequestError):
    """The model is known but could not be loaded; the message says why."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_UNAVAILABLE"


class ModelInvalid(InvalidInput):
    """What was to be deployed is no model; the message says why."""

    reason = "MODEL_INVALID"


class VersionExists(RequestError):
    """The model has that version already."""

    status = grpc.StatusCode.ALREADY_EXISTS
    reason = "VERSION_EXISTS"


class Unauthenticated(RequestError):
    """The server does not know who calls: it wants a token or a certificate, or another one."""

    status = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """Whoever calls may not do that."""

    status = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class DeployDisabled(PermissionDenied):
    """The server does not allow clients to change its models."""

    reason = "DEPLOY_DISABLED"


class BlobInvalid(InvalidRequest):
    """What was to be restored is no saved session, is damaged, or was written by a newer server."""

    reason = "BLOB_INVALID"


class ModelChanged(RequestError):
    """The server does not serve the very model with which the session was saved or stored."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_CHANGED"


class SessionNotFound(NotFound):
    """No session of that id is alive; the subclasses tell why, where the server may."""

    reason = "SESSION_UNKNOWN"


class SessionClosed(SessionNotFound):
    """The session was deleted."""

    reason = "SESSION_CLOSED"


class SessionExpired(SessionNotFound):
    """The session's idle lifetime ran out."""

    reason = "SESSION_EXPIRED"


class SessionAged(SessionExpired):
    """The session's lifetime ran out, though it may have been used."""

    reason = "SESSION_AGED"


class SessionEvicted(SessionExpired):
    """The session was not used for long and had to make room for others."""

    reason = "SESSION_EVICTED"


class SessionUnloaded(SessionNotFound):
    """The session's model was unloaded, and its sessions ended with it."""

    reason = "SESSION_UNLOADED"


class SessionTakenOver(RequestError):
    """Another server has taken the session; `attach` takes it back."""

    status = grpc.StatusCode.ABORTED
    reason = "SESSION_TAKEN_OVER"


class SessionExists(RequestError):
    """A live session has the id that was chosen."""

    status = grpc.StatusCode.ALREADY_EXISTS
    reason = "SESSION_EXISTS"


class StepMismatch(RequestError):
    """A chunk does not start where its session is: something before it failed, or somebody else stepped the session."""

    status = grpc.StatusCode.OUT_OF_RANGE
    reason = "STEP_AHEAD"

    @property
    def expected_step(self) -> int | None:
        """The step at which the session's next chunk starts; None when the server did not say."""
        text = self.metadata.get("expected_step") or self.metadata.get("expected", "")
        return int(text) if text.isdecimal() else None

    @property
    def past(self) -> bool:
        """Whether the session is beyond the chunk: its answer to it is forgotten, or it took another one there."""
        return self.reason in ("STEP_BEHIND", "STEP_CONFLICT")


class StepConflict(StepMismatch):
    """The session has taken another chunk at this step: somebody else stepped it."""

    status = grpc.StatusCode.ABORTED
    reason = "STEP_CONFLICT"


class ServerBusy(RequestError):
    """The server has as much work or as many sessions as it accepts. Try again after `retry_after` seconds."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class QuotaExceeded(ServerBusy):
    """Whoever calls has as many sessions, or runs as many rows a second, as it may. Try again after `retry_after`."""

    reason = "QUOTA_EXCEEDED"


class TooLarge(RequestError):
    """The message, chunk or batch is larger than the server accepts; trying again does not help."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "TOO_LARGE"


class DeadlineExceeded(RequestError, TimeoutError):
    """No answer in time.

    A chunk of a session keeps its place: it may be applied already or be applied later, once, and the session goes on
    after it. `metadata["first_step"]` is its step. Where that is missing the chunk was never sent, nor is it later.
    """

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_PASSED"


class Cancelled(RequestError):
    """The call or its stream ended before the work was run."""

    status = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class Unavailable(RequestError):
    """The server cannot be reached, is shutting down, or the connection to it broke, and trying again did not help."""

    status = grpc.StatusCode.UNAVAILABLE


class ChunkLost(RequestError):
    """The connection broke every time that this chunk was on its way, so it is not sent again.

    Perhaps the server breaks down over it. Whether it was applied is not known: the next chunk starts where the server
    has the session then.
    """

    status = grpc.StatusCode.UNAVAILABLE
    reason = "CHUNK_LOST"

    @classmethod
    def of(cls, session_id: str, first_step: int, losses: int) -> ChunkLost:
        """The error for a chunk that was lost so often."""
        return cls(
            f"the chunk at step {first_step} of session {session_id} was on its way when {losses} connections were "
            "lost, at last with nothing beside it. It is not sent again, and whether it was applied is not known: look "
            "at the server's log, and at `info().step` before going on",
            metadata={"session_id": session_id, "first_step": str(first_step)},
        )


class ServerError(RequestError):
    """A fault of the server's own; a session is as it was."""

    status = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


class GroupError(RequestError):
    """Some sessions of a group failed; the others went on.

    Attributes:
        errors: what failed, by the session's place in the group.
        partial: the group's result, with zeros for the sessions that failed; None when all of them failed.
    """

    def __init__(self, message: str = "", errors: Mapping[int, RequestError] | None = None) -> None:
        self.errors = dict(errors or {})
        self.partial: Any = None
        first = next(iter(self.errors.values()), None)
        super().__init__(
            message,
            status=first.status if first else None,
            reason=first.reason if first else None,
            metadata=first.metadata if first else None,
            violations=first.violations if first else (),
            retry_after=first.retry_after if first else None,
        )


_BY_REASON: dict[str, type[RequestError]] = {
    "INVALID_INPUT": InvalidInput,
    "NOT_FINITE": InvalidInput,
    "INVALID_REQUEST": InvalidRequest,
    "OPTION_UNSUPPORTED": OptionUnsupported,
    "MODEL_UNKNOWN": ModelNotFound,
    "VERSION_UNKNOWN": ModelNotFound,
    "MODEL_UNAVAILABLE": ModelUnavailable,
    "MODEL_INVALID": ModelInvalid,
    "VERSION_EXISTS": VersionExists,
    "DEPLOY_DISABLED": DeployDisabled,
    "BLOB_INVALID": BlobInvalid,
    "MODEL_CHANGED": ModelChanged,
    "SESSION_UNKNOWN": SessionNotFound,
    "SESSION_CLOSED": SessionClosed,
    "SESSION_EXPIRED": SessionExpired,
    "SESSION_AGED": SessionAged,
    "SESSION_EVICTED": SessionEvicted,
    "SESSION_UNLOADED": SessionUnloaded,
    "SESSION_TAKEN_OVER": SessionTakenOver,
    "SESSION_EXISTS": SessionExists,
    "SESSIONS_FULL": ServerBusy,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "STEP_AHEAD": StepMismatch,
    "STEP_BEHIND": StepMismatch,
    "STEP_CONFLICT": StepConflict,
    "QUEUE_FULL": ServerBusy,
    "TOO_LARGE": TooLarge,
    "DEADLINE_PASSED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "DRAINING": Unavailable,
    "STORE_DOWN": Unavailable,
    "ENGINE_FAILED": ServerError,
    "INTERNAL": ServerError,
}

# For an answer without a reason of ours: a proxy's, or gRPC's own.
_BY_STATUS: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerBusy,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

# A stream that ends with one of these has lost its server, whoever put it so: gRPC, a proxy or the server itself.
# Nobody has asked for its end: the client gives it no deadline, and does not listen any more when it cancels it.
_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.OK,
}

# What gRPC says, with UNKNOWN, of a stream that went with its connection.
_REMOVED = "Stream removed"


def from_status(status: error_pb2.Status) -> RequestError:
    """The exception for a Status of the contract: a LaneError's, or the one in a failed call's trailer."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    info = error_pb2.ErrorInfo()
    violations: list[Violation] = []
    retry_after: float | None = None
    for detail in status.details:
        # Our messages have google.rpc's fields under google.rpc's type URLs, so Any.Unpack would refuse them.
        name = detail.type_url.rpartition("/")[2]
        if name == "google.rpc.ErrorInfo":
            info.MergeFromString(detail.value)
        elif name == "google.rpc.BadRequest":
            bad = error_pb2.BadRequest.FromString(detail.value)
            violations += [Violation(each.field, each.description) for each in bad.field_violations]
        elif name == "google.rpc.RetryInfo":
            delay = error_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after = delay.seconds + delay.nanos / 1e9
    kind = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    return (kind or _BY_STATUS.get(code, RequestError))(
        status.message,
        status=code,
        reason=info.reason,
        metadata=info.metadata,
        violations=violations,
        retry_after=retry_after,
    )


class _FailedCall(Protocol):
    """What every RpcError that ends a call offers; grpc's stubs do not say so."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, Any]] | None: ...


def from_rpc_error(error: grpc.RpcError) -> RequestError:
    """The exception for a call that failed: its details from the trailer, else what its status alone says."""
    call = cast("_FailedCall", error)
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return from_status(error_pb2.Status.FromString(value))
            except DecodeError:  # not ours; the status must do
                break
    code = call.code() or grpc.StatusCode.UNKNOWN
    return _BY_STATUS.get(code, RequestError)(call.details() or code.name, status=code, reason="")


def from_lost_stream(error: grpc.RpcError | None) -> RequestError:
    """The exception for work on a stream that ended before the work was answered; None: it ended in good order."""
    if error is None:
        return Unavailable("the server ended the stream before it answered")
    found = from_rpc_error(error)
    removed = found.status is grpc.StatusCode.UNKNOWN and _REMOVED in found.message
    if (found.status in _LOST or removed) and not isinstance(found, Unavailable):
        return Unavailable(
            f"the stream to the server broke: {found.message}",
            status=found.status,
            reason=found.reason,
            metadata=found.metadata,
            retry_after=found.retry_after,
        )
    return found


def from_tensor_error(error: TensorError) -> InvalidInput:
    """The exception for a tensor that cannot be sent."""
    return InvalidInput.of(error.field or "tensor", error.expected, error.got)
