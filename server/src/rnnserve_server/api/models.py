"""rnnserve.v1.ModelService."""

from __future__ import annotations

import asyncio
import functools
import json
import tempfile
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import grpc

from rnnserve.codec import decode
from rnnserve.v1 import model_pb2 as pb
from rnnserve.v1 import model_pb2_grpc
from rnnserve_models.engine.base import Array
from rnnserve_models.errors import ModelError
from rnnserve_server.api.errors import told
from rnnserve_server.api.messages import model_message, page, page_number
from rnnserve_server.core import Core
from rnnserve_server.errors import InvalidRequest, ModelInvalid, StoreDown

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
                config = request.layer.config_json
                weights = [decode(weight, f"layer.weights.{i}") for i, weight in enumerate(request.layer.weights)]
                version = request.layer.keras_version or None
                if version not in (None, 2, 3):
                    raise InvalidRequest("layer.keras_version", "2, 3 or 0", str(version))
                write = functools.partial(_write_layer, _parsed(config), weights, version)
                size = len(config) + sum(weight.nbytes for weight in weights)
            case "file":
                write = functools.partial(_write_file, request.file.filename, request.file.content)
                size = len(request.file.content)
            case _:
                raise InvalidRequest("source", "layer or file", "neither")
        # A client that hangs up does not leave a version half way: written, and not served.
        deploying = self._core.deployer.deploy(request.name, request.version, size, write)
        model, findings = await asyncio.shield(deploying)
        return pb.DeployModelResponse(model=model_message(model), findings=findings)

    @told
    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.UnloadModelResponse:
        """See ModelService.UnloadModel."""
        after = None
        if request.HasField("end_sessions_after"):
            after = request.end_sessions_after.ToNanoseconds() / 1e9
        gone = self._core.unload(request.name, request.version, after)
        with suppress(StoreDown):  # it is told later
            await self._core.settle()
        return pb.UnloadModelResponse(versions=gone)

    @told
    async def ReloadModel(
        self, request: pb.ReloadModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReloadModelResponse:
        """See ModelService.ReloadModel."""
        return pb.ReloadModelResponse(models=map(model_message, await self._core.deployer.reload(request.name)))


def _parsed(config_json: str) -> dict[str, Any]:
    """The config of a layer.

    Raises:
        ModelInvalid: it is not a JSON object.
    """
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise ModelInvalid("layer.config_json", "JSON", str(error)) from error
    if not isinstance(config, dict):
        raise ModelInvalid("layer.config_json", "a JSON object", type(config).__name__)
    return config


def _write_layer(config: dict[str, Any], weights: list[Array], keras_version: int | None, target: Path) -> list[str]:
    """Writes a model directory of a layer."""
    from rnnserve_models.importers.apart import load_apart
    from rnnserve_models.importers.files import write_layer  # importers take a while to import

    findings = write_layer(config, weights, keras_version, target)
    load_apart(target)
    return findings


def _write_file(filename: str, content: bytes, target: Path) -> list[str]:
    """Writes a model directory of a file's content. Only the suffix of the name a client gives is heeded."""
    from rnnserve_models.importers.apart import write_apart

    with tempfile.TemporaryDirectory(prefix="rnnserve-") as scratch:
        path = Path(scratch) / f"model{PurePath(filename).suffix}"
        path.write_bytes(content)
        try:
            return write_apart(path, target)
        except ModelError as error:
            raise ModelError(str(error).replace(str(path), PurePath(filename).name)) from error
