from __future__ import annotations

import copy
import pickle

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from rnnserve import errors
from rnnserve.v1 import error_pb2

CLASSES = {
    "INVALID_INPUT": errors.InvalidInput,
    "NOT_FINITE": errors.InvalidInput,
    "INVALID_REQUEST": errors.InvalidRequest,
    "OPTION_UNSUPPORTED": errors.OptionUnsupported,
    "MODEL_UNKNOWN": errors.ModelNotFound,
    "VERSION_UNKNOWN": errors.ModelNotFound,
    "MODEL_UNAVAILABLE": errors.ModelUnavailable,
    "SESSION_UNKNOWN": errors.SessionNotFound,
    "SESSION_CLOSED": errors.SessionClosed,
    "SESSION_EXPIRED": errors.SessionExpired,
    "SESSION_EXISTS": errors.SessionExists,
    "SESSIONS_FULL": errors.ServerBusy,
    "STEP_AHEAD": errors.StepMismatch,
    "STEP_BEHIND": errors.StepMismatch,
    "STEP_CONFLICT": errors.StepConflict,
    "QUEUE_FULL": errors.ServerBusy,
    "TOO_LARGE": errors.TooLarge,
    "DEADLINE_PASSED": errors.DeadlineExceeded,
    "CANCELLED": errors.Cancelled,
    "DRAINING": errors.Unavailable,
    "ENGINE_FAILED": errors.ServerError,
    "INTERNAL": errors.ServerError,
}


class Failure(grpc.RpcError):
    def __init__(self, code, details="", trailer=()):
        self._failure = code, details, trailer

    def code(self):
        return self._failure[0]

    def details(self):
        return self._failure[1]

    def trailing_metadata(self):
        return self._failure[2]


def google_status(code, reason, *more, domain="rnnserve", **metadata):
    """A Status as google.rpc's own messages write it."""
    status = status_pb2.Status(code=code.value[0], message="a sentence")
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata), *more):
        status.details.add().Pack(detail)
    return status


def test_every_reason_has_its_class():
    """Each reason of the contract becomes its exception, with its reason, status and sentence, under one root."""
    for reason, kind in CLASSES.items():
        status = google_status(grpc.StatusCode.ABORTED, reason, field="x")
        error = errors.from_status(error_pb2.Status.FromString(status.SerializeToString()))
        assert type(error) is kind
        assert isinstance(error, errors.RnnserveError)
        assert (error.reason, error.status, str(error)) == (reason, grpc.StatusCode.ABORTED, "a sentence")
        assert error.metadata == {"field": "x"}


def test_details_are_googles():
    """BadRequest and RetryInfo are read from google.rpc's own messages."""
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="inputs.x", description="expected 5, got 4")
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    status = google_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", bad, retry)
    error = errors.from_status(error_pb2.Status.FromString(status.SerializeToString()))
    assert isinstance(error, errors.ServerBusy)
    assert error.retry_after == 1.5
    assert error.violations == (errors.Violation("inputs.x", "expected 5, got 4"),)


def test_expected_step():
    """A chunk at the wrong step says where the session is."""
    error = errors.from_status(
        error_pb2.Status.FromString(
            google_status(grpc.StatusCode.OUT_OF_RANGE, "STEP_AHEAD", expected_step="7").SerializeToString()
        )
    )
    assert isinstance(error, errors.StepMismatch)
    assert error.expected_step == 7
    assert errors.StepMismatch("no facts").expected_step is None


def test_trailer():
    """A failed call's exception comes from its trailer."""
    status = google_status(grpc.StatusCode.NOT_FOUND, "SESSION_EXPIRED", session_id="s")
    trailer = (("other", "x"), ("grpc-status-details-bin", status.SerializeToString()))
    error = errors.from_rpc_error(Failure(grpc.StatusCode.NOT_FOUND, "ignored", trailer))
    assert isinstance(error, errors.SessionExpired)
    assert isinstance(error, errors.SessionNotFound)
    assert error.metadata == {"session_id": "s"}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ServerBusy),
        (grpc.StatusCode.UNKNOWN, errors.ServerError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDenied),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.RequestError),
    ],
)
def test_without_our_details(code, kind):
    """A proxy's answer, or gRPC's own, is told by its status alone; so is one whose trailer is not to be read."""
    for trailer in (None, (), (("grpc-status-details-bin", b"\xff"),)):
        error = errors.from_rpc_error(Failure(code, "words", trailer))
        assert type(error) is kind
        assert (error.status, error.reason, str(error)) == (code, "", "words")
    foreign = google_status(code, "QUEUE_FULL", domain="else.where")
    assert type(errors.from_status(error_pb2.Status.FromString(foreign.SerializeToString()))) is kind


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_lost_stream(code):
    """However a stream is lost, it is Unavailable; a stream that the server refuses for a reason says the reason."""
    error = errors.from_lost_stream(Failure(code, "gone"))
    assert type(error) is errors.Unavailable
    assert error.status is code
    assert "gone" in str(error)
    assert type(errors.from_lost_stream(None)) is errors.Unavailable
    refused = google_status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST").SerializeToString()
    failure = Failure(grpc.StatusCode.INVALID_ARGUMENT, "", (("grpc-status-details-bin", refused),))
    assert type(errors.from_lost_stream(failure)) is errors.InvalidRequest


def test_builtin_kin():
    """Code that knows only Python's own exceptions catches these too."""
    assert issubclass(errors.InvalidInput, ValueError)
    assert issubclass(errors.DeadlineExceeded, TimeoutError)


@pytest.mark.parametrize("twin", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_copies(twin):
    """An exception crosses processes with all that it says."""
    error = errors.ServerBusy("full", reason="SESSIONS_FULL", metadata={"a": "b"}, retry_after=2.0)
    again = twin(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
    group = twin(errors.GroupError("2 of 3", {1: error}))
    assert (str(group), group.errors[1].reason, group.retry_after) == ("2 of 3", "SESSIONS_FULL", 2.0)
