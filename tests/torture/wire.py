"""The protocol by hand: what a test says to a server, and what it hears, with nothing in between that mends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from rnnserve.codec import decode_named, encode, encode_named
from rnnserve.v1 import error_pb2, inference_pb2_grpc, session_pb2, session_pb2_grpc
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.options_pb2 import LayerOptions

SECONDS = 30.0
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, not one that another channel had before
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
)


def channel(address: str) -> grpc.aio.Channel:
    """A channel that shares nothing with others."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def config(
    model: str = "lstm-4", session_id: str = "", *, batch: int = 1, **options: bool
) -> session_pb2.SessionConfig:
    return session_pb2.SessionConfig(
        model=model, session_id=session_id, batch_size=batch, options=LayerOptions(**options)
    )


def info(status: error_pb2.Status) -> error_pb2.ErrorInfo:
    """The ErrorInfo of an error."""
    return error_pb2.ErrorInfo.FromString(status.details[0].value)


def hint(status: error_pb2.Status) -> float | None:
    """The seconds after which trying again may help."""
    for detail in status.details:
        if detail.type_url.endswith("RetryInfo"):
            return error_pb2.RetryInfo.FromString(detail.value).retry_delay.ToNanoseconds() / 1e9
    return None


def told(error: grpc.aio.AioRpcError) -> error_pb2.Status:
    """The error of a call that failed."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return error_pb2.Status.FromString(value)
    return error_pb2.Status(code=error.code().value[0], message=error.details() or "")


def reason(error: grpc.aio.AioRpcError | pb.LaneError | error_pb2.Status) -> str:
    """The reason of a failure; the name of its status if a peer made it that knows no reasons."""
    status = told(error) if isinstance(error, grpc.aio.AioRpcError) else error
    status = status.status if isinstance(status, pb.LaneError) else status
    return info(status).reason if status.details else f"status {status.code}"


class Talk:
    """One stream, and the calls beside it."""

    def __init__(self, address: str) -> None:
        self._channel = channel(address)
        self.sessions = session_pb2_grpc.SessionServiceStub(self._channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.stream: Any = None

    async def __aenter__(self) -> Talk:
        await asyncio.wait_for(self._channel.channel_ready(), SECONDS)
        self.stream = self.inference.Stream()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stream.cancel()
        await self._channel.close()

    async def write(self, **parts: Any) -> None:
        await self.stream.write(pb.StreamRequest(**parts))

    async def read(self) -> pb.StreamResponse:
        """The next answer: what is told without being asked for is passed over."""
        while True:
            response = await asyncio.wait_for(self.stream.read(), SECONDS)
            assert response is not grpc.aio.EOF
            if not response.notices or response.opened or response.frames or response.errors or response.closed:
                return response

    async def open(self, lane: int, session_id: str) -> pb.LaneOpened | pb.LaneError:
        """Takes a session by its id."""
        return await self._opened(pb.LaneOpen(lane=lane, session_id=session_id))

    async def create(self, lane: int, config: session_pb2.SessionConfig) -> pb.LaneOpened | pb.LaneError:
        return await self._opened(pb.LaneOpen(lane=lane, create=config))

    async def _opened(self, opening: pb.LaneOpen) -> pb.LaneOpened | pb.LaneError:
        await self.write(opens=[opening])
        response = await self.read()
        (answer,) = (*response.opened, *response.errors)
        return answer

    async def step(self, lane: int, first_step: int | None, x: np.ndarray) -> np.ndarray | pb.LaneError:
        """Sends one chunk, [batch, time, features], and waits for its answer."""
        await self.write(frames=[frame([lane], None if first_step is None else [first_step], x[None])])
        response = await self.read()
        if response.errors:
            return response.errors[0]
        return decode_named(response.frames[0].outputs, "outputs")["output"][0]

    async def steps(self, lane: int, first_step: int, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Sends chunks one after the other; each must be answered."""
        answers = []
        for x in chunks:
            answer = await self.step(lane, first_step, x)
            assert isinstance(answer, np.ndarray), answer
            answers.append(answer)
            first_step += x.shape[1]
        return answers

    async def predict(self, session_id: str, x: np.ndarray, **fields: Any) -> tuple[np.ndarray, int]:
        """The output and the step of a unary call."""
        request = pb.PredictRequest(session_id=session_id, inputs=encode_named({"input": x}), **fields)
        response = await self.inference.Predict(request, timeout=SECONDS)
        return decode_named(response.outputs, "outputs")["output"], response.step

    async def get(self, session_id: str) -> session_pb2.Session:
        return (await self.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session_id))).session

    async def delete(self, session_id: str) -> None:
        await self.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session_id))

    async def ids(self) -> list[str]:
        """The ids of all sessions, in the order of the list."""
        found, token = [], ""
        while True:
            request = session_pb2.ListSessionsRequest(page_size=7, page_token=token)
            response = await self.sessions.ListSessions(request)
            found += [each.session_id for each in response.sessions]
            token = response.next_page_token
            if not token:
                return found


def frame(
    lanes: Sequence[int], first_steps: Sequence[int] | None, x: np.ndarray, mask: np.ndarray | None = None
) -> pb.StepFrame:
    """Chunks for N lanes: x is [N, batch, time, features]."""
    made = pb.StepFrame(lanes=lanes, first_steps=first_steps or (), inputs=encode_named({"input": x}))
    if mask is not None:
        made.mask.CopyFrom(encode(mask))
    return made


def outputs(frame: pb.ResultFrame) -> Mapping[str, np.ndarray]:
    return decode_named(frame.outputs, "outputs")
