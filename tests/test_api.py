"""The contract, through real stubs on a real server."""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import random
import time
from collections import Counter, defaultdict
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from house import FEATURES, AddingEngine, Clock, loaded, random_cuts
from rnnserve.codec import decode, encode, encode_named
from rnnserve.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    tensor_pb2,
)
from rnnserve.v1.options_pb2 import LayerOptions
from rnnserve_models.errors import ModelError
from rnnserve_models.load import load_model
from rnnserve_models.spec import OPTION_NAMES
from rnnserve_server.api import stream as stream_module
from rnnserve_server.api.sessions import SessionServicer
from rnnserve_server.api.stream import LaneStream
from rnnserve_server.config import Settings
from rnnserve_server.core import Core
from rnnserve_server.errors import Draining
from rnnserve_server.repository import Repository
from rnnserve_server.sessions import Group
from rnnserve_server.store import open_store
from serving import ZOO, running_server

OPEN, STEP, CLOSE = (
    inference_pb2.LANE_OPERATION_OPEN,
    inference_pb2.LANE_OPERATION_STEP,
    inference_pb2.LANE_OPERATION_CLOSE,
)
LIMITS = {
    "max_message_bytes": 1 << 20,
    "max_lanes": 300,
    "max_batch_size": 64,
    "max_sessions": 1000,
    "stream_queue_chunks": 256,
    "inline_seconds": 0.0,  # the engine of these tests waits for them
}


def repository() -> Repository:
    made = Repository(ZOO)
    fixed = tuple(name for name in OPTION_NAMES if name != "go_backwards")
    for model in (
        loaded(AddingEngine()),
        loaded(AddingEngine(), version="2"),
        loaded(AddingEngine(finite=True), name="strict", masking=False, settable_options=fixed),
        *(load_model(ZOO / name / "1") for name in ("lstm-4", "lstm-32-64")),
    ):
        made.put(model.name, model.version, model)
    made.put("broken", "1", ModelError("its weights are gone"))
    return made


class Served:
    """A server and stubs for it."""

    def __init__(self, server: Any, channel: grpc.Channel) -> None:
        self.server = server
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)

    @property
    def adder(self) -> AddingEngine:
        """The engine of adder, version 1."""
        engine = self.server.server.core.repository.get("adder", "1").engine
        assert isinstance(engine, AddingEngine)
        return engine

    def create(self, model: str = "adder", version: str = "1", **config: Any) -> session_pb2.Session:
        config = session_pb2.SessionConfig(model=model, version=version if model == "adder" else "", **config)
        return self.sessions.CreateSession(session_pb2.CreateSessionRequest(config=config)).session

    def get(self, session_id: str) -> session_pb2.Session:
        return self.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session_id)).session

    def predict(self, session_id: str = "", x: Any = None, **fields: Any) -> inference_pb2.PredictResponse:
        return self.inference.Predict(predict(session_id, x, **fields), timeout=30)


@pytest.fixture(scope="module")
def served():
    with running_server(repository(), **LIMITS) as server, grpc.insecure_channel(server.address) as channel:
        yield Served(server, channel)


def ones(*shape: int, value: float = 1.0) -> np.ndarray:
    return np.full((*shape, FEATURES), value, np.float32)


def predict(session_id: str = "", x: Any = None, **fields: Any) -> inference_pb2.PredictRequest:
    inputs = fields.pop("inputs", None)
    if inputs is None:
        inputs = encode_named({"input": ones(1, 1) if x is None else x})
    return inference_pb2.PredictRequest(session_id=session_id, inputs=inputs, **fields)


def details(status: Any) -> tuple[Any, list[Any], Any]:
    """(ErrorInfo, field violations, RetryInfo or None) of a status, which has exactly one ErrorInfo, of our domain."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    found = {message.DESCRIPTOR.name: False for message in (info, bad, retry)}
    for detail in status.details:
        for message in (info, bad, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
                found[message.DESCRIPTOR.name] = True
    assert found["ErrorInfo"]
    assert info.domain == "rnnserve"
    assert status.message
    if status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]:
        assert bad.field_violations
    return info, list(bad.field_violations), retry if found["RetryInfo"] else None


def assert_error(status: Any, code: str, reason: str, facts: dict[str, str]) -> None:
    info, violations, _ = details(status)
    assert status.code == grpc.StatusCode[code].value[0], status.message
    assert info.reason == reason
    for key, value in facts.items():
        assert value in info.metadata[key], (key, info.metadata)
    if code == "INVALID_ARGUMENT" and "field" in facts:
        assert facts["field"] in violations[0].field
        assert facts.get("expected", "") in violations[0].description


def assert_fails(call: Any, code: str, reason: str, **facts: str) -> None:
    """The call ends with that status, and its details say so."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code().name == code, caught.value.details()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert_error(status, code, reason, facts)


class Stream:
    """A stream, by hand."""

    def __init__(self, served: Served) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = served.inference.Stream(iter(self._requests.get, None), timeout=60)
        self.opened: dict[int, Any] = {}
        self.closed: list[int] = []
        self.errors: list[Any] = []
        self.results: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)  # by lane: (first step, output)
        self.timeline: list[tuple[str, int]] = []

    def send(self, *, opens: Any = (), frames: Any = (), closes: Any = ()) -> None:
        self._requests.put(inference_pb2.StreamRequest(opens=opens, frames=frames, closes=closes))

    def end(self) -> None:
        self._requests.put(None)

    def read(self, answers: int) -> Stream:
        """Reads until so many more answers came: opens, chunks, errors and closes."""
        for response in self.call if answers else ():
            answers -= self._take(response)
            if answers <= 0:
                break
        assert answers == 0
        return self

    def read_all(self) -> Stream:
        for response in self.call:
            self._take(response)
        return self

    def error(self) -> Any:
        """The one error since the last call of this."""
        (error,) = self.errors
        self.errors = []
        return error

    def _take(self, response: Any) -> int:
        taken = 0
        for opened in response.opened:
            self.opened[opened.lane] = opened.session
            self.timeline.append(("opened", opened.lane))
            taken += 1
        for frame in response.frames:
            (output,) = (decode(named.tensor) for named in frame.outputs)
            for lane, first_step, y in zip(frame.lanes, frame.first_steps, output, strict=True):
                self.results[lane].append((first_step, y))
                self.timeline.append(("result", lane))
                taken += 1
        for error in response.errors:
            details(error.status)
            self.errors.append(error)
            self.timeline.append(("error", error.lane))
        self.closed += [closed.lane for closed in response.closed]
        self.timeline += [("closed", closed.lane) for closed in response.closed]
        return taken + len(response.errors) + len(response.closed)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        self.call.cancel()
        self._requests.put(None)


def opening(lane: int, session_id: str = "", **config: Any) -> inference_pb2.LaneOpen:
    if session_id:
        return inference_pb2.LaneOpen(lane=lane, session_id=session_id)
    return inference_pb2.LaneOpen(lane=lane, create=session_pb2.SessionConfig(**{"model": "adder", **config}))


def frame(lanes: Any, x: Any = None, first_steps: Any = (), mask: Any = None, **fields: Any) -> inference_pb2.StepFrame:
    lanes = list(lanes)
    inputs = fields.pop("inputs", None)
    if inputs is None:
        inputs = encode_named({"input": ones(len(lanes), 1, 1) if x is None else x})
    mask = None if mask is None else encode(mask)
    return inference_pb2.StepFrame(lanes=lanes, first_steps=first_steps, inputs=inputs, mask=mask)


def named(name: str, array: Any) -> list[Any]:
    return encode_named({name: array})


def tensor(shape: Any, data: bytes, data_type: int = tensor_pb2.DATA_TYPE_FLOAT32) -> list[Any]:
    return [tensor_pb2.NamedTensor(name="input", tensor=tensor_pb2.Tensor(data_type=data_type, shape=shape, data=data))]


