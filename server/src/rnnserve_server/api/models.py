"""rnnserve.v1.ModelService."""

from __future__ import annotations

import functools
from typing import Any

import grpc

from rnnserve.v1 import model_pb2 as pb
from rnnserve.v1 import model_pb2_grpc
from rnnserve_server.api.errors import told
from rnnserve_server.api.messages import model_message, page, page_number
from rnnserve_server.core import Core
from rnnserve_server.deploy import write_file, write_layer
from rnnserve_server.errors import InvalidRequest

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

    @told
    async def DeployModel(
        self, request: pb.DeployModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DeployModelResponse:
        """See ModelService.DeployModel."""
        match request.WhichOneof("source"):
            case "layer":
                config, weights = request.layer.config_json, decode_list(request.layer.weights, "layer.weights")
                version = request.layer.keras_version or None
                if version not in (None, 2, 3):
                    raise InvalidRequest("layer.keras_version", "2, 3 or 0", str(version))
                write = functools.partial(write_layer, config, weights, version)
                size = len(config) + sum(weight.nbytes for weight in weights)
            case "file":
                write = functools.partial(write_file, request.file.filename, request.file.content)
                size = len(request.file.content)
            case _:
                raise InvalidRequest("source", "layer or file", "neither")
        model, findings = await self._core.deployer.deploy(request.name, request.version, size, write)
        return pb.DeployModelResponse(model=model_message(model), findings=findings)

    @told
    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.UnloadModelResponse:
        """See ModelService.UnloadModel."""
        return pb.UnloadModelResponse(versions=self._core.deployer.unload(request.name, request.version))

    @told
    async def ReloadModel(
        self, request: pb.ReloadModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReloadModelResponse:
        """See ModelService.ReloadModel."""
        return pb.ReloadModelResponse(models=map(model_message, await self._core.deployer.reload(request.name)))
