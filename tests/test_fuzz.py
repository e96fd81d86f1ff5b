"""What nobody should send, in short: `make fuzz` sends a million of them and measures what others notice."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rnnserve
from fuzz.files.targets import exported
from fuzz.frames import Talk
from fuzz.likeness import Likenesses, asked
from fuzz.messages import mutated, stream_request, unary_request
from fuzz.run import Fuzz, fuzz
from raw_http2 import STREAM, Wire
from rnnserve.v1 import inference_pb2, session_pb2
from serving import RunningServer, running_server

BAD = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.DEADLINE_EXCEEDED}
# One server for all examples: what one leaves behind is what the next one meets.
SHORT = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(connection_idle_seconds=1.0, max_sessions=300) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as opened:
        yield opened


@pytest.fixture(autouse=True)
def honest(server: RunningServer) -> Iterator[None]:
    """Somebody else's session computes what it would have without."""
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    with rnnserve.Client(server.address, retry_for=0) as client, client.session("lstm-4") as session:
        first = session.step(x[0])
        yield
        second = session.step(x[1], timeout=10)
        expected = client.RNN("lstm-4", return_sequences=True)(x[None])[0]
        np.testing.assert_array_equal([first, second], expected)


@given(chance=st.randoms(use_true_random=False))
@SHORT
def test_every_call_is_answered_with_a_status_of_its_own(channel: grpc.Channel, chance: Random):
    """Messages by their descriptors, filled at random: OK, or an error that says what is wrong with them."""
    method, content = unary_request(chance)
    try:
        channel.unary_unary(method)(content, timeout=20)
    except grpc.RpcError as error:
        found: Any = error
        assert found.code() not in BAD, f"{method}: {found.details()}"
        assert "grpc-status-details-bin" in dict(found.trailing_metadata())


@given(chance=st.randoms(use_true_random=False))
@SHORT
def test_every_chunk_of_a_stream_is_answered(channel: grpc.Channel, chance: Random):
    """Or the stream is ended with a status that says why, when no lane is to blame."""
    requests = [stream_request(chance, chance.choice((1, 4)), first=not number) for number in range(3)]
    asked = sum(len(frame.lanes) for request in requests for frame in request.frames)
    call = channel.stream_stream(
        STREAM,
        request_serializer=inference_pb2.StreamRequest.SerializeToString,
        response_deserializer=inference_pb2.StreamResponse.FromString,
    )(iter(requests), timeout=20)
    answered = 0
    try:
        for response in call:
            answered += sum(len(frame.lanes) for frame in response.frames)
            for error in response.errors:
                answered += error.operation == inference_pb2.LANE_OPERATION_STEP
                assert grpc.StatusCode(next(c for c in grpc.StatusCode if c.value[0] == error.status.code)) not in BAD
                assert error.status.details
    except grpc.RpcError as error:
        ended: Any = error
        assert ended.code() is grpc.StatusCode.INVALID_ARGUMENT, ended.details()
    else:
        assert answered == asked


@given(chance=st.randoms(use_true_random=False))
@SHORT
def test_what_is_no_message_is_refused(channel: grpc.Channel, chance: Random):
    """Bytes with some turned over, on a stream and alone."""
    content = mutated(stream_request(chance, 2, first=True).SerializeToString(), chance)
    call = channel.stream_stream(STREAM)(iter([content]), timeout=20)
    try:
        list(call)
    except grpc.RpcError as error:
        found: Any = error
        assert found.code() is grpc.StatusCode.INVALID_ARGUMENT, found.details()


