"""The stores against the suite, and what is particular to each."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from compliance.store_suite import IDLE, NOW, REMEMBER, Opener, StoreSuite, after, applied, created, record, tick
from redis_server import RedisServer, running_redis
from rnnserve_server.store import (
    End,
    Meta,
    Record,
    Reply,
    Store,
    StoreCorrupt,
    StoreMisconfigured,
    StoreUnavailable,
    Write,
    journal,
    open_store,
)
from rnnserve_server.store.memory import MemoryStore
from rnnserve_server.store.redis import RedisStore
from rnnserve_server.store.sqlite import SqliteStore
from torture.servers import free_port


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture(scope="module")
def redis_cluster() -> Iterator[RedisServer]:
    with running_redis("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        client = redis.Redis(unix_socket_path=str(server.socket))
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 30
        while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.close()
        yield server


@pytest.fixture
def raw(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """The server as others see it, empty."""
    with redis.Redis(unix_socket_path=str(redis_server.socket), decode_responses=True) as client:
        client.flushall()
        yield client


class TestMemory(StoreSuite):
    durable = False

    @pytest.fixture
    def opener(self) -> Opener:
        stores: dict[str, Store] = {}

        async def opened(place: str) -> Store:
            return stores.setdefault(place, MemoryStore(remember=REMEMBER))

        return opened


class TestSqlite(StoreSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        # A test ends no process by power: what "normal" risks is not at stake here.
        return lambda place: SqliteStore.open(tmp_path / place, synchronous="normal", remember=REMEMBER, patience=30.0)


class TestSqliteHandedOver(StoreSuite):
    """Whose ticks are all appended by its thread."""

    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda place: SqliteStore.open(
            tmp_path / place, synchronous="normal", remember=REMEMBER, patience=30.0, inline_seconds=0.0
        )


class TestSqliteThinned(StoreSuite):
    """Whose journal is looked through at every commit for what nobody wants any more."""

    @pytest.fixture
    def opener(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
        monkeypatch.setattr("rnnserve_server.store.sqlite_journal._LOOK_BYTES", 0)
        return lambda place: SqliteStore.open(tmp_path / place, synchronous="normal", remember=REMEMBER, patience=30.0)


class TestSqliteFull(StoreSuite):
    """Whose journal is as long as it may be: the oldest of it is brought to the sessions' rows at every commit."""

    @pytest.fixture
    def opener(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
        monkeypatch.setattr("rnnserve_server.store.sqlite_journal._MOST_TICKS", 2)
        monkeypatch.setattr("rnnserve_server.store.sqlite_journal._MORE_TICKS", 3)
        monkeypatch.setattr("rnnserve_server.store.sqlite_journal._MOST_SESSIONS", 1)
        return lambda place: SqliteStore.open(tmp_path / place, synchronous="normal", remember=REMEMBER, patience=30.0)


class TestRedis(StoreSuite):
    @pytest.fixture
    def opener(self, redis_server: RedisServer) -> Opener:
        return lambda place: RedisStore.open(redis_server.url, prefix=f"{place}:", remember=REMEMBER)


class TestRedisCluster(StoreSuite):
    """One node that insists, as all nodes of a cluster do, that the keys of one script share a slot."""

    @pytest.fixture
    def opener(self, redis_cluster: RedisServer) -> Opener:
        return lambda place: RedisStore.open(redis_cluster.url, prefix=f"{place}:", remember=REMEMBER)


# What is stored


def test_a_window_that_cannot_be() -> None:
    """Replies that overlap, are empty or reach beyond the step are refused before anything is sent."""
    for replies in ((Reply(0, 2, b"", b""), Reply(1, 1, b"", b"")), (Reply(0, 0, b"", b""),), (Reply(3, 2, b"", b""),)):
        with pytest.raises(ValueError, match="repl"):
            Write("a", 1, 1, 4, NOW, replies=replies)
    for step in (-1, 2**63):
        with pytest.raises(ValueError, match="63 bits"):
            record(step=step)


def test_a_description_of_a_later_release_is_read() -> None:
    """What is not known of a session's description is passed over; what is no description is said to be none."""
    meta = record().meta
    assert Meta.from_json(meta.to_json()[:-1] + ',"later":1}') == meta
    for document in ("", "[]", "{}", '{"model":"m"}'):
        with pytest.raises(StoreCorrupt, match="a session's description"):
            Meta.from_json(document)


# URLs


async def test_store_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer) -> None:
    """Each kind of URL opens its store."""
    monkeypatch.chdir(tmp_path)
    for url, name, path in (
        ("memory", "memory", None),
        (f"sqlite://{tmp_path}/one.db", "sqlite", "one.db"),
        ("sqlite:two.db", "sqlite", "two.db"),
        (f"{tmp_path}/three", "sqlite", "three"),
        ("./four", "sqlite", "four"),
        ("five.db", "sqlite", "five.db"),
        (redis_server.url, "redis", None),
    ):
        store = await open_store(url)
        assert store.name == name
        assert store.shared == (name != "memory")
        await store.close()
        assert path is None or (tmp_path / path).exists()


