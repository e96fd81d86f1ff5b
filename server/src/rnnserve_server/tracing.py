"""OpenTelemetry traces: which part of an answer's time was the queue's, the engine's and the store's.

Not loaded unless traces are asked for. A call is a span, the child of its client's. So is a frame of a stream, whose
parent is named by the frame itself or else by the stream; what its ticks did becomes its children, all made when the
last of them is over, because a tick belongs to many frames and has no time to spare.
"""

from __future__ import annotations

import inspect
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rnnserve_server.blocks import Block
from rnnserve_server.config import ConfigError
from rnnserve_server.observer import Ticked

_UNDER_WAY = 4096  # blocks cut into slices that are remembered; those that fail are never heard of again


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame or call that is traced.

    Attributes:
        context: its parent.
        trace_id: 32 hexadecimal digits.
        received_at: when it was decoded, by the core's clock.
    """

    context: Context
    trace_id: str
    received_at: float


@dataclass(frozen=True, slots=True)
class _Slice:
    """What one tick ran of a block."""

    run_at: float
    ran_at: float
    rows: int
    steps: int
    blocks: int


class Tracing:
    """Makes spans: of calls as an interceptor, of frames as an observer.

    Args:
        provider: where spans go. It is shut down with this.
        clock: the core's clock, in seconds.
        wall_clock: nanoseconds since the epoch.
    """

    def __init__(
        self,
        provider: TracerProvider,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("rnnserve", version("rnnserve-server"))
        self._clock = clock
        self._wall_clock = wall_clock
        self._propagator = TraceContextTextMapPropagator()
        self._slices: OrderedDict[tuple[str, str, int], list[_Slice]] = OrderedDict()

    def close(self) -> None:
        """Sends what is not sent. It may take seconds."""
        self._provider.shutdown()

    # What comes in

    def received(self, traceparent: str = "") -> Frame | None:
        """A frame has come, within a call: None if its trace is not recorded.

        Args:
            traceparent: as W3C Trace Context has it; empty or not valid: the call is the parent.
        """
        context = set_span_in_context(get_current_span())
        if traceparent:
            context = self._propagator.extract({"traceparent": traceparent}, context)
        parent = get_current_span(context).get_span_context()
        if not parent.is_valid or not parent.trace_flags.sampled:
            return None
        return Frame(context, f"{parent.trace_id:032x}", self._clock())

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """Makes a span of every call to a service of ours."""
        return _Interceptor(self)

    @contextmanager
    def call(self, method: str, metadata: Mapping[str, str], context: Any) -> Iterator[None]:
        """The span of a call, as long as it is handled."""
        service, name = method.strip("/").split("/", 1)
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        parent = self._propagator.extract(metadata)
        span = self._tracer.start_span(method.strip("/"), parent, SpanKind.SERVER, attributes)
        with _current(span):
            try:
                yield
            except BaseException as error:
                span.set_status(Status(StatusCode.ERROR, context.details() or type(error).__name__))
                raise
            finally:
                code = context.code()
                span.set_attribute("rpc.grpc.status_code", 0 if not code else _number(code))
                span.end()

    def store_span(self, operation: str) -> AbstractContextManager[object]:
        """The span of a call to the store, if it is part of one that is traced. A tick's are made by `ticked`."""
        if not get_current_span().is_recording():
            return nullcontext()
        return self._tracer.start_as_current_span(f"store {operation}")

    # What ran

    def ticked(self, tick: Ticked) -> None:
        """See `Observer`."""
        blocks = {block.number: block for block in (*tick.blocks, *tick.finished)}
        answered = {block.number for block in tick.finished}
        for number, block in blocks.items():
            frames = [frame for each in block.pieces for frame in each.traces]
            if not frames:
                continue
            key = (tick.model.name, tick.model.version, number)
            slices = self._slices.pop(key, [])
            if tick.run_at is not None and tick.ran_at is not None:
                slices.append(_Slice(tick.run_at, tick.ran_at, tick.rows, tick.steps, len(tick.blocks)))
            if number not in answered and block.done < block.steps:
                self._slices[key] = slices
                if len(self._slices) > _UNDER_WAY:
                    self._slices.popitem(last=False)
                continue
            for frame in frames:
                if isinstance(frame, Frame):
                    self._emit(frame, tick, block, slices, answered=number in answered)

    def _emit(self, frame: Frame, tick: Ticked, block: Block, slices: list[_Slice], *, answered: bool) -> None:
        offset = self._wall_clock() - self._nanoseconds(self._clock())
        attributes: dict[str, Any] = {
            "rnnserve.model": tick.model.name,
            "rnnserve.model_version": tick.model.version,
            "rnnserve.chunks": len(block.tags) * block.rounds,
            "rnnserve.timesteps": block.call.timesteps,
        }

        def span(name: str, context: Context, begin: float, attributes: dict[str, Any] | None = None) -> Span:
            return self._tracer.start_span(
                name, context, attributes=attributes, start_time=offset + self._nanoseconds(begin)
            )

        whole = span("frame", frame.context, frame.received_at, attributes)
        inside = set_span_in_context(whole)
        queued = span("queue", inside, max(frame.received_at, block.queued_at))
        queued.end(offset + self._nanoseconds(slices[0].run_at if slices else tick.began_at))
        for each in slices:
            facts = {"rnnserve.rows": each.rows, "rnnserve.steps": each.steps, "rnnserve.blocks": each.blocks}
            run = span("engine", inside, each.run_at, facts)
            run.end(offset + self._nanoseconds(each.ran_at))
        if tick.stored_at is not None and tick.ran_at is not None and block.sessions is not None:
            stored = span("store", inside, tick.ran_at, {"rnnserve.operation": "commit"})
            stored.end(offset + self._nanoseconds(tick.stored_at))
        if not answered:
            whole.set_status(Status(StatusCode.ERROR, "its sessions had ended, or the store did not take it"))
        whole.end(offset + self._nanoseconds(tick.ended_at))

    @staticmethod
    def _nanoseconds(seconds: float) -> int:
        return int(seconds * 1e9)