NAN = ones(2, 3)
NAN[1, 2, 0] = np.nan

# What is wrong with the chunk of a session of batch size 2: fields of Predict, code, reason, facts.
BAD_CHUNKS: dict[str, tuple[dict[str, Any], str, str, dict[str, str]]] = {
    "rank": ({"x": ones(2)}, "INVALID_ARGUMENT", "INVALID_INPUT", {"expected": ", time, 2]", "got": "[2, 2]"}),
    "features": ({"x": np.ones((2, 3, 5), "f4")}, "INVALID_ARGUMENT", "INVALID_INPUT", {"got": "shape [2, 3, 5]"}),
    "dtype": (
        {"x": ones(2, 3).astype("f8")},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"expected": "dtype float32", "got": "float64"},
    ),
    "batch": ({"x": ones(3, 3)}, "INVALID_ARGUMENT", "INVALID_INPUT", {"expected": "[2, time, 2]", "got": "[3, 3, 2]"}),
    "no_steps": ({"x": ones(2, 0)}, "INVALID_ARGUMENT", "INVALID_INPUT", {"expected": "none of them 0"}),
    "byte_length": (
        {"inputs": tensor([2, 1, 2], b"123")},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"expected": "16 bytes", "got": "3 bytes"},
    ),
    "data_type": (
        {"inputs": tensor([2, 1, 2], bytes(16), 0)},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"expected": "a data type among", "got": "none"},
    ),
    "negative_extent": (
        {"inputs": tensor([-2, 1, 2], bytes(16))},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"expected": "extents of 0 or more"},
    ),
    "name": (
        {"inputs": named("audio", ones(2, 1))},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"expected": "a tensor", "got": "none"},
    ),
    "twice": (
        {"inputs": named("input", ones(2, 1)) * 2},
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"expected": "distinct names"},
    ),
    "nan": ({"x": NAN}, "INVALID_ARGUMENT", "NOT_FINITE", {"expected": "finite", "got": "NaN"}),
    "infinity": ({"x": ones(2, 3, value=np.inf)}, "INVALID_ARGUMENT", "NOT_FINITE", {"expected": "finite"}),
}
FIELD = {"field": "inputs.input"}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_chunks(served, name):
    """Every misfit of a chunk has a status of its own that names the tensor, what was expected and what came; on a
    call and in a stream alike, and nothing changes: the session goes on from where it was.
    """
    fields, code, reason, facts = BAD_CHUNKS[name]
    facts = FIELD | facts
    session = served.create("strict", batch_size=2)
    served.predict(session.session_id, ones(2, 1))
    assert_fails(lambda: served.predict(session.session_id, **fields), code, reason, **facts)
    if name != "batch":  # a call without a session may have any
        assert_fails(lambda: served.predict(model="strict", **fields), code, reason, **facts)
    with Stream(served) as stream:
        stream.send(opens=[opening(1, session.session_id), opening(2, model="strict", batch_size=2)])
        stream.read(2)
        inputs = predict(**fields).inputs
        for each in inputs:
            each.tensor.shape.insert(0, 1)
        stream.send(frames=[frame([1], inputs=inputs, first_steps=[1]), frame([2], ones(1, 2, 1))])
        stream.read(2)
        error = stream.error()
        assert (error.lane, error.operation, error.first_step) == (1, STEP, 1)
        assert_error(error.status, code, reason, facts)
        stream.send(frames=[frame([1], ones(1, 2, 1), first_steps=[1])])
        stream.read(1)
        assert stream.results[1][0][1].tolist() == [[2, 2]] * 2
        assert stream.results[2][0][1].tolist() == [[1, 1]] * 2
    assert served.get(session.session_id).step == 2


MISUSES: dict[str, tuple[Any, str, str, dict[str, str]]] = {
    "no model": (lambda s: s.predict(), "INVALID_ARGUMENT", "INVALID_REQUEST", {"field": "model"}),
    "both": (
        lambda s: s.predict(s.create().session_id, model="adder"),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "model", "expected": "nothing"},
    ),
    "version of a session": (
        lambda s: s.predict(s.create().session_id, version="1"),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "version"},
    ),
    "options of a session": (
        lambda s: s.predict(s.create().session_id, options=LayerOptions()),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "options"},
    ),
    "initial states of a session": (
        lambda s: s.predict(s.create().session_id, initial_states=named("sum", ones(1))),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "initial_states"},
    ),
    "step of a call": (
        lambda s: s.predict(model="adder", first_step=0),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "first_step", "expected": "nothing", "got": "0"},
    ),
    "unknown model": (lambda s: s.predict(model="nope"), "NOT_FOUND", "MODEL_UNKNOWN", {"got": "nope"}),
    "unknown version": (
        lambda s: s.predict(model="adder", version="7"),
        "NOT_FOUND",
        "VERSION_UNKNOWN",
        {"expected": "2, 1", "got": "7"},
    ),
    "broken model": (lambda s: s.predict(model="broken"), "FAILED_PRECONDITION", "MODEL_UNAVAILABLE", {}),
    "unknown session": (lambda s: s.predict("nope"), "NOT_FOUND", "SESSION_UNKNOWN", {"session_id": "nope"}),
    "long name": (lambda s: s.get("x" * 50_000), "NOT_FOUND", "SESSION_UNKNOWN", {"session_id": "xxx"}),
    "long foreign name": (lambda s: s.predict(model="ж" * 50_000), "NOT_FOUND", "MODEL_UNKNOWN", {"got": "жжж"}),
    "long input": (
        lambda s: s.predict(model="adder", inputs=named("input", ones(1, 1)) + named("y" * 50_000, ones(1, 1))),
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "inputs.yyy", "expected": "one of ['input']"},
    ),
    "stateful call": (
        lambda s: s.predict(model="adder", options=LayerOptions(stateful=True)),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "options.stateful", "expected": "false", "got": "true"},
    ),
    "stateless session": (
        lambda s: s.create(options=LayerOptions(stateful=False)),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "options.stateful", "expected": "true", "got": "false"},
    ),
    "option of a call": (
        lambda s: s.predict(model="strict", options=LayerOptions(go_backwards=True)),
        "UNIMPLEMENTED",
        "OPTION_UNSUPPORTED",
        {"field": "options.go_backwards", "expected": "False", "got": "True"},
    ),
    "option of a session": (
        lambda s: s.create("strict", options=LayerOptions(go_backwards=True)),
        "UNIMPLEMENTED",
        "OPTION_UNSUPPORTED",
        {"field": "options.go_backwards"},
    ),
    "mask of a call": (
        lambda s: s.predict(model="strict", mask=encode(np.ones((1, 1), bool))),
        "UNIMPLEMENTED",
        "OPTION_UNSUPPORTED",
        {"field": "mask", "expected": "no mask", "got": "a mask"},
    ),
    "mask of a session": (
        lambda s: s.predict(s.create("strict").session_id, mask=encode(np.ones((1, 1), bool))),
        "UNIMPLEMENTED",
        "OPTION_UNSUPPORTED",
        {"field": "mask"},
    ),
    "mask of another shape": (
        lambda s: s.predict(model="adder", mask=encode(np.ones((1, 2), bool))),
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "mask", "expected": "shape [1, 1]", "got": "shape [1, 2]"},
    ),
    "mask of numbers": (
        lambda s: s.predict(model="adder", mask=encode(np.ones((1, 1), np.uint8))),
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "mask", "expected": "dtype bool", "got": "uint8"},
    ),
    "states of another name": (
        lambda s: s.create(initial_states=named("h", ones(1))),
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "initial_states.sum", "got": "none"},
    ),
    "states of another shape": (
        lambda s: s.create(batch_size=2, initial_states=named("sum", ones(1))),
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "initial_states.sum", "expected": "shape [2, 2]", "got": "shape [1, 2]"},
    ),
    "states of a call": (
        lambda s: s.predict(model="adder", initial_states=named("sum", ones(3))),
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "initial_states.sum", "expected": "shape [1, 2]", "got": "shape [3, 2]"},
    ),
    "batch of a session": (
        lambda s: s.create(batch_size=65),
        "RESOURCE_EXHAUSTED",
        "TOO_LARGE",
        {"field": "batch_size", "expected": "at most 64", "got": "65"},
    ),
    "batch of a call": (
        lambda s: s.predict(model="adder", x=ones(65, 1)),
        "RESOURCE_EXHAUSTED",
        "TOO_LARGE",
        {"expected": "at most 64", "got": "65"},
    ),
    "session id": (
        lambda s: s.create(session_id="a b"),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "session_id", "expected": "1 to 128 characters", "got": "'a b'"},
    ),
    "long session id": (
        lambda s: s.create(session_id="a" * 129),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "session_id"},
    ),
    "session id of a line": (
        lambda s: s.create(session_id="a\n"),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "session_id"},
    ),
    "session id in use": (
        lambda s: [s.create(session_id="taken"), s.create(session_id="taken")],
        "ALREADY_EXISTS",
        "SESSION_EXISTS",
        {"session_id": "taken"},
    ),
    "no lifetime": (
        lambda s: s.create(idle_lifetime=Duration()),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "idle_lifetime", "expected": "positive"},
    ),
    "negative page of sessions": (
        lambda s: s.sessions.ListSessions(session_pb2.ListSessionsRequest(page_size=-1)),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "page_size", "expected": "0 or more", "got": "-1"},
    ),
    "negative page of models": (
        lambda s: s.models.ListModels(model_pb2.ListModelsRequest(page_size=-1)),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "page_size"},
    ),
    "token of sessions": (
        lambda s: s.sessions.ListSessions(session_pb2.ListSessionsRequest(page_token="next")),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "page_token", "got": "'next'"},
    ),
    "token of models": (
        lambda s: s.models.ListModels(model_pb2.ListModelsRequest(page_token="٣")),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "page_token"},
    ),
    "unknown model described": (
        lambda s: s.models.GetModel(model_pb2.GetModelRequest(name="nope")),
        "NOT_FOUND",
        "MODEL_UNKNOWN",
        {},
    ),
    "unknown session reset": (
        lambda s: s.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id="nope")),
        "NOT_FOUND",
        "SESSION_UNKNOWN",
        {},
    ),
    "reset to other states": (
        lambda s: s.sessions.ResetSession(
            session_pb2.ResetSessionRequest(session_id=s.create().session_id, states=named("sum", ones(2)))
        ),
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "states.sum"},
    ),
    "reset at another step": (
        lambda s: s.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id=s.create().session_id, step=3)),
        "OUT_OF_RANGE",
        "STEP_AHEAD",
        {"expected": "0", "got": "3", "expected_step": "0"},
    ),
    "unknown session deleted": (
        lambda s: s.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="nope")),
        "NOT_FOUND",
        "SESSION_UNKNOWN",
        {},
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_of_calls(served, name):
    """Every other mistake of a call has its own status and reason too, and those of a request name field and value."""
    call, code, reason, facts = MISUSES[name]
    assert_fails(lambda: call(served), code, reason, **facts)


