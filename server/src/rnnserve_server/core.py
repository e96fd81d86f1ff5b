"""The house without its doors: models, sessions and workers, and what a request may ask of them.

Knows nothing of gRPC. Lives on one event loop's thread.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import numpy as np
import structlog

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_models.options import LayerOptions
from rnnserve_server.blocks import Barrier, Block, Sink, Trace
from rnnserve_server.config import Settings
from rnnserve_server.deploy import Deployer
from rnnserve_server.errors import (
    Draining,
    InvalidRequest,
    OptionUnsupported,
    QueueFull,
    ServiceError,
    SessionAway,
    SessionsFull,
    StoreDown,
    TooLarge,
    step_mismatch,
)
from rnnserve_server.intake import Frame
from rnnserve_server.keeper import Keeper, session_bytes
from rnnserve_server.layout import (
    Signature,
    answer_bytes,
    check_call,
    check_states,
    faults,
    signature,
    timesteps,
    to_call,
)
from rnnserve_server.meter import Meter
from rnnserve_server.observer import Observer
from rnnserve_server.process import inline_seconds
from rnnserve_server.replay import Limits
from rnnserve_server.repository import Repository
from rnnserve_server.resets import NO_RULES, ResetRules, resets
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.sessions import Group, Session, SessionTable
from rnnserve_server.store import open_store
from rnnserve_server.store.base import Head
from rnnserve_server.store.observed import ObservedStore
from rnnserve_server.worker import Soon, Worker

if TYPE_CHECKING:
    from rnnserve_server.tracing import Tracing

log = structlog.get_logger(__name__)

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MAX_SIGNATURES = 1024  # a client may send chunks of any length
_LONGEST = 1e10  # seconds; a Duration holds more, and a clock less
_RETRY_AFTER = 0.1  # seconds; a tick takes milliseconds


Watch = Callable[[], Awaitable[None]]
"""Looks whether somebody has to be told of sessions that end."""


class Core:
    """Everything that a server does between decoding a request and encoding its answer.

    Attributes:
        observer: who is told of ticks, if anybody is.
        tracing: who traces requests, if anybody does.
        streams: streams that are open.
        streamed: streams that were opened.
        observed_store: the store, if it is timed.
        watches: who looks after sessions, about every second.
    """

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        observer: Observer | None = None,
        tracing: Tracing | None = None,
        soon: Soon | None = None,
    ) -> None:
        self.settings = settings
        self.repository = repository
        self.sessions = SessionTable(
            max_sessions=settings.max_sessions,
            max_state_bytes=settings.max_state_bytes,
            clock=clock,
            wall_clock=wall_clock,
        )
        self.clock = clock
        self.wall_clock = wall_clock
        self.observer = observer
        self.tracing = tracing
        self.observed_store: ObservedStore | None = None
        self.streams = 0
        self.streamed = 0
        self.keeper: Keeper | None = None
        self.draining = asyncio.Event()
        self.deployer = Deployer(settings, repository)
        self.watches: set[Watch] = set()
        self.meter = Meter() if settings.oip else None
        self._soon = soon
        self._workers: dict[tuple[str, str, str], Worker] = {}
        self._room = asyncio.Event()

    # Sessions

    async def create_sessions(
        self,
        model: str,
        version: str,
        batch_size: int,
        options: Mapping[str, bool],
        count: int = 1,
        *,
        initial_states: Arrays | None = None,
        idle_lifetime: float | None = None,
        lifetime: float | None = None,
        replay: Limits | None = None,
        rules: ResetRules = NO_RULES,
        session_ids: Sequence[str] = (),
        scope: str = "",
    ) -> tuple[Group, Array, SessionsFull | None]:
        """Makes sessions that are alike; see SessionConfig for the rules, and `SessionTable.create_many` for what is
        returned.

        Raises:
            ServiceError: as CreateSession says. None was made.
        """
        self.check_new(session_ids, scope)
        if idle_lifetime is not None and idle_lifetime <= 0:
            raise InvalidRequest("idle_lifetime", "a positive duration", f"{idle_lifetime} s")
        if lifetime is not None and not 0 < lifetime <= _LONGEST:
            raise InvalidRequest("lifetime", f"a positive duration of at most {_LONGEST:.0f} s", f"{lifetime} s")
        batch_size = batch_size or 1
        if batch_size > self.settings.max_batch_size:
            raise TooLarge("batch_size", self.settings.max_batch_size, batch_size)
        loaded = self.repository.get(model, version)
        resolved = resolve_options(loaded, options, stateful=True)
        _check_rules(loaded, rules)
        if initial_states:
            check_states(loaded.engine.states, initial_states, batch_size, "initial_states")
        await self.make_room(loaded, batch_size, count, rules)
        idle = self.settings.idle_lifetime if idle_lifetime is None else idle_lifetime
        return self.sessions.create_many(
            loaded,
            batch_size,
            resolved,
            count,
            initial_states=initial_states or None,
            idle_lifetime=min(idle, self.settings.max_idle_lifetime),
            lifetime=min(lifetime or math.inf, self.settings.max_lifetime or math.inf),
            replay=self._limits(replay),
            rules=rules,
            session_ids=session_ids,
            scope=scope,
            stored=await self.stored(scope),
        )

    async def stored(self, scope: str) -> int | None:
        """How many sessions a principal has in the store; None if nobody has to know, or there is no store.

        Raises:
            StoreDown: the store cannot be reached.
        """
        owners = self.sessions.owners
        return await self.keeper.count(scope) if self.keeper and owners and owners.limited(scope) else None

    def _limits(self, asked: Limits | None) -> Limits:
        """What a replay window may hold: what was asked for, and not more than the settings allow."""
        settings = self.settings
        if asked is None:
            return Limits(settings.replay_chunks, settings.replay_bytes)
        return Limits(min(asked.replies, settings.replay_chunks), min(asked.bytes, settings.replay_bytes))

    async def make_room(self, model: LoadedModel, batch_size: int, count: int, rules: ResetRules = NO_RULES) -> None:
        """Has sessions leave memory if N more would not fit: those that rest, if there is a store, else those that were
        not used for as long as the settings say.

        Raises:
            StoreDown: the store cannot be reached.
        """
        nbytes = session_bytes(model, batch_size, rules)
        if self.keeper is not None:
            await self.keeper.make_room(count, nbytes, self._line_up)
        elif self.settings.evict_idle_seconds:
            lacking = self.sessions.lacking(count, nbytes)
            if lacking > 0:
                for worker in self._workers.values():
                    worker.line_up()  # a session for which a chunk has come is in use
                if evicted := self.sessions.evict(lacking, self.settings.evict_idle_seconds):
                    log.warning("sessions made room for others", count=evicted)

    def check_new(self, session_ids: Sequence[str], scope: str = "") -> None:
        """Raises InvalidRequest for ids that no session can have, and Draining when no session can be made."""
        if self.draining.is_set():
            raise Draining("the server is shutting down; open the session elsewhere", retry_after=1.0)
        for session_id in session_ids:
            session_id = session_id.removeprefix(scope)
            if not _SESSION_ID.fullmatch(session_id):
                expected = "1 to 128 characters from A-Z a-z 0-9 . _ : -"
                raise InvalidRequest("session_id", expected, repr(session_id[:200]))

    def unload(self, name: str, version: str, end_sessions_after: float | None) -> list[str]:
        """Takes a version of a model, or all, from what is served, and returns which.

        Args:
            name: the model's name.
            version: the version; empty for all.
            end_sessions_after: seconds after which the sessions in memory that have it end; None: they go on.

        Raises:
            ServiceError: as UnloadModel says.
        """
        if end_sessions_after is not None and not 0 <= end_sessions_after <= _LONGEST:
            wanted = f"a duration of 0 to {_LONGEST:.0f} s"
            raise InvalidRequest("end_sessions_after", wanted, f"{end_sessions_after} s")
        models = [model for model in self.repository if model.name == name and version in ("", model.version)]
        gone = self.deployer.unload(name, version)
        for model in models if end_sessions_after is not None else ():
            assert end_sessions_after is not None
            if count := self.sessions.unload(model, end_sessions_after):
                log.info("sessions end with their model", model=name, version=model.version, count=count)
        return gone

    async def open_store(self) -> None:
        """Has sessions kept in the store that the settings name, if they name one.

        Raises:
            StoreError: it cannot be opened.
        """
        if self.settings.store:
            store = await open_store(
                self.settings.store,
                synchronous=self.settings.store_sync,
                inline_seconds=inline_seconds(self.settings.inline_seconds),
            )
            if self.observer is not None:
                span = nullcontext if self.tracing is None else self.tracing.store_span
                store = self.observed_store = ObservedStore(store, self.clock, span)
            self.keeper = Keeper(
                store,
                self.settings.durability,
                self.sessions,
                self.repository,
                clock=self.clock,
                wall_clock=self.wall_clock,
            )

    async def keep(self, group: Group, slots: Array) -> Array:
        """Has new sessions kept in the store, if there is one: bool [N], whose ids were free.

        Raises:
            StoreDown: the store cannot be reached. The sessions are gone.
        """
        if self.keeper is None or not len(slots):
            return np.ones(len(slots), np.bool_)
        generations = group.generation[slots]
        try:
            made = np.array(await self.keeper.create(group, slots))
        except BaseException:  # cancelled too: if they were stored, they are found there
            self.sessions.forget(group, slots[group.generation[slots] == generations])
            raise
        alive = group.generation[slots] == generations  # the others were deleted meanwhile: an id may be known
        self.sessions.forget(group, slots[~made & alive])
        kept: Array = made & alive
        return kept

    async def attach(self, ids: Sequence[str], *, sure: bool = False) -> dict[str, ServiceError]:
        """Brings sessions into memory that are in the store, if there is one, and takes them over.

        Args:
            ids: the sessions.
            sure: look at those that are in memory too, whether they are still this server's.

        Returns:
            Why it could not, by id.

        Raises:
            StoreDown: the store cannot be reached.
            Draining: the server is shutting down.
        """
        if self.keeper is not None and sure:
            await self.keeper.verify(ids)
        if self.keeper is None or all(self.sessions.is_stored(each) for each in ids):
            return {}
        if self.draining.is_set():
            raise Draining("the server is shutting down; open the session elsewhere", retry_after=1.0)
        return await self.keeper.attach(ids, self._line_up)

    async def session(self, session_id: str, *, sure: bool = False) -> Session:
        """Finds a session, in memory or in the store. Arguments as `attach`.

        Raises:
            ServiceError: there is none, or it cannot be had; and why.
        """
        if error := (await self.attach([session_id], sure=sure)).get(session_id):
            raise error
        return self.sessions.get(session_id)

    async def show(self, session_id: str) -> Session | Head:
        """Looks at a session, in memory or in the store, without using it.

        Raises:
            ServiceError: there is none, and why.
        """
        if self.keeper is not None:
            with suppress(StoreDown):
                await self.keeper.verify([session_id])
        if self.keeper is None or self.sessions.is_stored(session_id):
            return self.sessions.get(session_id)
        return await self.keeper.peek(session_id)

    async def save_all(self) -> None:
        """Has the store keep what is in memory and not stored, if there is one.

        Raises:
            StoreDown: the store cannot be reached.
        """
        if self.keeper is not None:
            await self.keeper.save_all()

    async def delete_session(self, session_id: str) -> None:
        """Ends a session; see DeleteSession for the rules."""
        await self.session(session_id, sure=True)
        self.sessions.delete(session_id)
        await self.settle()

    async def settle(self) -> None:
        """Has the store know which sessions have ended here.

        Raises:
            StoreDown: the store cannot be reached; it is told later.
        """
        if self.keeper is not None:
            await self.keeper.settle()

    async def reset_session(self, session_id: str, states: Arrays | None, step: int | None) -> Session:
        """Resets a session's states when its turn has come; see ResetSession for the rules."""
        session = await self.session(session_id, sure=True)
        if states:
            check_states(session.group.model.engine.states, states, session.group.batch_size, "states")
        async with self.turn(session):
            if step is not None and step != session.step:
                raise step_mismatch(session.step, step)
            self.sessions.reset(session, states or None)
            await self.save(session)
        return session

    @asynccontextmanager
    async def turn(self, session: Session) -> AsyncIterator[None]:
        """Waits for the chunks of a session that came before, and has those that come later wait.

        Raises:
            SessionError: it has ended meanwhile.
        """
        async with self.worker(session.group.model).turn(session.group, session.slot):
            self.check_alive(session)
            yield

    def check_alive(self, session: Session) -> None:
        """Raises SessionError if a session has ended meanwhile."""
        if not session.live:
            raise self.sessions.gone(session.group, session.id)

    async def save(self, session: Session) -> None:
        """Has the store keep what a session's turn has changed.

        Raises:
            StoreDown: the store cannot be reached. The session is as it is stored.
            SessionError: the session is not ours any more. Nothing was stored.
        """
        if self.keeper is None or self.keeper.durability != "step":
            return
        slots = np.array([session.slot])
        try:
            await self.keeper.save(session.group, slots)
        except StoreDown:
            self.check_alive(session)
            self.sessions.lose(session.group, slots, SessionAway)
            raise
        self.check_alive(session)

    def when_idle(self, group: Group, slot: int, action: Callable[[], None]) -> None:
        """Does something once the chunks queued for a session so far are done: now, if there are none."""
        self.worker(group.model).submit(Barrier(group, slot, action))

    # Work

    def submit_frame(self, frame: Frame) -> int:
        """Queues a frame of chunks. Those that hold what the model forbids are told so when their turn comes.

        Returns:
            Bytes of the answers, if all chunks succeed.

        Raises:
            ServiceError: the inputs or the mask do not fit; nothing was queued.
        """
        group = frame.sessions.group
        key, nbytes = self.fit(group, len(frame.tags), frame.inputs, frame.mask)
        self.take_in(frame, key)
        return nbytes

    def fit(self, group: Group, chunks: int, inputs: Arrays, mask: Array | None) -> tuple[Signature, int]:
        """Checks that N chunks fit sessions of a group. Whether they do depends on N and their signature alone.

        Args:
            group: the sessions' group.
            chunks: N.
            inputs: as `Frame` has them.
            mask: as `Frame` has it.

        Returns:
            The signature; and bytes of the answers, if all chunks succeed.

        Raises:
            ServiceError: the inputs or the mask do not fit.
        """
        key = signature(inputs, mask)
        nbytes = group.fitting.get(key)
        if nbytes is None:
            _check_mask(group.model, mask)
            check_call(group.model.engine, group.options, inputs, mask, batch_size=group.batch_size)
            steps = timesteps(group.options, inputs)
            if len(group.fitting) >= _MAX_SIGNATURES:
                group.fitting.clear()
            nbytes = group.fitting[key] = self._check_steps(group.model, group.options, group.batch_size, steps)
        nbytes *= chunks
        if nbytes > self.settings.max_answer_bytes:
            raise TooLarge("bytes of the answers to a frame", self.settings.max_answer_bytes, nbytes)
        return key, nbytes

    def take_in(self, frame: Frame, key: Signature) -> None:
        """Queues a frame of chunks that `fit` found to fit, as `submit_frame` does."""
        self.worker(frame.sessions.group.model).take_in(frame, key)

    def submit_call(
        self,
        model: LoadedModel,
        options: LayerOptions,
        inputs: Mapping[str, Array],
        mask: Array | None,
        initial_states: Arrays | None,
        sink: Sink,
        trace: Trace | None = None,
        *,
        rules: ResetRules = NO_RULES,
        first_step: int = 0,
    ) -> None:
        """Queues one call without a session.

        Args:
            model: the model.
            options: the options of the layer.
            inputs: every input, [batch, time, *shape] ([time, batch, *shape] with time_major).
            mask: bool, [batch, time] or [1, time] (likewise), or None.
            initial_states: every state, [batch, *shape]; None or empty for the model's default.
            sink: where results go.
            trace: what whoever traces knows it by; None if nobody does.
            rules: when states are reset by themselves, but for masked steps: nothing is known of those before.
            first_step: the number of the first step, for these rules.

        Raises:
            ServiceError: the inputs, the mask or the states do not fit; nothing was queued.
        """
        _check_mask(model, mask)
        inputs = {name: x[None] for name, x in inputs.items()}  # [1, batch, time, ...]
        mask = None if mask is None else mask[None]
        check_call(model.engine, options, inputs, mask, batch_size=None)
        call = to_call(model.engine, options, inputs, mask)
        rows = len(call.lengths)
        self._check_steps(model, options, rows, timesteps(options, inputs))
        if rows > self.settings.max_batch_size:
            raise TooLarge("batch size", self.settings.max_batch_size, rows)
        for fault in faults(model.engine.inputs, call, rows).values():
            raise fault
        if initial_states:
            check_states(model.engine.states, initial_states, rows, "initial_states")
        states = initial_states or {spec.name: spec.initial(rows) for spec in model.engine.states}
        block = Block(call, rows, options, [(sink, 1)], np.zeros(1, np.int64), states=states)
        if trace is not None:
            block.traces = [trace]
        if rules.every_steps:
            block.resets = resets(ResetRules(rules.every_steps), call, np.array([first_step], np.uint64), {})
        self.worker(model).submit(block)

    def _check_steps(self, model: LoadedModel, options: LayerOptions, rows: int, steps: int) -> int:
        """Bytes of the answer to a chunk of so many rows and time steps.

        Raises:
            TooLarge: they are more than they may, or the steps are.
        """
        if steps > self.settings.max_chunk_steps:
            raise TooLarge("time steps of a chunk", self.settings.max_chunk_steps, steps)
        nbytes = rows * answer_bytes(model.engine, options, steps)
        if nbytes > self.settings.max_answer_bytes:
            raise TooLarge("bytes of the answer", self.settings.max_answer_bytes, nbytes)
        return nbytes

    def worker(self, model: LoadedModel) -> Worker:
        """The worker of a model version."""
        key = (model.name, model.version, model.digest)
        if key not in self._workers:
            self._workers[key] = Worker(
                model,
                Scheduler(self.settings.max_batch_rows, self.settings.slice_steps, whole=model.engine.whole),
                self.sessions,
                clock=self.clock,
                on_progress=self._room.set,
                inline_seconds=inline_seconds(self.settings.inline_seconds),
                keeper=self.keeper,
                meter=self.meter,
                observer=self.observer,
                soon=self._soon,
            )
        return self._workers[key]

    @property
    def workers(self) -> list[Worker]:
        """Those that there are."""
        return list(self._workers.values())

    def _line_up(self, group: Group) -> None:
        """Has sessions for which work has come show as busy."""
        self.worker(group.model).line_up()

    # Flow

    @property
    def queued_bytes(self) -> int:
        """Bytes of input that wait or run, of all models."""
        return sum([worker.queued_bytes for worker in self._workers.values()])

    @property
    def has_room(self) -> bool:
        """Whether less work is waiting than may."""
        return self.queued_bytes < self.settings.queue_bytes

    def check_room(self) -> None:
        """Raises QueueFull when as much work is waiting as may."""
        if not self.has_room:
            raise QueueFull(
                f"{self.queued_bytes} bytes of input are waiting, as many as may; try again shortly",
                retry_after=_RETRY_AFTER,
            )

    async def wait_for_room(self) -> None:
        """Waits until less work is waiting than may."""
        while not self.has_room:
            self._room.clear()
            await self._room.wait()

    async def sweep(self) -> int:
        """Ends the sessions whose lifetime has run out, gives back memory that none needs, and ends the workers that
        nothing needs any more: a little at a time, so that no step waits for it.

        Returns:
            The number of sessions ended.
        """
        for worker in self._workers.values():
            worker.line_up()  # a session for which a chunk has come is in use
        expired, more = 0, True
        while more:
            expired += len(self.sessions.expire())
            more = self.sessions.overdue() or self.sessions.trim()
            await asyncio.sleep(0)
        for group in self.sessions.groups():
            looking = group.window.forget_ended(group)
            while looking:
                await asyncio.sleep(0)
                looking = group.window.look_on(group)
        self.sessions.trim_replays(self.settings.max_replay_bytes)
        for watch in list(self.watches):
            await watch()
            await asyncio.sleep(0)
        if self.keeper is not None:
            await self.keeper.sweep()
            await self.keeper.rest(self.settings.rest_seconds, self._line_up)
        for key, worker in list(self._workers.items()):
            if worker.idle and worker.model not in self.repository and not self.sessions.uses(worker.model):
                del self._workers[key]
                worker.shutdown()
        return expired

    async def close(self) -> None:
        """Finishes what is queued and ends the workers."""
        for worker in self._workers.values():
            await worker.close()
        if self.keeper is not None:
            await self.keeper.close()