@pytest.mark.parametrize(
    "url", ["", "memroy", "redsi://host", "sqlite:", "sqlite://", "sqlite://host/path", "postgres://x/y"]
)
async def test_other_urls_are_refused(url: str) -> None:
    """A URL that names no store is refused with those that would, and makes no file."""
    with pytest.raises(StoreMisconfigured, match="a store is memory"):
        await open_store(url)
    assert url not in os.listdir()


async def test_a_redis_url_that_makes_no_sense() -> None:
    """The message names the URL without its password."""
    with pytest.raises(StoreMisconfigured) as caught:
        await open_store("redis://me:secret@host:port/x")
    assert "host:port" in str(caught.value)
    assert "secret" not in str(caught.value)


# SQLite


async def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    """Nobody else may read the file, nor those beside it."""
    store = await SqliteStore.open(tmp_path / "s.db")
    await created(store)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in os.listdir(tmp_path)} == {0o600}
    await store.close()
    assert os.listdir(tmp_path) == ["s.db"]


async def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    """Another program's file, a later format and a folder are refused with the reason, and left as they are."""
    text, other, later = tmp_path / "text", tmp_path / "other.db", tmp_path / "later.db"
    text.write_text("Dear diary, " * 100)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE diary (entry TEXT)")
    db.close()
    await (await SqliteStore.open(later)).close()
    with sqlite3.connect(later) as db:
        db.execute("PRAGMA user_version = 6")
    db.close()
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for path, message in (
        (text, "not a database.*name a file of rnnserve's own"),
        (other, "another program's database"),
        (later, "got format 6"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "s.db", "No such file or directory"),
    ):
        with pytest.raises(StoreMisconfigured, match=message) as caught:
            await SqliteStore.open(path)
        assert str(path) in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


async def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    """Damage is met with an error that names the file and the ways out, not with wrong states."""
    path = tmp_path / "s.db"
    store = await SqliteStore.open(path)
    assert all(await store.create([record(f"s{index}", states=bytes(500)) for index in range(200)]))
    await store.close()
    content = bytearray(path.read_bytes())
    content[16384:] = b"\x5a" * (len(content) - 16384)
    path.write_bytes(content)
    store = await SqliteStore.open(path)
    with pytest.raises(StoreCorrupt, match="recover") as caught:
        await store.take(["s7"], NOW)
    assert str(path) in str(caught.value)
    await store.close()


async def test_a_file_that_another_keeps_locked(tmp_path: Path) -> None:
    """A commit waits no longer than it may for another process, says so, and fits once the other is done."""
    store = await SqliteStore.open(tmp_path / "s.db", patience=0.01)
    session = await created(store)
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.commit([after(session)])
    other.execute("ROLLBACK")
    other.close()
    assert await store.commit([after(session)]) == [True]
    await store.close()


