"""The one place where failures become gRPC statuses."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2

from rnnserve.codec import TensorError
from rnnserve.v1 import error_pb2
from rnnserve_server import errors
from rnnserve_server.access.caller import ANYBODY, Caller, caller
from rnnserve_server.errors import ServiceError

log = structlog.get_logger(__name__)

DOMAIN = "rnnserve"

#: How often each reason was told to anybody by this process.
rejections: Counter[str] = Counter()

# A peer drops a call whose trailers have more than 8 KiB, and with it the error: names that a client made up are cut.
_MESSAGE_BYTES = 1000
_VALUE_BYTES = 400
_SHOWN = 128  # characters of a name in the log

_STATUS: dict[type[ServiceError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OptionUnsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.ModelUnknown: grpc.StatusCode.NOT_FOUND,
    errors.VersionUnknown: grpc.StatusCode.NOT_FOUND,
    errors.ModelUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.VersionExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.DeployDisabled: grpc.StatusCode.PERMISSION_DENIED,
    errors.SessionError: grpc.StatusCode.NOT_FOUND,
    errors.SessionAway: grpc.StatusCode.UNAVAILABLE,
    errors.SessionTakenOver: grpc.StatusCode.ABORTED,
    errors.SequenceNotLive: grpc.StatusCode.INVALID_ARGUMENT,  # as Triton says it
    errors.ModelChanged: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StoreDown: grpc.StatusCode.UNAVAILABLE,
    errors.SessionExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.SessionsFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.LaneUnknown: grpc.StatusCode.NOT_FOUND,
    errors.LaneOpen: grpc.StatusCode.ALREADY_EXISTS,
    errors.LaneRepeated: grpc.StatusCode.INVALID_ARGUMENT,
    errors.StepMismatch: grpc.StatusCode.OUT_OF_RANGE,
    errors.StepConflict: grpc.StatusCode.ABORTED,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFailed: grpc.StatusCode.INTERNAL,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}


def status_code(error: ServiceError) -> grpc.StatusCode:
    """The status of an error: that of its class, or of the nearest class above it."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def status(error: ServiceError, who: Caller = ANYBODY) -> error_pb2.Status:
    """An error as google.rpc.Status has it, with ErrorInfo and, where they apply, BadRequest and RetryInfo. It names
    sessions as whoever is told of it does.
    """
    error = who.told(error)
    code = status_code(error)
    rejections[error.reason] += 1
    details: list[Any] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={key: _brief(value, _VALUE_BYTES) for key, value in error.metadata.items()},
        ),
    ]
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for field, description in error.violations:
            bad_request.field_violations.add(
                field=_brief(field, _VALUE_BYTES), description=_brief(description, _MESSAGE_BYTES)
            )
        details.append(bad_request)
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return error_pb2.Status(code=code.value[0], message=_brief(str(error), _MESSAGE_BYTES), details=packed)


def service_error(error: Exception, **facts: object) -> ServiceError:
    """Any failure as a ServiceError. What is not expected is logged, with the facts that are known of the request, and
    its text kept from the caller.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, TensorError):
        return errors.InvalidInput(error.field, error.expected, error.got)
    if isinstance(error, DecodeError):
        return errors.InvalidRequest("message", "one of the contract", "bytes that are none")
    if isinstance(error, grpc.aio.InternalError):  # what gRPC has for a message whose reader is gone
        return errors.Cancelled("the client has gone")
    log.exception("request failed", exc_info=error, **facts)
    return errors.InternalError("the server failed; its log has the cause")


def _brief(text: str, most: int) -> str:
    cut = text.encode(errors="replace")
    return text if len(cut) <= most else cut[:most].decode(errors="ignore") + "…"


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, **facts: object) -> None:
    """Ends a call with an error. The facts are for the log."""
    told = service_error(error, **facts)
    log.debug("call refused", reason=told.reason, error=str(told), **facts)
    message = status(told, caller())
    await context.abort(status_code(told), message.message, (("grpc-status-details-bin", message.SerializeToString()),))


def _facts(request: Any) -> dict[str, str]:
    """What a request says of whom it concerns."""
    config = getattr(request, "config", request)  # of a new session
    found = {
        "session": getattr(request, "session_id", ""),
        "model": getattr(config, "model", "") or getattr(config, "name", ""),
    }
    return {name: value[:_SHOWN] for name, value in found.items() if isinstance(value, str) and value}


Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def told(method: Method) -> Method:
    """A method of a servicer that ends its call with a status whenever it raises."""

    @functools.wraps(method)
    async def wrapper(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:  # the boundary: every failure becomes a status here
            return await abort(context, error, method=method.__name__, **_facts(request))

    return wrapper  # type: ignore[return-value]