def test_no_refused_session_is_left_behind(served):
    """Sessions that were refused are on no page."""
    before = list_sessions(served)
    for call, *_ in (MISUSES["session id"], MISUSES["states of another shape"], MISUSES["batch of a session"]):
        with pytest.raises(grpc.RpcError):
            call(served)
    assert list_sessions(served) == before


def test_an_oversized_message(served):
    """A message above the limit ends its call with RESOURCE_EXHAUSTED; the session and the server go on."""
    session = served.create()
    with pytest.raises(grpc.RpcError) as caught:
        served.predict(session.session_id, ones(1, 1 << 18))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    served.predict(session.session_id)
    assert served.get(session.session_id).step == 1


def test_steps_of_calls(served):
    """A chunk ahead or behind fails with the step that was expected; without a step it goes wherever the session is."""
    session = served.create()
    assert served.predict(session.session_id, ones(1, 3), first_step=0).step == 3
    for first_step, reason in ((4, "STEP_AHEAD"), (2, "STEP_BEHIND"), (2**64 - 1, "STEP_AHEAD")):
        assert_fails(
            lambda first_step=first_step: served.predict(session.session_id, first_step=first_step),
            "OUT_OF_RANGE",
            reason,
            field="first_step",
            expected="3",
            got=str(first_step),
            expected_step="3",
        )
    response = served.predict(session.session_id)
    assert (response.step, response.version) == (4, "1")
    assert decode(response.outputs[0].tensor).tolist() == [[4, 4]]


def test_ends_are_told_apart(served):
    """After a session was deleted its chunks, its reset and its second end say so."""
    session_id = served.create().session_id
    served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session_id))
    for call in (
        lambda: served.predict(session_id),
        lambda: served.get(session_id),
        lambda: served.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id=session_id)),
        lambda: served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session_id)),
    ):
        assert_fails(call, "NOT_FOUND", "SESSION_CLOSED", session_id=session_id)


def test_a_full_server_hints_when_to_come_back():
    """SESSIONS_FULL carries a RetryInfo, and the lane or call beside it goes on."""
    with (
        running_server(repository(), max_sessions=1) as server,
        grpc.insecure_channel(server.address) as channel,
        Stream(served := Served(server, channel)) as stream,
    ):
        stream.send(opens=[opening(0), opening(1)], frames=[frame([0])])
        stream.read(3)
        error = stream.error()
        assert_error(error.status, "RESOURCE_EXHAUSTED", "SESSIONS_FULL", {})
        assert details(error.status)[2].retry_delay.ToNanoseconds() > 0
        assert (error.lane, error.operation) == (1, OPEN)
        assert stream.results[0][0][1].tolist() == [[1, 1]]
        assert_fails(served.create, "RESOURCE_EXHAUSTED", "SESSIONS_FULL")


# Sessions


def list_sessions(served: Served, **request: Any) -> list[str]:
    found, token = [], ""
    while True:
        page = served.sessions.ListSessions(session_pb2.ListSessionsRequest(page_token=token, **request))
        assert len(page.sessions) <= (request.get("page_size") or 1000)
        found += [session.session_id for session in page.sessions]
        token = page.next_page_token
        if not token:
            return found


def test_a_session_is_as_it_was_asked_for(served):
    """A new session has every field set, the asked options over the model's, and its lifetime cut to the maximum."""
    session = served.create(
        batch_size=3,
        options=LayerOptions(return_sequences=True, zero_output_for_mask=True),
        idle_lifetime=Duration(seconds=10**9),
        session_id="as.asked:for-1_",
    )
    assert session == served.get("as.asked:for-1_")
    assert (session.model, session.version, session.batch_size, session.step) == ("adder", "1", 3, 0)
    assert session.digest == "sha256:adder/1"
    assert {field.name: value for field, value in session.options.ListFields()} == {
        **dict.fromkeys(OPTION_NAMES, False),
        "return_sequences": True,
        "zero_output_for_mask": True,
        "stateful": True,
    }
    assert session.idle_lifetime.seconds == 86400
    assert session.create_time.seconds > 1_700_000_000
    assert served.create(version="").version == "2"


def test_pages_of_sessions(served):
    """Sessions come oldest first, each that lives throughout on exactly one page, also while others come and go."""
    made = [served.create("lstm-4").session_id for _ in range(7)]
    assert list_sessions(served, model="lstm-4", page_size=2) == made
    assert [each for each in list_sessions(served, page_size=3) if each in made] == made
    first = served.sessions.ListSessions(session_pb2.ListSessionsRequest(model="lstm-4", page_size=3))
    served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=made[1]))
    served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=made[2]))
    late = served.create("lstm-4").session_id
    rest = served.sessions.ListSessions(
        session_pb2.ListSessionsRequest(model="lstm-4", page_token=first.next_page_token)
    )
    assert [session.session_id for session in first.sessions] == made[:3]
    assert [session.session_id for session in rest.sessions] == [*made[3:], late]
    assert rest.next_page_token == ""
    for session_id in (made[0], *made[3:], late):
        served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session_id))


