"""The client for asyncio. `rnnserve.Client` is the same for threads.

    async with rnnserve.aio.Client("localhost:50051") as client:
        rnn = client.RNN("lstm-32-64", return_sequences=True)
        y = await rnn(x)
        async with client.session("silero-vad") as vad:
            async for probability in vad.stream(frames):
                ...

One client has one bidirectional stream to the server, opened on first use, for all its sessions. Whatever its tasks
ask for in one turn of the event loop leaves in one message. A client belongs to one event loop.

Arrays that come back are read-only views of what arrived.
"""
# ruff: noqa: ASYNC109  (a timeout is an argument of every call, as in httpx and grpc)

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Self, Unpack, overload

import grpc
from numpy.typing import ArrayLike

from rnnserve import _group_states, _states
from rnnserve._catalogue import Catalogue
from rnnserve._chunks import Chunk
from rnnserve._connection import Connection
from rnnserve._faces import GroupFace, LayerFace, LiveFace, SessionFace
from rnnserve._layer import Layer
from rnnserve._links import REPLAY_BYTES
from rnnserve._live import Live, Wish
from rnnserve._notices import OnNotice, on_the_loop
from rnnserve._pipeline import WINDOW, pipelined
from rnnserve._retry import RETRY_FOR
from rnnserve._states import Rollout
from rnnserve.errors import GroupError, RequestError
from rnnserve.models import Model, SessionInfo
from rnnserve.nest import Nest
from rnnserve.options import LayerOptions, ReplayWindow, SessionOptions, Terms, given_options
from rnnserve.tls import Tls, Token

__all__ = ["RNN", "Client", "Models", "Session", "SessionGroup"]