def resolve_options(model: LoadedModel, asked: Mapping[str, bool], *, stateful: bool) -> LayerOptions:
    """The options of a call or session: what was asked for, else the model's defaults.

    Args:
        model: the model.
        asked: the options that the client set.
        stateful: whether there is a session.

    Raises:
        InvalidRequest: ``stateful`` was asked for otherwise.
        OptionUnsupported: the model cannot honour one.
    """
    if asked.get("stateful", stateful) != stateful:
        hint = "a session is always stateful" if stateful else "to keep state between calls, make a session"
        raise InvalidRequest("options.stateful", str(stateful).lower(), str(not stateful).lower(), hint)
    options = {**vars(model.spec.default_options), "stateful": stateful}
    for name, value in asked.items():
        if value != options[name] and name not in model.spec.settable_options:
            raise OptionUnsupported(
                f"options.{name}: model {model.name!r} cannot honour {str(value).lower()}; "
                f"it can be asked for {[*model.spec.settable_options]}",
                metadata={"field": f"options.{name}", "expected": str(options[name]), "got": str(value)},
            )
        options[name] = value
    return LayerOptions(**options)


def _check_rules(model: LoadedModel, rules: ResetRules) -> None:
    if rules != NO_RULES and model.engine.whole:
        raise OptionUnsupported(
            f"reset_rules: model {model.name!r} computes each chunk whole, so its states cannot be reset within one; "
            "reset the session between chunks",
            metadata={"field": "reset_rules", "expected": "none", "got": str(rules)},
        )


def _check_mask(model: LoadedModel, mask: Array | None) -> None:
    if mask is not None and not model.spec.masking:
        raise OptionUnsupported(
            f"mask: model {model.name!r} takes no mask",
            metadata={"field": "mask", "expected": "no mask", "got": "a mask"},
        )