def test_pages_of_models(served):
    """Models come by name and then newest version first, page by page; those that could not be loaded do not."""
    found, token = [], None
    while token != "":
        page = served.models.ListModels(model_pb2.ListModelsRequest(page_size=2, page_token=token or ""))
        found += [(model.name, model.version) for model in page.models]
        token = page.next_page_token
    assert found == [("adder", "2"), ("adder", "1"), ("lstm-32-64", "1"), ("lstm-4", "1"), ("strict", "1")]
    model = served.models.GetModel(model_pb2.GetModelRequest(name="strict")).model
    assert model.inputs[0].finite
    assert not model.masking
    assert "go_backwards" not in model.settable_options


def queued(served: Served) -> int:
    core = served.server.server.core
    return served.server.call(lambda: len(core.worker(core.repository.get("adder", "1"))))


def until_queued(served: Served, count: int) -> None:
    for _ in range(10_000):
        if queued(served) == count:
            return
    raise AssertionError(f"{queued(served)} are queued, expected {count}")


@pytest.fixture
def held(served):
    """The adder's next run waits until the test opens the gate."""
    served.adder.running.clear()
    served.adder.gate.clear()
    yield served.adder
    served.adder.gate.set()


def reset(served: Served, session_id: str, **fields: Any) -> Any:
    return served.sessions.ResetSession.future(
        session_pb2.ResetSessionRequest(session_id=session_id, **fields), timeout=30
    )


def test_a_reset_takes_its_turn(served, held):
    """A reset acts behind the chunks received before it and before those received after it; steps go on counting."""
    session_id = served.create().session_id
    first = served.inference.Predict.future(predict(session_id, ones(1, 2)), timeout=30)
    assert held.running.wait(30)
    second = reset(served, session_id, states=named("sum", ones(1, value=10)))
    until_queued(served, 2)
    third = served.inference.Predict.future(predict(session_id, ones(1, 1)), timeout=30)
    until_queued(served, 3)
    assert not second.done()
    held.gate.set()
    assert decode(first.result().outputs[0].tensor).tolist() == [[2, 2]]
    assert second.result().session.step in (2, 3)
    assert decode(third.result().outputs[0].tensor).tolist() == [[11, 11]]
    assert reset(served, session_id).result().session.step == 3
    assert decode(served.predict(session_id).outputs[0].tensor).tolist() == [[1, 1]]


def test_a_reset_holds_its_step_against_the_turn(served, held):
    """`step` is compared when the reset's turn has come: it counts the chunks before it; a mismatch changes nothing."""
    session_id = served.create().session_id
    chunk = served.inference.Predict.future(predict(session_id, ones(1, 2)), timeout=30)
    assert held.running.wait(30)
    wrong = reset(served, session_id, step=0)
    until_queued(served, 2)
    right = reset(served, session_id, step=2, states=named("sum", ones(1, value=5)))
    until_queued(served, 3)
    held.gate.set()
    assert chunk.result().step == 2
    assert_fails(wrong.result, "OUT_OF_RANGE", "STEP_BEHIND", expected_step="2", got="0")
    assert right.result().session.step == 2
    assert decode(served.predict(session_id).outputs[0].tensor).tolist() == [[6, 6]]


def test_a_cancelled_call_leaves_no_trace(served, held):
    """A chunk whose caller went away before its turn is not run, nor is a reset; the session is as it was."""
    session_id = served.create().session_id
    first = served.inference.Predict.future(predict(session_id), timeout=30)
    assert held.running.wait(30)
    second = served.inference.Predict.future(predict(session_id), timeout=30)
    until_queued(served, 2)
    third = reset(served, session_id)
    until_queued(served, 3)
    second.cancel()
    third.cancel()
    served.models.ListModels(model_pb2.ListModelsRequest())
    held.gate.set()
    first.result()
    response = served.predict(session_id)
    assert (response.step, decode(response.outputs[0].tensor).tolist()) == (2, [[2, 2]])


def test_a_deadline_leaves_no_trace(served, held):
    """A chunk whose deadline passed while it waited is not run."""
    session_id = served.create().session_id
    first = served.inference.Predict.future(predict(session_id), timeout=30)
    assert held.running.wait(30)
    with pytest.raises(grpc.RpcError) as caught:
        served.inference.Predict(predict(session_id), timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    held.gate.set()
    first.result()
    assert served.predict(session_id).step == 2


def test_delete_does_not_wait(served, held):
    """Deleting ends a session at once: chunks that wait or run for it fail with NOT_FOUND, others' do not."""
    doomed, other = served.create().session_id, served.create().session_id
    running = served.inference.Predict.future(predict(doomed), timeout=30)
    assert held.running.wait(30)
    waiting = served.inference.Predict.future(predict(doomed), timeout=30)
    until_queued(served, 2)
    bystander = served.inference.Predict.future(predict(other), timeout=30)
    until_queued(served, 3)
    served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=doomed))
    heir = served.create()
    held.gate.set()
    for call in (running, waiting):
        assert_fails(call.result, "NOT_FOUND", "SESSION_CLOSED", session_id=doomed)
    assert bystander.result().step == 1
    assert decode(served.predict(heir.session_id).outputs[0].tensor).tolist() == [[1, 1]]


# Streams


def test_pipelining(served):
    """Opens, steps and closes may all be sent before anything is read, even in one message."""
    with Stream(served) as stream:
        stream.send(
            opens=[opening(0), opening(1)],
            frames=[frame([0, 1], first_steps=[0, 0]), frame([0], ones(1, 1, 2), first_steps=[1])],
            closes=[inference_pb2.LaneClose(lane=0)],
        )
        stream.send(frames=[frame([1], first_steps=[1])], closes=[inference_pb2.LaneClose(lane=1, delete_session=True)])
        stream.end()
        stream.read_all()
    assert stream.errors == []
    assert [(step, y.tolist()) for step, y in stream.results[0]] == [(0, [[1, 1]]), (1, [[3, 3]])]
    assert [(step, y.tolist()) for step, y in stream.results[1]] == [(0, [[1, 1]]), (1, [[2, 2]])]
    assert sorted(stream.closed) == [0, 1]
    for lane in (0, 1):
        events = [event for event, of in stream.timeline if of == lane]
        assert events == ["opened", "result", "result", "closed"]
    assert served.get(stream.opened[0].session_id).step == 3
    assert_fails(lambda: served.get(stream.opened[1].session_id), "NOT_FOUND", "SESSION_CLOSED")


def test_half_close_answers_everything(served):
    """A client that says it is done is answered for everything it sent, and then the stream ends with OK."""
    with Stream(served) as stream:
        stream.send(opens=[opening(lane) for lane in range(20)])
        for number in range(50):
            stream.send(frames=[frame(range(20), ones(20, 1, 3), first_steps=[3 * number] * 20)])
        stream.end()
        stream.read_all()
        assert stream.call.code() == grpc.StatusCode.OK
    for lane in range(20):
        assert [step for step, _ in stream.results[lane]] == list(range(0, 150, 3))
        assert stream.results[lane][-1][1].tolist() == [[150, 150]]


def test_an_empty_stream(served):
    """A stream on which nothing is said ends with OK."""
    with Stream(served) as stream:
        stream.end()
        stream.read_all()
        assert stream.call.code() == grpc.StatusCode.OK


