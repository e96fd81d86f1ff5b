"""What a client has of its servers, under asyncio: channels, calls that are not streamed, and the links."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import grpc
import grpc.aio

from rnnserve import _trace
from rnnserve._chunks import Lane
from rnnserve._links import REPLAY_BYTES, Links, Place, Routing
from rnnserve._notices import OnNotice
from rnnserve._resolve import Replica, fixed, resolve
from rnnserve._retry import RETRY_FOR, Retry
from rnnserve._signature import Signature
from rnnserve.errors import ClientClosed, DeadlineExceeded, RequestError, Unavailable, from_rpc_error
from rnnserve.models import Model, SessionInfo
from rnnserve.options import LayerOptions
from rnnserve.tls import Tls, Token, check_token, tls_of
from rnnserve.v1 import inference_pb2, model_pb2, session_pb2
from rnnserve.v1.inference_pb2_grpc import InferenceServiceStub
from rnnserve.v1.model_pb2_grpc import ModelServiceStub
from rnnserve.v1.session_pb2_grpc import SessionServiceStub

T = TypeVar("T")

#: A call that is not streamed, of the stub that it is given a channel for.
Method = Callable[[grpc.aio.Channel], Callable[..., Awaitable[T]]]

# A returned sequence may be longer than gRPC's usual limit of 4 MiB; the server guards itself with its own.
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # When to connect again is for `Retry` to say. gRPC alone would wait for up to two minutes between tries that it
    # makes of its own, fail whatever is asked meanwhile, and give each try 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 5000),  # in spite of its name, how long one try may take
    # A peer whose packets are dropped says nothing, and TCP takes a quarter of an hour to notice. While a stream is
    # open, one that was silent for so long is asked for a sign of life, and has so long to give it.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # also of a ping that gRPC has sent for its own sake: it sends no second one
    ("grpc.http2.max_pings_without_data", 0),  # as often as that
)

_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse with status SERVING

#: Seconds between looks at what the names of replicas stand for.
_RESOLVED_EVERY = 5.0

_PROBE_SECONDS = 2.0  # that a replica may take to say whether it serves


class Connection:
    """What both clients stand on. Everything runs on one event loop; channels are opened on first use.

    Attributes:
        target: what the client was given, for messages.
        collect: takes in what other threads wish, where there are any. To be set before the first call.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        timeout: float | None,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
        retry_for: float | None = RETRY_FOR,
        replay_bytes: int = REPLAY_BYTES,
        on_notice: OnNotice | None = None,
        tls: Tls = None,
        token: Token | None = None,
        streams: int = 1,
    ) -> None:
        if credentials is not None and tls not in (None, False):
            raise ValueError("credentials and tls: expected one of them")
        for each in [target] if isinstance(target, str) else target:
            check_token(each, token, tls, credentials)
        if retry_for is not None and not retry_for >= 0:
            raise ValueError(f"retry_for must be seconds, 0 for never or None for ever, got {retry_for}")
        if replay_bytes < 1:
            raise ValueError(f"replay_bytes must be at least 1, got {replay_bytes}")
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams}")
        self._targets = [target] if isinstance(target, str) else list(target)
        self._spread = not isinstance(target, str)
        if not self._targets:
            raise ValueError("expected at least one replica, got an empty list")
        if self._spread and streams > 1:
            raise ValueError("streams are for a single target: a list of replicas has one stream to each")
        self._fixed = not self._spread or fixed(self._targets)
        self._streams = streams
        self.target = ", ".join(self._targets)
        self.timeout = timeout
        self.retry = Retry(retry_for)
        self._replay_bytes = replay_bytes
        self._on_notice = on_notice
        self._token = token
        self._credentials = credentials
        secure = tls_of(tls)
        given = options if secure is None else (*secure.options(), *options)
        self._options = tuple({**dict(_OPTIONS), **dict(given)}.items())  # gRPC takes the first of two
        if secure is not None:
            self._credentials = secure.credentials()
        self._channels: dict[Replica, grpc.aio.Channel] = {}
        self._links: Links | None = None
        self._looking: asyncio.Task[Links] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._models: dict[tuple[str, str], Model] = {}
        self._newest: dict[str, Model] = {}
        self._signatures: WeakValueDictionary[tuple[str, str, LayerOptions, int], Signature] = WeakValueDictionary()
        self._closed = False
        self.collect: Callable[[], None] | None = None

    async def close(self) -> None:
        """Ends the stream and the channel; calls that are not answered fail with ClientClosed. Closes once."""
        self._closed = True
        tasks = [task for task in (self._looking, self._watch) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        links, self._links = self._links, None
        channels, self._channels = self._channels, {}
        if links is not None:
            await links.close()
        for channel in channels.values():
            await channel.close()

    async def links(self) -> Links:
        """The links of this client."""
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._links is None:
            if self._fixed:
                return self._make({each: Replica(each) for each in self._targets})
            if self._looking is None:
                self._looking = asyncio.create_task(self._look())
            try:
                return await asyncio.shield(self._looking)
            except asyncio.CancelledError:
                if self._closed and self._looking.cancelled():
                    raise ClientClosed("the client is closed") from None
                raise
        return self._links

    async def _look(self) -> Links:
        links = self._make(await self._resolved())
        self._watch = asyncio.create_task(self._keep_looking(links))
        return links

    async def _keep_looking(self, links: Links) -> None:
        while True:
            await self.retry.sleep(_RESOLVED_EVERY)
            links.set(await self._resolved())

    async def _resolved(self) -> dict[str, Replica]:
        return {replica.target: replica for replica in await resolve(self._targets)}

    def _make(self, replicas: dict[str, Replica]) -> Links:
        links = self._links = Links(
            self.retry,
            self._replay_bytes,
            channel=self._channel,
            start=self._stream,
            knows=self._knows,
            serves=self._serves,
            drop=self._drop,
            moves=self._spread,
            on_notice=self._on_notice,
        )
        if self.collect is not None:
            links.account.collect = self.collect
        if self._streams > 1:
            replicas = {f"{name}#{number}": each for name, each in replicas.items() for number in range(self._streams)}
        links.set(replicas)
        return links

    def _stream(self, replica: Replica, routing: Routing) -> Any:
        return InferenceServiceStub(self._channel(replica)).Stream(metadata=self.metadata(routing))

    def metadata(self, routing: Routing = ()) -> grpc.aio.Metadata:
        """What every call says beside its request; `routing` tells a proxy where it belongs."""
        headers = [*routing, *_trace.headers()]
        if self._token is not None:
            token = self._token if isinstance(self._token, str) else self._token()
            headers.append(("authorization", f"Bearer {token}"))
        return grpc.aio.Metadata(*headers)

    def _channel(self, replica: Replica) -> grpc.aio.Channel:
        """The channel to a replica, opened on first use."""
        if self._closed:
            raise ClientClosed("the client is closed")
        channel = self._channels.get(replica)
        if channel is None:
            options = self._options
            if replica.authority is not None:
                options = (("grpc.default_authority", replica.authority), *options)
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(replica.target, options)
            else:
                if replica.authority is not None:
                    options = (("grpc.ssl_target_name_override", replica.authority.rpartition(":")[0]), *options)
                channel = grpc.aio.secure_channel(replica.target, self._credentials, options)
            self._channels[replica] = channel
        return channel

    async def _drop(self, replica: Replica) -> None:
        channel = self._channels.pop(replica, None)
        if channel is not None:
            await channel.close()

    async def _knows(self, replica: Replica, session_id: str) -> bool:
        request = session_pb2.GetSessionRequest(session_id=session_id)
        try:
            await SessionServiceStub(self._channel(replica)).GetSession(
                request, timeout=_PROBE_SECONDS, metadata=self.metadata()
            )
        except grpc.RpcError:
            return False
        return True

    async def _serves(self, replica: Replica, routing: Routing = ()) -> bool:
        check: Callable[..., Awaitable[bytes]] = self._channel(replica).unary_unary(_HEALTH)
        try:
            return await check(b"", timeout=_PROBE_SECONDS, metadata=self.metadata(routing)) == _SERVING
        except grpc.RpcError:
            return False

    def seconds(self, limit: float | None) -> float | None:
        """The deadline of a call: its own, else the client's."""
        return self.timeout if limit is None else limit

    async def limited(self, work: Awaitable[T], limit: float | None) -> T:
        """The result of work that makes several calls, or DeadlineExceeded."""
        seconds = self.seconds(limit)
        try:
            async with asyncio.timeout(seconds):
                return await work
        except DeadlineExceeded:
            raise
        except TimeoutError as error:
            assert seconds is not None
            raise DeadlineExceeded(self.late(seconds)) from error

    def late(self, seconds: float) -> str:
        """What to say when a deadline passed."""
        trouble = None if self._links is None else self._links.trouble
        return f"no answer within {seconds:g} s" + (f"; {self.target}: {trouble}" if trouble else "")

    async def predict(
        self, request: inference_pb2.PredictRequest, limit: float | None
    ) -> inference_pb2.PredictResponse:
        """One call without a session."""
        return await self.unary(lambda channel: InferenceServiceStub(channel).Predict, request, limit)

    async def newest(self, name: str, version: str, limit: float | None, *, known: bool = False) -> Model:
        """A model's description; with `known`, the one that was fetched before, if there is one."""
        model = (self._models.get((name, version)) if version else self._newest.get(name)) if known else None
        if model is None:
            request = model_pb2.GetModelRequest(name=name, version=version)
            response = await self.unary(lambda channel: ModelServiceStub(channel).GetModel, request, limit)
            model = self._keep(Model.from_message(response.model))
            if not version:
                self._newest[name] = model
        return model

    async def model_of(self, session: session_pb2.Session, limit: float | None) -> Model:
        """The description of a session's model, fetched once for each digest."""
        model = self._models.get((session.model, session.version))
        if model is None or model.digest != session.digest:
            model = await self.newest(session.model, session.version, limit)
        return model

    def signature(self, model: Model, options: LayerOptions, batch_size: int) -> Signature:
        """The signature of a session: the same one for all sessions of a kind, whose steps then are of one form."""
        key = (model.name, model.version, options, batch_size)
        signature = self._signatures.get(key)
        if signature is None or signature.model is not model:
            signature = self._signatures[key] = Signature(model, options, batch_size)
        return signature

    async def models(self, limit: float | None) -> list[Model]:
        """Every loaded model."""
        found: list[Model] = []
        request = model_pb2.ListModelsRequest()
        while True:
            response = await self.unary(lambda channel: ModelServiceStub(channel).ListModels, request, limit)
            found += [self._keep(Model.from_message(each)) for each in response.models]
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def sessions_page(self, model: str, token: str, limit: float | None) -> tuple[list[SessionInfo], str]:
        """A page of the live sessions, oldest first, and the token of the next one, empty at the end."""
        request = session_pb2.ListSessionsRequest(model=model, page_token=token)
        response = await self.unary(lambda channel: SessionServiceStub(channel).ListSessions, request, limit)
        return [SessionInfo.from_message(each) for each in response.sessions], response.next_page_token

    async def get_session(self, session_id: str, limit: float | None, lane: Lane | None = None) -> SessionInfo:
        """A session as it is; with its lane, if there is one."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        response = await self.unary(
            lambda channel: SessionServiceStub(channel).GetSession, request, limit, about=lane or session_id
        )
        return SessionInfo.from_message(response.session)

    async def reset_session(
        self, request: session_pb2.ResetSessionRequest, limit: float | None, lane: Lane, *, retry: bool = True
    ) -> None:
        """Puts a session's states back; `retry` if it says at which step."""
        await self.unary(
            lambda channel: SessionServiceStub(channel).ResetSession, request, limit, retry=retry, about=lane
        )

    async def health(self, limit: float | None) -> bool:
        """Whether the server, or one of the replicas, says that it serves; False when none can be reached."""
        seconds = self.seconds(limit)
        links = await self.links()
        try:
            async with asyncio.timeout(seconds):
                return any(await asyncio.gather(*[self._healthy(place) for place in links.all()]))
        except TimeoutError:
            return False

    async def _healthy(self, place: Place) -> bool:
        check: Callable[..., Awaitable[bytes]] = self._channel(place.replica).unary_unary(_HEALTH)
        try:
            return await check(b"", metadata=self.metadata()) == _SERVING
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if isinstance(failure, (Unavailable, DeadlineExceeded)):
                return False
            raise failure from None

    def _keep(self, model: Model) -> Model:
        self._models[model.name, model.version] = model
        return model

    async def unary(
        self,
        method: Method[T],
        request: Any,
        limit: float | None,
        *,
        retry: bool = True,
        about: Lane | str | None = None,
    ) -> T:
        """One call, its failure as one of our exceptions.

        Args:
            method: the call.
            request: its message.
            limit: seconds; None for the client's.
            retry: it may be made again: doing it twice is once.
            about: the session that it is for, by its lane or its id; None for a call that any replica can answer.
        """
        seconds = self.seconds(limit)
        started = self.retry.clock()
        trial = None
        links = await self.links()
        while True:
            spent = self.retry.clock() - started
            routing: Routing = ()
            if isinstance(about, Lane):
                place = links.holding(about)
                about.asked = True
                routing = links.routing(place, "")
            elif about is not None:
                place = links.place(about)
                routing = links.routing(place, about)
            else:
                place = links.any()
            try:
                left = None if seconds is None else max(0.0, seconds - spent)
                return await method(self._channel(place.replica))(
                    request, timeout=left, metadata=self.metadata(routing)
                )
            except grpc.RpcError as error:
                failure: RequestError = from_rpc_error(error)
            except asyncio.CancelledError:
                # Closing the channel cancels its calls, which must not look as if their tasks had been cancelled.
                task = asyncio.current_task()
                if self._closed and task is not None and not task.cancelling():
                    raise ClientClosed("the client was closed before the answer came") from None
                raise
            if failure.status is not grpc.StatusCode.UNAVAILABLE:
                raise failure
            others = links.failed(place, failure)
            if not retry:
                raise failure
            trial = trial or self.retry.begin()
            delay = 0.0 if others and not isinstance(about, Lane) else trial.next(failure.retry_after)
            if delay is None:
                raise failure
            if seconds is not None and self.retry.clock() - started + delay >= seconds:
                raise DeadlineExceeded(f"no answer within {seconds:g} s; {self.target}: {failure}")
            await self.retry.sleep(delay)
            if self._closed:
                raise ClientClosed("the client was closed before the answer came") from failure
