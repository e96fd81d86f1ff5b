"""Sessions in Redis, or Valkey, for several servers.

A session is three keys that share a slot: a hash, the list of its replies, and, once it has ended, a note that says
why. What must hold at once is done by a script on these keys. A tick is pushed to its writer's journal, whatever the
number of its sessions, and mostly without a script (see `scripts`), but for a cluster, whose scripts may not touch what
is elsewhere. The indexes, of all sessions and of when to look at each next, are sorted sets of their own and only
hints: they are written before a session and again after it, and what they name is held against the session itself.

What a commit that was answered is worth is for the server to say: ``appendonly yes`` with ``appendfsync always`` for
"on disk", ``maxmemory-policy noeviction`` so that no session vanishes. A replica that is promoted may lack the last
writes; to rule that out, have it promoted by hand or use one server with a disk.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from rnnserve_server.owners import scope_of
from rnnserve_server.store import scripts
from rnnserve_server.store.base import (
    REMEMBERED,
    Applied,
    End,
    Ended,
    Head,
    Meta,
    Record,
    Reply,
    Store,
    StoreCorrupt,
    StoreError,
    StoreMisconfigured,
    StoreUnavailable,
    Told,
    Write,
    check_distinct,
    in_task,
    settles,
)
from rnnserve_server.store.journal import Journal
from rnnserve_server.store.line import Answers, Command, Line
from rnnserve_server.store.tick import Tick

_FORMAT = 3
_READ = (2, _FORMAT)
_FOREVER = 1e300  # what ends at infinity ends here: not every Lua reads "inf"
_EXACT = 2**53  # of Lua's numbers
_PER_CALL = 64  # sessions of one call of a script: no other client waits for longer than that takes
_BATCH = 1000
_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}


class RedisStore(Store):
    """Keeps sessions in Redis 6.2 or later, or Valkey. `open` makes one.

    A batch is one pipeline. Each session of it is changed at once; the batch as a whole is not, if the connection
    breaks.
    """

    name = "redis"
    shared = True

    def __init__(
        self, client: Redis, place: str, *, prefix: str, remember: float, patience: float, retries: int
    ) -> None:
        self._client = client
        self._place = place
        self._prefix = prefix
        self._remember = str(max(1, int(remember * 1000)))
        self._remember_seconds = remember
        self._per_call = _PER_CALL
        self._retries = retries
        self._line = Line(client, patience)
        self._journal = Journal("", prefix, "")
        self._begin_journal()

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        prefix: str = "rnnserve:",
        remember: float = REMEMBERED,
        patience: float = 5.0,
        retries: int = 1,
    ) -> RedisStore:
        """Connects.

        Args:
            url: ``redis://[user:password@]host[:port][/database]``, or ``unix://[user:password@]path[?db=database]``.
                ``rediss://`` is the same over TLS: the certificate must be of the host and of an authority that this
                machine trusts, or of the one in ``?ssl_ca_certs=/path/ca.pem``; ``&ssl_certfile=...&ssl_keyfile=...``
                is for a server that wants to know its clients. ``valkey://`` and ``valkeys://`` mean the same.
            prefix: what all keys begin with.
            remember: seconds for which it is remembered why a session ended.
            patience: seconds to wait for a connection, and for an answer.
            retries: how often to send a batch again over a new connection; it may be, for it is recognised.

        Raises:
            StoreMisconfigured: the URL is wrong, the server lets nobody in with it, or a later release keeps its
                sessions there.
            StoreUnavailable: there is no server, or it does not answer.
        """
        scheme, separator, rest = url.partition("://")
        try:
            client = Redis.from_url(
                _SCHEMES.get(scheme, scheme) + separator + rest,
                socket_timeout=patience,
                socket_connect_timeout=patience,
                retry=Retry(NoBackoff(), retries),
                protocol=2,  # all that is needed, and every server speaks it
            )
        except ValueError as error:
            raise StoreMisconfigured(f"{_without_password(url)}: {error}") from error
        place = _without_password(url)
        store = cls(client, place, prefix=prefix, remember=remember, patience=patience, retries=retries)
        try:
            (found,) = await store._pipeline([("INFO", "cluster")])
            if isinstance(found, dict) and found.get("cluster_enabled"):
                store._per_call = 1  # the keys of one call must share a slot
            await store._check_format()
        except BaseException:
            await client.aclose()
            raise
        return store

    async def create(self, records: Sequence[Record]) -> list[bool]:
        """See `Store`."""
        check_distinct([record.id for record in records])
        indexed = list(chain.from_iterable(map(self._index, records)))
        await self._pipeline(indexed)  # first, so that no session is without
        arguments = []
        for record in records:
            replies = [_pack(reply) for reply in record.replies]
            arguments.append(
                (
                    repr(record.meta.create_time),
                    record.epoch,
                    record.revision,
                    f"{record.step:020d}",
                    repr(record.last_used),
                    repr(record.meta.idle_lifetime),
                    repr(min(record.meta.ends_at, _FOREVER)),
                    _index_entry(record),
                    record.meta.to_json(),
                    record.states,
                    len(replies),
                    *replies,
                )
            )
        results = await self._call(scripts.CREATE, [record.id for record in records], (self._remember,), arguments)
        await self._pipeline(indexed)  # again, should a sweep have come in between
        entries = [_index_entry(record).encode() for record in records]
        refused = zip(entries, results, strict=True)
        await self._forget([entry for entry, result in refused if not result[0] and result[1] != entry])
        return [result[0] == 1 for result in results]

    async def take(self, ids: Sequence[str], now: float) -> list[Record | None]:
        """See `Store`."""
        check_distinct(ids)
        results = await self._call(scripts.TAKE, ids, (self._remember, repr(now)))
        await self._forget([result[1] for result in results if len(result) == 2])
        taken: list[Record | None] = []
        for session_id, result in zip(ids, results, strict=True):
            if not result[0]:
                taken.append(None)
                continue
            head, states = _head(session_id, result[1][:5]), result[1][5]
            ends = list(accumulate(map(int, result[2].split()), initial=0))
            replies = tuple(_unpack(result[3][start:end]) for start, end in pairwise(ends))
            taken.append(
                Record(head.id, head.meta, head.epoch, head.revision, head.step, head.last_used, states, replies)
            )
        return taken

    async def peek(self, ids: Sequence[str]) -> list[Head | None]:
        """See `Store`."""
        found = await self._call(scripts.PEEK, ids, ())
        return [
            None if values[0] is None else _head(session_id, values[:5])
            for session_id, values in zip(ids, found, strict=True)
        ]

    async def commit(self, writes: Sequence[Write]) -> list[bool]:
        """See `Store`."""
        ids = [write.id for write in writes]
        check_distinct(ids)
        arguments = [
            (
                f"{w.epoch} {w.revision - 1} {w.revision} {w.step:020d} {w.forget_before:020d} {w.start:020d} "
                f"{int(w.states is not None)} {len(w.replies)} {w.keep} {w.last_used!r}",
                w.states or b"",
                *map(_pack, w.replies),
            )
            for w in writes
        ]
        return [result == ord("1") for result in await self._call(scripts.COMMIT, ids, (), arguments)]

    async def commit_ticks(self, ticks: Sequence[Tick]) -> Applied:
        """See `Store`."""
        kept: asyncio.Future[Applied] = asyncio.get_running_loop().create_future()
        self.begin_commit(ticks, settles(kept))
        return await kept

    def begin_commit(self, ticks: Sequence[Tick], told: Told) -> None:
        """See `Store`."""
        check_distinct([session_id for tick in ticks for session_id in tick.ids])
        if self._per_call == 1 or any(
            tick.forget_before is not None or tick.numbers.max(initial=0) >= _EXACT for tick in ticks
        ):
            in_task(super().commit_ticks(ticks), told)
            return
        expected: Answers = []

        def pushed(answers: Answers | Exception) -> None:
            if answers == expected:
                told([[True] * len(tick.ids) for tick in ticks])
                if self._journal.is_due:
                    self._trim()
            else:
                self._begin_journal()  # it was folded, or it is not known what is in it, and what will be
                in_task(self._commit_otherwise(ticks, answers), told)

        self._line.exchange(partial(self._pushes, ticks, expected), pushed)

    def _pushes(self, ticks: Sequence[Tick], answers: Answers) -> list[Command]:
        """The commands that push ticks to the journal, and what they are answered if that goes well."""
        if self._journal.is_full:
            self._begin_journal()
        journal = self._journal
        commands: list[Command] = []
        for tick in ticks:
            parts = [tick]
            if len(tick.ids) > self._per_call and journal.strangers(tick):  # a script takes no more
                starts = range(0, len(tick.ids), self._per_call)
                parts = [tick.part(start, start + self._per_call) for start in starts]
            for part in parts:
                commands.append(journal.push(part))
                answers.append(journal.length)
        return commands

    def _trim(self) -> None:
        """Has ticks of which nothing is wanted taken out of the journal, while nobody waits for it."""
        journal, expected = self._journal, list[int]()

        def commands() -> list[Command]:
            command = journal.trim() if self._journal is journal and journal.is_due else None
            expected.append(journal.length)
            return [] if command is None else [command]

        def trimmed(answers: Answers | Exception) -> None:
            if answers != expected and self._journal is journal:
                self._begin_journal()

        self._line.exchange(commands, trimmed)

    async def _commit_otherwise(self, ticks: Sequence[Tick], answers: Answers | Exception) -> Applied:
        """Commits ticks of which some, or all, may have been pushed to a journal that is not pushed to any more."""
        if isinstance(answers, list) and any(isinstance(answer, NoScriptError) for answer in answers):
            # A server that was started again, or another one.
            await self._pipeline([("SCRIPT LOAD", scripts.TICK.text)])
            expected: Answers = []
            again: asyncio.Future[Answers | Exception] = asyncio.get_running_loop().create_future()
            self._line.exchange(partial(self._pushes, ticks, expected), again.set_result)
            answers = await again
            if answers == expected:
                return [[True] * len(tick.ids) for tick in ticks]
            self._begin_journal()
        if isinstance(answers, RedisError | OSError):
            if not self._retries:
                raise self._explained(answers) from answers
        elif isinstance(answers, Exception):
            raise answers
        elif errors := [answer for answer in answers if isinstance(answer, RedisError)]:
            raise self._explained(errors[0]) from errors[0]
        return await super().commit_ticks(ticks)  # some are another's, or were sent before: each is looked at

    def _begin_journal(self) -> None:
        """Pushes nothing more to the journal, and has it folded when something is pushed to the next one."""
        self._journal = Journal(f"{self._prefix}journal:{secrets.token_hex(8)}", self._prefix, self._journal.name)

    async def delete(self, owned: Sequence[tuple[str, int]], why: End, now: float) -> list[bool]:
        """See `Store`."""
        ids = [session_id for session_id, _ in owned]
        check_distinct(ids)
        epochs = [(epoch,) for _, epoch in owned]
        for session_id in ids:
            self._journal.forget(session_id)
        common = (self._remember, why.value, repr(now), self._journal.name)
        results = await self._call(scripts.DELETE, ids, common, epochs)
        await self._forget([result[1] for result in results if len(result) == 2])
        return [result[0] == 1 for result in results]

    async def ended(self, ids: Sequence[str], now: float) -> list[Ended | None]:
        """See `Store`."""
        notes: list[Ended | None] = []
        for found in await self._pipeline([("GET", self._keys(session_id)[2]) for session_id in ids]):
            note = None
            if found is not None:
                why, at, epoch = found.decode().split(" ")
                note = Ended(End(why), float(at), int(epoch))
            notes.append(note if note is not None and note.at + self._remember_seconds > now else None)
        return notes

    async def expire(self, now: float, limit: int) -> list[str]:
        """See `Store`."""
        expired: list[str] = []
        while len(expired) < limit:
            count = min(limit - len(expired), _BATCH)
            command = ("ZRANGEBYSCORE", f"{self._prefix}due", "-inf", repr(now), "LIMIT", 0, count)
            (entries,) = await self._pipeline([command])
            if not entries:
                break
            ids = [_session_of(entry) for entry in entries]
            results = await self._call(scripts.EXPIRE, ids, (self._remember, repr(now)))
            gone, later = [], []
            for entry, session_id, (state, *more) in zip(entries, ids, results, strict=True):
                if state == 2 and more[0][3] == entry:
                    used, idle, ends = map(float, more[0][:3])
                    later.append(("ZADD", f"{self._prefix}due", "XX", repr(min(used + idle, ends)), entry))
                    continue
                gone.append(entry)  # which may be that of an earlier session of the same id
                if state == 1:
                    expired.append(session_id)
                    gone += more
            await self._forget(gone)
            await self._pipeline(later)
        return expired

    async def page(self, after: str, limit: int, model: str = "", scope: str = "") -> list[Head]:
        """See `Store`."""
        index = f"{self._prefix}all:{model}" if model else f"{self._prefix}all"
        if scope:
            index = f"{self._prefix}of:{scope}"
        heads: list[Head] = []
        while len(heads) < limit:
            count = limit - len(heads)
            lowest = f"({after}" if after else "-"
            (cursors,) = await self._pipeline([("ZRANGEBYLEX", index, lowest, "+", "LIMIT", 0, count)])
            ids = [_session_of(cursor) for cursor in cursors]
            found = zip(cursors, await self.peek(ids), strict=True)
            live = [head for cursor, head in found if head is not None and head.cursor == cursor.decode()]
            heads += [head for head in live if model in ("", head.meta.model)]
            if len(cursors) < count:
                break
            after = cursors[-1].decode()
        return heads

    async def count_of(self, scope: str) -> int:
        """See `Store`."""
        (count,) = await self._pipeline([("ZCARD", f"{self._prefix}of:{scope}")])
        return int(count)

    async def count(self, models: Sequence[str]) -> list[int]:
        """See `Store`."""
        return list(await self._pipeline([("ZCARD", f"{self._prefix}all:{model}") for model in models]))

    async def close(self) -> None:
        """See `Store`."""
        await self._line.close()
        await self._client.aclose()

    async def _check_format(self) -> None:
        """Says in which format sessions are kept here from now on, if it is one that this release reads."""
        key = f"{self._prefix}format"
        (found,) = await self._pipeline([("GET", key)])
        if found is None:  # also where releases wrote that kept none: they knew of no other format
            _, found = await self._pipeline([("SET", key, _FORMAT, "NX"), ("GET", key)])
        if found not in [b"%d" % each for each in _READ]:
            raise StoreMisconfigured(
                f"{self._place}: expected sessions in format {_FORMAT} under {self._prefix!r}, got format "
                f"{found.decode(errors='replace')}; serve them with the release that wrote them"
            )
        if found != b"%d" % _FORMAT:
            await self._pipeline([("SET", key, _FORMAT)])

    # Keys and indexes

    def _keys(self, session_id: str) -> tuple[str, str, str]:
        """The hash, the replies and the note. What is in braces makes the slot of a cluster."""
        key = f"{self._prefix}{{{session_id}}}"
        return key, f"{key}:replies", f"{key}:ended"

    def _index(self, record: Record) -> Iterator[Command]:
        # LT: should a live session have the very same entry, it must not be looked at later than it was to be.
        yield "ZADD", f"{self._prefix}due", "LT", repr(min(record.expires_at, _FOREVER)), _index_entry(record)
        yield "ZADD", f"{self._prefix}all", 0, record.cursor
        yield "ZADD", f"{self._prefix}all:{record.meta.model}", 0, record.cursor
        if scope := scope_of(record.id):
            yield "ZADD", f"{self._prefix}of:{scope}", 0, record.cursor

    async def _forget(self, entries: Sequence[bytes]) -> None:
        """Takes ended sessions out of the indexes."""
        commands: list[Command] = []
        for entry in entries:
            cursor, _, model = entry.decode().partition(" ")
            commands.append(("ZREM", f"{self._prefix}due", entry))
            commands.append(("ZREM", f"{self._prefix}all", cursor))
            commands.append(("ZREM", f"{self._prefix}all:{model}", cursor))
            if scope := scope_of(_session_of(entry)):
                commands.append(("ZREM", f"{self._prefix}of:{scope}", cursor))
        await self._pipeline(commands)

    # Calls

    async def _call(
        self, script: scripts.Script, ids: Sequence[str], common: tuple[Any, ...], each: Sequence[tuple[Any, ...]] = ()
    ) -> list[Any]:
        """Runs a script on sessions.

        Args:
            script: it.
            ids: the sessions.
            common: its first arguments.
            each: its further arguments, of each session.

        Returns:
            What it answers for each.
        """
        keys = [self._keys(session_id)[: script.keys] for session_id in ids]
        commands: list[Command] = []
        for start in range(0, len(ids), self._per_call):
            part = slice(start, start + self._per_call)
            flat = chain.from_iterable
            count = script.keys * len(keys[part])
            commands.append(("EVALSHA", script.sha, count, *flat(keys[part]), *common, *flat(each[part])))
        return list(chain.from_iterable(await self._scripted(script, commands)))

    async def _scripted(self, script: scripts.Script, commands: Sequence[Command]) -> list[Any]:
        """Sends calls of a script, which the server may have to be given first. Their answers."""
        answers = await self._pipeline(commands)
        missing = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:  # a server that was started again, or another one: nothing was done
            load = ("SCRIPT LOAD", script.text)
            again = await self._pipeline([load, *(commands[index] for index in missing)])
            for index, answer in zip(missing, again[1:], strict=True):
                answers[index] = answer
                if isinstance(answer, NoScriptError):
                    raise self._explained(answer)
        return answers

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Sends commands in one go. Their answers; NoScriptError, which a caller may mend, is one of them."""
        if not commands:
            return []
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers: list[Any] = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            raise self._explained(error) from error
        for answer in answers:
            if isinstance(answer, RedisError) and not isinstance(answer, NoScriptError):
                raise self._explained(answer) from answer
        return answers

    def _explained(self, error: Exception) -> StoreError:
        what = f"{self._place}: {error}"
        if isinstance(error.__cause__ or error, AuthenticationError | NoPermissionError):
            return StoreMisconfigured(f"{what}: give a user and a password that may use all keys of {self._prefix!r}")
        if "CERTIFICATE_VERIFY_FAILED" in what:
            return StoreMisconfigured(f"{what}: name its authority with ?ssl_ca_certs=/path/ca.pem, and the right host")
        if isinstance(error, RedisConnectionError | RedisTimeoutError | OSError):
            return StoreUnavailable(f"{what}: is the server there, and does it answer in time?")
        if isinstance(error, ResponseError) and "WRONGTYPE" in str(error):
            return StoreCorrupt(
                f"{what}: something else uses keys that begin with {self._prefix!r}; choose another prefix"
            )
        return StoreUnavailable(f"{what}: the server is there but refuses; what it says should tell why")


def _index_entry(record: Record) -> str:
    return f"{record.cursor} {record.meta.model}"


def _session_of(entry: bytes) -> str:
    """The session that a cursor, or an entry that begins with one, is of."""
    return entry.decode().partition(" ")[0].partition(".")[2]


def _head(session_id: str, values: Sequence[bytes]) -> Head:
    meta, epoch, revision, step, used = values
    return Head(session_id, Meta.from_json(meta), int(epoch), int(revision), int(step), float(used))


def _pack(reply: Reply) -> bytes:
    head = f"{reply.first_step:020d}{reply.end:020d}{len(reply.request_digest):04d}"
    return b"".join((head.encode(), reply.request_digest, reply.payload))


def _unpack(packed: bytes) -> Reply:
    first_step, end, digest = int(packed[:20]), int(packed[20:40]), 44 + int(packed[40:44])
    return Reply(first_step, end - first_step, packed[44:digest], packed[digest:])


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    user, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{place}"