LANES: dict[str, tuple[dict[str, Any], int, int, str, str, dict[str, str]]] = {
    # what is sent while lanes 1 and 2 are open: the lane, the operation, code, reason and facts of the one error
    "open twice": ({"opens": [opening(1)]}, 1, OPEN, "ALREADY_EXISTS", "LANE_OPEN", {"lane": "1"}),
    "lane too high": ({"opens": [opening(300)]}, 300, OPEN, "RESOURCE_EXHAUSTED", "TOO_LARGE", {"field": "lane"}),
    "no target": (
        {"opens": [inference_pb2.LaneOpen(lane=5)]},
        5,
        OPEN,
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "target"},
    ),
    "unknown session": ({"opens": [opening(5, "nope")]}, 5, OPEN, "NOT_FOUND", "SESSION_UNKNOWN", {}),
    "unknown model": ({"opens": [opening(5, model="nope")]}, 5, OPEN, "NOT_FOUND", "MODEL_UNKNOWN", {}),
    "bad states": (
        {"opens": [opening(5, initial_states=named("sum", ones(2)))]},
        5,
        OPEN,
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "initial_states.sum"},
    ),
    "bad bytes": (
        {
            "opens": [
                opening(5, initial_states=[tensor_pb2.NamedTensor(name="sum", tensor=tensor_pb2.Tensor(data=b"1"))])
            ]
        },
        5,
        OPEN,
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "initial_states.sum"},
    ),
    "closed lane": ({"frames": [frame([7])]}, 7, STEP, "NOT_FOUND", "LANE_UNKNOWN", {"lane": "7"}),
    "lane beyond all": ({"frames": [frame([2**32 - 1])]}, 2**32 - 1, STEP, "NOT_FOUND", "LANE_UNKNOWN", {}),
    "close of none": (
        {"closes": [inference_pb2.LaneClose(lane=7)]},
        7,
        CLOSE,
        "NOT_FOUND",
        "LANE_UNKNOWN",
        {"lane": "7"},
    ),
    "ahead": (
        {"frames": [frame([1], first_steps=[9])]},
        1,
        STEP,
        "OUT_OF_RANGE",
        "STEP_AHEAD",
        {"expected_step": "1", "got": "9"},
    ),
    "another chunk": (
        {"frames": [frame([1], ones(1, 1, 1, value=2), first_steps=[0])]},
        1,
        STEP,
        "ABORTED",
        "STEP_CONFLICT",
        {"expected_step": "1", "got": "0"},
    ),
    "wrong count": (
        {"frames": [frame([1], first_steps=[1, 2])]},
        1,
        STEP,
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        {"field": "frames.first_steps", "expected": "1", "got": "2"},
    ),
    "first axis": (
        {"frames": [frame([1], ones(2, 1, 1))]},
        1,
        STEP,
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "inputs.input", "expected": "a first axis of 1", "got": "[2, 1, 1, 2]"},
    ),
    "scalar": (
        {"frames": [frame([1], np.float32(1))]},
        1,
        STEP,
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "inputs.input", "got": "shape []"},
    ),
    "mask": (
        {"frames": [frame([1], mask=np.ones((1, 1, 2), bool))]},
        1,
        STEP,
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        {"field": "mask"},
    ),
}


@pytest.mark.parametrize("name", LANES)
def test_misuses_of_lanes(served, name):
    """What is wrong with one lane is told on that lane, changes nothing, and the stream and its other lanes go on."""
    sent, lane, operation, code, reason, facts = LANES[name]
    with Stream(served) as stream:
        stream.send(opens=[opening(1), opening(2)], frames=[frame([1, 2])])
        stream.read(4)
        stream.send(**sent)
        stream.send(frames=[frame([1, 2], first_steps=[1, 1])])
        stream.read(3)
        error = stream.error()
        assert (error.lane, error.operation) == (lane, operation)
        assert_error(error.status, code, reason, facts)
        assert [step for step, _ in stream.results[1]] == [step for step, _ in stream.results[2]] == [0, 1]
        assert stream.results[1][1][1].tolist() == [[2, 2]]


def test_a_lane_twice_in_a_frame(served):
    """A frame that names a lane twice runs none of its chunks and tells each of its lanes."""
    with Stream(served) as stream:
        stream.send(opens=[opening(1), opening(2)], frames=[frame([1, 2, 1])])
        stream.read(5)
        assert [error.lane for error in stream.errors] == [1, 2, 1]
        for error in stream.errors:
            assert_error(error.status, "INVALID_ARGUMENT", "LANE_REPEATED", {"lane": "1"})
        stream.send(frames=[frame([1, 2], first_steps=[0, 0])])
        stream.read(2)


def test_a_frame_without_lanes_ends_the_stream(served):
    """No lane is to blame for an empty frame: the stream ends with INVALID_ARGUMENT, once all else was answered."""
    with Stream(served) as stream:
        stream.send(opens=[opening(1)], frames=[frame([1]), inference_pb2.StepFrame()])
        assert_fails(
            stream.read_all, "INVALID_ARGUMENT", "INVALID_REQUEST", field="frames.lanes", expected="at least one lane"
        )
        assert stream.results[1][0][1].tolist() == [[1, 1]]
    assert served.get(stream.opened[1].session_id).step == 1


def test_only_the_lanes_to_blame_fail(served):
    """Of a frame over sessions of two kinds, one ended and one not open, each lane is told its own."""
    with Stream(served) as stream:
        stream.send(opens=[opening(0), opening(1), opening(2, batch_size=2), opening(3), opening(4)])
        stream.read(5)
        ended = stream.opened[3].session_id
        served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=ended))
        stream.send(frames=[frame([0, 1, 2, 3, 4, 9], first_steps=[0, 5, 0, 0, 0, 0])])
        stream.read(6)
        reasons = {error.lane: details(error.status)[0].reason for error in stream.errors}
        assert reasons == {1: "STEP_AHEAD", 2: "INVALID_INPUT", 3: "SESSION_CLOSED", 9: "LANE_UNKNOWN"}
        assert sorted(stream.results) == [0, 4]
        (closed,) = (error for error in stream.errors if error.lane == 3)
        assert details(closed.status)[0].metadata["session_id"] == ended


def test_a_masked_chunk_beside_one_that_is_refused(served):
    """Where the only chunk of a frame with valid steps is refused, the others are answered and the server lives on.

    (onnxruntime's LSTM ends the process if it is run over no rows.)
    """
    mask = np.array([[[1, 1]], [[0, 0]]], bool)
    with Stream(served) as stream:
        stream.send(opens=[opening(0, model="lstm-4"), opening(1, model="lstm-4")])
        stream.read(2)
        stream.send(frames=[frame([0, 1], np.ones((2, 1, 2, 5), np.float32), first_steps=[7, 0], mask=mask)])
        stream.read(2)
        assert_error(stream.error().status, "OUT_OF_RANGE", "STEP_AHEAD", {"expected_step": "0"})
        assert not stream.results[1][0][1].any()
        assert served.get(stream.opened[1].session_id).step == 2
        for opened in stream.opened.values():
            served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=opened.session_id))


def test_an_ended_session_does_not_learn_anothers_step(served):
    """The error of a chunk without a step, for a session that ended, tells no step: the slot is another session's."""
    with Stream(served) as stream:
        stream.send(opens=[opening(0, model="lstm-4")])
        stream.read(1)
        other = served.create("lstm-4").session_id
        served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=stream.opened[0].session_id))
        heir = served.create("lstm-4").session_id
        served.predict(heir, np.ones((1, 5, 5), np.float32))
        stream.send(frames=[frame([0], np.ones((1, 1, 1, 5), np.float32))])
        stream.read(1)
        assert not stream.error().HasField("first_step")
        assert served.get(heir).step == 5
        for session_id in (heir, other):
            served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session_id))