async def test_a_commit_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """When the disk is full, nothing of a tick is stored, and it may be sent again when there is room."""
    store = await SqliteStore.open(tmp_path / "s.db")
    sessions = [await created(store, name) for name in "ab"]
    (pages,) = await store._file.run(lambda: store._db.execute("PRAGMA page_count").fetchone())
    await store._file.run(lambda: store._db.execute(f"PRAGMA max_page_count = {pages + 4}"))
    writes = [after(each, states=bytes(100_000)) for each in sessions]
    with pytest.raises(StoreUnavailable, match="full"):
        await store.commit(writes)
    assert [head and head.step for head in await store.peek(["a", "b"])] == [0, 0]
    await store._file.run(lambda: store._db.execute("PRAGMA max_page_count = 1000000"))
    assert await store.commit(writes) == [True, True]
    await store.close()


async def test_a_file_is_looked_at_at_one_moment(tmp_path, monkeypatch):
    """Another process that makes its tables while a new file is looked at has to wait, and is not half seen."""
    path = tmp_path / "s.db"
    tries = []

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            if statement == "PRAGMA user_version" and not tries:
                with contextlib.closing(connect(path, timeout=0)) as other:
                    try:
                        other.executescript("BEGIN; CREATE TABLE t (c); PRAGMA user_version = 1; COMMIT")
                        tries.append("made")
                    except sqlite3.OperationalError as error:
                        tries.append(str(error))
            return super().execute(statement, *arguments)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", functools.partial(connect, factory=Connection))
    store = await SqliteStore.open(path)
    await store.close()
    assert tries == ["database is locked"]


