"""The house without its doors: models, sessions and workers, and what a request may ask of them.

Knows nothing of gRPC. Lives on one event loop's thread.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_models.options import LayerOptions
from rnnserve_server.blocks import Barrier, Block, Sink
from rnnserve_server.config import Settings
from rnnserve_server.deploy import Deployer
from rnnserve_server.errors import (
    Draining,
    InvalidRequest,
    OptionUnsupported,
    QueueFull,
    ServiceError,
    SessionAway,
    SessionClosed,
    SessionsFull,
    StoreDown,
    TooLarge,
    step_mismatch,
)
from rnnserve_server.intake import Frame
from rnnserve_server.keeper import Keeper, session_bytes
from rnnserve_server.layout import check_call, check_states, faults, signature, to_call
from rnnserve_server.replay import Limits
from rnnserve_server.repository import Repository
from rnnserve_server.scheduler import Scheduler
from rnnserve_server.sessions import Group, Session, SessionTable
from rnnserve_server.store import open_store
from rnnserve_server.store.base import Head
from rnnserve_server.worker import Worker

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MAX_SIGNATURES = 1024  # a client may send chunks of any length
_LONGEST = 1e10  # seconds; a Duration holds more, and a clock less
_RETRY_AFTER = 0.1  # seconds; a tick takes milliseconds


class Core:
    """Everything that a server does between decoding a request and encoding its answer."""

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
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
        self.keeper: Keeper | None = None
        self.draining = asyncio.Event()
        self.deployer = Deployer(settings, repository)
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
        session_ids: Sequence[str] = (),
    ) -> tuple[Group, Array, SessionsFull | None]:
        """Makes sessions that are alike; see SessionConfig for the rules, and `SessionTable.create_many` for what is
        returned.

        Raises:
            ServiceError: as CreateSession says. None was made.
        """
        self.check_new(session_ids)
        if idle_lifetime is not None and idle_lifetime <= 0:
            raise InvalidRequest("idle_lifetime", "a positive duration", f"{idle_lifetime} s")
        if lifetime is not None and not 0 < lifetime <= _LONGEST:
            raise InvalidRequest("lifetime", f"a positive duration of at most {_LONGEST:.0f} s", f"{lifetime} s")
        batch_size = batch_size or 1
        if batch_size > self.settings.max_batch_size:
            raise TooLarge("batch_size", self.settings.max_batch_size, batch_size)
        loaded = self.repository.get(model, version)
        resolved = resolve_options(loaded, options, stateful=True)
        if initial_states:
            check_states(loaded.engine.states, initial_states, batch_size, "initial_states")
        await self.make_room(loaded, batch_size, count)
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
            session_ids=session_ids,
        )

    def _limits(self, asked: Limits | None) -> Limits:
        """What a replay window may hold: what was asked for, and not more than the settings allow."""
        settings = self.settings
        if asked is None:
            return Limits(settings.replay_chunks, settings.replay_bytes)
        return Limits(min(asked.replies, settings.replay_chunks), min(asked.bytes, settings.replay_bytes))

    async def make_room(self, model: LoadedModel, batch_size: int, count: int) -> None:
        """Has sessions that rest leave memory, if there is a store and N more would not fit.

        Raises:
            StoreDown: the store cannot be reached.
        """
        if self.keeper is not None:
            await self.keeper.make_room(count, session_bytes(model, batch_size), self._line_up)

    def check_new(self, session_ids: Sequence[str]) -> None:
        """Raises InvalidRequest for ids that no session can have, and Draining when no session can be made."""
        if self.draining.is_set():
            raise Draining("the server is shutting down; open the session elsewhere", retry_after=1.0)
        for session_id in session_ids:
            if not _SESSION_ID.fullmatch(session_id):
                expected = "1 to 128 characters from A-Z a-z 0-9 . _ : -"
                raise InvalidRequest("session_id", expected, repr(session_id[:200]))

    async def open_store(self) -> None:
        """Has sessions kept in the store that the settings name, if they name one.

        Raises:
            StoreError: it cannot be opened.
        """
        if self.settings.store:
            store = await open_store(self.settings.store)
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
        if self.keeper is None or session_id in self.sessions:
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
        if self.sessions.get(session.id) != session:  # and the id was used again
            raise SessionClosed(session.id)

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

    def submit_frame(self, frame: Frame) -> None:
        """Queues a frame of chunks. Those that hold what the model forbids are told so when their turn comes.

        Raises:
            ServiceError: the inputs or the mask do not fit; nothing was queued.
        """
        group = frame.sessions.group
        key = signature(frame.inputs, frame.mask)
        if key not in group.fitting:
            _check_mask(group.model, frame.mask)
            check_call(group.model.engine, group.options, frame.inputs, frame.mask, batch_size=group.batch_size)
            if len(group.fitting) >= _MAX_SIGNATURES:
                group.fitting.clear()
            group.fitting.add(key)
        self.worker(group.model).take_in(frame, key)

    def submit_call(
        self,
        model: LoadedModel,
        options: LayerOptions,
        inputs: Mapping[str, Array],
        mask: Array | None,
        initial_states: Arrays | None,
        sink: Sink,
    ) -> None:
        """Queues one call without a session.

        Args:
            model: the model.
            options: the options of the layer.
            inputs: every input, [batch, time, *shape] ([time, batch, *shape] with time_major).
            mask: bool, [batch, time] or [1, time] (likewise), or None.
            initial_states: every state, [batch, *shape]; None or empty for the model's default.
            sink: where results go.

        Raises:
            ServiceError: the inputs, the mask or the states do not fit; nothing was queued.
        """
        _check_mask(model, mask)
        inputs = {name: x[None] for name, x in inputs.items()}  # [1, batch, time, ...]
        mask = None if mask is None else mask[None]
        check_call(model.engine, options, inputs, mask, batch_size=None)
        call = to_call(model.engine, options, inputs, mask)
        rows = len(call.lengths)
        if rows > self.settings.max_batch_size:
            raise TooLarge("batch size", self.settings.max_batch_size, rows)
        for fault in faults(model.engine.inputs, call, rows).values():
            raise fault
        if initial_states:
            check_states(model.engine.states, initial_states, rows, "initial_states")
        states = initial_states or {spec.name: spec.initial(rows) for spec in model.engine.states}
        self.worker(model).submit(Block(call, rows, options, [(sink, 1)], np.zeros(1, np.int64), states=states))

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
                inline_seconds=self.settings.inline_seconds,
                keeper=self.keeper,
            )
        return self._workers[key]

    def _line_up(self, group: Group) -> None:
        """Has sessions for which work has come show as busy."""
        self.worker(group.model).line_up()

    # Flow

    @property
    def queued_bytes(self) -> int:
        """Bytes of input that wait or run, of all models."""
        return sum(worker.queued_bytes for worker in self._workers.values())

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
        self.sessions.trim_replays(self.settings.max_replay_bytes)
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


def _check_mask(model: LoadedModel, mask: Array | None) -> None:
    if mask is not None and not model.spec.masking:
        raise OptionUnsupported(
            f"mask: model {model.name!r} takes no mask",
            metadata={"field": "mask", "expected": "no mask", "got": "a mask"},
        )