def test_one_session_on_several_lanes(served):
    """A session may be on several lanes, of several streams: step numbers keep its chunks apart, also in one frame."""
    session_id = served.create().session_id
    with Stream(served) as one, Stream(served) as two:
        one.send(opens=[opening(1, session_id), opening(2, session_id)], frames=[frame([2, 1])])
        one.read(4)
        assert one.results[2][0][0] == 0
        assert one.results[1][0][0] == 1
        assert one.results[1][0][1].tolist() == [[2, 2]]
        one.send(frames=[frame([1, 2], np.stack([ones(1, 1), ones(1, 1, value=7)]), first_steps=[2, 2])])
        one.read(2)
        assert details(one.error().status)[0].reason == "STEP_CONFLICT"
        two.send(opens=[opening(9, session_id)], frames=[frame([9], first_steps=[3])])
        two.read(2)
        assert two.results[9][0][1].tolist() == [[4, 4]]
    assert served.get(session_id).step == 4


def test_two_streams_of_a_session_send_at_once(served, held):
    """Chunks that wait for one another are answered on the stream on which each came."""
    session_id = served.create().session_id
    with Stream(served) as one, Stream(served) as two, Stream(served) as other:
        for stream in (one, two):
            stream.send(opens=[opening(0, session_id)])
            stream.read(1)
        other.send(opens=[opening(0, version="1")], frames=[frame([0])])
        assert held.running.wait(10)
        for first_step, stream in enumerate((one, two)):
            stream.send(frames=[frame([0], first_steps=[first_step])])
            until_queued(served, 2 + first_step)
        held.gate.set()
        assert [stream.read(1).results[0][0][1].tolist() for stream in (one, two)] == [[[1, 1]], [[2, 2]]]


def test_a_lane_is_free_after_its_close(served):
    """A closed lane takes another session; its old session lives on and can be taken by its id."""
    with Stream(served) as stream:
        stream.send(opens=[opening(1)], frames=[frame([1])], closes=[inference_pb2.LaneClose(lane=1)] * 2)
        stream.read(4)
        assert details(stream.error().status)[0].reason == "LANE_UNKNOWN"
        first = stream.opened[1].session_id
        stream.send(opens=[opening(1), opening(2, first)], frames=[frame([1, 2], first_steps=[0, 1])])
        stream.read(4)
        assert stream.errors == []
        assert stream.opened[2].step == 1
        assert stream.results[2][0][1].tolist() == [[2, 2]]


def test_opens_in_bulk(served):
    """Of hundreds of opens in one message each is answered as it would be alone, in their order, and before the
    message's frames are taken.
    """
    named = f"bulk-{random.randrange(1 << 60)}"
    wishes = [opening(lane) for lane in range(200)]
    wishes[20] = opening(20, model="strict", batch_size=2)
    wishes[30] = opening(30, model="nope")
    wishes[40] = opening(7)
    wishes[50] = opening(300)
    wishes[60] = inference_pb2.LaneOpen(lane=60)
    wishes[70] = opening(70, session_id=named)
    wishes[71] = inference_pb2.LaneOpen(lane=71, create=session_pb2.SessionConfig(model="adder", session_id=named))
    wishes[72] = opening(72, session_id=named)
    wishes[80] = opening(80, initial_states=named_states(9))
    wrong = {30: "MODEL_UNKNOWN", 7: "LANE_OPEN", 300: "TOO_LARGE", 60: "INVALID_REQUEST", 70: "SESSION_UNKNOWN"}
    lanes = [0, 80, 72, 71, 199]
    with Stream(served) as stream:
        stream.send(opens=wishes, frames=[frame([lane]) for lane in lanes])
        stream.read(200 + len(lanes))
        assert {error.lane: details(error.status)[0].reason for error in stream.errors} == wrong
        assert {error.operation for error in stream.errors} == {OPEN}
        assert list(stream.opened) == [lane for lane in range(200) if lane not in (30, 40, 50, 60, 70)]
        assert len({session.session_id for session in stream.opened.values()}) == 200 - len(wrong) - 1
        assert stream.opened[71].session_id == stream.opened[72].session_id == named
        assert (stream.opened[20].model, stream.opened[20].batch_size) == ("strict", 2)
        for lane in (0, 80, 199):
            opened = stream.opened[lane]
            assert (opened.step, opened.options.stateful, opened.idle_lifetime.seconds) == (0, True, 3600)
            assert served.get(opened.session_id).create_time == opened.create_time
        firsts = [stream.results[lane][0][1][0, 0] for lane in lanes]
        assert firsts == [1, 10, 1, 2, 1] or firsts == [1, 10, 2, 1, 1]


def named_states(fill: float) -> list[Any]:
    return encode_named({"sum": np.full((1, FEATURES), fill, np.float32)})


def test_a_bulk_of_opens_that_does_not_fit():
    """Where a server is full in the middle of a message, the sessions before are open and the others are told so."""
    with running_server(repository(), max_sessions=100) as server, grpc.insecure_channel(server.address) as channel:
        small = Served(server, channel)
        with Stream(small) as stream:
            stream.send(opens=[opening(lane) for lane in range(150)], frames=[frame([99])])
            stream.read(151)
            assert list(stream.opened) == list(range(100))
            assert [error.lane for error in stream.errors] == list(range(100, 150))
            assert {details(error.status)[0].reason for error in stream.errors} == {"SESSIONS_FULL"}
            assert len(stream.results[99]) == 1


def test_closes_in_bulk(served, held):
    """Of hundreds of closes in one message each waits for its own lane's chunks and no other's; closing twice, what is
    not open and what has ended are told; sessions that were not to be deleted live on.
    """
    with Stream(served) as stream:
        stream.send(opens=[opening(lane, version="1") for lane in range(200)])
        stream.read(200)
        stream.send(opens=[opening(200, stream.opened[9].session_id)], frames=[frame([5, 150])])
        stream.read(1)
        assert held.running.wait(30)
        served.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=stream.opened[180].session_id))
        closes = [inference_pb2.LaneClose(lane=lane, delete_session=lane != 3) for lane in (*range(200), 8, 250, 200)]
        stream.send(closes=closes)
        stream.read(201)
        assert sorted(stream.closed) == [lane for lane in range(200) if lane not in (5, 150, 180)]
        reasons = {error.lane: details(error.status)[0].reason for error in stream.errors}
        assert reasons == {8: "LANE_UNKNOWN", 250: "LANE_UNKNOWN", 180: "SESSION_CLOSED", 200: "SESSION_CLOSED"}
        held.gate.set()
        stream.read(4)
        assert stream.timeline[-4:-2] == [("result", 5), ("result", 150)]
        assert sorted(stream.closed[-2:]) == [5, 150]
        assert served.get(stream.opened[3].session_id).step == 0
        for lane in (0, 5, 150, 199):
            assert_fails(lambda lane=lane: served.get(stream.opened[lane].session_id), "NOT_FOUND", "SESSION_CLOSED")


def test_a_lane_that_waits_to_be_closed(served, held):
    """It takes no more chunks, nor another close, and is not free before the chunks that came before are answered: what
    is told of it is told of the session that was on it.
    """
    with Stream(served) as stream:
        stream.send(opens=[opening(5, version="1")], frames=[frame([5])])
        stream.read(1)
        assert held.running.wait(30)
        stream.send(closes=[inference_pb2.LaneClose(lane=5)])
        stream.send(opens=[opening(5)], frames=[frame([5])], closes=[inference_pb2.LaneClose(lane=5)])
        stream.read(3)
        told = [(error.operation, details(error.status)[0].reason) for error in stream.errors]
        assert told == [(OPEN, "LANE_OPEN"), (STEP, "LANE_UNKNOWN"), (CLOSE, "LANE_UNKNOWN")]
        held.gate.set()
        stream.read(2)
        assert stream.timeline[-2:] == [("result", 5), ("closed", 5)]
        assert served.get(stream.opened[5].session_id).step == 1
        stream.send(opens=[opening(5)], frames=[frame([5])])
        stream.read(2)
        assert len(stream.results[5]) == 2