class Client:
    """A client of a server, or of several that share a store.

    Args:
        target: where the server or a proxy is, as gRPC writes it, such as `localhost:50051`; or a list of replicas, of
            which each `host:port` stands for every address that the host's name has. See below.
        timeout: seconds that a call may take unless it is given its own; None for no limit.
        credentials: gRPC's own, where `tls` is not enough.
        options: gRPC channel options.
        retry_for: seconds of trying to reach the server again before those who wait are told Unavailable; None for
            ever, 0 to tell them at once. See below.
        replay_bytes: memory for chunks that are not answered and may have to be sent again. Beyond it, steps wait.
        on_notice: called with each `Notice` of the server: that a session is about to end, or has. A function or a
            coroutine function, which runs as a task.
        tls: True for TLS with the system's roots, a path for the roots in that file, or a `TLS` with a certificate to
            show; without it the connection is not encrypted.
        token: the bearer token to show, or a function that gives the one to show now. Without TLS it is only sent to
            this machine, unless `tls=False` says that this is meant.
        streams: streams to a single target, over which sessions are spread. A proxy may take each to another replica.

    Attributes:
        models: called, lists what the server hosts; deploys, unloads and reloads models where the server allows it.

    A lost connection is a pause. The client connects again, after a time that grows from try to try and is left to
    chance, or as the server asks; takes up its sessions, and sends what was not answered. Each chunk is applied once,
    in its place, and answered as if nothing had happened. A call whose `timeout` passes meanwhile raises
    DeadlineExceeded, and after `retry_for` every waiting call raises Unavailable. Their chunks keep their places: they
    are settled before anything that is sent later, and only their outputs are lost. So go on with the next chunk; the
    same one again would be a further step. With `retry_for=0` unanswered chunks are dropped, and the next call starts
    where the server has the session. A server that has forgotten the sessions is told by SessionNotFound. The logger
    "rnnserve" says when the connection is lost and when it is back.

    With a list of replicas each session has its place among those that answer, the same for every client, and there is
    one stream to each replica. When one is lost its sessions go on at the others, which take them from the store; they
    come back when it does, in a moment of rest. Names are looked up every few seconds, so that replicas may be added
    and taken away. Calls that are of no session take turns. A proxy is told by the metadata `x-session-id`, the id of
    the first session of a stream, where the stream and all calls for its sessions belong.

    Every call raises the exceptions of `rnnserve.errors`.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        retry_for: float | None = RETRY_FOR,
        replay_bytes: int = REPLAY_BYTES,
        on_notice: OnNotice | None = None,
        tls: Tls = None,
        token: Token | None = None,
        streams: int = 1,
    ) -> None:
        called = None if on_notice is None else on_the_loop(on_notice)
        self._connection = Connection(
            target,
            timeout,
            credentials,
            options,
            retry_for,
            replay_bytes,
            called,
            tls=tls,
            token=token,
            streams=streams,
        )
        self.models = Models(Catalogue(self._connection))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Sessions that were not closed live on until they expire."""
        await self._connection.close()

    def RNN(  # noqa: N802  (Keras's name)
        self,
        model: str | Sequence[str],
        *,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        time_major: bool = False,
        zero_output_for_mask: bool = False,
        version: str | Sequence[str] = "",
        idle_lifetime: float | None = None,
        lifetime: float | None = None,
        replay_window: ReplayWindow | tuple[int | None, int | None] | None = None,
        reset_every: int | None = None,
        reset_after_masked: int | None = None,
    ) -> RNN:
        """A recurrent layer with the options and the defaults of `tf.keras.layers.RNN`, computed by the server.

        `model` is a model's name, or a list of names for a stack (Keras's list of cells). Every option is sent as it
        is here; OptionUnsupported is raised when a model cannot honour one. What follows is
        for the sessions of a stateful layer, as for `session`.
        """
        options = LayerOptions(
            return_sequences, return_state, go_backwards, stateful, unroll, time_major, zero_output_for_mask
        )
        terms = Terms(idle_lifetime, lifetime, replay_window, reset_every, reset_after_masked)
        return RNN(Layer(self._connection, model, version, options, terms))

    def session(
        self,
        model: str,
        *,
        batch_size: int = 1,
        initial_state: Nest = None,
        version: str = "",
        idle_lifetime: float | None = None,
        lifetime: float | None = None,
        replay_window: ReplayWindow | tuple[int | None, int | None] | None = None,
        reset_every: int | None = None,
        reset_after_masked: int | None = None,
        session_id: str = "",
        timeout: float | None = None,
        **options: Unpack[SessionOptions],
    ) -> Session:
        """A new session, to be entered with `async with` (which ends it) or awaited.

        Args:
            model: the model's name.
            batch_size: the number of rows in every step, fixed for the session's life.
            initial_state: the states to start from, nested as Keras nests them, each [batch_size, ...]; None for the
                model's default.
            version: the model's version; empty for the newest.
            idle_lifetime: seconds without use after which the server ends the session.
            lifetime: seconds after which the server ends the session in any case; None for no such end.
            replay_window: how many chunks, and bytes, of its last answers the server remembers; None for its default.
            reset_every: the states go back to the model's default whenever `next_step` is a multiple of it.
            reset_after_masked: a row's states do so with the so many-th masked step in a row.
            session_id: an id of one's own.
            timeout: seconds that opening may take.
            options: options of the layer, such as return_sequences; what is not given takes the model's default.
        """
        terms = Terms(idle_lifetime, lifetime, replay_window, reset_every, reset_after_masked)
        wish = Wish(model, version, batch_size, initial_state, session_id, given_options(options), terms)
        return Session(lambda: Live.create(self._connection, wish, timeout), ends=True)

    def attach(self, session_id: str, *, timeout: float | None = None) -> Session:
        """A session that is alive on the server; `async with` leaves it alive."""
        return Session(lambda: Live.attach(self._connection, session_id, timeout), ends=False)

    def restore(
        self, source: str | PathLike[str] | bytes, *, session_id: str = "", timeout: float | None = None
    ) -> Session:
        """A new session that goes on where a saved one was, to be entered with `async with` (which ends it) or awaited.

        `source` is the path that `Session.save` was given, or what `Session.export` gave, on this server or another.

        Raises:
            BlobInvalid: it is no saved session, or is damaged.
            ModelNotFound, ModelChanged: the server has no such model, or another of that name and version.
        """
        return Session(lambda: _states.restore(self._connection, source, session_id, timeout), ends=True)

    def restore_group(
        self, source: str | PathLike[str] | Sequence[bytes], *, timeout: float | None = None
    ) -> SessionGroup:
        """A new group, each session of which goes on where a saved one was; to be entered with `async with` or awaited.

        `source` is the folder that `SessionGroup.save` was given, or what `SessionGroup.export` gave.

        Raises:
            GroupError: some of them cannot be restored; none is made.
            InvalidInput: they are of several kinds.
        """
        return SessionGroup(lambda: _group_states.restore(self._connection, source, timeout), ends=True)

    def session_group(
        self,
        model: str,
        count: int,
        *,
        batch_size: int = 1,
        initial_state: Nest = None,
        version: str = "",
        idle_lifetime: float | None = None,
        lifetime: float | None = None,
        replay_window: ReplayWindow | tuple[int | None, int | None] | None = None,
        reset_every: int | None = None,
        reset_after_masked: int | None = None,
        timeout: float | None = None,
        **options: Unpack[SessionOptions],
    ) -> SessionGroup:
        """`count` new sessions of one kind that step together, to be entered with `async with` or awaited.

        They are opened in one message, and a step of all of them is one frame. Arguments are those of `session`, the
        same for each.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        terms = Terms(idle_lifetime, lifetime, replay_window, reset_every, reset_after_masked)
        wish = Wish(model, version, batch_size, initial_state, "", given_options(options), terms)
        return SessionGroup(lambda: Live.create(self._connection, wish, timeout, count=count, group=True), ends=True)

    async def model(self, name: str, *, version: str = "", timeout: float | None = None) -> Model:
        """One version of one model; the newest if none is named."""
        return await self._connection.newest(name, version, timeout)

    async def sessions(self, *, model: str = "", timeout: float | None = None) -> AsyncIterator[SessionInfo]:
        """The live sessions, oldest first; of one model, if named."""
        token = ""
        while True:
            page, token = await self._connection.sessions_page(model, token, timeout)
            for session in page:
                yield session
            if not token:
                return

    async def health(self, *, timeout: float | None = None) -> bool:
        """Whether the server says that it serves. False too when it cannot be reached."""
        return await self._connection.health(timeout)


class Models:
    """The models of the server, made by `Client.models`: called to list them, and changed where the server allows it.

    Changing raises DeployDisabled unless the server was started with `--allow-deploy`.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def __call__(self, *, timeout: float | None = None) -> list[Model]:
        """What the server hosts, by name, the newest version of each first."""
        return await self._catalogue.listed(timeout)

    async def deploy(
        self,
        name: str,
        config: Mapping[str, Any],
        weights: Sequence[ArrayLike],
        *,
        version: str = "",
        keras_version: int | None = None,
        timeout: float | None = None,
    ) -> Model:
        """Adds a version of a model, made from a layer or a model of layers.

        Sessions stay on the version they were opened on; new ones get the new one.

        Args:
            name: the model's name.
            config: `{"class_name": ..., "config": {...}}`, as Keras 2 or Keras 3 serializes a layer or a model.
            weights: in the order of Keras's `get_weights()`.
            version: the version; empty for the next number.
            keras_version: 2 or 3, the Keras that wrote the config; None to tell from it.
            timeout: seconds that the call may take.

        Raises:
            ModelInvalid: it is no model; the message says why.
            VersionExists: the version is there.
        """
        return await self._catalogue.deploy(name, config, weights, version, keras_version, timeout)

    async def deploy_file(
        self, name: str, path: str | PathLike[str], *, version: str = "", timeout: float | None = None
    ) -> Model:
        """Adds a version of a model from a .keras, .h5, .onnx or .safetensors (PyTorch) file. Raises as `deploy`."""
        return await self._catalogue.deploy_file(name, path, version, timeout)

    async def unload(
        self,
        name: str,
        *,
        version: str = "",
        end_sessions_after: float | None = None,
        timeout: float | None = None,
    ) -> list[str]:
        """Takes a version, or all, from the list, and returns which.

        Sessions that have it go on, unless `end_sessions_after` says that they end in so many seconds, 0 for at once:
        then they are told by a `Notice`, and afterwards by SessionUnloaded.
        """
        return await self._catalogue.unload(name, version, end_sessions_after, timeout)

    async def reload(self, name: str, *, timeout: float | None = None) -> list[Model]:
        """Loads the versions that are in the server's folder now, and returns what is served."""
        return await self._catalogue.reload(name, timeout)


