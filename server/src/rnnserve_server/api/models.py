"""rnnserve.v1.ModelService."""

from __future__ import annotations

from typing import Any

import grpc

from rnnserve.v1 import model_pb2 as pb
from rnnserve.v1 import model_pb2_grpc
from rnnserve_server.api.errors import told
from rnnserve_server.api.messages import model_message, page, page_number
from rnnserve_server.core import Core

_PAGE = 100


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """See model.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @told
    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        """See ModelService.ListModels."""
        start = page_number(request.page_token)
        numbered = list(enumerate(self._core.repository, 1))[start:]
        models, token = page(numbered, request.page_size, _PAGE, lambda item: str(item[0]))
        return pb.ListModelsResponse(models=[model_message(model) for _, model in models], next_page_token=token)

    @told
    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        """See ModelService.GetModel."""
        return pb.GetModelResponse(model=model_message(self._core.repository.get(request.name, request.version)))
