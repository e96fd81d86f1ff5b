"""Who watches a server, as its settings say: metrics, traces, the log of slow ticks, channelz."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc

from rnnserve_server.config import Settings, traces_wanted
from rnnserve_server.observer import Observer, Observers, SlowTicks

if TYPE_CHECKING:
    from rnnserve_server.core import Core
    from rnnserve_server.metrics import Metrics, MetricsServer
    from rnnserve_server.tracing import Tracing


class Watch:
    """What is on of all this. Libraries of what is off are not loaded.

    Attributes:
        observer: who is to be told of ticks; None: nobody.
        tracing: who traces; None: nobody.
        host: the address of the metrics.
        options: of the gRPC server.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError if traces have nowhere to go."""
        self.tracing: Tracing | None = None
        self.host = settings.metrics_host or settings.host
        self._port = settings.metrics_port
        self._metrics: Metrics | None = None
        self._metrics_server: MetricsServer | None = None
        observers: list[Observer] = []
        if settings.metrics_port is not None:
            from rnnserve_server.api.errors import rejections
            from rnnserve_server.metrics import Metrics

            self._metrics = Metrics(lambda: rejections)
            observers.append(self._metrics)
        if traces_wanted(settings):
            from rnnserve_server.tracing import open_tracing

            self.tracing = open_tracing(settings.traces, time.monotonic)
            observers.append(self.tracing)
        if settings.slow_tick_seconds:
            observers.append(SlowTicks(settings.slow_tick_seconds, time.monotonic))
        self.observer = Observers(observers) if observers else None
        self.options = [("grpc.enable_channelz", int(settings.channelz))]

    @property
    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """What every call is to go through."""
        return [] if self.tracing is None else [self.tracing.interceptor()]

    def listen(self, core: Core) -> int:
        """Answers requests for metrics, if there are any: the port, or 0. On the event loop's thread.

        Raises:
            OSError: the address cannot be listened on.
        """
        if self._metrics is None or self._port is None:
            return 0
        from rnnserve_server.metrics import MetricsServer

        self._metrics.attach(core, asyncio.get_running_loop())
        self._metrics_server = MetricsServer(self._metrics, self.host, self._port)
        return self._metrics_server.port

    def close(self) -> None:
        """Stops all of it, and sends the last spans. Not on the event loop's thread."""
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self.tracing is not None:
            self.tracing.close()


def add_channelz(server: grpc.aio.Server) -> str:
    """Adds the service of channelz, and returns its name."""
    from grpc_channelz.v1 import channelz, channelz_pb2

    channelz.add_channelz_servicer(server)
    name: str = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
    return name