class _Interceptor(grpc.aio.ServerInterceptor):
    """See `Tracing.interceptor`."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith("/grpc."):  # health and reflection are asked all the time
            return handler
        metadata = {key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)}
        call = self._tracing.call
        if handler.unary_unary is not None:
            unary = handler.unary_unary

            async def answer(request: Any, context: Any) -> Any:
                with call(method, metadata, context):
                    return await unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                answer, handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_stream is not None:
            stream = handler.stream_stream

            async def converse(requests: Any, context: Any) -> Any:
                with call(method, metadata, context):
                    await stream(requests, context)

            if not inspect.isasyncgenfunction(stream):
                return grpc.stream_stream_rpc_method_handler(
                    converse, handler.request_deserializer, handler.response_serializer
                )
        return handler


@contextmanager
def _current(span: Span) -> Iterator[None]:
    token = attach(set_span_in_context(span))
    try:
        yield
    finally:
        detach(token)


def _number(code: Any) -> int:
    return int(code if isinstance(code, int) else code.value[0])


def open_tracing(setting: str | None, clock: Callable[[], float]) -> Tracing:
    """Traces as the setting and OpenTelemetry's variables say: where to, as whose, and which part of them.

    Raises:
        ConfigError: there is no such exporter, or it is not installed.
    """
    name = setting or os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "rnnserve"}
    provider = TracerProvider(resource=Resource.create({"service.version": version("rnnserve-server"), **named}))
    provider.add_span_processor(BatchSpanProcessor(_exporter(name)))
    return Tracing(provider, clock)


def _exporter(name: str) -> SpanExporter:
    if name == "console":
        return ConsoleSpanExporter()
    if name != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER: expected otlp, console or none, got {name!r}")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(f"traces: {error}; pip install 'rnnserve-server[traces]'") from error
    return OTLPSpanExporter()
