"""The client for threads; `rnnserve.aio.Client` is the same for asyncio.

    with rnnserve.Client("localhost:50051") as client:
        rnn = client.RNN("lstm-32-64", return_sequences=True)
        y = rnn(x)
        with client.session("silero-vad") as vad:
            for probability in vad.stream(frames):
                ...

Every method may be called from any thread. One client has one stream to the server, run by one background thread;
what several threads ask for at the same time leaves in one message.

Arrays that come back are read-only views of what arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from rnnserve._notices import NoticeThread, OnNotice
from rnnserve._pipeline import WINDOW, check_window
from rnnserve._portal import Portal
from rnnserve._retry import RETRY_FOR
from rnnserve._states import Rollout
from rnnserve._tickets import Ticket
from rnnserve.errors import GroupError, RequestError, RnnserveError
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
        on_notice: called with each `Notice` of the server: that a session is about to end, or has. Runs on a thread of
            its own, one call after the other, and may use the client.
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
        notices = None if on_notice is None else NoticeThread(on_notice)
        self._connection = Connection(
            target,
            timeout,
            credentials,
            options,
            retry_for,
            replay_bytes,
            notices,
            tls=tls,
            token=token,
            streams=streams,
        )
        self._notices = notices
        self._portal = Portal()
        self._connection.collect = self._portal.collect
        self.models = Models(self._portal, Catalogue(self._connection))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and joins its thread. Sessions that were not closed live on until they expire."""
        self._portal.close(self._connection.close())
        if self._notices is not None:
            self._notices.close()

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
        for the sessions of a stateful layer, as for `session`. Raises ModelNotFound for a model that the server does
        not have.
        """
        options = LayerOptions(
            return_sequences, return_state, go_backwards, stateful, unroll, time_major, zero_output_for_mask
        )
        terms = Terms(idle_lifetime, lifetime, replay_window, reset_every, reset_after_masked)
        layer = Layer(self._connection, model, version, options, terms)
        self._portal.run(layer.build())
        return RNN(self._portal, layer)

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
        """A new session; leaving its `with` block ends it.

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
        live = self._portal.run(Live.create(self._connection, wish, timeout))
        return Session(self._portal, live, ends=True)

    def attach(self, session_id: str, *, timeout: float | None = None) -> Session:
        """A session that is alive on the server; leaving its `with` block leaves it alive."""
        return Session(self._portal, self._portal.run(Live.attach(self._connection, session_id, timeout)), ends=False)

    def restore(
        self, source: str | PathLike[str] | bytes, *, session_id: str = "", timeout: float | None = None
    ) -> Session:
        """A new session that goes on where a saved one was; leaving its `with` block ends it.

        `source` is the path that `Session.save` was given, or what `Session.export` gave, on this server or another.

        Raises:
            BlobInvalid: it is no saved session, or is damaged.
            ModelNotFound, ModelChanged: the server has no such model, or another of that name and version.
        """
        live = self._portal.run(_states.restore(self._connection, source, session_id, timeout))
        return Session(self._portal, live, ends=True)

    def restore_group(
        self, source: str | PathLike[str] | Sequence[bytes], *, timeout: float | None = None
    ) -> SessionGroup:
        """A new group, each session of which goes on where a saved one was; leaving its `with` block ends it.

        `source` is the folder that `SessionGroup.save` was given, or what `SessionGroup.export` gave.

        Raises:
            GroupError: some of them cannot be restored; none is made.
            InvalidInput: they are of several kinds.
        """
        live = self._portal.run(_group_states.restore(self._connection, source, timeout))
        return SessionGroup(self._portal, live, ends=True)

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
        """`count` new sessions of one kind that step together; leaving the `with` block ends them.

        They are opened in one message, and a step of all of them is one frame. Arguments are those of `session`, the
        same for each.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        terms = Terms(idle_lifetime, lifetime, replay_window, reset_every, reset_after_masked)
        wish = Wish(model, version, batch_size, initial_state, "", given_options(options), terms)
        live = self._portal.run(Live.create(self._connection, wish, timeout, count=count, group=True))
        return SessionGroup(self._portal, live, ends=True)

    def model(self, name: str, *, version: str = "", timeout: float | None = None) -> Model:
        """One version of one model; the newest if none is named."""
        return self._portal.run(self._connection.newest(name, version, timeout))

    def sessions(self, *, model: str = "", timeout: float | None = None) -> Iterator[SessionInfo]:
        """The live sessions, oldest first; of one model, if named. Fetched a page at a time."""
        token = ""
        while True:
            page, token = self._portal.run(self._connection.sessions_page(model, token, timeout))
            yield from page
            if not token:
                return

    def health(self, *, timeout: float | None = None) -> bool:
        """Whether the server says that it serves. False too when it cannot be reached."""
        return self._portal.run(self._connection.health(timeout))


class Models:
    """The models of the server, made by `Client.models`: called to list them, and changed where the server allows it.

    Changing raises DeployDisabled unless the server was started with `--allow-deploy`.
    """

    def __init__(self, portal: Portal, catalogue: Catalogue) -> None:
        self._portal = portal
        self._catalogue = catalogue

    def __call__(self, *, timeout: float | None = None) -> list[Model]:
        """What the server hosts, by name, the newest version of each first."""
        return self._portal.run(self._catalogue.listed(timeout))

    def deploy(
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
        return self._portal.run(self._catalogue.deploy(name, config, weights, version, keras_version, timeout))

    def deploy_file(
        self, name: str, path: str | PathLike[str], *, version: str = "", timeout: float | None = None
    ) -> Model:
        """Adds a version of a model from a .keras, .h5, .onnx or .safetensors (PyTorch) file. Raises as `deploy`."""
        return self._portal.run(self._catalogue.deploy_file(name, path, version, timeout))

    def unload(
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
        return self._portal.run(self._catalogue.unload(name, version, end_sessions_after, timeout))

    def reload(self, name: str, *, timeout: float | None = None) -> list[Model]:
        """Loads the versions that are in the server's folder now, and returns what is served."""
        return self._portal.run(self._catalogue.reload(name, timeout))