def test_many_processes_open_a_new_file_at_once(tmp_path: Path) -> None:
    """Whoever comes first makes the tables, and the others find them."""
    script = (
        "import asyncio, sys\n"
        "from rnnserve_server.store import open_store\n"
        "sys.stdin.read()\n"
        "async def main():\n"
        "    store = await open_store(sys.argv[1], patience=60)\n"
        "    print(len(await store.page('', 1)))\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "s.db")]
    many = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in many:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    assert [process.communicate()[0] for process in many] == ["0\n"] * 4


# Redis


async def test_no_redis_there(tmp_path: Path) -> None:
    """A server that is not there is named."""
    with pytest.raises(StoreUnavailable, match="nowhere"):
        await RedisStore.open(f"unix://{tmp_path}/nowhere")


async def test_a_redis_that_lets_nobody_in() -> None:
    """A missing or wrong password is said to be one, and is not repeated."""
    with running_redis("--requirepass", "right") as server:
        for url in (server.url, server.url.replace("unix://", "unix://:wrong@")):
            with pytest.raises(StoreMisconfigured, match="password") as caught:
                await RedisStore.open(url)
            assert "wrong@" not in str(caught.value)
        await (await RedisStore.open(server.url.replace("unix://", "unix://:right@"))).close()


async def test_scripts_that_the_server_forgot(redis_server: RedisServer, raw: redis.Redis) -> None:
    """A server that knows the scripts no more is given them again."""
    store = await RedisStore.open(redis_server.url)
    session = record()
    for call in (
        lambda: store.create([session]),
        lambda: store.commit([after(session)]),
        lambda: store.delete([("a", session.epoch)], End.CLOSED, NOW),
    ):
        raw.script_flush()
        assert await call() == [True]
    await store.close()


async def test_prefixes_keep_stores_apart(redis_server: RedisServer, raw: redis.Redis) -> None:
    """Two services on one server do not see each other's sessions, and all keys say whose they are."""
    one, two = [await RedisStore.open(redis_server.url, prefix=prefix) for prefix in ("one:", "two:")]
    await created(one)
    assert await two.peek(["a"]) == [None]
    await created(two)
    assert {key.partition(":")[0] for key in raw.scan_iter()} == {"one", "two"}
    await one.close()
    await two.close()


async def test_a_later_format_is_refused(redis_server: RedisServer, raw: redis.Redis) -> None:
    """What a later release wrote is left alone, and so is what an earlier one left without a word of its format."""
    stores = [await RedisStore.open(redis_server.url)]
    await created(stores[0])
    raw.delete("rnnserve:format")
    stores.append(await RedisStore.open(redis_server.url))
    assert (await stores[1].peek(["a"]))[0] is not None
    raw.set("rnnserve:format", 4)
    with pytest.raises(StoreMisconfigured, match="got format 4"):
        await RedisStore.open(redis_server.url)
    for store in stores:
        await store.close()


async def test_nothing_is_left_behind(redis_server: RedisServer, raw: redis.Redis) -> None:
    """Sessions that ended leave a note that goes by itself, and nothing else: not even after a crash in between."""
    store = await RedisStore.open(redis_server.url, remember=REMEMBER)
    sessions = [
        await created(store, name, replies=(reply_,), step=1) for name in "abcd" for reply_ in [Reply(0, 1, b"", b"")]
    ]
    assert await store.create([record("a")]) == [False]
    await store.delete([("a", sessions[0].epoch)], End.CLOSED, NOW)
    assert await store.take(["b"], NOW + IDLE) == [None]
    raw.delete("rnnserve:{c}", "rnnserve:{c}:replies")  # as if a server had died between ending it and its index
    assert await store.expire(NOW + IDLE, 10) == ["d"]
    keys = set(raw.scan_iter())
    assert keys == {"rnnserve:format", *(f"rnnserve:{{{name}}}:ended" for name in "abd")}
    assert all(0 < raw.pttl(key) <= REMEMBER * 1000 for key in keys if key != "rnnserve:format")
    await store.close()


def journals(raw: redis.Redis) -> list[str]:
    """The keys that have to do with journals."""
    return sorted(raw.scan_iter("rnnserve:journal:*"))


async def test_a_journal_of_ticks_goes_with_the_last_of_its_sessions(
    redis_server: RedisServer, raw: redis.Redis
) -> None:
    """However they end, and not before; one that is made anew under the same id has nothing of the first."""
    store = await RedisStore.open(redis_server.url)
    sessions = [await created(store, name, states=b"\0" * 8) for name in "abc"]
    assert await store.commit_ticks([tick(sessions, [1, 2])]) == [[True] * 3]
    assert len(journals(raw)) == 2
    assert await store.delete([("a", sessions[0].epoch)], End.CLOSED, NOW) == [True]
    again = await created(store, "a", states=b"\0" * 8)
    assert await store.commit_ticks([tick([again], [3])]) == [[True]]
    (found,) = await store.take(["a"], NOW)
    assert found is not None
    assert (found.step, [(reply.first_step, reply.timesteps) for reply in found.replies]) == (3, [(0, 3)])
    assert journals(raw) == []  # taking one has brought all to their own keys
    for session in await store.take(["b", "c"], NOW):
        assert session is not None
        assert (session.step, len(session.replies), session.states) == (3, 2, b"       3")
        assert await store.commit_ticks([tick([session], [1])]) == [[True]]
    assert len(journals(raw)) == 2
    assert await store.delete([("b", sessions[1].epoch + 1)], End.CLOSED, NOW) == [True]
    assert len(journals(raw)) == 2
    assert await store.expire(NOW + 10 * IDLE, 10) == ["a", "c"]
    assert journals(raw) == []
    await store.close()


async def test_a_journal_that_a_dead_server_left_behind(redis_server: RedisServer, raw: redis.Redis) -> None:
    """Whoever takes one of its sessions brings all of them to their own keys, and the server that comes back late
    writes no more.
    """
    dead, other = [await RedisStore.open(redis_server.url) for _ in range(2)]
    sessions = [await created(dead, name, states=b"\0" * 8) for name in "abc"]
    for first in (0, 1, 0):
        some = sessions[first:]
        assert all((await dead.commit_ticks([tick(some, [1])]))[0])
        wrote = {write.id: write for write in tick(some, [1]).writes()}
        sessions = [applied(each, wrote[each.id]) if each.id in wrote else each for each in sessions]
    (found,) = await other.take(["b"], NOW)
    assert found == replace(sessions[1], epoch=found.epoch)
    assert journals(raw) == []
    assert await dead.commit_ticks([tick(sessions, [1])]) == [[True, False, True]]
    assert len(journals(raw)) == 0  # what is partly stale is written session by session
    (found,) = await other.take(["a"], NOW)
    assert found is not None
    assert (found.step, len(found.replies)) == (3, 3)
    for store in (dead, other):
        await store.close()


async def test_a_journal_in_the_second_format(redis_server: RedisServer, raw: redis.Redis) -> None:
    """It had one reply of each session in each part, and blanks where there are commas now. It is read and folded, and
    releases that know of no later format find the store in this one from then on.
    """
    store = await RedisStore.open(redis_server.url)
    sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
    made = tick(sessions, [1, 1, 2])
    parts: list[bytes] = []
    for each in made.answered:
        for digests, rest in zip(each.digests, each.rest, strict=True):
            parts += [digests.tobytes(), each.head, rest.tobytes()]
    rounds = "".join(f"|{timesteps} 8 9" for timesteps in (1, 1, 2))
    parts += [made.states.tobytes(), made.before.tobytes(), f"{made.last_used!r} 16 4 8 {rounds}".encode()]
    raw.rpush("rnnserve:journal:old", *parts, "rnnserve:{a}\nrnnserve:{b}")
    raw.set("rnnserve:journal:old:open", 2)
    for name in "ab":
        raw.hset(f"rnnserve:{{{name}}}", mapping={"journal": "rnnserve:journal:old", "used": ""})
    raw.set("rnnserve:format", 2)
    later = await RedisStore.open(redis_server.url)
    assert raw.get("rnnserve:format") == "3"
    assert [head and head.step for head in await later.peek(["a", "b"])] == [session.step + 4 for session in sessions]
    wrote = made.writes()
    for session, write, found in zip(sessions, wrote, await later.take(["a", "b"], NOW), strict=True):
        assert found is not None
        assert found == replace(applied(session, write), epoch=found.epoch)
    assert journals(raw) == []
    for each_store in (store, later):
        await each_store.close()


async def test_what_is_in_a_journal_is_said_to_be_there(redis_server: RedisServer, raw: redis.Redis) -> None:
    """A look finds where sessions stand, and lets the journal be; releases that would believe the numbers in a
    session's own key find no time of its last use there, and no count of the journal's sessions.
    """
    writer, other = [await RedisStore.open(redis_server.url) for _ in range(2)]
    sessions = [await created(writer, name, states=b"\0" * 8) for name in "abc"]
    sessions = await ticked(writer, sessions, 3)
    sessions[1:] = await ticked(writer, sessions[1:], 2)
    before = raw.llen(journals(raw)[0])
    heads = await other.peek(["c", "none", "a", "b"])
    assert heads[1] is None
    seen = [(head.id, head.epoch, head.revision, head.step, head.last_used) for head in heads if head]
    assert seen == [(s.id, s.epoch, s.revision, s.step, s.last_used) for s in (sessions[2], sessions[0], sessions[1])]
    assert [head.step for head in await other.page("", 10)] == [s.step for s in sessions]
    assert raw.llen(journals(raw)[0]) == before
    assert [raw.hget(f"rnnserve:{{{name}}}", "used") for name in "abc"] == [""] * 3
    assert not any(key.endswith(":sessions") for key in journals(raw))
    for store in (writer, other):
        await store.close()


async def test_a_tick_of_known_sessions_is_pushed_and_no_script_runs(
    redis_server: RedisServer, raw: redis.Redis
) -> None:
    """That is what makes a tick cheap: only the first one of a session is compared with what is stored."""
    store = await RedisStore.open(redis_server.url)
    sessions = [await created(store, name, states=b"\0" * 8) for name in "abc"]
    sessions = await ticked(store, sessions, 1)
    raw.config_resetstat()
    sessions = await ticked(store, sessions, 20)
    assert "cmdstat_evalsha" not in raw.info("commandstats")
    assert raw.info("commandstats")["cmdstat_rpushx"]["calls"] == 20
    late = await created(store, "d", states=b"\0" * 8)
    assert late.step == 0
    sessions = await ticked(store, [*sessions, late], 1)
    assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] == 2  # it is made, and comes into the journal
    await checked(store, sessions)
    await store.close()