class RNN(LayerFace):
    """A recurrent layer, called as Keras calls one; made by `Client.RNN`.

    With stateful=True the state stays on the server, in a session that is made by the first call and has that call's
    batch size from then on; `async with` or `close` ends it.

    A call that raises is as if it had not been, even if it was not answered: what it may have moved is put back before
    the next one. Not so for a model that cannot show its states: there it keeps its place, as a session's step does.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    async def __call__(
        self, x: Any, *, mask: Any = None, initial_state: Nest = None, timeout: float | None = None
    ) -> Any:
        """Runs the layer over a batch of sequences.

        Args:
            x: [batch, time, *features] ([time, batch, ...] with time_major); for a model of several inputs a mapping
                from their names. Other numbers are cast to the model's element type as Keras 3 casts them.
            mask: which steps count, [batch, time] or [batch, time, 1], the batch 1 for all rows.
            initial_state: the states to start from, nested as Keras nests them, each [batch, ...]. A stateful layer
                takes them in place of what it recorded.
            timeout: seconds that the call may take.

        Returns:
            The output, [batch, time, ...] with return_sequences, else [batch, ...] (a dict for several outputs); with
            return_state a list of the output and the states.
        """
        return await self._layer.call(x, mask, initial_state, timeout)

    async def __aenter__(self) -> Self:
        await self.build()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _leave(self._layer.close(), error)

    async def build(self, *, timeout: float | None = None) -> None:
        """Fetches the model's description, which a first call does too and the properties need."""
        await self._layer.build(timeout)

    async def reset_states(self, states: Nest = None, *, timeout: float | None = None) -> None:
        """Puts the recorded states to zeros (the model's default, if it has another) or to given values.

        AttributeError when the layer is not stateful, as in Keras.
        """
        await self._layer.reset_states(states, timeout)

    reset_state = reset_states

    async def close(self) -> None:
        """Ends the session of a stateful layer."""
        await self._layer.close()


