"""Between the sessions in memory and a durable store.

What is in memory is a copy that this process owns: it may be written as long as nobody has taken the session over. A
session that rests may leave memory, and comes back with its next step, here or in another process.

Durability says what an answer promises. ``step``: what it tells is in the store. ``interval``: it will be within some
seconds. ``none``: it will be when the session rests or the server is shut down.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_server.blocks import Block
from rnnserve_server.config import Durability
from rnnserve_server.errors import (
    ModelChanged,
    ServiceError,
    SessionAged,
    SessionAway,
    SessionClosed,
    SessionError,
    SessionExpired,
    SessionTakenOver,
    SessionUnknown,
    StoreDown,
)
from rnnserve_server.records import (
    limits_of,
    meta_of,
    options_of,
    pack_answers,
    pack_states,
    unpack_answers,
    unpack_states,
)
from rnnserve_server.replay import digest
from rnnserve_server.repository import Repository
from rnnserve_server.sessions import Group, SessionTable
from rnnserve_server.store.base import End, Head, Record, Reply, Store, StoreError, Write, first_epoch

log = structlog.get_logger(__name__)

_ERRORS: dict[End, type[SessionError]] = {
    End.CLOSED: SessionClosed,
    End.IDLE: SessionExpired,
    End.AGED: SessionAged,
    End.EVICTED: SessionExpired,
    End.UNLOADED: SessionClosed,
}
_REASONS: dict[type[SessionError], End] = {SessionExpired: End.IDLE, SessionAged: End.AGED}
_AT_ONCE = 256  # sessions of one call to the store
_TRIES = 3  # to have all sessions of a request in memory at once: there may not be room for them

Wire = tuple[Block, Arrays, Arrays]
"""A block, and its outputs and states as `Answers` has them."""


class Keeper:
    """Keeps a server's sessions in a store.

    Args:
        store: where.
        durability: when.
        sessions: the sessions in memory.
        repository: their models.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        durability: Durability,
        sessions: SessionTable,
        repository: Repository,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.store = store
        self.durability = durability
        self._sessions = sessions
        self._repository = repository
        self._clock = clock
        self._wall_clock = wall_clock
        self._ended: list[tuple[str, int, End]] = []
        self._attaching = asyncio.Lock()
        self._saving = asyncio.Lock()
        sessions.on_end = self._note_end

    # Coming and going

    async def create(self, group: Group, slots: Array) -> list[bool]:
        """Stores new sessions, in N slots: for each whether it is stored. It is not if its id is taken.

        Raises:
            StoreDown: the store cannot be reached; whether any is stored is not known.
        """
        epochs = [first_epoch() for _ in range(len(slots))]
        blobs = pack_states(group, group.arena.gather(slots), len(slots))
        records = []
        for slot, epoch, blob in zip(slots.tolist(), epochs, blobs, strict=True):
            session = self._sessions.at(group, slot)
            records.append(
                Record(session.id, meta_of(session), epoch, 0, session.step, last_used=session.create_time, states=blob)
            )
        generations = group.generation[slots]
        async with self._attaching:
            try:
                made = await self.store.create(records)
            except StoreError as error:
                raise StoreDown(error) from error
            alive = group.generation[slots] == generations
            group.epoch[slots[alive]] = np.array(epochs)[alive]
            group.revision[slots[alive]] = 0
        return made

    async def attach(self, ids: Sequence[str], line_up: Callable[[Group], None]) -> dict[str, ServiceError]:
        """Brings sessions into memory, and takes them over from whoever owned them. Arguments as `rest`.

        Returns:
            Why it could not, by id.

        Raises:
            StoreDown: the store cannot be reached.
        """
        async with self._attaching:  # or two streams that ask for one session would take it from each other
            failed: dict[str, ServiceError] = {}
            for _ in range(_TRIES):  # those that were here may have come to rest while the others were fetched
                missing = [x for x in dict.fromkeys(ids) if x not in failed and not self._sessions.is_stored(x)]
                if not missing:
                    return failed
                try:
                    failed |= await self._attach(missing, line_up)
                except StoreError as error:
                    raise StoreDown(error) from error
            away = [each for each in ids if each not in failed and not self._sessions.is_stored(each)]
            return failed | {each: SessionAway(each) for each in away}

    async def _attach(self, ids: list[str], line_up: Callable[[Group], None]) -> dict[str, ServiceError]:
        failed: dict[str, ServiceError] = {}
        models: dict[str, LoadedModel] = {}
        await self._settle()  # what ended here has to be so in the store
        heads = await self.store.peek(ids)
        for session_id, head in zip(ids, heads, strict=True):
            if head is None:
                continue
            try:
                models[session_id] = self._repository.with_digest(head.meta.model, head.meta.version, head.meta.digest)
            except ModelChanged as error:
                failed[session_id] = error
        now = self._wall_clock()
        wanted = [each for each in ids if each in models]
        if wanted:
            largest = max(
                session_bytes(models[head.id], head.meta.batch_size) for head in heads if head and head.id in models
            )
            await self.make_room(len(wanted), largest, line_up)
        records = [record for record in await self.store.take(wanted, now) if record is not None]
        taken = {record.id for record in records}
        gone = [each for each in ids if each not in taken and each not in failed]
        for session_id, ended in zip(gone, await self.store.ended(gone, now) if gone else (), strict=True):
            failed[session_id] = (SessionUnknown if ended is None else _ERRORS[ended.why])(session_id)
        for record in records:  # from here to where they are used nothing is awaited, or they might rest again
            try:
                self._adopt(record, models[record.id])
            except ServiceError as error:
                failed[record.id] = error
        return failed

    async def verify(self, ids: Sequence[str]) -> None:
        """Forgets those sessions in memory that another server has taken over: it shows only when they are written.

        Raises:
            StoreDown: the store cannot be reached.
        """
        here = [each for each in dict.fromkeys(ids) if self._sessions.is_stored(each)]
        if not here:
            return
        before = [self._sessions.get(each) for each in here]
        epochs = [int(session.group.epoch[session.slot]) for session in before]
        try:
            heads = await self.store.peek(here)
        except StoreError as error:
            raise StoreDown(error) from error
        for session, epoch, head in zip(before, epochs, heads, strict=True):
            group, slot = session.group, session.slot
            if (head is None or head.epoch != epoch) and group.generation[slot] == session.generation:
                await self.lose(group, np.array([slot]))

    def _adopt(self, record: Record, model: LoadedModel) -> None:
        meta = record.meta
        states = unpack_states(model.engine.states, meta.batch_size, record.states)
        group, slots, full = self._sessions.create_many(
            model,
            meta.batch_size,
            options_of(meta),
            1,
            initial_states=states or None,
            idle_lifetime=meta.idle_lifetime,
            lifetime=math.inf if meta.lifetime is None else meta.lifetime,
            replay=limits_of(meta),
            session_ids=[record.id],
        )
        if full is not None:
            raise full
        now, wall = self._clock(), self._wall_clock()
        group.step[slots] = record.step
        group.epoch[slots], group.revision[slots] = record.epoch, record.revision
        group.create_time[slots] = meta.create_time
        group.last_used[slots] = group.stored_used[slots] = now - max(0.0, wall - record.last_used)
        self._sessions.age(group, slots, np.array([wall - meta.create_time]))
        for reply in record.replies:
            outputs, shown = unpack_answers(reply.payload)
            group.window.restore(
                group,
                slots,
                np.array([reply.first_step], np.uint64),
                reply.timesteps,
                reply.request_digest,
                outputs,
                shown,
            )

    async def peek(self, session_id: str) -> Head:
        """Looks at a stored session without taking it.

        Raises:
            SessionError: there is none, and why.
            StoreDown: the store cannot be reached.
        """
        try:
            (head,) = await self.store.peek([session_id])
            if head is None:
                (ended,) = await self.store.ended([session_id], self._wall_clock())
                raise (SessionUnknown if ended is None else _ERRORS[ended.why])(session_id)
            return head
        except StoreError as error:
            raise StoreDown(error) from error

    async def page(self, after: str, limit: int, model: str) -> list[Head]:
        """Stored sessions, oldest first: see `Store.page`.

        Raises:
            StoreDown: the store cannot be reached.
        """
        try:
            return await self.store.page(after, limit, model)
        except StoreError as error:
            raise StoreDown(error) from error

    async def rest(self, idle_seconds: float, line_up: Callable[[Group], None]) -> int:
        """Lets sessions that were not used for so long leave memory: how many have.

        Args:
            idle_seconds: how long.
            line_up: has a group's sessions for which work has come show as busy.

        Raises:
            StoreDown: the store cannot be reached; they stay.
        """
        resting = 0
        for group in self._sessions.groups():
            line_up(group)
            resting += await self._rest(group, self._sessions.resting(group, idle_seconds), line_up)
        return resting

    async def make_room(self, count: int, session_bytes: int, line_up: Callable[[Group], None]) -> None:
        """Has the sessions that were not used for longest leave memory, if N more of so many bytes would not fit.

        Raises:
            StoreDown: the store cannot be reached; they stay.
        """
        lacking = self._sessions.lacking(count, session_bytes)
        if lacking <= 0:
            return
        groups = self._sessions.groups()
        for group in groups:
            line_up(group)
        idle = [self._sessions.resting(group, 0.0) for group in groups]
        which = np.repeat(np.arange(len(groups)), [len(slots) for slots in idle])  # [N], the group of each
        slots = np.concatenate([*idle, np.zeros(0, np.int64)])  # [N]
        used = np.concatenate(
            [*(group.last_used[found] for group, found in zip(groups, idle, strict=True)), np.zeros(0)]
        )
        oldest = np.argsort(used, kind="stable")[: max(lacking, _AT_ONCE)]
        for number in np.unique(which[oldest]).tolist():
            await self._rest(groups[number], slots[oldest[which[oldest] == number]], line_up)

    async def _rest(self, group: Group, slots: Array, line_up: Callable[[Group], None]) -> int:
        resting = 0
        for piece in _pieces(slots):
            piece = np.intersect1d(piece, self._sessions.resting(group, 0.0))  # as it is now: some may have ended
            generations = group.generation[piece]
            await self.save(group, piece)
            line_up(group)
            idle = (group.generation[piece] == generations) & (group.tail[piece] < 0) & ~group.dirty[piece]
            self._sessions.forget(group, piece[idle])
            resting += int(idle.sum())
        return resting

    # Writing

    def writes(self, block: Block, rounds: Sequence[Wire]) -> list[Write]:
        """What a finished block changes: a write for each of its N sessions."""
        sessions = block.sessions
        assert sessions is not None
        assert sessions.first_steps is not None
        group, slots, count = sessions.group, sessions.slots, len(sessions.slots)
        replies: list[list[Reply]] = [[] for _ in range(count)]
        if group.window.limits.replies:
            for each, outputs, shown in rounds:
                assert each.sessions is not None
                assert each.sessions.first_steps is not None
                payloads = pack_answers(outputs, shown, count)
                for position, (first_step, payload) in enumerate(
                    zip(each.sessions.first_steps.tolist(), payloads, strict=True)
                ):
                    what = digest(each.call, position, count)
                    replies[position].append(Reply(first_step, each.call.timesteps, what, payload))
        now = self._wall_clock()
        columns = zip(
            slots.tolist(),
            group.epoch[slots].tolist(),
            group.revision[slots].tolist(),
            (sessions.first_steps + np.uint64(block.call.timesteps)).tolist(),
            pack_states(group, block.states, count),
            replies,
            group.window.oldest(group, slots).tolist(),
            strict=True,
        )
        return [
            Write(group.ids[slot], epoch, revision + 1, step, now, states, tuple(answered), forget_before)
            for slot, epoch, revision, step, states, answered, forget_before in columns
        ]

    async def save(self, group: Group, slots: Array) -> None:
        """Stores what is in memory of the sessions in N slots, where it is not stored. Once begun it is finished, even
        if the caller is cancelled: else nobody would know what is stored.

        Raises:
            StoreDown: the store cannot be reached.
        """
        if group.dirty[slots].any() or self._saving.locked():
            await asyncio.shield(self._save(group, slots))

    async def _save(self, group: Group, slots: Array) -> None:
        async with self._saving:
            for piece in _pieces(slots):
                piece = piece[group.dirty[piece]]  # as it is now: some may have been stored, or have ended
                if not len(piece):
                    continue
                generations = group.generation[piece]
                writes = [self._snapshot(group, slot) for slot in piece.tolist()]
                used = group.last_used[piece]
                group.dirty[piece] = False
                try:
                    applied = await self.store.commit(writes)
                except StoreError as error:
                    group.dirty[piece[group.generation[piece] == generations]] = True
                    raise StoreDown(error) from error
                alive = group.generation[piece] == generations
                kept = np.array(applied) & alive
                group.revision[piece[kept]] += 1
                group.stored_used[piece[kept]] = used[kept]
                if (lost := piece[alive & ~np.array(applied)]).size:
                    await self.lose(group, lost)

    async def save_all(self) -> None:
        """Stores everything that is in memory and not stored."""
        for group in self._sessions.groups():
            await self.save(group, group.arena.all_used())

    def _snapshot(self, group: Group, slot: int) -> Write:
        """All that there is of a session now."""
        slots = np.array([slot])
        replies = []
        for round_, index in group.window.of(group, slot):
            (payload,) = pack_answers(*round_.shown(index), 1)
            replies.append(Reply(int(round_.first_steps[index]), round_.timesteps, round_.digest(index), payload))
        (blob,) = pack_states(group, group.arena.gather(slots), 1)
        last_used = self._wall_clock() - (self._clock() - float(group.last_used[slot]))
        return Write(
            group.ids[slot],
            int(group.epoch[slot]),
            int(group.revision[slot]) + 1,
            int(group.step[slot]),
            last_used,
            blob,
            tuple(replies),
            replies[0].first_step if replies else int(group.step[slot]),
        )

    async def lose(self, group: Group, slots: Array) -> list[ServiceError]:
        """The store says that sessions in N slots are not ours any more: ends them here, and says why."""
        ids, generations = [group.ids[slot] for slot in slots.tolist()], group.generation[slots].tolist()
        try:
            ended = await self.store.ended(ids, self._wall_clock())
        except StoreError:
            ended = [None] * len(ids)
        errors: list[ServiceError] = []
        for slot, generation, session_id, why in zip(slots.tolist(), generations, ids, ended, strict=True):
            kind = SessionTakenOver if why is None else _ERRORS[why.why]
            if group.generation[slot] == generation:  # else it has ended meanwhile, and the slot may be another's
                self._sessions.lose(group, np.array([slot]), kind)
            errors.append(kind(session_id))
        log.warning("sessions are not ours any more", count=len(ids), taken=sum(why is None for why in ended))
        return errors

    # Ending

    def _note_end(self, group: Group, slots: Array, why: type[SessionError]) -> None:
        reason = _REASONS.get(why, End.CLOSED)
        self._ended += [(group.ids[slot], int(group.epoch[slot]), reason) for slot in slots.tolist()]

    async def settle(self) -> None:
        """Ends in the store what has ended in memory.

        Raises:
            StoreDown: the store cannot be reached; it is tried again.
        """
        try:
            await self._settle()
        except StoreError as error:
            raise StoreDown(error) from error

    async def _settle(self) -> None:
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        try:
            for why in End:
                if owned := [(session_id, epoch) for session_id, epoch, reason in ended if reason is why]:
                    await self.store.delete(list(dict(owned).items()), why, self._wall_clock())
        except BaseException:  # cancelled too: it is tried again
            self._ended = ended + self._ended
            raise

    async def sweep(self) -> None:
        """Ends in the store what is due there, whoever had it, and what has ended in memory."""
        await self.settle()
        if self.durability != "step":
            await self._save_in_time()
        try:
            while len(await self.store.expire(self._wall_clock(), _AT_ONCE)) == _AT_ONCE:
                pass
        except StoreError as error:
            raise StoreDown(error) from error

    async def _save_in_time(self) -> None:
        """Stores the sessions that were used but are stored as if they were not, before the store ends them: when half
        of their idle lifetime has passed since the use that it knows of.
        """
        for group in self._sessions.groups():
            slots = group.arena.all_used()
            late = group.stored_used[slots] + group.idle_lifetime[slots] / 2 <= self._clock()
            await self.save(group, slots[late])

    async def close(self) -> None:
        """Stores what is not stored, and lets the store go. The sessions stay there."""
        try:
            await self.save_all()
            await self.settle()
        finally:
            await self.store.close()


def session_bytes(model: LoadedModel, batch_size: int) -> int:
    """The bytes of a session's states."""
    return sum(batch_size * spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in model.engine.states)


def _pieces(slots: Array) -> list[Array]:
    return [slots[start : start + _AT_ONCE] for start in range(0, len(slots), _AT_ONCE)]