async def test_what_others_do_to_a_session_is_noticed(redis_server: RedisServer, raw: redis.Redis) -> None:
    """Whatever another server does, the journal is folded: the next push is refused, and the sessions that are still
    the writer's go on.
    """
    writer, other = [await RedisStore.open(redis_server.url) for _ in range(2)]
    sessions = [await created(writer, name, states=b"\0" * 8) for name in "abcdef"]
    sessions = await ticked(writer, sessions, 2)

    async def refused(gone: int) -> None:
        nonlocal sessions
        assert journals(raw) == []
        made = tick(sessions, [1])
        assert await writer.commit_ticks([made]) == [[at != gone for at in range(len(sessions))]]
        wrote = [applied(each, write) for each, write in zip(sessions, made.writes(), strict=True)]
        sessions = await ticked(writer, [each for at, each in enumerate(wrote) if at != gone], 2)

    (taken,) = await other.take(["c"], NOW)
    assert taken is not None
    await refused(2)
    assert await other.commit([after(replace(sessions[0], states=b"else"))]) == [True]  # as if it had the epoch
    await refused(0)
    assert await other.delete([("b", sessions[0].epoch)], End.CLOSED, NOW) == [True]
    await refused(0)
    assert await other.expire(NOW + 2 + IDLE, 10) == ["c"]  # the others have been used since
    assert journals(raw) == []
    sessions = await ticked(writer, sessions, 2)
    await checked(writer, sessions)
    for store in (writer, other):
        await store.close()