class RNN(LayerFace):
    """A recurrent layer, called as Keras calls one; made by `Client.RNN`.

    With stateful=True the state stays on the server, in a session that is made by the first call and has that call's
    batch size from then on; a `with` block or `close` ends it.

    A call that raises is as if it had not been, even if it was not answered: what it may have moved is put back before
    the next one. Not so for a model that cannot show its states: there it keeps its place, as a session's step does.
    """

    def __init__(self, portal: Portal, layer: Layer) -> None:
        self._portal = portal
        self._layer = layer

    def __call__(self, x: Any, *, mask: Any = None, initial_state: Nest = None, timeout: float | None = None) -> Any:
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
        return self._portal.run(self._layer.call(x, mask, initial_state, timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(self.close, error)

    def reset_states(self, states: Nest = None, *, timeout: float | None = None) -> None:
        """Puts the recorded states to zeros (the model's default, if it has another) or to given values.

        AttributeError when the layer is not stateful, as in Keras.
        """
        self._portal.run(self._layer.reset_states(states, timeout))

    reset_state = reset_states

    def close(self) -> None:
        """Ends the session of a stateful layer."""
        self._portal.run(self._layer.close())


class _Entered(LiveFace):
    """What sessions and groups share."""

    def __init__(self, portal: Portal, live: Live, *, ends: bool) -> None:
        self._portal = portal
        self._opened = live
        self._ends = ends

    @property
    def _live(self) -> Live:
        return self._opened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(self.close if self._ends else self.detach, error)

    def close(self, *, timeout: float | None = None) -> None:
        """Ends it on the server, behind the steps sent so far."""
        self._portal.run(self._live.close(delete=True, limit=timeout))

    def detach(self, *, timeout: float | None = None) -> None:
        """Leaves it alive on the server, for `Client.attach`."""
        self._portal.run(self._live.close(delete=False, limit=timeout))

    def reset_states(self, states: Nest = None, *, timeout: float | None = None) -> None:
        """Puts the states to the model's default or to given values, behind the steps sent so far.

        The values are nested as Keras nests them, each [batch_size, ...]. The step number does not change.
        """
        self._portal.run(self._live.reset(states, timeout))

    def _run(self, chunk: Chunk, timeout: float | None) -> Any:
        try:
            self._portal.submit(self._live, chunk)
            return self._wait(chunk, timeout)
        except BaseException:
            chunk.ticket.leave()
            raise

    def _wait(self, chunk: Chunk, timeout: float | None) -> Any:
        seconds = self._live.connection.seconds(timeout)
        try:
            return chunk.ticket.result(seconds)
        except RnnserveError:
            raise
        except TimeoutError:
            assert seconds is not None
            raise self._live.late(chunk, seconds, taken=self._give_up(chunk)) from None
        except BaseException:  # the thread was interrupted
            self._give_up(chunk)
            raise

    def _give_up(self, chunk: Chunk) -> bool:
        """Gives up the answer to a chunk, before the caller writes to its arrays; whether the chunk keeps its place."""
        chunk.own()
        return self._portal.abandon(self._live, chunk)


class Session(_Entered, SessionFace):
    """A stateful layer on the server, made by `Client.session` or `Client.attach`.

    A step that fails leaves the session as it was; the steps that were sent behind it fail with StepMismatch. A step
    that is given up, because it is cancelled or because it raises DeadlineExceeded or Unavailable, keeps its place: it
    is applied once, before any later one, and only its output is lost. What is said of lost connections at the client
    holds.
    """

    def step(self, x: Any, *, timeout: float | None = None) -> Any:
        """One time step.

        `x` is [*features] for a batch size of 1 and the output [*shape], a NumPy scalar if that is empty; otherwise
        they are [batch, *features] and [batch, *shape]. With return_state a list of the output and the states, each
        [batch, ...]. Several inputs or outputs are mappings by name.
        """
        signature = self._live.signature
        columns, row = self._run(signature.step(x, Ticket()), timeout)
        return signature.step_result(columns, row)

    def __call__(self, x: Any, *, mask: Any = None, timeout: float | None = None) -> Any:
        """A chunk of time steps: arrays and results as for `RNN.__call__`."""
        signature = self._live.signature
        columns, row = self._run(signature.chunk(x, mask, Ticket()), timeout)
        return signature.chunk_result(columns, row)

    def stream(self, frames: Iterable[Any], *, window: int = WINDOW, timeout: float | None = None) -> Iterator[Any]:
        """The output of each step, in order, for frames that are each what `step` takes.

        At most `window` steps are sent ahead of the output that is yielded, so the next frame is asked for before the
        output of the last one is there; for a live source use window=1. What is left unanswered when the caller stops
        early is given up: it is applied, and its outputs are lost.
        """
        check_window(window)
        signature = self._live.signature
        sent: deque[Chunk] = deque()
        try:
            for frame in frames:
                chunk = signature.step(frame, Ticket(waited=False)).own()
                self._portal.submit(self._live, chunk)
                sent.append(chunk)
                while sent and (len(sent) >= window or sent[0].ticket.done() or self._live.full):
                    yield signature.step_result(*self._wait(sent.popleft(), timeout))
            while sent:
                yield signature.step_result(*self._wait(sent.popleft(), timeout))
        finally:
            for chunk in sent:
                self._portal.forget(self._live, chunk)

    def info(self, *, timeout: float | None = None) -> SessionInfo:
        """The session as the server has it now."""
        return self._portal.run(self._live.connection.get_session(self.session_id, timeout, self._live.lane()))

    @property
    def states(self) -> list[Nest]:
        """The states, each [batch_size, ...], nested as Keras nests them: fetched when asked for, and may be set."""
        return self.get_states()

    @states.setter
    def states(self, states: Nest) -> None:
        self.set_states(states)

    def get_states(self, *, timeout: float | None = None) -> list[Nest]:
        """The states behind the steps sent so far, each [batch_size, ...], nested as Keras nests them."""
        return self._portal.run(_states.get_states(self._live, timeout))

    def set_states(self, states: Nest, *, timeout: float | None = None) -> None:
        """Puts the states to given values, as `reset_states` does."""
        self._portal.run(self._live.reset(states, timeout))

    @overload
    def fork(self, *, timeout: float | None = None) -> Session: ...
    @overload
    def fork(self, count: int, *, timeout: float | None = None) -> list[Session]: ...
    def fork(self, count: int | None = None, *, timeout: float | None = None) -> Session | list[Session]:
        """A new session that goes on where this one is, behind the steps sent so far; or a list of `count`.

        They are made at one moment, all or none; leaving the `with` block of one ends it.
        """
        lives = self._portal.run(_states.fork(self._live, 1 if count is None else count, timeout))
        made = [Session(self._portal, live, ends=True) for live in lives]
        return made[0] if count is None else made

    def rewind(self, step: int, *, timeout: float | None = None) -> None:
        """Takes the session back to `step`: to the states that the chunk had to start from that began there.

        That chunk must be among the last that the server remembers (16, unless it is told otherwise); else
        StepMismatch says which are. What is sent next starts at `step`, and what was sent before from there on is
        forgotten.
        """
        self._portal.run(_states.rewind(self._live, step, timeout))

    def export(self, *, timeout: float | None = None) -> bytes:
        """The session, behind the steps sent so far, as a blob for `Client.restore`: a safetensors file."""
        return self._portal.run(_states.export(self._live, timeout))

    def save(self, path: str | PathLike[str], *, timeout: float | None = None) -> None:
        """Writes what `export` gives to a file, which is there whole or not at all."""
        self._portal.run(_states.save(self._live, path, timeout))

    def rollout(
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
        return self._portal.run(_states.rollout(self._live, steps, x, feedback, rule, temperature, seed, timeout))


class SessionGroup(_Entered, GroupFace):
    """Sessions of one kind that step together, made by `Client.session_group`.

    Where some of them fail, GroupError tells which, and has the result of the others.
    """

    def step(self, x: Any, *, timeout: float | None = None) -> Any:
        """One time step of every session: arrays as for `Session.step`, with a leading axis of sessions."""
        return self._group(self._live.signature.step_all(x, len(self), Ticket()), timeout, step=True)

    def __call__(self, x: Any, *, mask: Any = None, timeout: float | None = None) -> Any:
        """A chunk of every session: arrays as for `Session.__call__`, with a leading axis of sessions."""
        return self._group(self._live.signature.chunk_all(x, len(self), mask, Ticket()), timeout, step=False)

    @property
    def states(self) -> list[Nest]:
        """The states, each [sessions, batch_size, ...], nested as Keras nests them: fetched when asked for, and may be
        set."""
        return self.get_states()

    @states.setter
    def states(self, states: Nest) -> None:
        self.set_states(states)

    def get_states(self, *, timeout: float | None = None) -> list[Nest]:
        """The states behind the steps sent so far, each [sessions, batch_size, ...], nested as Keras nests them."""
        return self._portal.run(_group_states.get_states(self._live, timeout))

    def set_states(self, states: Nest, *, timeout: float | None = None) -> None:
        """Puts the states to given values, each [sessions, batch_size, ...]; `reset_states` gives all the same."""
        self._portal.run(_group_states.set_states(self._live, states, timeout))

    def fork(self, *, timeout: float | None = None) -> SessionGroup:
        """A new group, each session of which goes on where one of these is, behind the steps sent so far.

        All are made or none; leaving the `with` block of the group ends them.
        """
        live = self._portal.run(_group_states.fork(self._live, timeout))
        return SessionGroup(self._portal, live, ends=True)

    def rewind(self, step: int | Sequence[int], *, timeout: float | None = None) -> None:
        """Takes every session back to `step`, or each to its own: see `Session.rewind`."""
        self._portal.run(_group_states.rewind(self._live, step, timeout))

    def export(self, *, timeout: float | None = None) -> list[bytes]:
        """Each session, behind the steps sent so far, as a blob: for `Client.restore_group`, or `Client.restore`."""
        return self._portal.run(_group_states.export(self._live, timeout))

    def save(self, folder: str | PathLike[str], *, timeout: float | None = None) -> None:
        """Writes what `export` gives to a folder that is new or empty, a file for each session."""
        self._portal.run(_group_states.save(self._live, folder, timeout))

    def rollout(
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
        return self._portal.run(_group_states.rollout(self._live, steps, x, feedback, rule, temperature, seed, timeout))

    def _group(self, chunk: Chunk, timeout: float | None, *, step: bool) -> Any:
        try:
            answer = self._run(chunk, timeout)
        except GroupError as error:
            answer = error
        return self._live.group_result(answer, step=step)


def _leave(close: Any, error: BaseException | None) -> None:
    """Closes at the end of a block, without hiding the error that ended it behind one of closing."""
    try:
        close()
    except RequestError:
        if error is None:
            raise
