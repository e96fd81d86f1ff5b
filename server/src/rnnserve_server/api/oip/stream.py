"""A stream of requests of the Open Inference Protocol."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc

from rnnserve_server.access.caller import caller
from rnnserve_server.api.errors import rejections, service_error, status_code
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip.infer import Inference
from rnnserve_server.api.oip.pending import Pending
from rnnserve_server.core import Core
from rnnserve_server.ending import end
from rnnserve_server.errors import Draining, ServiceError

_QUIET_SECONDS = 0.1  # a stream that says nothing for so long while the server drains has said all


class InferStream:
    """Reads requests, sends them on their way, and answers them in the order in which they came.

    Args:
        core: where.
        inference: takes and answers requests.
        context: the call's.
        strict: the stream ends with the status of the first request that fails.
    """

    def __init__(
        self, core: Core, inference: Inference, context: grpc.aio.ServicerContext[Any, Any], *, strict: bool
    ) -> None:
        self._core = core
        self._inference = inference
        self._context = context
        self._strict = strict
        self._sent: deque[tuple[pb.ModelInferRequest, Pending, ServiceError | None]] = deque()
        self._more = asyncio.Event()  # to be answered
        self._less = asyncio.Event()
        self._received = 0
        self._ended = False

    async def run(self) -> None:
        """Until the client has said all and was answered.

        Raises:
            ServiceError: the server is shutting down; or, if the stream is strict, a request failed.
        """
        self._core.streams += 1
        self._core.streamed += 1
        reader = asyncio.create_task(self._read())
        drainer = asyncio.create_task(self._drain(reader))
        try:
            await self._write()
            if reader.cancelled() or self._core.draining.is_set():
                raise Draining("the server is shutting down; go on elsewhere", retry_after=1.0)
            await reader
        finally:
            reader.cancel()
            drainer.cancel()
            self._core.streams -= 1
            for _, pending, _ in self._sent:
                pending.forget()

    async def _read(self) -> None:
        core = self._core
        try:
            while (request := await self._context.read()) is not grpc.aio.EOF:
                self._received += 1
                pending = Pending(self._inference.meter, core.clock(), None)
                refused: ServiceError | None = None
                try:
                    await self._inference.send(request, pending)
                except asyncio.CancelledError:
                    pending.forget()
                    raise
                except Exception as error:  # the request is to blame, or a bug: the stream goes on
                    pending.forget()
                    refused = service_error(error)
                self._sent.append((request, pending, refused))
                self._more.set()
                if not core.has_room:
                    await core.wait_for_room()
                while len(self._sent) > core.settings.stream_queue_chunks:
                    self._less.clear()
                    await self._less.wait()
        finally:
            self._ended = True
            self._more.set()

    async def _write(self) -> None:
        while True:
            while not self._sent:
                if self._ended:
                    return
                self._more.clear()
                await self._more.wait()
            request, pending, error = self._sent[0]
            response: pb.ModelInferResponse | None = None
            if error is None:
                try:
                    response = await self._inference.receive(request, pending)
                except asyncio.CancelledError:
                    raise
                except Exception as failure:
                    error = service_error(failure)
                finally:
                    pending.forget()
            self._sent.popleft()
            self._less.set()
            if response is not None:
                response.parameters["triton_final_response"].bool_param = True
                await self._context.write(pb.ModelStreamInferResponse(infer_response=response))
            elif error is not None and self._strict:
                raise error
            elif error is not None:
                await self._context.write(_failed(request, caller().told(error)))

    async def _drain(self, reader: asyncio.Task[None]) -> None:
        """Once the server drains: lets the client say what it was saying, then stops listening."""
        await self._core.draining.wait()
        heard = -1
        while heard != self._received or self._sent:
            heard = self._received
            await asyncio.sleep(_QUIET_SECONDS)
        await end([reader])


def _failed(request: pb.ModelInferRequest, error: ServiceError) -> pb.ModelStreamInferResponse:
    rejections[error.reason] += 1
    response = pb.ModelStreamInferResponse(error_message=said(error))
    about = response.infer_response
    about.id, about.model_name, about.model_version = request.id, request.model_name, request.model_version
    about.parameters["rnnserve_status"].string_param = status_code(error).name
    about.parameters["rnnserve_reason"].string_param = error.reason
    if error.retry_after is not None:
        about.parameters["rnnserve_retry_after"].double_param = error.retry_after
    about.parameters["triton_final_response"].bool_param = True
    return response


def said(error: ServiceError) -> str:
    """An error as one who has only its text needs it."""
    return str(error) if error.retry_after is None else f"{error}; try again in {error.retry_after:.1f} s"
