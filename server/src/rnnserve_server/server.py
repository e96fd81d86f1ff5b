"""The server: the house with its doors, from listening to draining."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rnnserve.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc, session_pb2, session_pb2_grpc
from rnnserve_server.access.access import Access, Defaults
from rnnserve_server.access.tls import server_credentials
from rnnserve_server.api.guard import Guard, Sieve
from rnnserve_server.api.health import Health
from rnnserve_server.api.inference import InferenceServicer, streams_of_bytes
from rnnserve_server.api.models import ModelServicer
from rnnserve_server.api.oip import service_pb2, service_pb2_grpc
from rnnserve_server.api.oip.service import OpenInferenceServicer
from rnnserve_server.api.sessions import SessionServicer
from rnnserve_server.config import Settings
from rnnserve_server.core import Core
from rnnserve_server.ending import end
from rnnserve_server.errors import StoreDown
from rnnserve_server.limits import grpc_options
from rnnserve_server.owners import Owners
from rnnserve_server.process import Ebb
from rnnserve_server.repository import Repository
from rnnserve_server.watch import Watch, add_channelz
from rnnserve_server.wire.loop import CompletionLoop, at_turns_end
from rnnserve_server.wire.server import CompletionServer

log = structlog.get_logger(__name__)

_SWEEP_SECONDS = 1.0
_RETRY_SECONDS = 0.2  # between tries to reach the store while draining

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (model_pb2, "ModelService"),
        (session_pb2, "SessionService"),
        (inference_pb2, "InferenceService"),
    )
)

OIP_SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class Server:
    """A listening server.

    Attributes:
        core: what it serves.
        port: the port it listens on, once started.
        metrics_port: the port of its metrics, once started; 0 if there are none.
    """

    def __init__(self, settings: Settings, repository: Repository | None = None) -> None:
        """Loads the models, unless a repository is given.

        Raises:
            ModelError: there are none.
            PrincipalsError, TlsError: the files that decide who is let in are of no use.
            ConfigError: there is nowhere for traces to go.
        """
        self.settings = settings
        self._credentials = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            self._credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        self._guard: Guard | None = None
        self._watch = Watch(settings)
        self._ebb = Ebb()
        self.core = Core(
            settings,
            repository or Repository.load(settings.models, engine=settings.engine, threads=settings.engine_threads),
            observer=self._watch.observer,
            tracing=self._watch.tracing,
            soon=at_turns_end,
        )
        if settings.principals is not None:
            access = Access(
                settings.principals,
                Defaults(settings.quota_sessions, settings.quota_rows_per_second, settings.quota_state_bytes),
            )
            self._guard = Guard(access)
            self.core.sessions.owners = Owners(
                lambda name: access.limits(name).sessions, lambda name: access.limits(name).state_bytes
            )
        self.port = 0
        self._services = (*SERVICES, OIP_SERVICE) if settings.oip else SERVICES
        self.metrics_port = 0
        self._health = Health()
        self._server: grpc.aio.Server | None = None
        self._chores: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listens.

        Raises:
            OSError: the address cannot be listened on.
        """
        await self.core.open_store()
        guards = [Sieve(self.settings.max_metadata_bytes), *([self._guard] if self._guard else [])]
        server = grpc_server([*self._watch.interceptors, *guards], [*grpc_options(self.settings), *self._watch.options])
        listed: Any = _Unregistered(server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self.core), listed)
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(self.core), listed)
        inference = InferenceServicer(self.core)
        server.add_generic_rpc_handlers([streams_of_bytes(inference)])  # first, so that it is this one that is found
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, listed)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.settings.oip:
            servicer = OpenInferenceServicer(self.core)
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, listed)
        names = (*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        if self.settings.channelz:
            names = (*names, add_channelz(server))
        reflection.enable_server_reflection(names, server)
        address = f"{self.settings.host}:{self.settings.port}"
        try:
            if self._credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            await server.stop(None)  # or its end would be left to chance, after that of the event loop
            raise OSError(f"cannot listen on {address}: {error}") from error
        self.metrics_port = self._watch.listen(self.core)
        await server.start()
        self._server = server
        self._chores = [asyncio.create_task(self._sweep())]
        if self.settings.store and self.settings.durability == "interval":
            self._chores.append(asyncio.create_task(self._save()))
        self._health.serving("", *self._services)
        watched = {"metrics": f"{self._watch.host}:{self.metrics_port}"} if self.metrics_port else {}
        log.info(
            "serving", address=f"{self.settings.host}:{self.port}", models=len(list(self.core.repository)), **watched
        )

    async def stop(self) -> bool:
        """Drains: says NOT_SERVING, takes no new calls, and lets open streams finish for ``drain_seconds``. For as long
        it tries a store that does not answer. Whether all that was to be stored is.
        """
        until = asyncio.get_running_loop().time() + self.settings.drain_seconds
        log.info("draining", seconds=self.settings.drain_seconds, sessions=len(self.core.sessions))
        await end(self._chores)  # none may still write when the store is closed
        with suppress(StoreDown):  # it is tried again
            await self.core.save_all()  # whoever is sent elsewhere now finds there what was done here
        self.core.draining.set()
        self._health.ending()
        if self._server is not None:
            await self._server.stop(self.settings.drain_seconds)
        stored = await self._hand_over(until)
        await asyncio.to_thread(self._watch.close)
        log.info("stopped")
        return stored

    async def _hand_over(self, until: float) -> bool:
        """Has the store keep what it has not yet, and lets it go: whether it could."""
        while True:
            try:
                await self.core.save_all()
                break
            except StoreDown as error:
                if asyncio.get_running_loop().time() >= until:
                    log.error("sessions are lost, for the store does not answer", error=str(error))
                    break
                log.warning("the store does not answer", error=str(error))
            await asyncio.sleep(_RETRY_SECONDS)
        try:
            await self.core.close()
        except StoreDown:
            return False
        return True

    async def _sweep(self) -> None:
        failed = ""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            if self._guard is not None:
                self._guard.recheck()
            if not failed and self.core.keeper is not None and (failed := self.core.keeper.store.failed):
                log.error("the store has failed for good", error=failed)
                self._health.failed()  # whoever watches over the server is to start it again
            try:
                if expired := await self.core.sweep():
                    log.info("sessions expired", count=expired)
                self._ebb.look(self.core.sessions.held_bytes)
            except StoreDown as error:
                log.warning("the store does not answer", error=str(error))

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(self.settings.store_interval)
            try:
                await self.core.save_all()
            except StoreDown as error:
                log.warning("the store does not answer", error=str(error))


def grpc_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """A server for the event loop that runs."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, CompletionLoop):
        return CompletionServer(loop, interceptors, options)
    return grpc.aio.server(interceptors=interceptors, options=options)


class _Unregistered:
    """Takes services for a server, by their names only.

    Methods that are registered too are waited for one by one: with every call, gRPC's loop builds and takes down a wait
    for each of them, which for our three dozen is an eighth of the time of a small unary call.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Does nothing."""


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    server = Server(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    gc.collect()
    gc.freeze()  # modules and models stay: to look at them in every full collection takes more than ten milliseconds
    await stop.wait()
    if not await server.stop():
        sys.exit(1)
