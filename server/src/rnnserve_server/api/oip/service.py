"""inference.GRPCInferenceService: the Open Inference Protocol with Triton's extensions."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed
from typing import Any, TypeVar

import grpc

from rnnserve_models.errors import ModelError
from rnnserve_models.load import LoadedModel
from rnnserve_server.access.caller import caller
from rnnserve_server.api.errors import service_error, status, status_code
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip import service_pb2_grpc
from rnnserve_server.api.oip.describe import config, metadata
from rnnserve_server.api.oip.infer import Inference
from rnnserve_server.api.oip.statistics import statistics
from rnnserve_server.api.oip.stream import InferStream, said
from rnnserve_server.core import Core
from rnnserve_server.errors import OptionUnsupported, ServiceError

Context = grpc.aio.ServicerContext[Any, Any]

_EXTENSIONS = ("sequence", "sequence(string_id)", "model_configuration", "statistics", "binary_tensor_data")
_STRICT = "triton_grpc_error"


Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def _told(method: Method) -> Method:
    """A method that ends its call with a status whenever it raises."""

    @functools.wraps(method)
    async def wrapper(self: Any, request: Any, context: Context) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:  # the boundary: every failure becomes a status here
            return await _abort(context, error)

    return wrapper  # type: ignore[return-value]


class OpenInferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """See service.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._inference = Inference(core)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """See GRPCInferenceService.ServerLive."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """See GRPCInferenceService.ServerReady."""
        ready = not self._core.draining.is_set() and next(iter(self._core.repository), None) is not None
        return pb.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """See GRPCInferenceService.ModelReady."""
        try:
            self._core.repository.get(request.name, request.version)
        except ServiceError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._core.draining.is_set())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """See GRPCInferenceService.ServerMetadata."""
        repository = ("model_repository",) if self._core.settings.allow_deploy else ()
        return pb.ServerMetadataResponse(
            name="rnnserve", version=installed("rnnserve-server"), extensions=[*_EXTENSIONS, *repository]
        )

    @_told
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """See GRPCInferenceService.ModelMetadata."""
        model = self._core.repository.get(request.name, request.version)
        return metadata(model, self._served(model.name))

    @_told
    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """See GRPCInferenceService.ModelConfig."""
        model = self._core.repository.get(request.name, request.version)
        return pb.ModelConfigResponse(config=config(model, self._served(model.name), self._core.settings))

    @_told
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """See GRPCInferenceService.ModelInfer."""
        self._core.check_room()
        left = context.time_remaining()
        return await self._inference.answer(request, None if left is None else self._core.clock() + left)

    async def ModelStreamInfer(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]
        """See GRPCInferenceService.ModelStreamInfer."""
        sent = dict(context.invocation_metadata() or ())
        try:
            strict = str(sent.get(_STRICT, "")).lower() == "true"
            await InferStream(self._core, self._inference, context, strict=strict).run()
        except Exception as error:  # the boundary: every failure becomes a status here
            await _abort(context, error)

    @_told
    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """See GRPCInferenceService.ModelStatistics."""
        models = list(self._core.repository)
        if request.name:
            first = self._core.repository.get(request.name, request.version)
            models = [model for model in models if model.name == request.name]
            if request.version:
                models = [first]
        meter = self._inference.meter
        return pb.ModelStatisticsResponse(model_stats=[statistics(model, meter.of(model)) for model in models])

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """See GRPCInferenceService.RepositoryIndex."""
        response = pb.RepositoryIndexResponse()
        for name, version, model in self._core.repository.index():
            if isinstance(model, LoadedModel):
                response.models.add(name=name, version=version, state="READY")
            elif not request.ready:
                response.models.add(name=name, version=version, state="UNAVAILABLE", reason=str(model))
        return response

    @_told
    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """See GRPCInferenceService.RepositoryModelLoad."""
        if request.parameters:
            raise OptionUnsupported(
                f"parameters: {sorted(request.parameters)[0]!r} is not taken: a model is loaded as it is in the "
                "models' folder; rnnserve.v1.ModelService.DeployModel takes files"
            )
        await self._core.deployer.reload(request.model_name)
        return pb.RepositoryModelLoadResponse()

    @_told
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """See GRPCInferenceService.RepositoryModelUnload."""
        self._core.deployer.unload(request.model_name, "")
        return pb.RepositoryModelUnloadResponse()

    def _served(self, name: str) -> list[str]:
        """The versions of a model that take requests, newest first."""
        return [
            version
            for found, version, model in self._core.repository.index()
            if found == name and not isinstance(model, ModelError)
        ]


async def _abort(context: Context, error: Exception) -> None:
    """Ends a call with an error. Triton's clients show a person the message and nothing else, so it says all."""
    told = service_error(error)
    message = status(told, caller())
    if told.retry_after is not None:
        message.message = said(caller().told(told))[:1000]
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", message.SerializeToString())]
    if told.retry_after is not None:
        trailers.append(("grpc-retry-pushback-ms", str(round(told.retry_after * 1000))))
    await context.abort(status_code(told), message.message, tuple(trailers))
