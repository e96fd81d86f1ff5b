"""What `client.models` does, the same in both clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rnnserve._connection import Connection
from rnnserve.codec import encode
from rnnserve.models import Model
from rnnserve.v1 import model_pb2


class Catalogue:
    """The models of a server, to list and, where the server allows it, to change."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def listed(self, limit: float | None) -> list[Model]:
        """See `Models.__call__`."""
        return await self._connection.models(limit)

    async def deploy(
        self,
        name: str,
        config: Mapping[str, Any],
        weights: Sequence[ArrayLike],
        version: str,
        keras_version: int | None,
        limit: float | None,
    ) -> Model:
        """See `Models.deploy`."""
        layer = model_pb2.LayerSource(
            config_json=json.dumps(config),
            weights=[encode(np.asarray(weight), f"weights[{index}]") for index, weight in enumerate(weights)],
            keras_version=keras_version or 0,
        )
        return await self._deploy(model_pb2.DeployModelRequest(name=name, version=version, layer=layer), limit)

    async def deploy_file(self, name: str, path: str | PathLike[str], version: str, limit: float | None) -> Model:
        """See `Models.deploy_file`."""
        content = await asyncio.to_thread(Path(path).read_bytes)
        file = model_pb2.FileSource(filename=Path(path).name, content=content)
        return await self._deploy(model_pb2.DeployModelRequest(name=name, version=version, file=file), limit)

    async def unload(self, name: str, version: str, end_sessions_after: float | None, limit: float | None) -> list[str]:
        """See `Models.unload`."""
        request = model_pb2.UnloadModelRequest(name=name, version=version)
        if end_sessions_after is not None:
            request.end_sessions_after.FromNanoseconds(round(end_sessions_after * 1e9))
        response = await self._connection.unary(
            self._connection.model_service().UnloadModel, request, limit, retry=False
        )
        return list(response.versions)

    async def reload(self, name: str, limit: float | None) -> list[Model]:
        """See `Models.reload`."""
        request = model_pb2.ReloadModelRequest(name=name)
        response = await self._connection.unary(
            self._connection.model_service().ReloadModel, request, limit, retry=False
        )
        return [Model.from_message(each) for each in response.models]

    async def _deploy(self, request: model_pb2.DeployModelRequest, limit: float | None) -> Model:
        response = await self._connection.unary(
            self._connection.model_service().DeployModel, request, limit, retry=False
        )
        return Model.from_message(response.model)