class Lockstep:
    """A stream of which every message is answered before the next one is sent."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._queued: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(STREAM, response_deserializer=inference_pb2.StreamResponse.FromString)(
            iter(self._queued.get, None), timeout=60
        )

    def say(self, content: bytes) -> list[Any]:
        """What a message is answered, lane by lane, in an order of its own; None if the stream is ended."""
        said = inference_pb2.StreamRequest.FromString(content) if asked(content) is not None else None
        owed = 0 if said is None else len(said.opens) + len(said.closes) + (asked(content) or 0)
        self._queued.put(content)
        told: list[Any] = []
        while said is None or len(told) < owed:
            response = next(self._call)
            told += [("opened", each.lane) for each in response.opened]
            told += [("closed", each.lane) for each in response.closed]
            for error in response.errors:
                reason = error_details_pb2.ErrorInfo()
                error.status.details[0].Unpack(reason)
                first_step = error.first_step if error.HasField("first_step") else None
                told.append(("error", error.lane, error.operation, error.status.code, reason.reason, first_step))
            for frame in response.frames:
                outputs = rnnserve.codec.decode_named(frame.outputs)
                for n, lane in enumerate(frame.lanes):
                    values = [(name, y[n].tobytes()) for name, y in outputs.items()]
                    told.append(("result", lane, frame.first_steps[n], frame.timesteps, values))
        return sorted(told, key=str)

    def end(self) -> None:
        self._queued.put(None)
        assert list(self._call) == []


@pytest.fixture(scope="module")
def roomy() -> Iterator[grpc.Channel]:
    """A server that is never full: whether it is would depend on what streams that were ended have left."""
    with running_server() as running, grpc.insecure_channel(running.address) as opened:
        yield opened


@given(chance=st.randoms(use_true_random=False))
@SHORT
def test_what_is_read_as_columns_is_answered_as_what_protobuf_reads(roomy: grpc.Channel, chance: Random):
    """Messages like the one before but for a detail, and the same with a field in front that nobody knows, so that no
    outline fits: on two streams they are answered alike, bit for bit, or end both.
    """
    talk = Likenesses(chance)
    plain, parsed = Lockstep(roomy), Lockstep(roomy)
    for content in [talk.opening(), *(talk.next() for _ in range(8)), talk.closing()]:
        if asked(content) is None:
            for stream, said in ((plain, content), (parsed, b"\x78\x00" + content)):
                with pytest.raises(grpc.RpcError) as caught:
                    stream.say(said)
                ended: Any = caught.value
                assert ended.code() is grpc.StatusCode.INVALID_ARGUMENT, ended.details()
            return
        assert plain.say(content) == parsed.say(b"\x78\x00" + content)
    plain.end()
    parsed.end()


@pytest.fixture(scope="module")
def blob(server: RunningServer) -> bytes:
    """A session, exported after two steps."""
    with rnnserve.Client(server.address) as client, client.session("lstm-4", batch_size=2) as session:
        session.step(np.ones((2, 5), np.float32))
        content: bytes = session.export()
        return content


@given(chance=st.randoms(use_true_random=False))
@SHORT
def test_an_exported_session_that_says_something_else_is_refused(channel: grpc.Channel, blob: bytes, chance: Random):
    """Another model, other states, more rows than it has, seconds that are none: with a checksum that is right, it is a
    session nonetheless, or is refused with what is wrong.
    """
    request = session_pb2.ImportSessionRequest(blob=exported(blob, chance))
    services = "/rnnserve.v1.SessionService"
    try:
        answer = channel.unary_unary(f"{services}/ImportSession")(request.SerializeToString(), timeout=20)
    except grpc.RpcError as error:
        found: Any = error
        assert found.code() not in BAD, found.details()
        assert "grpc-status-details-bin" in dict(found.trailing_metadata())
        return
    made = session_pb2.ImportSessionResponse.FromString(answer).session
    assert made.batch_size == 2
    name = session_pb2.DeleteSessionRequest(session_id=made.session_id)
    channel.unary_unary(f"{services}/DeleteSession")(name.SerializeToString(), timeout=20)


@given(chance=st.randoms(use_true_random=False))
@SHORT
def test_frames_at_random_end_in_a_closed_connection(server: RunningServer, chance: Random):
    """Whatever a connection says, it is closed in the end, and the server is there for the next."""
    talk = Talk(chance, "")
    with Wire(server.address, timeout=10) as wire:
        wire.send(*talk.frames(40))
        try:
            wire.socket.shutdown(1)
        except OSError:
            return  # it is closed already
        assert wire.ended()


@pytest.mark.slow
def test_twenty_thousand_frames_leave_nothing_behind(tmp_path: Path):
    """In a process of its own, beside 64 honest sessions: no fault, no leak. How long those wait is printed; that it is
    not more than three times as long is for a machine with nothing else to do, and `make fuzz`.
    """
    report = fuzz(Fuzz(frames=20_000, seconds=120.0, seed=11), tmp_path)
    print(report)
    assert report.faults == []
    assert report.frames.total() == 20_000
