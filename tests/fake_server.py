"""A server of running sums on a thread of its own, whose answers, failures and breakdowns a test commands.

Its models add up their inputs: each output is the sum of one input over time, and the sum is the state. It speaks the
whole contract for streams and calls, and shares no code with the real server.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage

from rnnserve import codec
from rnnserve.v1 import error_pb2, inference_pb2, model_pb2, options_pb2, session_pb2
from rnnserve.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from rnnserve.v1.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server
from rnnserve.v1.session_pb2_grpc import SessionServiceServicer, add_SessionServiceServicer_to_server

OPTIONS = [each.name for each in options_pb2.LayerOptions.DESCRIPTOR.fields]

# name: (input, output, state, dtype, shape of one step) for each sum
MODELS = {
    "sum": [("x", "y", "total", np.dtype("f4"), (3,))],
    "scalar": [("x", "y", "total", np.dtype("f4"), ())],
    "wide": [("x", "y", "total", np.dtype("f4"), (3,))],
    "pair": [("a", "p", "a_total", np.dtype("f4"), (2,)), ("b", "q", "b_total", np.dtype("i4"), ())],
}


def failure(
    reason: str, code: grpc.StatusCode, *, retry_after: float | None = None, **metadata: str
) -> error_pb2.Status:
    info = error_pb2.ErrorInfo(reason=reason, domain="rnnserve", metadata=metadata)
    details = [AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())]
    if retry_after is not None:
        hint = error_pb2.RetryInfo()
        hint.retry_delay.FromNanoseconds(round(retry_after * 1e9))
        details.append(AnyMessage(type_url="type.googleapis.com/google.rpc.RetryInfo", value=hint.SerializeToString()))
    return error_pb2.Status(code=code.value[0], message=f"told to fail: {reason}", details=details)


def describe(name: str) -> model_pb2.Model:
    model = model_pb2.Model(name=name, version="1", digest=f"sha256:{name}", engine="numpy", masking=True)
    for number, (x, y, state, dtype, shape) in enumerate(MODELS[name]):
        kind = codec.data_type(dtype)
        model.inputs.add(name=x, data_type=kind, shape=shape)
        model.outputs.add(name=y, data_type=kind, shape=shape)
        model.states.add(name=state, data_type=kind, shape=shape, path=[number])
    model.default_options.CopyFrom(options_pb2.LayerOptions(**dict.fromkeys(OPTIONS, False)))
    model.settable_options.extend(OPTIONS)
    return model


def add_up(model, options, inputs, mask, states):
    """Outputs and final states of one chunk; every rule of Keras that a sum can show."""
    outputs, after = {}, {}
    for x_name, y_name, state, _, shape in MODELS[model]:
        x = inputs[x_name]
        valid = np.ones(x.shape[:2], bool) if mask is None else mask
        if options.time_major:
            x, valid = x.swapaxes(0, 1), valid.swapaxes(0, 1)
        if options.go_backwards:
            x, valid = x[:, ::-1], valid[:, ::-1]
        x = np.where(valid.reshape(valid.shape + (1,) * len(shape)), x, 0)
        y = states[state][:, None] + np.cumsum(x, axis=1, dtype=x.dtype)
        after[state] = y[:, -1]
        if not options.return_sequences:
            outputs[y_name] = y[:, -1]
        else:
            outputs[y_name] = y.swapaxes(0, 1) if options.time_major else y
    return outputs, after


@dataclass
class Sums:
    session_id: str
    model: str
    batch_size: int
    options: options_pb2.LayerOptions
    states: dict[str, np.ndarray]
    step: int = 0
    replies: dict[int, tuple] = field(default_factory=dict)  # first step: what was asked there, and the reply

    def message(self) -> session_pb2.Session:
        return session_pb2.Session(
            session_id=self.session_id,
            model=self.model,
            version="1",
            digest=f"sha256:{self.model}",
            batch_size=self.batch_size,
            options=self.options,
            step=self.step,
        )


class Failed(Exception):
    def __init__(self, status: error_pb2.Status) -> None:
        self.status = status


@dataclass
class FakeServer(InferenceServiceServicer, SessionServiceServicer, ModelServiceServicer):
    target: str = ""
    requests: list[inference_pb2.StreamRequest] = field(default_factory=list)
    predicts: list[inference_pb2.PredictRequest] = field(default_factory=list)
    resets: list[session_pb2.ResetSessionRequest] = field(default_factory=list)
    sessions: dict[str, Sums] = field(default_factory=dict)
    failures: deque[error_pb2.Status] = field(default_factory=deque)
    broken: dict[str, error_pb2.Status] = field(default_factory=dict)  # model: what every chunk of it fails with
    streams: int = 0
    poison: float | None = None  # a chunk that holds it ends every stream, and is not applied
    poisoned: int = 0  # how often one did
    window: int = 16  # chunks of a session whose replies are kept
    applied: list[tuple[str, int]] = field(default_factory=list)  # (session, first step) of every chunk that was

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._opens_held = False
        self._muted = False
        self._waiting: list[tuple] = []
        self._queues: list[asyncio.Queue] = []
        self._made = 0

    # What a test commands, from any thread

    def hold(self) -> None:
        """From now on chunks are taken and not answered."""
        self._held = True

    def hold_opens(self) -> None:
        """From now on messages with opens are taken and wait."""
        self._opens_held = True

    def mute(self) -> None:
        """From now on everything is done and nothing is answered."""
        self._muted = True

    def release(self) -> None:
        """Does and answers what was held."""
        self._loop.call_soon_threadsafe(self._release)

    def break_streams(self, code: grpc.StatusCode = grpc.StatusCode.INTERNAL, *, forget: bool = False) -> None:
        """Ends every stream with a status; what was held is forgotten, and it holds and mutes no more."""
        self.end_streams(error_pb2.Status(code=code.value[0], message="told to break"), forget=forget)

    def end_streams(self, status: error_pb2.Status | None, *, forget: bool = False) -> None:
        """Does so with a status that says more, or None for a good one; and forgets the sessions if told so."""

        def end() -> None:
            self._held = self._opens_held = self._muted = False
            self._waiting.clear()
            if forget:
                self.sessions.clear()
            for queue in self._queues:
                queue.put_nowait(status)

        self._loop.call_soon_threadsafe(end)

    def wait_for_applied(self, count: int) -> None:
        """Returns once so many chunks are applied."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.applied) >= count, timeout=30)

    def wait_for_rows(self, count: int) -> None:
        """Returns once the streams have asked for so many chunks."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.rows >= count, timeout=30)

    def wait_for_opens(self, count: int) -> None:
        """Returns once the streams have asked for so many opens."""
        with self._changed:
            opens = lambda: sum(len(request.opens) for request in self.requests)  # noqa: E731
            assert self._changed.wait_for(lambda: opens() >= count, timeout=30)

    @property
    def rows(self) -> int:
        return sum(len(frame.lanes) for request in self.requests for frame in request.frames)

    # The contract

    async def ListModels(self, request, context):
        names = sorted(MODELS)
        start = int(request.page_token or 0)
        page = names[start : start + 2]
        token = str(start + 2) if start + 2 < len(names) else ""
        return model_pb2.ListModelsResponse(models=map(describe, page), next_page_token=token)

    async def GetModel(self, request, context):
        if request.name not in MODELS:
            await _abort(context, failure("MODEL_UNKNOWN", grpc.StatusCode.NOT_FOUND))
        return model_pb2.GetModelResponse(model=describe(request.name))

    async def ListSessions(self, request, context):
        live = [each for each in self.sessions.values() if request.model in ("", each.model)]
        start = int(request.page_token or 0)
        token = str(start + 2) if start + 2 < len(live) else ""
        page = [each.message() for each in live[start : start + 2]]
        return session_pb2.ListSessionsResponse(sessions=page, next_page_token=token)

    async def GetSession(self, request, context):
        session = await self._find(request.session_id, context)
        return session_pb2.GetSessionResponse(session=session.message())

    async def ResetSession(self, request, context):
        self.resets.append(request)
        if self.failures:
            await _abort(context, self.failures.popleft())
        session = await self._find(request.session_id, context)
        if request.HasField("step") and request.step != session.step:
            expected = str(session.step)
            await _abort(context, failure("STEP_AHEAD", grpc.StatusCode.OUT_OF_RANGE, expected_step=expected))
        session.states = self._states(session.model, session.batch_size, request.states)
        return session_pb2.ResetSessionResponse(session=session.message())

    async def DeleteSession(self, request, context):
        if self.failures:
            await _abort(context, self.failures.popleft())
        await self._find(request.session_id, context)
        del self.sessions[request.session_id]
        return session_pb2.DeleteSessionResponse()

    async def Predict(self, request, context):
        self.predicts.append(request)
        if self.failures:
            await _abort(context, self.failures.popleft())
        if self._held:
            await asyncio.Event().wait()
        inputs = codec.decode_named(request.inputs)
        mask = codec.decode(request.mask) if request.HasField("mask") else None
        rows = next(iter(inputs.values())).shape[1 if request.options.time_major else 0]
        states = self._states(request.model, rows, request.initial_states)
        outputs, after = add_up(request.model, request.options, inputs, mask, states)
        response = inference_pb2.PredictResponse(outputs=codec.encode_named(outputs), version="1")
        if request.options.return_state:
            response.states.extend(codec.encode_named(after))
        return response

    async def Stream(self, request_iterator, context):
        self.streams += 1
        queue: asyncio.Queue = asyncio.Queue()
        self._queues.append(queue)
        lanes: dict[int, Sums] = {}

        async def read() -> None:
            async for request in request_iterator:
                self._take(request, lanes, queue)
                with self._changed:
                    self.requests.append(request)
                    self._changed.notify_all()
            queue.put_nowait(None)

        reader = asyncio.get_running_loop().create_task(read())
        try:
            while (response := await queue.get()) is not None:
                if isinstance(response, error_pb2.Status):
                    await _abort(context, response)
                await context.write(response)
        finally:
            self._queues.remove(queue)
            reader.cancel()

    def _tell(self, queue, response) -> None:
        if not self._muted:
            queue.put_nowait(response)

    def _take(self, request, lanes, queue) -> None:
        if self._opens_held and request.opens:
            self._waiting.append((self._take, request, lanes, queue))
            return
        response = inference_pb2.StreamResponse()
        for opening in request.opens:
            try:
                lanes[opening.lane] = session = self._open(opening)
                response.opened.add(lane=opening.lane, session=session.message())
            except Failed as error:
                response.errors.add(lane=opening.lane, operation=inference_pb2.LANE_OPERATION_OPEN, status=error.status)
        self._tell(queue, response)
        for frame in request.frames:
            if self._poisoned(frame):
                self.poisoned += 1
                self.break_streams()
                return
            if self._held:
                self._waiting.append((self._run, frame, lanes, queue))
            else:
                self._run(frame, lanes, queue)
        response = inference_pb2.StreamResponse()
        for closing in request.closes:
            session = lanes.pop(closing.lane)
            if closing.delete_session:
                self.sessions.pop(session.session_id, None)
            response.closed.add(lane=closing.lane)
        self._tell(queue, response)

    def _poisoned(self, frame) -> bool:
        arrays = codec.decode_named(frame.inputs).values() if self.poison is not None else ()
        return any((array == self.poison).any() for array in arrays)

    def _open(self, opening) -> Sums:
        if self.failures:
            raise Failed(self.failures.popleft())
        if opening.WhichOneof("target") == "session_id":
            session = self.sessions.get(opening.session_id)
            if session is None:
                raise Failed(failure("SESSION_UNKNOWN", grpc.StatusCode.NOT_FOUND))
            return session
        config = opening.create
        if config.session_id in self.sessions:
            raise Failed(failure("SESSION_EXISTS", grpc.StatusCode.ALREADY_EXISTS))
        self._made += 1
        name = config.session_id or f"s{self._made}"
        options = options_pb2.LayerOptions(**{each: getattr(config.options, each) for each in OPTIONS})
        options.stateful = True
        rows = config.batch_size or 1
        states = self._states(config.model, rows, config.initial_states)
        session = self.sessions[name] = Sums(name, config.model, rows, options, states)
        return session

    def _run(self, frame, lanes, queue) -> None:
        response = inference_pb2.StreamResponse()
        inputs = codec.decode_named(frame.inputs)
        mask = codec.decode(frame.mask) if frame.HasField("mask") else None
        for row, (lane, first) in enumerate(zip(frame.lanes, frame.first_steps, strict=True)):
            session = lanes[lane]
            x = {name: array[row] for name, array in inputs.items()}
            valid = None if mask is None else mask[row]
            asked = [(name, array.shape, array.tobytes()) for name, array in x.items()], mask is not None
            status = self.failures.popleft() if self.failures else self.broken.get(session.model)
            if status is None and first in session.replies and session.replies[first][0] == asked:
                response.frames.add().CopyFrom(session.replies[first][1])
                response.frames[-1].lanes[:] = [lane]
                continue
            if status is None and first != session.step:
                status = self._wrong_step(session, first)
            if status is not None:
                operation = inference_pb2.LANE_OPERATION_STEP
                response.errors.add(lane=lane, operation=operation, first_step=first, status=status)
                continue
            outputs, after = add_up(session.model, session.options, x, valid, session.states)
            session.states = after
            time = next(iter(x.values())).shape[0 if session.options.time_major else 1]
            session.step += time
            result = response.frames.add(lanes=[lane], first_steps=[first], timesteps=time)
            result.outputs.extend(codec.encode_named({name: y[None] for name, y in outputs.items()}))
            if session.options.return_state:
                result.states.extend(codec.encode_named({name: y[None] for name, y in after.items()}))
            session.replies[first] = asked, result
            if len(session.replies) > self.window:
                del session.replies[min(session.replies)]
            with self._changed:
                self.applied.append((session.session_id, first))
                self._changed.notify_all()
        self._tell(queue, response)

    @staticmethod
    def _wrong_step(session, first) -> error_pb2.Status:
        facts = {"expected": str(session.step), "oldest": str(min(session.replies, default=session.step))}
        if first in session.replies:
            return failure("STEP_CONFLICT", grpc.StatusCode.ABORTED, **facts)
        reason = "STEP_AHEAD" if first > session.step else "STEP_BEHIND"
        return failure(reason, grpc.StatusCode.OUT_OF_RANGE, **facts)

    def _release(self) -> None:
        self._held = self._opens_held = self._muted = False
        waiting, self._waiting = self._waiting, []
        for work, *arguments in waiting:
            work(*arguments)

    @staticmethod
    def _states(model, rows, given) -> dict[str, np.ndarray]:
        zeros = {state: np.zeros((rows, *shape), dtype) for _, _, state, dtype, shape in MODELS[model]}
        return {**zeros, **codec.decode_named(given)}

    async def _find(self, session_id, context) -> Sums:
        if session_id not in self.sessions:
            await _abort(context, failure("SESSION_UNKNOWN", grpc.StatusCode.NOT_FOUND, session_id=session_id))
        return self.sessions[session_id]

    # Its thread

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = grpc.aio.server()
        add_InferenceServiceServicer_to_server(self, server)
        add_ModelServiceServicer_to_server(self, server)
        add_SessionServiceServicer_to_server(self, server)
        health = grpc.unary_unary_rpc_method_handler(_healthy)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": health}),)
        )
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        started.set()
        await self._stop.wait()
        await server.stop(None)


@contextmanager
def running():
    server = FakeServer()
    started = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server._serve(started)), name="fake-server")
    thread.start()
    assert started.wait(30)
    try:
        yield server
    finally:
        server._loop.call_soon_threadsafe(server._stop.set)
        thread.join()


async def _healthy(request: bytes, context) -> bytes:
    return b"\x08\x01"


async def _abort(context, status: error_pb2.Status) -> None:
    code = next(each for each in grpc.StatusCode if each.value[0] == status.code)
    trailer = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, status.message, trailer)
