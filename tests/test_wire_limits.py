"""What one client may ask of the server at most, and that the others do not notice who asks for more."""

from __future__ import annotations

import gc
import itertools
import resource
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

import rnnserve
from house import FEATURES, AddingEngine, loaded
from raw_http2 import LIST, PREFACE, STREAM, Wire, continued, headers_of, message
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2, inference_pb2_grpc, session_pb2, session_pb2_grpc
from rnnserve_server.api.stream import LaneStream
from rnnserve_server.config import Settings
from rnnserve_server.limits import grpc_options
from rnnserve_server.repository import Repository
from serving import ZOO, RunningServer, running_server
from torture.servers import server_process

RESOURCE_EXHAUSTED = "8"
ENHANCE_YOUR_CALM, REFUSED_STREAM, NO_ERROR = 11, 7, 0
LIMITS = {
    "max_message_bytes": 1 << 20,
    "max_chunk_steps": 1000,
    "max_answer_bytes": 100_000,
    "stream_queue_bytes": 200_000,
    "max_connections": 60,
    "max_streams": 20,
    "handshake_seconds": 0.5,
    "connection_idle_seconds": 1.0,
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    repository = Repository(ZOO)
    repository.put("adder", "1", loaded(AddingEngine()))
    with running_server(repository, **LIMITS) as running:
        yield running


@pytest.fixture(autouse=True)
def honest(server: RunningServer) -> Iterator[None]:
    """A session of somebody else, that must not notice: it steps before and after each test, on one stream."""
    with rnnserve.Client(server.address, retry_for=0) as client, client.session("adder") as session:
        session.step(np.ones(FEATURES, np.float32))
        yield
        assert (session.step(np.ones(FEATURES, np.float32), timeout=10) == 2).all()


def ones(*shape: int) -> Any:
    return encode_named({"input": np.ones((*shape, FEATURES), np.float32)})


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


# Size


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (inference_pb2.PredictRequest(model="adder", inputs=ones(1, 1001)), "at most 1000, got 1001"),
        (inference_pb2.PredictRequest(model="adder", inputs=ones(1, 200_000)), "larger than max"),
        (
            inference_pb2.PredictRequest(model="adder", inputs=ones(100, 1000), options={"return_sequences": True}),
            "at most 100000, got 800000",
        ),
    ],
)
def test_what_is_too_large_is_refused_with_its_limit(stub, request_, said):
    """A message, a chunk's steps, and an answer that a small request would blow up."""
    with pytest.raises(grpc.RpcError, match=said) as caught:
        stub.Predict(request_)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_frame_may_not_ask_for_more_than_an_answer_may_be(stub):
    """Each of its chunks would do; together they are refused, lane by lane, and one of them alone is answered."""
    config = session_pb2.SessionConfig(model="adder", options={"return_sequences": True})
    opens = [inference_pb2.LaneOpen(lane=lane, create=config) for lane in range(13)]
    many = inference_pb2.StepFrame(lanes=range(13), inputs=ones(13, 1, 1000))
    one = inference_pb2.StepFrame(lanes=[3], inputs=ones(1, 1, 1000))
    responses = list(stub.Stream(iter([inference_pb2.StreamRequest(opens=opens, frames=[many, one])])))
    errors = [error for response in responses for error in response.errors]
    assert {(each.status.code, "at most 100000, got 104000" in each.status.message) for each in errors} == {(8, True)}
    assert sorted(error.lane for error in errors) == list(range(13))
    assert [list(frame.lanes) for response in responses for frame in response.frames] == [[3]]


def test_a_frame_of_more_lanes_than_a_stream_may_have_ends_the_stream(stub):
    """None of them is told what is wrong: that would be an error for each byte of the message."""
    frame = inference_pb2.StepFrame(lanes=[0] * 65537)
    with pytest.raises(grpc.RpcError, match=r"frames\.lanes: expected at most 65536, got 65537") as caught:
        list(stub.Stream(iter([inference_pb2.StreamRequest(frames=[frame])])))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


