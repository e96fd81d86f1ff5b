"""Traces: whose child a span is, and which time is whose."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

import rnnserve
from rnnserve import aio
from rnnserve_server.config import ConfigError, Settings, traces_wanted
from rnnserve_server.metrics import Metrics
from rnnserve_server.observer import Observers
from rnnserve_server.server import Server
from rnnserve_server.tracing import Tracing, open_tracing
from serving import running_server

ME = TracerProvider().get_tracer("the caller")


class Spans(InMemorySpanExporter):
    def named(self, name, trace_id=None):
        return [
            span
            for span in self.get_finished_spans()
            if span.name == name and trace_id in (None, span.context.trace_id)
        ]

    def one(self, name, trace_id=None):
        (span,) = self.named(name, trace_id)
        return span


@pytest.fixture
def spans(monkeypatch):
    """Where the spans of servers go that trace. Every span is there when what it tells of is over."""
    exporter = Spans()

    def opened(setting, clock):
        provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        return Tracing(provider, clock)

    monkeypatch.setattr("rnnserve_server.tracing.open_tracing", opened)
    return exporter


def inside(child, parent):
    return (
        child.parent.span_id == parent.context.span_id
        and parent.start_time <= child.start_time <= child.end_time <= parent.end_time
    )


@pytest.mark.parametrize("client_of", ["threads", "asyncio"])
def test_a_step_is_a_part_of_the_callers_trace(spans, tmp_path, client_of):
    """Within the caller's span, a step is a frame in the server's spans, with the queue, the engine and the store's
    commit within it, one after the other; each step is within the span that it was called in, though all travel on one
    stream.
    """
    called = []

    def threads(address):
        with rnnserve.Client(address) as client, client.session("lstm-4") as session:
            for _ in range(2):
                with ME.start_as_current_span("caller") as span:
                    session.step(np.zeros(session.model.inputs[0].shape, np.float32))
                called.append(span)

    async def tasks(address):
        async with aio.Client(address) as client, await client.session("lstm-4") as session:
            for _ in range(2):
                with ME.start_as_current_span("caller") as span:
                    await session.step(np.zeros(session.model.inputs[0].shape, np.float32))
                called.append(span)

    with running_server(traces="otlp", store=f"sqlite:///{tmp_path}/s.db") as server:
        threads(server.address) if client_of == "threads" else asyncio.run(tasks(server.address))
    assert called[0].context.trace_id != called[1].context.trace_id
    for caller in called:
        trace_id = caller.context.trace_id
        frame = spans.one("frame", trace_id)
        assert frame.parent.span_id == caller.context.span_id
        assert frame.attributes["rnnserve.model"] == "lstm-4"
        assert (frame.attributes["rnnserve.chunks"], frame.attributes["rnnserve.timesteps"]) == (1, 1)
        queue, engine, store = (spans.one(name, trace_id) for name in ("queue", "engine", "store"))
        assert all(inside(each, frame) for each in (queue, engine, store))
        assert queue.end_time <= engine.start_time <= engine.end_time <= store.start_time
        assert (engine.attributes["rnnserve.rows"], engine.attributes["rnnserve.steps"]) == (1, 1)
        assert frame.status.is_ok or frame.status.is_unset


def test_calls_are_spans_with_their_status(spans, tmp_path):
    """A unary call within the caller's span is its child, by gRPC's semantic conventions; what the call did in the
    queue and the engine is within it.
    """
    with (
        running_server(traces="otlp", store=f"sqlite:///{tmp_path}/s.db") as server,
        rnnserve.Client(server.address) as client,
        ME.start_as_current_span("caller") as caller,
    ):
        layer = client.RNN("lstm-4")
        layer(np.zeros((2, 40, *layer.models[0].inputs[0].shape), np.float32))
    predict = spans.one("rnnserve.v1.InferenceService/Predict")
    assert predict.parent.span_id == caller.context.span_id
    assert predict.kind is trace.SpanKind.SERVER
    assert dict(predict.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "rnnserve.v1.InferenceService",
        "rpc.method": "Predict",
        "rpc.grpc.status_code": 0,
    }
    frame = spans.one("frame", caller.context.trace_id)
    assert inside(frame, predict)
    slices = [span.attributes["rnnserve.steps"] for span in spans.named("engine")]
    assert slices == [32, 8]  # a call of 40 steps, cut at --slice-steps
    assert spans.named("store") == []  # it has no session


async def test_a_call_that_fails_says_so(spans):
    """The span of a call that ended with a status other than OK has that status, and its message."""
    from rnnserve.v1 import session_pb2
    from rnnserve.v1.session_pb2_grpc import SessionServiceStub

    with running_server(traces="otlp") as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            with pytest.raises(grpc.RpcError):
                await SessionServiceStub(channel).GetSession(
                    session_pb2.GetSessionRequest(session_id="nobody"), metadata=[("traceparent", parent)]
                )
    span = spans.one("rnnserve.v1.SessionService/GetSession")
    assert (span.context.trace_id, span.parent.span_id) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert "nobody" in span.status.description


def test_calls_to_the_store_are_parts_of_the_call(spans, tmp_path):
    """What a call asks the store is within the call's span."""
    with (
        running_server(traces="otlp", store=f"sqlite:///{tmp_path}/s.db") as server,
        rnnserve.Client(server.address) as client,
        client.session("lstm-4") as session,
        ME.start_as_current_span("caller") as caller,
    ):
        session.info()
    call = spans.one("rnnserve.v1.SessionService/GetSession", caller.context.trace_id)
    assert inside(spans.one("store peek", caller.context.trace_id), call)


