"""rnnserve.v1.InferenceService."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import structlog
from structlog.contextvars import bound_contextvars

from rnnserve.codec import decode, decode_named, encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import inference_pb2_grpc
from rnnserve_server.access.caller import caller
from rnnserve_server.api.errors import abort, told
from rnnserve_server.api.messages import asked_options, rows_of
from rnnserve_server.api.stream import LaneStream
from rnnserve_server.blocks import Sessions
from rnnserve_server.calls import Call
from rnnserve_server.core import Core, resolve_options
from rnnserve_server.errors import InvalidRequest
from rnnserve_server.intake import Frame
from rnnserve_server.rollout import Feedback, Rule, rollout

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


_RULES = {
    pb.FEEDBACK_RULE_UNSPECIFIED: Rule.COPY,
    pb.FEEDBACK_RULE_COPY: Rule.COPY,
    pb.FEEDBACK_RULE_ARGMAX: Rule.ARGMAX,
    pb.FEEDBACK_RULE_SAMPLE: Rule.SAMPLE,
    pb.FEEDBACK_RULE_SAMPLE_LOGITS: Rule.SAMPLE_LOGITS,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """See inference.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @told
    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """See InferenceService.Predict."""
        core = self._core
        core.check_room()
        left = context.time_remaining()
        who = caller()
        session_id = who.scoped(request.session_id) if request.session_id else ""
        call = Call(None if left is None else core.clock() + left, session_id)
        inputs = decode_named(request.inputs, "inputs")
        mask = decode(request.mask, "mask") if request.HasField("mask") else None
        if who.bucket is not None:
            who.bucket.take(rows_of(inputs, 2))
        trace = None if core.tracing is None else core.tracing.received()
        if request.session_id:
            for field in ("model", "version", "options", "initial_states"):
                if getattr(request, field) and (field != "options" or request.HasField("options")):
                    raise InvalidRequest(field, "nothing", "a value", "a session has its own")
            session = await core.session(session_id)
            version = session.group.model.version
            core.submit_frame(
                Frame(
                    call,
                    np.zeros(1, np.int64),
                    Sessions(
                        session.group,
                        np.array([session.slot]),
                        np.array([session.generation]),
                        np.array([request.first_step], np.uint64) if request.HasField("first_step") else None,
                    ),
                    {name: x[None] for name, x in inputs.items()},
                    None if mask is None else mask[None],
                    trace,
                )
            )
        else:
            if not request.model:
                raise InvalidRequest("model", "a model's name, or a session_id", "neither")
            if request.HasField("first_step"):
                raise InvalidRequest("first_step", "nothing", str(request.first_step), "only sessions count steps")
            model = core.repository.get(request.model, request.version)
            version = model.version
            options = resolve_options(model, asked_options(request.options), stateful=False)
            initial_states = decode_named(request.initial_states, "initial_states")
            core.submit_call(model, options, inputs, mask, initial_states, call, trace)
        answers = await call.answer()
        return pb.PredictResponse(
            outputs=encode_named({name: y[0] for name, y in answers.outputs.items()}),
            states=encode_named({name: state[0] for name, state in answers.states.items()}),
            version=version,
            step=0 if answers.first_steps is None else int(answers.first_steps[0]) + answers.timesteps,
        )

    @told
    async def Rollout(self, request: pb.RolloutRequest, context: Context) -> pb.RolloutResponse:
        """See InferenceService.Rollout."""
        self._core.check_room()
        left = context.time_remaining()
        who = caller()
        outputs, inputs = await rollout(
            self._core,
            who.scoped(request.session_id),
            request.steps,
            decode_named(request.inputs, "inputs"),
            [_feedback(each) for each in request.feedback],
            request.seed if request.HasField("seed") else None,
            None if left is None else self._core.clock() + left,
            None if who.bucket is None else who.bucket.take,
        )
        return pb.RolloutResponse(outputs=encode_named(outputs), inputs=encode_named(inputs))

    async def Stream(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]
        """See InferenceService.Stream. Messages are bytes: it is served by `streams_of_bytes`."""
        with bound_contextvars(peer=context.peer()):
            log.debug("stream opened")
            try:
                await LaneStream(self._core, context).run()
            except Exception as error:  # the boundary: every failure becomes a status here
                await abort(context, error, method="Stream")
            finally:
                log.debug("stream ended")


def streams_of_bytes(servicer: InferenceServicer) -> grpc.GenericRpcHandler:
    """Serves `Stream` with messages as they are on the wire, which `LaneStream` reads and writes itself."""
    service = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
    return grpc.method_handlers_generic_handler(
        service, {"Stream": grpc.stream_stream_rpc_method_handler(servicer.Stream)}
    )


def _feedback(message: pb.Feedback) -> Feedback:
    if message.rule not in _RULES:
        raise InvalidRequest("feedback.rule", f"one of {pb.FeedbackRule.keys()}", str(message.rule))
    rule = _RULES[message.rule]
    if message.HasField("temperature") and rule not in (Rule.SAMPLE, Rule.SAMPLE_LOGITS):
        raise InvalidRequest("feedback.temperature", "nothing", f"{message.temperature}", f"{rule.value} takes none")
    return Feedback(
        message.output, message.input, rule, message.temperature if message.HasField("temperature") else 1.0
    )
