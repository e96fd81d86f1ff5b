"""Between the sessions in memory and a durable store.

What is in memory is a copy that this process owns: it may be written as long as nobody has taken the session over. A
session that rests may leave memory, and comes back with its next step, here or in another process.

Durability says what an answer promises. ``step``: what it tells is in the store. ``interval``: it will be within some
seconds. ``none``: it will be when the session rests or the server is shut down.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import attrgetter

import numpy as np
import structlog

from rnnserve_models.engine.base import Array
from rnnserve_models.load import LoadedModel
from rnnserve_server.answering import Shown
from rnnserve_server.blocks import Block
from rnnserve_server.config import Durability
from rnnserve_server.digests import digests
from rnnserve_server.errors import (
    ModelChanged,
    ServiceError,
    SessionAged,
    SessionAway,
    SessionClosed,
    SessionError,
    SessionEvicted,
    SessionExpired,
    SessionTakenOver,
    SessionUnknown,
    SessionUnloaded,
    StoreDown,
)
from rnnserve_server.owners import scope_of
from rnnserve_server.records import (
    answers_begin,
    limits_of,
    meta_of,
    options_of,
    pack_answers,
    pack_states,
    rules_of,
    unpack_answers,
    unpack_states,
)
from rnnserve_server.repository import Repository
from rnnserve_server.resets import NO_RULES, ResetRules
from rnnserve_server.sessions import Group, Session, SessionTable
from rnnserve_server.store.base import End, Head, Record, Reply, Store, StoreError, Write, first_epoch
from rnnserve_server.store.tick import EPOCH, REVISION, STEP, Answered, Tick

log = structlog.get_logger(__name__)

_ERRORS: dict[End, type[SessionError]] = {
    End.CLOSED: SessionClosed,
    End.IDLE: SessionExpired,
    End.AGED: SessionAged,
    End.EVICTED: SessionEvicted,
    End.UNLOADED: SessionUnloaded,
}
_REASONS: dict[type[SessionError], End] = {kind: end for end, kind in _ERRORS.items()}
_SHOWN = 4  # sessions that a line of the log names
_AT_ONCE = 256  # sessions of one call to the store
_TRIES = 3  # to have all sessions of a request in memory at once: there may not be room for them


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
        packed = pack_states(group, group.arena.gather(slots), len(slots))
        records = []
        for slot, epoch, states in zip(slots.tolist(), epochs, packed, strict=True):
            session = self._sessions.at(group, slot)
            created, blob = session.create_time, states.tobytes()
            records.append(Record(session.id, meta_of(session), epoch, 0, session.step, last_used=created, states=blob))
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
        failed: dict[str, ServiceError] = {}
        for _ in range(_TRIES):  # those that were here may have come to rest while the others were fetched
            async with self._attaching:  # or two streams that ask for one session would take it from each other
                missing = [x for x in dict.fromkeys(ids) if x not in failed and not self._sessions.is_stored(x)]
                if not missing:
                    return failed
                # Those that are here all the same are being made: whoever makes them has a turn before the next try.
                if absent := [each for each in missing if each not in self._sessions]:
                    try:
                        failed |= await self._attach(absent, line_up)
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
                session_bytes(models[head.id], head.meta.batch_size, rules_of(head.meta))
                for head in heads
                if head and head.id in models
            )
            await self.make_room(len(wanted), largest, line_up)
        records = [record for record in await self.store.take(wanted, now) if record is not None]
        taken = {record.id for record in records}
        gone = [each for each in ids if each not in taken and each not in failed]
        for session_id, ended in zip(gone, await self.store.ended(gone, now) if gone else (), strict=True):
            failed[session_id] = (SessionUnknown if ended is None else _ERRORS[ended.why])(session_id)
        alike: dict[tuple[str, str], list[Record]] = {}
        for record in records:  # from here to where they are used nothing is awaited, or they might rest again
            if record.id not in self._sessions:  # else somebody is about to learn that there is one of that id
                terms = replace(record.meta, create_time=0.0).to_json()
                alike.setdefault((scope_of(record.id), terms), []).append(record)
        for some in alike.values():
            failed |= self._adopt(some, models[some[0].id])
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
        await self.lose(
            [
                session
                for session, epoch, head in zip(before, epochs, heads, strict=True)
                if head is None or head.epoch != epoch
            ]
        )

    def _adopt(self, records: list[Record], model: LoadedModel) -> dict[str, ServiceError]:
        """Puts sessions that differ by their ids and their past alone into memory: why it could not, by id."""
        meta = records[0].meta
        rules = rules_of(meta)
        specs = (*model.engine.states, *rules.states)
        states = [unpack_states(specs, meta.batch_size, record.states) for record in records]
        group, slots, full = self._sessions.create_many(
            model,
            meta.batch_size,
            options_of(meta),
            len(records),
            initial_states=None,
            idle_lifetime=meta.idle_lifetime,
            lifetime=math.inf if meta.lifetime is None else meta.lifetime,
            replay=limits_of(meta),
            rules=rules,
            session_ids=[record.id for record in records],
            scope=scope_of(records[0].id),
            new=False,
        )
        failed: dict[str, ServiceError] = {}
        if full is not None:
            failed = {record.id: full for record in records[len(slots) :]}
        if not len(slots):
            return failed
        records, states = records[: len(slots)], states[: len(slots)]
        group.arena.scatter(slots, {spec.name: np.concatenate([each[spec.name] for each in states]) for spec in specs})
        self._sessions.fetched[model.name, model.version] += len(slots)
        now, wall = self._clock(), self._wall_clock()
        group.step[slots] = np.array([record.step for record in records], np.uint64)
        group.epoch[slots] = [record.epoch for record in records]
        group.revision[slots] = [record.revision for record in records]
        group.create_time[slots] = created = np.array([record.meta.create_time for record in records])
        used = np.array([record.last_used for record in records])
        group.last_used[slots] = group.stored_used[slots] = now - np.maximum(0.0, wall - used)
        self._sessions.age(group, slots, wall - created)
        _restore(group, slots, [record.replies for record in records])
        return failed

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

    async def ends(self, ids: Sequence[str]) -> list[Head | type[SessionError] | None]:
        """Of sessions that are not in memory: how each is stored, or why it ended, or None where that is not known.

        Raises:
            StoreDown: the store cannot be reached.
        """
        now = self._wall_clock()
        try:
            heads = await self.store.peek(ids)
            ended = await self.store.ended(ids, now)
        except StoreError as error:
            raise StoreDown(error) from error
        return [
            head if head is not None else None if end is None else _ERRORS[end.why]
            for head, end in zip(heads, ended, strict=True)
        ]

    async def page(self, after: str, limit: int, model: str, scope: str = "") -> list[Head]:
        """Stored sessions, oldest first: see `Store.page`.

        Raises:
            StoreDown: the store cannot be reached.
        """
        try:
            return await self.store.page(after, limit, model, scope)
        except StoreError as error:
            raise StoreDown(error) from error

    async def count(self, scope: str) -> int:
        """How many sessions of a principal are stored: see `Store.count_of`.

        Raises:
            StoreDown: the store cannot be reached.
        """
        try:
            return await self.store.count_of(scope)
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

    def tick(self, chain: Sequence[tuple[Block, Sequence[Shown]]]) -> Tick:
        """What finished blocks and their answers change, each going on where the one before it ends, of each of their N
        sessions.
        """
        last, _ = chain[-1]
        sessions = last.sessions
        assert sessions is not None
        assert sessions.first_steps is not None
        group, slots, at, count = sessions.group, sessions.slots, sessions.at, len(sessions.slots)
        window, limits = group.window, group.window.limits
        answered, more = deque[Answered](), limits.replies
        for block, parts in reversed(chain):
            for shown in reversed(parts):
                if more > 0:
                    answered.appendleft(_answered(block, shown, count, more))
                    more -= shown.count
        by_count = window.by_count and all(each.rest.shape[2] * limits.replies <= limits.bytes for each in answered)
        numbers = np.empty((count, 3), np.int64)  # [N, 3]
        numbers[:, EPOCH] = group.epoch[at]
        numbers[:, REVISION] = group.revision[at] + 1
        numbers[:, STEP] = sessions.first_steps + np.uint64(last.call.timesteps)
        return Tick(
            tuple(group.ids[at]) if isinstance(at, slice) else tuple([group.ids[slot] for slot in slots.tolist()]),
            numbers,
            sum([block.call.timesteps for block, _ in chain]),
            self._wall_clock(),
            pack_states(group, last.states, count),
            tuple(answered),
            limits.replies,
            None if by_count else window.oldest(group, slots).astype(np.int64),
        )

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
                writes = self._snapshots(group, piece)
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
                lost = piece[alive & ~np.array(applied)]
                await self.lose([self._sessions.at(group, slot) for slot in lost.tolist()])

    async def save_all(self) -> None:
        """Stores everything that is in memory and not stored."""
        for group in self._sessions.groups():
            await self.save(group, group.arena.all_used())

    def _snapshots(self, group: Group, slots: Array) -> list[Write]:
        """All that there is now of the sessions in N slots."""
        replies: dict[int, list[Reply]] = {slot: [] for slot in slots.tolist()}
        for round_, index in group.window.of_many(group, slots):
            head, rest = pack_answers(*round_.shown_to(index), len(index))
            answered = Answered(round_.timesteps, round_.digests(index)[None], head, rest[None])
            first_steps = round_.first_steps[index].tolist()
            for position, (slot, first_step) in enumerate(zip(round_.slots[index].tolist(), first_steps, strict=True)):
                replies[slot] += answered.replies(position, first_step)
        used = (self._wall_clock() - (self._clock() - group.last_used[slots])).tolist()
        columns = zip(
            slots.tolist(),
            group.epoch[slots].tolist(),
            group.revision[slots].tolist(),
            group.step[slots].tolist(),
            used,
            pack_states(group, group.arena.gather(slots), len(slots)),
            strict=True,
        )
        writes = []
        for slot, epoch, revision, step, last_used, states in columns:
            window = tuple(sorted(replies[slot], key=attrgetter("first_step")))
            since = window[0].first_step if window else step
            write = Write(group.ids[slot], epoch, revision + 1, step, last_used, states.tobytes(), window, since)
            writes.append(write)
        return writes

    async def lose(self, sessions: Iterable[Session]) -> None:
        """The store says that sessions are not ours any more: ends those here that are live, and finds out why."""
        lost = [session for session in sessions if session.live]
        if not lost:
            return
        ids = [session.id for session in lost]
        try:
            ended = await self.store.ended(ids, self._wall_clock())
        except StoreError:
            ended = [None] * len(ids)
        for session, why in zip(lost, ended, strict=True):
            if session.live:  # it may have ended meanwhile, and its slot be another's
                kind = SessionTakenOver if why is None else _ERRORS[why.why]
                self._sessions.lose(session.group, np.array([session.slot]), kind)
        log.warning(
            "sessions are not ours any more",
            models=sorted({session.group.model.name for session in lost}),
            count=len(ids),
            taken=sum(why is None for why in ended),
            sessions=ids[:_SHOWN],
        )

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


def session_bytes(model: LoadedModel, batch_size: int, rules: ResetRules = NO_RULES) -> int:
    """The bytes of a session's states, with what its reset rules need."""
    states = (*model.engine.states, *rules.states)
    return sum(batch_size * spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in states)