def test_what_nobody_samples_is_not_traced(spans):
    """Without a caller's span, and with one that is not sampled, nothing is recorded, and frames carry nothing."""
    with running_server(traces="otlp") as server, rnnserve.Client(server.address) as client:
        unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("off")
        with client.session("lstm-4") as session:
            x = np.zeros(session.model.inputs[0].shape, np.float32)
            session.step(x)
            with unsampled.start_as_current_span("caller"):
                session.step(x)
    assert spans.get_finished_spans() == ()


def test_ticks_that_are_traced_are_exemplars(spans):
    """A histogram of ticks names the trace of a frame that was in one."""
    with running_server(traces="otlp", metrics_port=0) as server, rnnserve.Client(server.address) as client:
        with client.session("lstm-4") as session, ME.start_as_current_span("caller") as caller:
            session.step(np.zeros(session.model.inputs[0].shape, np.float32))
        import urllib.request

        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server.metrics_port}/metrics",
            headers={"Accept": "application/openmetrics-text; version=1.0.0"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
    trace_id = f"{caller.context.trace_id:032x}"
    for name in ("tick_seconds", "queue_seconds", "engine_seconds", "tick_rows"):
        lines = [line for line in text.splitlines() if line.startswith(f"rnnserve_{name}_bucket") and " # {" in line]
        assert len(lines) == 1, name
        assert f'trace_id="{trace_id}"' in lines[0]


def test_traces_are_asked_for_by_the_setting_or_by_opentelemetrys_variables():
    """The setting counts if there is one; else the variables that every program with OpenTelemetry heeds."""
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}
    for traces, environment, on in (
        (None, {}, False),
        (None, endpoint, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4317"}, True),
        (None, {**endpoint, "OTEL_SDK_DISABLED": "true"}, False),
        (None, {**endpoint, "OTEL_TRACES_EXPORTER": "none"}, False),
        (None, {"OTEL_TRACES_EXPORTER": "console"}, True),
        ("off", endpoint, False),
        ("otlp", {}, True),
    ):
        assert traces_wanted(Settings(traces=traces), environment) is on, (traces, environment)


def test_spans_reach_a_collector(monkeypatch):
    """With --traces otlp, spans go to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, the last ones while the
    server stops; they say whose they are.
    """
    from concurrent.futures import ThreadPoolExecutor

    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    got = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            got.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "rnns-of-mine")
        with running_server() as server, rnnserve.Client(server.address) as client:  # the variable alone is enough
            client.models()
    finally:
        collector.stop(None)
    (resource,) = {str(spans.resource) for request in got for spans in request.resource_spans}
    assert "rnns-of-mine" in resource
    names = {
        span.name
        for request in got
        for resources in request.resource_spans
        for scope in resources.scope_spans
        for span in scope.spans
    }
    assert "rnnserve.v1.ModelService/ListModels" in names


def test_an_exporter_that_there_is_not_is_told(monkeypatch):
    """An exporter of another name, and one that is not installed, are refused with what to do."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigError, match="expected otlp, console or none, got 'zipkin'"):
        Server(Settings(models="models/zoo"))
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'rnnserve-server\[traces\]'"):
        open_tracing("otlp", lambda: 0.0)


def test_the_client_does_not_load_opentelemetry():
    """A client of somebody who does not trace neither loads OpenTelemetry nor sends any context."""
    program = (
        "import sys, rnnserve, rnnserve.aio\n"
        "from rnnserve import _trace\n"
        "rnnserve.Client, rnnserve.aio.Client\n"
        "assert (_trace.headers(), _trace.traceparent()) == ([], '')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60).strip() == "[]"


def test_sliced_blocks_that_fail_are_not_remembered_for_ever(monkeypatch):
    """Of blocks under way, so many are remembered at most."""
    monkeypatch.setattr("rnnserve_server.tracing._UNDER_WAY", 2)
    from house import chunks, loaded, opened, table
    from rnnserve_server.observer import Ticked

    tracing, sessions, model = Tracing(TracerProvider()), table(), loaded()
    session = opened(sessions, model)
    frame = tracing.received("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert frame is not None
    observers = Observers([Metrics(dict), tracing])
    for number in range(5):
        block = chunks(session.group, [session.slot], 3)
        block.number, block.traces = number, [frame]
        tick = Ticked(model, 1.0)
        tick.runs([block], 1, 1.0)
        tick.ran_at = tick.ended_at = 2.0
        observers.ticked(tick)
    assert len(tracing._slices) == 2
