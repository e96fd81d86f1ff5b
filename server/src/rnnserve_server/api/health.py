"""The health service: what proxies and orchestrators ask before they send anybody here."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

Context = grpc.aio.ServicerContext[Any, Any]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """``grpc.health.v1.Health``, as its protocol file says.

    The servicer of grpcio-health-checking holds a lock while it writes to a watcher, and changes no status without it:
    one watcher that reads nothing would keep everybody from learning that the server drains, and it from its end.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._ending = False

    def serving(self, *services: str) -> None:
        """Says of services that they serve; the service "" is the server as a whole."""
        self._statuses |= dict.fromkeys(services, SERVING)
        self._tell()

    def failed(self) -> None:
        """Says of all services that they do not serve any more."""
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._tell()

    def ending(self) -> None:
        """As `failed`, and has watches end once they have told it."""
        self._ending = True
        self.failed()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """How a service is. NOT_FOUND: there is no such one."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.service!r}: there is no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:
        """How all services are."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """How a service is, and how it will be whenever that changes. SERVICE_UNKNOWN: there is none, so far."""
        told = None
        while True:
            changed, status, ending = self._changed, self._statuses.get(request.service, _UNKNOWN), self._ending
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if ending:
                return
            await changed.wait()