async def test_a_journal_of_which_a_part_is_gone(redis_server: RedisServer, raw: redis.Redis) -> None:
    """A Redis that came back without its last moments: what was not there to go on from is refused, although the
    journal is still there.
    """
    store = await RedisStore.open(redis_server.url)
    sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
    (first, second) = await ticked(store, sessions, 1)
    (name,) = [key for key in journals(raw) if not key.endswith(":open")]
    elements = raw.llen(name)
    (first,) = await ticked(store, [first], 1)
    raw.ltrim(name, 0, elements - 1)
    made = tick([second], [1])
    assert await store.commit_ticks([made]) == [[True]]  # which was not lost, and is not applied twice
    assert await store.commit_ticks([tick([first], [1])]) == [[False]]
    await checked(store, [applied(second, *made.writes())])
    await store.close()


@pytest.mark.parametrize("limit", ["_TICKS", "_BYTES", "_SESSIONS"])
async def test_a_journal_of_ticks_does_not_grow_for_ever(
    redis_server: RedisServer, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """By its ticks, its bytes or its sessions, whatever limit comes first, it is brought to the sessions' own keys."""
    monkeypatch.setattr(journal, limit, {"_TICKS": 3, "_BYTES": 400, "_SESSIONS": 2}[limit])
    store = await RedisStore.open(redis_server.url)
    sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
    names = set()
    for _ in range(12):
        sessions = await ticked(store, sessions, 1)
        (name,) = [key for key in journals(raw) if not key.endswith(":open")]  # the one before is gone
        names.add(name)
        assert raw.llen(name) <= 3 * 7
    assert len(names) >= 4
    await checked(store, sessions)
    await store.close()


async def test_sessions_that_rest_keep_nothing_but_what_is_theirs(
    redis_server: RedisServer, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others have pushed since leaves the journal from between the ticks of which something is wanted, and nobody
    has to wait until all of it was brought to the sessions' own keys.
    """
    monkeypatch.setattr(journal, "_LOOK_TICKS", 4)
    store = await RedisStore.open(redis_server.url)
    slow = [await created(store, name, states=b"\0" * 8) for name in "ab"]
    quick = [await created(store, name, states=b"\0" * 8) for name in "cde"]
    longest = 0
    for number in range(300):
        if number % 100 == 50:
            slow = await ticked(store, slow, 1)
        quick = await ticked(store, quick, 1)
        (name,) = [key for key in journals(raw) if not key.endswith(":open")]
        longest = max(longest, raw.llen(name))
    assert longest < 300  # elements, of more than 2000
    assert raw.hget("rnnserve:{a}", "journal") == name  # it was never folded
    await checked(store, [*slow, *quick])
    await store.close()


@pytest.mark.parametrize("limit", ["_LOOK_TICKS", "_LOOK_BYTES"])
async def test_what_nobody_wants_any_more_leaves_the_journal(
    redis_server: RedisServer, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Ticks whose replies no window holds, and whose states are not the last, go; those of sessions that rest stay,
    and sessions of other windows have what is theirs.
    """
    monkeypatch.setattr(journal, limit, 3)
    monkeypatch.setattr(journal, "_TICKS", 10_000)
    rng = random.Random(9)
    store = await RedisStore.open(redis_server.url)
    sessions = {name: await created(store, name, states=b"\0" * 8) for name in "abcde"}
    longest = 0
    for _ in range(200):
        names = rng.sample(sorted(sessions), rng.choice((1, 5, 5)))
        made = tick([sessions[name] for name in names], [1] * rng.randrange(1, 3), keep=4)
        assert await store.commit_ticks([made]) == [[True] * len(names)]
        sessions |= {write.id: applied(sessions[write.id], write) for write in made.writes()}
        (name,) = [key for key in journals(raw) if not key.endswith(":open")]
        longest = max(longest, raw.llen(name))
    assert longest < 60 * 10  # of 200
    await checked(store, list(sessions.values()))
    await store.close()


async def ticked(store: Store, sessions: Sequence[Record], count: int) -> list[Record]:
    """Sessions after so many ticks of one chunk."""
    sessions = list(sessions)
    for _ in range(count):
        made = tick(sessions, [1])
        assert await store.commit_ticks([made]) == [[True] * len(sessions)]
        sessions = [applied(each, write) for each, write in zip(sessions, made.writes(), strict=True)]
    return sessions


async def checked(store: Store, sessions: Sequence[Record]) -> None:
    """That sessions are stored so."""
    found = await store.take([each.id for each in sessions], NOW)
    assert [each and replace(each, epoch=1) for each in found] == [replace(each, epoch=1) for each in sessions]


async def test_a_key_of_another_kind(redis_server: RedisServer, raw: redis.Redis) -> None:
    """Somebody else's key in place of a session is an error that names the prefix."""
    store = await RedisStore.open(redis_server.url)
    raw.set("rnnserve:{a}", "mine")
    with pytest.raises(StoreCorrupt, match="another prefix"):
        await store.create([record()])
    await store.close()


async def test_a_full_redis_refuses(raw: redis.Redis, redis_server: RedisServer) -> None:
    """Without memory a write fails as a whole, with what the server says, and fits later."""
    store = await RedisStore.open(redis_server.url)
    session = await created(store)
    raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            await store.commit([after(session)])
    finally:
        raw.config_set("maxmemory", 0)
    assert [head and head.step for head in await store.peek(["a"])] == [0]
    assert await store.commit([after(session)]) == [True]
    await store.close()


async def test_servers_that_do_not_answer(tmp_path: Path) -> None:
    """A server that accepts and says nothing is given up after the time that was set."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_unix_server(silent, tmp_path / "s")
    with pytest.raises(StoreUnavailable, match="in time"):
        await RedisStore.open(f"unix://{tmp_path}/s", patience=0.05, retries=0)
    listener.close()


def test_records_are_values() -> None:
    """Equal in all fields is equal: what the tests above rest on."""
    session = record()
    assert session == Record(**{name: getattr(session, name) for name in session.__dataclass_fields__})