WRONG = {
    "frames": {"frames": [inference_pb2.StepFrame(lanes=[7])] * 50_000},
    "lanes that are not open": {"frames": [inference_pb2.StepFrame(lanes=range(50_000))]},
    "lanes that are all the same": {"frames": [inference_pb2.StepFrame(lanes=[7] * 50_000)]},
    "opens": {"opens": [inference_pb2.LaneOpen()] * 50_000},
    "closes": {"closes": [inference_pb2.LaneClose()] * 50_000},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_message_of_many_wrong_things_is_answered_as_it_is_read(server, stub, what):
    """Fifty thousand things to be refused in one message of 100 to 350 kB: others have their turns in between, no more
    is looked at than the client reads answers to, and when it reads, each is answered.
    """
    request = inference_pb2.StreamRequest(**WRONG[what])
    known = live_streams(server)
    with rnnserve.Client(server.address, retry_for=0) as client, client.session("adder") as session:
        session.step(np.ones(FEATURES, np.float32))
        mine = live_streams(server)
        call = stub.Stream(iter([request]))
        waiting = 0
        while not waiting:
            session.step(np.ones(FEATURES, np.float32), timeout=10)
            waiting = server.call(
                lambda: sum(each._outbox.answers for each in live_streams_here() if id(each) not in known | mine)
            )
        assert waiting <= Settings().stream_queue_chunks + 256
        answers = sum(len(response.errors) for response in call)
    assert answers == 50_000


def test_a_message_that_claims_to_be_larger_than_any_is_refused_at_once(server):
    """Nothing of it has to come."""
    with Wire(server.address) as wire:
        wire.call(1, headers_of(LIST), None)
        wire.send(DataFrame(1, message(b"", length=2**32 - 1)))
        assert wire.status(1) == RESOURCE_EXHAUSTED


def test_a_compressed_message_that_unfolds_beyond_the_limit_is_refused(server):
    """64 MB of zeros in 64 kB, which take no memory worth the name."""
    press = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(press.compress(bytes(1 << 20)) for _ in range(64)) + press.flush()
    assert len(bomb) < LIMITS["max_message_bytes"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Wire(server.address) as wire:
        wire.call(1, headers_of(LIST, ("grpc-encoding", "gzip")), None)
        body = b"\1" + len(bomb).to_bytes(4, "big") + bomb
        wire.send(*(DataFrame(1, body[start : start + 16384]) for start in range(0, len(body), 16384)))
        assert wire.status(1) in (RESOURCE_EXHAUSTED, "reset 1", "reset 2")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


# Metadata


def test_metadata_bombs_are_refused(server):
    """One long value, many short ones, and a few bytes that name a long one of the table again and again."""
    bombs = [
        [("x", "y" * 60_000)],
        [(f"x{number}", "y") for number in range(2000)],
        [("x-table", "y" * 3000)] * 1000,
    ]
    for bomb in bombs:
        with Wire(server.address) as wire:
            wire.send(*continued(1, wire.encoder.encode(headers_of(LIST, *bomb), huffman=False)))
            wire.send(DataFrame(1, message(b""), flags=["END_STREAM"]))
            assert wire.status(1) == RESOURCE_EXHAUSTED, len(bomb)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        session_pb2_grpc.SessionServiceStub(channel).ListSessions(
            session_pb2.ListSessionsRequest(), metadata=(("x", "y" * 60_000),)
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_headers_that_never_end_end_the_connection(server):
    """A flood of CONTINUATION frames."""
    with Wire(server.address) as wire:
        wire.send(HeadersFrame(1, wire.encoder.encode(headers_of(LIST))))
        literal = b"\0\x01x" + b"\x7f\xa1\x3e" + b"y" * 8096  # 8096 bytes, not to be kept in the table
        for _ in range(10_000):
            wire.send(ContinuationFrame(1, literal))
        assert wire.status(1) in (RESOURCE_EXHAUSTED, "closed")


# Slowness


@pytest.mark.parametrize("sent", [b"", PREFACE[:10], PREFACE, PREFACE + SettingsFrame(0).serialize()[:5]])
def test_a_connection_that_does_not_become_one_is_closed(server, sent):
    """Nothing, half a greeting, a greeting without settings: after handshake_seconds."""
    with Wire(server.address, greet=False, timeout=8) as wire:
        wire.send(sent)
        assert wire.ended()


def test_headers_that_do_not_come_to_an_end_are_idle(server):
    """Half of a call's headers are no call: the connection is closed as one without calls."""
    with Wire(server.address, timeout=8) as wire:
        wire.send(HeadersFrame(1, wire.encoder.encode(headers_of(LIST))[:10]))
        assert wire.ended()


def test_who_writes_slowly_holds_nobody_up(server):
    """Forty messages whose last byte does not come."""
    wires = [Wire(server.address) for _ in range(4)]
    for wire in wires:
        for stream in range(1, 21, 2):
            wire.call(stream, headers_of(STREAM), None)
            wire.send(DataFrame(stream, message(b"x" * 1000, length=100_000)))
    with rnnserve.Client(server.address) as client, client.session("adder") as session:
        for _ in range(50):
            session.step(np.ones(FEATURES, np.float32), timeout=5)
    for wire in wires:
        wire.socket.close()


def live_streams_here() -> list[LaneStream]:
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, LaneStream)]


def live_streams(server: RunningServer) -> set[int]:
    """The streams that the server still has, by identity."""
    return server.call(lambda: {id(each) for each in live_streams_here()})


def test_who_reads_slowly_is_held_back(server):
    """A client that asks for 80 kB with every message and reads nothing: the server stops reading too, and what it
    keeps for it is no more than stream_queue_bytes and one message's answers.
    """
    config = session_pb2.SessionConfig(model="adder", options={"return_sequences": True})
    opens = [inference_pb2.LaneOpen(lane=lane, create=config) for lane in range(10)]
    frame = inference_pb2.StepFrame(lanes=range(10), inputs=ones(10, 1, 1000))
    ask = message(inference_pb2.StreamRequest(frames=[frame]).SerializeToString())
    known = live_streams(server)
    with Wire(server.address, timeout=1) as wire:
        wire.call(1, headers_of(STREAM), inference_pb2.StreamRequest(opens=opens).SerializeToString(), end=False)
        window, asked = 65535, 0  # the connection's; the stream's may be smaller, which makes the end come sooner
        frames = wire.read()
        with suppress(TimeoutError):  # no window any more, for a second
            while asked < 1000:
                for start in range(0, len(ask), 16384):
                    piece = ask[start : start + 16384]
                    while window < len(piece):
                        update = next(frames)
                        if isinstance(update, WindowUpdateFrame) and not update.stream_id:
                            window += update.window_increment
                    wire.send(DataFrame(1, piece))
                    window -= len(piece)
                asked += 1
        assert asked < 1000
        kept = server.call(
            lambda: [each._outbox.nbytes + each._owed_bytes for each in live_streams_here() if id(each) not in known]
        )
        assert len(kept) == 1
        assert kept[0] <= LIMITS["stream_queue_bytes"] + 80_000


# Floods


def test_connections_beyond_the_limit_are_closed(server):
    """Those that are there go on, and when some go others may come."""
    flood = [socket.create_connection(("127.0.0.1", server.server.port), 5) for _ in range(300)]
    closed = 0
    for each in flood:
        each.settimeout(5)
        try:
            while each.recv(65536):
                pass
            closed += 1
        except ConnectionError:
            closed += 1
        except TimeoutError:
            pass
    assert closed == len(flood)  # the first 60 at the latest when they have not become connections of HTTP/2
    for each in flood:
        each.close()
    with rnnserve.Client(server.address) as client:
        assert client.health(timeout=10)


@pytest.mark.slow
def test_a_server_without_descriptors_serves_who_is_there(tmp_path):
    """When all are in use, sessions that have a connection go on; when some are free again, others may come."""
    with server_process(tmp_path / "log", models=ZOO) as process, rnnserve.Client(process.address) as client:
        x = np.ones(5, np.float32)
        session = client.session("lstm-4")
        session.step(x)
        descriptors = Path(f"/proc/{process.pid}/fd")
        limit = len(list(descriptors.iterdir())) + 20
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        host, port = process.address.split(":")
        flood = [socket.create_connection((host, int(port)), 5) for _ in range(100)]
        while len(list(descriptors.iterdir())) < limit:
            assert process.alive
        for _ in range(20):
            session.step(x, timeout=10)
        for each in flood:
            each.close()
        with rnnserve.Client(process.address) as other:
            assert other.health(timeout=30)
        session.close()


def test_streams_of_a_connection_are_limited_and_said_so(server):
    """The limit is announced, and who does not heed it has the rest refused."""
    with Wire(server.address) as wire:
        for stream in range(1, 201, 2):
            wire.call(stream, headers_of(STREAM), None)
        refused = set()
        try:
            wire.socket.settimeout(1)
            for frame in wire.read():
                if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                    assert frame.settings[SettingsFrame.MAX_CONCURRENT_STREAMS] == LIMITS["max_streams"]
                if isinstance(frame, RstStreamFrame):
                    assert frame.error_code in (REFUSED_STREAM, ENHANCE_YOUR_CALM)
                    refused.add(frame.stream_id)
        except TimeoutError:
            pass
        assert len(refused) >= 50


def test_who_asks_too_often_whether_the_server_is_there_is_closed(server):
    """A flood of pings."""
    with Wire(server.address) as wire:
        for _ in range(10):
            wire.send(PingFrame(0, b"01234567"))
        farewell = wire.goaway()
        assert farewell is not None
        assert farewell.error_code == ENHANCE_YOUR_CALM


def test_calls_that_are_taken_back_at_once_leave_nothing(server):
    """Three thousand calls, each cancelled with the next frame (the rapid reset)."""
    before = len(live_streams(server))
    with Wire(server.address) as wire:
        for stream in range(1, 6001, 2):
            wire.call(stream, headers_of(STREAM), None)
            wire.send(RstStreamFrame(stream, 8))
    deadline = time.monotonic() + 10
    while len(live_streams(server)) > before:
        assert time.monotonic() < deadline


# Age


def test_a_connection_comes_to_its_age_and_the_client_goes_on(server):
    """Its streams are told to go, cut after the grace, and the client takes its session up on another connection."""
    repository = Repository(ZOO)
    repository.put("adder", "1", loaded(AddingEngine()))
    ages = {"connection_age_seconds": 0.3, "connection_grace_seconds": 0.1}
    with (
        running_server(repository, **ages) as aging,
        rnnserve.Client(aging.address) as client,
        client.session("adder") as session,
    ):
        began = time.monotonic()
        for step in itertools.count(1):
            assert (session.step(np.ones(FEATURES, np.float32)) == step).all()
            if time.monotonic() > began + 1.5:
                break


def test_every_setting_of_a_connection_reaches_grpc():
    """0 means never, and what is longer than gRPC can count is as long as it can."""
    settings = Settings(
        max_connections=1,
        max_streams=2,
        max_metadata_bytes=3,
        handshake_seconds=4,
        connection_idle_seconds=0,
        connection_age_seconds=5,
        connection_grace_seconds=6,
        keepalive_seconds=7,
        keepalive_timeout_seconds=1e9,
        min_ping_seconds=0,
    )
    options = dict(grpc_options(settings))
    assert options["grpc.max_allowed_incoming_connections"] == 1
    assert options["grpc.max_concurrent_streams"] == 2
    assert options["grpc.max_metadata_size"] == options["grpc.absolute_max_metadata_size"] == 3
    assert options["grpc.server_handshake_timeout_ms"] == 4000
    assert options["grpc.max_connection_idle_ms"] == 2**31 - 1
    assert options["grpc.max_connection_age_ms"] == 5000
    assert options["grpc.max_connection_age_grace_ms"] == 6000
    assert options["grpc.keepalive_time_ms"] == 7000
    assert options["grpc.keepalive_timeout_ms"] == 2**31 - 1
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 0