def test_what_waits_for_a_session_that_went_and_came_back(tmp_path, monkeypatch):
    """A chunk is being stored while another server takes its session, and somebody here takes it back: the chunk is
    told so before the lane has the session again, or is closed; and of its session, not of none.
    """
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    kept: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def take(session_id: str) -> None:
        store = await open_store(url)
        assert await store.take([session_id], time.time()) != [None]
        await store.close()

    monkeypatch.setattr("rnnserve_server.storing._NEAR_SECONDS", 0.0)
    with (
        running_server(repository(), store=url, durability="step") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        served = Served(server, channel)
        store = server.server.core.keeper.store
        begin = store.begin_commit
        monkeypatch.setattr(store, "embedded", False)  # what need not wait for the commit does not
        monkeypatch.setattr(
            store, "begin_commit", lambda ticks, told: begin(ticks, lambda applied: kept.put((told, applied)))
        )
        with Stream(served) as stream, Stream(served) as other:
            stream.send(opens=[opening(5, version="1")], frames=[frame([5])])
            stream.read(1)
            told, applied = kept.get(timeout=30)
            session_id = stream.opened[5].session_id
            try:
                asyncio.run(take(session_id))
                other.send(opens=[opening(1, session_id)])
                other.read(1)
                assert other.opened[1].step == 1
                stream.send(closes=[inference_pb2.LaneClose(lane=5, delete_session=True)])
                until_queued(served, 2)
            finally:
                server.call(lambda: told(applied))
            stream.read(2)
            assert stream.timeline == [("opened", 5), ("error", 5), ("closed", 5)]
            info, *_ = details(stream.error().status)
            assert (info.reason, info.metadata["session_id"]) == ("STORE_DOWN", session_id)


def test_sessions_outlive_their_stream(served):
    """After a stream was cut off, its sessions are where their last answered chunk left them."""
    with Stream(served) as stream:
        stream.send(opens=[opening(1)], frames=[frame([1], ones(1, 1, 3))])
        stream.read(2)
        session_id = stream.opened[1].session_id
    with Stream(served) as stream:
        stream.send(opens=[opening(8, session_id)], frames=[frame([8], first_steps=[3])])
        stream.read(2)
        assert stream.opened[8].step == 3
        assert stream.results[8][0][1].tolist() == [[4, 4]]


def test_long_lived_streams_give_groups_back(served):
    """A stream that opens and ends sessions for days holds on to the memory of none of them."""
    with Stream(served) as stream:
        for _ in range(20):
            stream.send(opens=[opening(1, batch_size=7)], closes=[inference_pb2.LaneClose(lane=1, delete_session=True)])
            stream.read(2)
        gc.collect()
        assert sum(isinstance(each, Group) and each.batch_size == 7 for each in gc.get_objects()) <= 1


def test_options_on_the_wire(served):
    """time_major, masks and the last output hold for frames as they do for calls."""
    options = LayerOptions(return_sequences=True, time_major=True, zero_output_for_mask=True)
    x = np.arange(3 * 2 * FEATURES, dtype=np.float32).reshape(3, 2, FEATURES)  # [T, B, 2]
    mask = np.array([[1, 0], [0, 1], [1, 1]], bool)
    expected = np.cumsum(x * mask[..., None], axis=0) * mask[..., None]
    response = served.predict(model="adder", x=x, options=options, mask=encode(mask))
    np.testing.assert_array_equal(decode(response.outputs[0].tensor), expected)
    with Stream(served) as stream:
        stream.send(opens=[opening(1, batch_size=2, options=options), opening(2, batch_size=2, options=options)])
        stream.send(frames=[frame([2, 1], np.stack([x, x]), mask=np.stack([mask, mask]))])
        stream.read(4)
        for lane in (1, 2):
            np.testing.assert_array_equal(stream.results[lane][0][1], expected)


# Bits


def sequences(count: int, steps: int) -> np.ndarray:
    return np.random.default_rng(8).normal(size=(count, steps, 5)).astype(np.float32)


def test_chunks_of_a_long_sequence_are_the_bits_of_one_call(served):
    """A long sequence streamed in random chunks gives the bits of one call, under onnxruntime."""
    (x,) = sequences(1, 400)
    options = LayerOptions(return_sequences=True)
    whole = decode(served.predict(model="lstm-32-64", x=x[None], options=options).outputs[0].tensor)[0]
    with Stream(served) as stream:
        stream.send(opens=[opening(0, model="lstm-32-64", options=options)])
        cuts = random_cuts(np.random.default_rng(3), len(x))
        for start, stop in cuts:
            stream.send(frames=[frame([0], x[None, None, start:stop], first_steps=[start])])
        stream.read(1 + len(cuts))
    assert [step for step, _ in stream.results[0]] == [start for start, _ in cuts]
    assert np.concatenate([y[0] for _, y in stream.results[0]]).tobytes() == whole.tobytes()


def test_interleaved_sessions_are_the_bits_of_each_alone(served):
    """200 sessions on one stream, in random frames of random lanes and lengths, give the bits of 200 calls alone."""
    lanes, steps = 200, 12
    x = sequences(lanes, steps)
    options = LayerOptions(return_sequences=True, return_state=True)
    rng = random.Random(4)
    with Stream(served) as stream:
        stream.send(opens=[opening(lane, model="lstm-4", options=options) for lane in range(lanes)])
        at, sent = dict.fromkeys(range(lanes), 0), 0
        while at:
            chosen = rng.sample(sorted(at), rng.randint(1, len(at)))
            most = min(steps - at[lane] for lane in chosen)
            length = rng.randint(1, most)
            chunk = np.stack([x[lane, None, at[lane] : at[lane] + length] for lane in chosen])
            stream.send(frames=[frame(chosen, chunk, first_steps=[at[lane] for lane in chosen])])
            sent += len(chosen)
            for lane in chosen:
                at[lane] += length
                if at[lane] == steps:
                    del at[lane]
        stream.read(lanes + sent)
    for lane in range(lanes):
        alone = served.predict(model="lstm-4", x=x[lane, None], options=options)
        streamed = np.concatenate([y[0] for _, y in stream.results[lane]])
        assert streamed.tobytes() == decode(alone.outputs[0].tensor)[0].tobytes(), lane


# Flow control


class Context:
    """A stream of grpc whose client writes for ever and reads only when it is let."""

    def __init__(self, requests: Any) -> None:
        self._requests = iter(requests)
        self.read_requests = 0
        self.reading = asyncio.Event()
        self.written: list[Any] = []

    async def read(self) -> Any:
        self.read_requests += 1
        request = next(self._requests, None)
        return grpc.aio.EOF if request is None else request.SerializeToString()

    async def write(self, response: bytes) -> None:
        await self.reading.wait()
        self.written.append(inference_pb2.StreamResponse.FromString(response))


GARBAGE: dict[str, Any] = {
    "chunks": {"frames": [frame(range(4))]},
    "unknown lanes": {"frames": [frame(range(100, 104))]},
    "wrong inputs": {"frames": [frame(range(4), inputs=[])]},
    "wrong features": {"frames": [frame(range(4), np.ones((4, 1, 1, 9), "f4"))]},
    "opens": {"opens": [opening(0)] * 4},
    "closes": {"closes": [inference_pb2.LaneClose(lane=90)] * 4},
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_a_client_that_does_not_read_is_not_read(name):
    """A client that writes and does not read is held back, whatever it writes: what waits for it is bounded, and all
    of it is answered once it reads.
    """
    limit, messages = 64, 500
    core = Core(Settings(stream_queue_chunks=limit, max_lanes=1000), repository())
    first = inference_pb2.StreamRequest(opens=[opening(lane, version="1") for lane in range(4)])
    each = inference_pb2.StreamRequest(**GARBAGE[name])
    context = Context(itertools.chain([first], itertools.repeat(each, messages)))
    stream = LaneStream(core, context)
    running = asyncio.create_task(stream.run())
    read = -1
    worker = core.worker(core.repository.get("adder", "1"))
    while read != context.read_requests or not worker.idle:
        read = context.read_requests
        await worker.settle()
        for _ in range(10):
            await asyncio.sleep(0)
    assert stream._unanswered + stream._outbox.answers <= limit + 4
    assert context.read_requests <= limit // 4 + 3
    assert sum(len(bytes(piece)) for response in stream._outbox._responses for piece in response) < limit * 1000
    context.reading.set()
    await asyncio.wait_for(running, 30)
    answers = sum(
        len(response.opened)
        + len(response.errors)
        + len(response.closed)
        + sum(len(frame.lanes) for frame in response.frames)
        for response in context.written
    )
    assert answers == 4 + 4 * messages
    assert (stream._unanswered, stream._outbox.answers) == (0, 0)
    await core.close()


async def test_a_bulk_leaves_the_event_loop_to_others(monkeypatch):
    """A message of thousands of opens, and one of as many closes, is worked at a little in each turn of the loop."""
    milliseconds = itertools.count()
    core = Core(Settings(), repository(), clock=lambda: next(milliseconds) / 1000)  # one, whenever anybody looks
    turns, worked = 0, []
    for name in ("_open", "_close"):
        whole = getattr(LaneStream, name)
        monkeypatch.setattr(
            LaneStream,
            name,
            lambda self, part, *rest, whole=whole: (worked.append((turns, len(part))), whole(self, part, *rest))[1],
        )
    context = Context(
        [
            inference_pb2.StreamRequest(opens=[opening(lane) for lane in range(2000)]),
            inference_pb2.StreamRequest(
                closes=[inference_pb2.LaneClose(lane=lane, delete_session=True) for lane in range(2000)]
            ),
        ]
    )
    context.reading.set()
    running = asyncio.create_task(LaneStream(core, context).run())
    while not running.done():
        turns += 1
        await asyncio.sleep(0)
    await running
    assert sum(count for _, count in worked) == 4000
    each = Counter()
    for turn, count in worked:
        each[turn] += count
    assert max(each.values()) <= 2 * 64  # the end of one message and the beginning of the next
    assert len(core.sessions) == 0
    await core.close()


async def test_a_message_that_was_begun_is_finished(monkeypatch):
    """A server that drains while it takes a long message answers all of it before it ends the stream."""
    monkeypatch.setattr(stream_module, "_QUIET_SECONDS", 0.0)
    core = Core(Settings(), repository())
    opens = [opening(lane) for lane in range(2000)]
    context = Context([inference_pb2.StreamRequest(opens=opens, frames=[frame([0])])])
    context.reading.set()
    running = asyncio.create_task(LaneStream(core, context).run())
    for _ in range(10):
        await asyncio.sleep(0)
    core.draining.set()
    with suppress(Draining):  # or the client had ended
        await asyncio.wait_for(running, 30)
    opened = sum(len(response.opened) for response in context.written)
    refused = [error for response in context.written for error in response.errors]
    assert 0 < opened < 2000
    assert opened + len(refused) == 2000
    assert {details(error.status)[0].reason for error in refused} == {"DRAINING"}
    assert sum(len(response.frames) for response in context.written) == 1
    await core.close()


async def test_a_sweep_ends_sessions_a_few_at_a_time():
    """A mass expiry is spread over many turns of the event loop, and all of it is done by one sweep."""
    clock = Clock()
    core = Core(Settings(), repository(), clock=clock)
    await core.create_sessions("adder", "", 1, {}, 20_000, idle_lifetime=10.0)
    clock.now += 11
    sweeping, left = asyncio.create_task(core.sweep()), [len(core.sessions)]
    while not sweeping.done():
        await asyncio.sleep(0)
        left.append(len(core.sessions))
    assert sweeping.result() == 20_000
    assert left[-1] == 0
    assert max(before - after for before, after in itertools.pairwise(left)) <= 1024
    await core.close()


async def test_a_list_of_sessions_leaves_the_event_loop_to_others():
    """A page of many sessions is put together a few at a time; one that ends meanwhile is not on it."""
    core = Core(Settings(), repository())
    context = Context([inference_pb2.StreamRequest(opens=[opening(lane) for lane in range(100)])])
    context.reading.set()
    await LaneStream(core, context).run()
    known = list(core.sessions.after(0))
    listing = asyncio.create_task(
        SessionServicer(core).ListSessions(session_pb2.ListSessionsRequest(), None)  # type: ignore[arg-type]
    )
    turns = 0
    while not listing.done():
        turns += 1
        await asyncio.sleep(0)
        if turns == 1:
            core.sessions.delete(known[99].id)
    assert turns >= 100 // 32
    assert [each.session_id for each in (await listing).sessions] == [each.id for each in known[:99]]
    await core.close()


async def test_a_messages_turn_is_over_with_its_time(monkeypatch):
    """Frames, opens that are not alike, and lanes that are told what is wrong with them: however many there are in a
    message, others have their turns whenever it has taken 0.4 ms, and not before.
    """
    clock, turns, worked = Clock(), 0, Counter()
    core = Core(Settings(max_sessions=10), repository(), clock=clock)

    def slow(name):
        whole = getattr(LaneStream, name)

        def each(self, *args):
            worked[name, turns] += 1
            clock.now += 0.00016
            return whole(self, *args)

        monkeypatch.setattr(LaneStream, name, each)

    for name in ("_frame", "_open", "_fail"):
        slow(name)
    context = Context(
        [
            inference_pb2.StreamRequest(frames=[frame([7, 7])] * 100),
            inference_pb2.StreamRequest(opens=[opening(lane, session_id=str(lane)) for lane in range(100)]),
            inference_pb2.StreamRequest(frames=[frame(range(100), ones(100, 1, 1))]),
        ]
    )
    context.reading.set()
    running = asyncio.create_task(LaneStream(core, context).run())
    while not running.done():
        turns += 1
        await asyncio.sleep(0)
    await running
    for name, most in (("_frame", 3), ("_open", 3), ("_fail", 8)):
        each = [number for (what, _), number in worked.items() if what == name]
        assert (sum(each), max(each)) == (100 + (name == "_frame"), most)
        assert len(each) <= 100 / most + 2  # and no turn is given up that has hardly begun


async def test_large_answers_are_cut_into_responses():
    """The errors of a frame of many lanes are sent in responses that a client's default limit lets through."""
    core = Core(Settings(), repository())
    lanes = range(20_000)
    context = Context([inference_pb2.StreamRequest(frames=[frame(lanes, ones(20_000, 1, 1))])])
    context.reading.set()
    await LaneStream(core, context).run()
    assert sum(len(response.errors) for response in context.written) == 20_000
    assert max(response.ByteSize() for response in context.written) < 2 << 20
    await core.close()


async def test_a_bug_in_a_frame_does_not_hang_the_stream(monkeypatch):
    """Whatever goes wrong with a frame, its lanes are told and the stream ends when its client is done."""
    core = Core(Settings(), repository())

    def submit_frame(*arguments: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(core, "submit_frame", submit_frame)
    context = Context([inference_pb2.StreamRequest(opens=[opening(0)], frames=[frame([0])])])
    context.reading.set()
    await asyncio.wait_for(LaneStream(core, context).run(), 30)
    (error,) = (error for response in context.written for error in response.errors)
    assert details(error.status)[0].reason == "INTERNAL"
    assert "secret" not in error.status.message
    await core.close()


def test_queue_full(served):
    """A call that comes while as many input bytes wait as may is refused with QUEUE_FULL and a hint."""
    with (
        running_server(repository(), queue_bytes=64) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        small = Served(server, channel)
        session_id = small.create().session_id
        small.adder.running.clear()
        small.adder.gate.clear()
        first = small.inference.Predict.future(predict(session_id, ones(1, 10)), timeout=30)
        assert small.adder.running.wait(30)
        assert_fails(lambda: small.predict(session_id), "RESOURCE_EXHAUSTED", "QUEUE_FULL")
        small.adder.gate.set()
        first.result()
        assert small.predict(session_id).step == 11
