"""A connection to a server, under asyncio: the channel, the calls that are not streamed, and the current stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from rnnserve import _trace
from rnnserve._link import REPLAY_BYTES, Link
from rnnserve._notices import OnNotice
from rnnserve._retry import RETRY_FOR, Retry
from rnnserve.errors import ClientClosed, DeadlineExceeded, RequestError, Unavailable, from_rpc_error
from rnnserve.models import Model, SessionInfo
from rnnserve.tls import Tls, Token, check_token, tls_of
from rnnserve.v1 import inference_pb2, model_pb2, session_pb2
from rnnserve.v1.inference_pb2_grpc import InferenceServiceStub
from rnnserve.v1.model_pb2_grpc import ModelServiceStub
from rnnserve.v1.session_pb2_grpc import SessionServiceStub

if TYPE_CHECKING:
    from rnnserve.v1.model_pb2_grpc import ModelServiceAsyncStub

T = TypeVar("T")

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

_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse with status SERVING


class Connection:
    """What both clients stand on. Everything runs on one event loop; the channel is opened on first use."""

    def __init__(
        self,
        target: str,
        timeout: float | None,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, Any]],
        retry_for: float | None = RETRY_FOR,
        replay_bytes: int = REPLAY_BYTES,
        on_notice: OnNotice | None = None,
        tls: Tls = None,
        token: Token | None = None,
    ) -> None:
        if credentials is not None and tls not in (None, False):
            raise ValueError("credentials and tls: expected one of them")
        check_token(target, token, tls, credentials)
        if retry_for is not None and not retry_for >= 0:
            raise ValueError(f"retry_for must be seconds, 0 for never or None for ever, got {retry_for}")
        if replay_bytes < 1:
            raise ValueError(f"replay_bytes must be at least 1, got {replay_bytes}")
        self.target = target
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
        self._channel: grpc.aio.Channel | None = None
        self._link: Link | None = None
        self._models: dict[tuple[str, str], Model] = {}
        self._newest: dict[str, Model] = {}
        self._closed = False

    async def close(self) -> None:
        """Ends the stream and the channel; calls that are not answered fail with ClientClosed. Closes once."""
        self._closed = True
        link, self._link = self._link, None
        channel, self._channel = self._channel, None
        if link is not None:
            await link.close()
        if channel is not None:
            await channel.close()

    def link(self) -> Link:
        """The streams of this connection."""
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._link is None:
            self._link = Link(self.target, self._stream, self.retry, self._replay_bytes, self._on_notice)
        return self._link

    def _stream(self) -> Any:
        return InferenceServiceStub(self.channel()).Stream(metadata=self.metadata())

    def metadata(self) -> grpc.aio.Metadata:
        """What every call says beside its request."""
        headers = _trace.headers()
        if self._token is not None:
            token = self._token if isinstance(self._token, str) else self._token()
            headers.append(("authorization", f"Bearer {token}"))
        return grpc.aio.Metadata(*headers)

    def channel(self) -> grpc.aio.Channel:
        """The channel, opened on first use."""
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, self._options)
        return self._channel

    def model_service(self) -> ModelServiceAsyncStub:
        """The stub of the service of models."""
        return ModelServiceStub(self.channel())

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
        trouble = None if self._link is None else self._link.trouble
        return f"no answer within {seconds:g} s" + (f"; {self.target}: {trouble}" if trouble else "")

    async def predict(
        self, request: inference_pb2.PredictRequest, limit: float | None
    ) -> inference_pb2.PredictResponse:
        """One call without a session."""
        return await self.unary(InferenceServiceStub(self.channel()).Predict, request, limit)

    async def newest(self, name: str, version: str, limit: float | None, *, known: bool = False) -> Model:
        """A model's description; with `known`, the one that was fetched before, if there is one."""
        model = (self._models.get((name, version)) if version else self._newest.get(name)) if known else None
        if model is None:
            request = model_pb2.GetModelRequest(name=name, version=version)
            response = await self.unary(self.model_service().GetModel, request, limit)
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

    async def models(self, limit: float | None) -> list[Model]:
        """Every loaded model."""
        found: list[Model] = []
        request = model_pb2.ListModelsRequest()
        while True:
            response = await self.unary(self.model_service().ListModels, request, limit)
            found += [self._keep(Model.from_message(each)) for each in response.models]
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def sessions_page(self, model: str, token: str, limit: float | None) -> tuple[list[SessionInfo], str]:
        """A page of the live sessions, oldest first, and the token of the next one, empty at the end."""
        request = session_pb2.ListSessionsRequest(model=model, page_token=token)
        response = await self.unary(SessionServiceStub(self.channel()).ListSessions, request, limit)
        return [SessionInfo.from_message(each) for each in response.sessions], response.next_page_token

    async def get_session(self, session_id: str, limit: float | None) -> SessionInfo:
        """A session as it is."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        response = await self.unary(SessionServiceStub(self.channel()).GetSession, request, limit)
        return SessionInfo.from_message(response.session)

    async def reset_session(
        self, request: session_pb2.ResetSessionRequest, limit: float | None, *, retry: bool = True
    ) -> None:
        """Puts a session's states back; `retry` if it says at which step."""
        await self.unary(SessionServiceStub(self.channel()).ResetSession, request, limit, retry=retry)

    async def health(self, limit: float | None) -> bool:
        """Whether the server says that it serves; False when it cannot be reached."""
        check: Callable[..., Awaitable[bytes]] = self.channel().unary_unary("/grpc.health.v1.Health/Check")
        try:
            return await self.unary(check, b"", limit, retry=False) == _SERVING
        except (Unavailable, DeadlineExceeded):
            return False

    def _keep(self, model: Model) -> Model:
        self._models[model.name, model.version] = model
        return model

    async def unary(
        self, method: Callable[..., Awaitable[T]], request: Any, limit: float | None, *, retry: bool = True
    ) -> T:
        """One call, its failure as one of our exceptions. With `retry` it may be made again: doing it twice is once."""
        seconds = self.seconds(limit)
        started = self.retry.clock()
        trial = None
        while True:
            spent = self.retry.clock() - started
            try:
                left = None if seconds is None else max(0.0, seconds - spent)
                return await method(request, timeout=left, metadata=self.metadata())
            except grpc.RpcError as error:
                failure: RequestError = from_rpc_error(error)
            except asyncio.CancelledError:
                # Closing the channel cancels its calls, which must not look as if their tasks had been cancelled.
                task = asyncio.current_task()
                if self._closed and task is not None and not task.cancelling():
                    raise ClientClosed("the client was closed before the answer came") from None
                raise
            if not retry or failure.status is not grpc.StatusCode.UNAVAILABLE:
                raise failure
            trial = trial or self.retry.begin()
            delay = trial.next(failure.retry_after)
            if delay is None:
                raise failure
            if seconds is not None and self.retry.clock() - started + delay >= seconds:
                raise DeadlineExceeded(f"no answer within {seconds:g} s; {self.target}: {failure}")
            await self.retry.sleep(delay)
            if self._closed:
                raise ClientClosed("the client was closed before the answer came") from failure