def _restore(group: Group, slots: Array, replies: Sequence[Sequence[Reply]]) -> None:
    """Puts what N sessions were answered into their windows: answers that are alike together, the oldest first."""
    for age in range(max(map(len, replies)), 0, -1):
        alike: dict[tuple[int, int, int, bytes], list[tuple[int, Reply]]] = {}
        for position, each in enumerate(replies):
            if len(each) >= age:
                reply = each[-age]
                sizes = len(reply.request_digest), len(reply.payload)
                key = (reply.timesteps, *sizes, answers_begin(reply.payload))
                alike.setdefault(key, []).append((position, reply))
        for (timesteps, *_), some in alike.items():
            outputs, shown = unpack_answers([reply.payload for _, reply in some])
            asked = np.frombuffer(b"".join([reply.request_digest for _, reply in some]), np.uint8)
            group.window.restore(
                group,
                slots if len(some) == len(slots) else slots[[position for position, _ in some]],
                np.array([reply.first_step for _, reply in some], np.uint64),
                timesteps,
                asked.reshape(len(some), -1),
                outputs,
                shown,
            )


def _answered(block: Block, shown: Shown, count: int, most: int) -> Answered:
    """What a block, or one part of it, answered N sessions: the last of no more chunks of each than that."""
    if shown.count == block.rounds:  # one part is all of it
        asked = digests(block.call, count, block.rounds)
    else:
        (of,) = shown.blocks
        asked = digests(of.call, count, of.rounds)
    head, rest = pack_answers(shown.outputs, shown.states, shown.count, count)
    return Answered(shown.timesteps, asked[-most:], head, rest[-most:])


def _pieces(slots: Array) -> list[Array]:
    return [slots[start : start + _AT_ONCE] for start in range(0, len(slots), _AT_ONCE)]