class _Entered(LiveFace):
    """What sessions and groups share: they are opened by `await` or `async with`, and left in two ways."""

    def __init__(self, open_live: Any, *, ends: bool) -> None:
        self._open_live = open_live
        self._ends = ends
        self._opened: Live | None = None

    @property
    def _live(self) -> Live:
        if self._opened is None:
            raise RuntimeError("the session is not open: await it, or enter it with `async with`, first")
        return self._opened

    async def _open(self) -> Self:
        if self._opened is None:
            self._opened = await self._open_live()
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _leave(self._live.close(delete=self._ends), error)

    async def close(self, *, timeout: float | None = None) -> None:
        """Ends it on the server, behind the steps sent so far."""
        await self._live.close(delete=True, limit=timeout)

    async def detach(self, *, timeout: float | None = None) -> None:
        """Leaves it alive on the server, for `Client.attach`."""
        await self._live.close(delete=False, limit=timeout)

    async def reset_states(self, states: Nest = None, *, timeout: float | None = None) -> None:
        """Puts the states to the model's default or to given values, behind the steps sent so far.

        The values are nested as Keras nests them, each [batch_size, ...]. The step number does not change.
        """
        await self._live.reset(states, timeout)


class Session(_Entered, SessionFace):
    """A stateful layer on the server, made by `Client.session` or `Client.attach`.

    A step that fails leaves the session as it was; the steps that were sent behind it fail with StepMismatch. A step
    that is given up, because it is cancelled or because it raises DeadlineExceeded or Unavailable, keeps its place: it
    is applied once, before any later one, and only its output is lost. What is said of lost connections at the client
    holds.
    """

    async def step(self, x: Any, *, timeout: float | None = None) -> Any:
        """One time step.

        `x` is [*features] for a batch size of 1 and the output [*shape], a NumPy scalar if that is empty; otherwise
        they are [batch, *features] and [batch, *shape]. With return_state a list of the output and the states, each
        [batch, ...]. Several inputs or outputs are mappings by name.
        """
        live = self._live
        ticket = live.new_ticket()
        chunk = live.signature.step(x, ticket)
        live.submit(chunk)
        columns, row = await live.answer(chunk, timeout)
        return live.signature.step_result(columns, row)

    async def __call__(self, x: Any, *, mask: Any = None, timeout: float | None = None) -> Any:
        """A chunk of time steps: arrays and results as for `RNN.__call__`."""
        live = self._live
        ticket = live.new_ticket()
        chunk = live.signature.chunk(x, mask, ticket)
        live.submit(chunk)
        columns, row = await live.answer(chunk, timeout)
        return live.signature.chunk_result(columns, row)

    async def stream(
        self, frames: Iterable[Any] | AsyncIterable[Any], *, window: int = WINDOW, timeout: float | None = None
    ) -> AsyncIterator[Any]:
        """The output of each step, in order, for frames that are each what `step` takes.

        At most `window` steps are sent ahead of the output that is yielded. An output of an asynchronous iterable is
        yielded as soon as it is there. A plain iterable is asked for its next frame first, until the window is full;
        for a live one use window=1.
        """
        live = self._live

        def chunk_of(frame: Any) -> Chunk:
            return live.signature.step(frame, live.new_ticket()).own()

        async for columns, row in pipelined(live, frames, chunk_of, window, timeout):
            yield live.signature.step_result(columns, row)

    async def info(self, *, timeout: float | None = None) -> SessionInfo:
        """The session as the server has it now."""
        return await self._live.connection.get_session(self.session_id, timeout, self._live.lane())

    async def get_states(self, *, timeout: float | None = None) -> list[Nest]:
        """The states behind the steps sent so far, each [batch_size, ...], nested as Keras nests them."""
        return await _states.get_states(self._live, timeout)

    async def set_states(self, states: Nest, *, timeout: float | None = None) -> None:
        """Puts the states to given values, as `reset_states` does."""
        await self._live.reset(states, timeout)

    @overload
    async def fork(self, *, timeout: float | None = None) -> Session: ...
    @overload
    async def fork(self, count: int, *, timeout: float | None = None) -> list[Session]: ...
    async def fork(self, count: int | None = None, *, timeout: float | None = None) -> Session | list[Session]:
        """A new session that goes on where this one is, behind the steps sent so far; or a list of `count`.

        They are made at one moment, all or none, and are open already; `async with` ends each.
        """
        made = [Session._of(live) for live in await _states.fork(self._live, 1 if count is None else count, timeout)]
        return made[0] if count is None else made

    async def rewind(self, step: int, *, timeout: float | None = None) -> None:
        """Takes the session back to `step`: to the states that the chunk had to start from that began there.

        That chunk must be among the last that the server remembers (16, unless it is told otherwise); else
        StepMismatch says which are. What is sent next starts at `step`, and what was sent before from there on is
        forgotten.
        """
        await _states.rewind(self._live, step, timeout)

    async def export(self, *, timeout: float | None = None) -> bytes:
        """The session, behind the steps sent so far, as a blob for `Client.restore`: a safetensors file."""
        return await _states.export(self._live, timeout)

    async def save(self, path: str | PathLike[str], *, timeout: float | None = None) -> None:
        """Writes what `export` gives to a file, which is there whole or not at all."""
        await _states.save(self._live, path, timeout)

    async def rollout(
        self,
        steps: int,
        x: Any = None,
        *,
        feedback: Mapping[str, str] | None = None,
        rule: str = "copy",
        temperature: float | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> Rollout:
        """Lets the model go on by itself for `steps` steps, each output becoming the next input.

        It starts from where the session is, behind the steps sent so far, and leaves the session as it is.

        Args:
            steps: how many.
            x: a chunk to take before, as for a call of the session; the output of its last step becomes the first
                input. None: the output of the session's last step does.
            feedback: which output becomes each input, by their names; None for a model with one of each.
            rule: "copy": as it is. "argmax", "sample" (of probabilities) or "sample_logits": a class among the K of an
                output [K], as its number or, where the input is [K], as 1 among zeros.
            temperature: below 1 the likely gets likelier, above 1 less so. Only where the rule samples.
            seed: the same seed gives the same samples.
            timeout: seconds that the call may take.
        """
        return await _states.rollout(self._live, steps, x, feedback, rule, temperature, seed, timeout)

    @classmethod
    def _of(cls, live: Live) -> Session:
        """An open session, which `async with` ends."""
        session = cls(None, ends=True)
        session._opened = live
        return session


class SessionGroup(_Entered, GroupFace):
    """Sessions of one kind that step together, made by `Client.session_group`.

    Where some of them fail, GroupError tells which, and has the result of the others.
    """

    async def step(self, x: Any, *, timeout: float | None = None) -> Any:
        """One time step of every session: arrays as for `Session.step`, with a leading axis of sessions."""
        live = self._live
        ticket = live.new_ticket()
        return await self._run(live.signature.step_all(x, len(self), ticket), timeout, step=True)

    async def __call__(self, x: Any, *, mask: Any = None, timeout: float | None = None) -> Any:
        """A chunk of every session: arrays as for `Session.__call__`, with a leading axis of sessions."""
        live = self._live
        ticket = live.new_ticket()
        return await self._run(live.signature.chunk_all(x, len(self), mask, ticket), timeout, step=False)

    async def get_states(self, *, timeout: float | None = None) -> list[Nest]:
        """The states behind the steps sent so far, each [sessions, batch_size, ...], nested as Keras nests them."""
        return await _group_states.get_states(self._live, timeout)

    async def set_states(self, states: Nest, *, timeout: float | None = None) -> None:
        """Puts the states to given values, each [sessions, batch_size, ...]; `reset_states` gives all the same."""
        await _group_states.set_states(self._live, states, timeout)

    async def fork(self, *, timeout: float | None = None) -> SessionGroup:
        """A new group, each session of which goes on where one of these is, behind the steps sent so far.

        All are made or none, and are open already; `async with` ends them.
        """
        group = SessionGroup(None, ends=True)
        group._opened = await _group_states.fork(self._live, timeout)
        return group

    async def rewind(self, step: int | Sequence[int], *, timeout: float | None = None) -> None:
        """Takes every session back to `step`, or each to its own: see `Session.rewind`."""
        await _group_states.rewind(self._live, step, timeout)

    async def export(self, *, timeout: float | None = None) -> list[bytes]:
        """Each session, behind the steps sent so far, as a blob: for `Client.restore_group`, or `Client.restore`."""
        return await _group_states.export(self._live, timeout)

    async def save(self, folder: str | PathLike[str], *, timeout: float | None = None) -> None:
        """Writes what `export` gives to a folder that is new or empty, a file for each session."""
        await _group_states.save(self._live, folder, timeout)

    async def rollout(
        self,
        steps: int,
        x: Any = None,
        *,
        feedback: Mapping[str, str] | None = None,
        rule: str = "copy",
        temperature: float | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> Rollout:
        """As `Session.rollout` for every session; `x` and what comes back have a leading axis of sessions.

        The n-th session's samples come from `seed` + n.
        """
        return await _group_states.rollout(self._live, steps, x, feedback, rule, temperature, seed, timeout)

    async def _run(self, chunk: Chunk, timeout: float | None, *, step: bool) -> Any:
        live = self._live
        live.submit(chunk)
        try:
            answer = await live.answer(chunk, timeout)
        except GroupError as error:
            answer = error
        return live.group_result(answer, step=step)


async def _leave(closing: Any, error: BaseException | None) -> None:
    """Closes at the end of a block, without hiding the error that ended it behind one of closing."""
    try:
        await closing
    except RequestError:
        if error is None:
            raise
