"""Stores whose processes, wires and servers are killed at any moment.

The states of a session say its step, and each reply says its own: what is found after a crash must be of one moment,
not before the last one that was acknowledged.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compliance.store_suite import NOW, after, applied, created, record, rows
from redis_server import RedisServer, Wire, running_redis
from rnnserve_server.store import End, Record, Store, StoreUnavailable, Write, sqlite_journal
from rnnserve_server.store.redis import RedisStore
from rnnserve_server.store.sqlite import SqliteStore
from rnnserve_server.store.tick import Answered, Tick

SESSIONS = ["a", "b", "c"]
WINDOW = 4

WRITER = """
import asyncio, random, sys
from compliance.store_suite import NOW, after, applied
from rnnserve_server.store import open_store, sqlite_journal
from test_store_crashes import SESSIONS, commit

if sys.argv[2] == "full":
    sqlite_journal._MOST_TICKS = 2

async def main(url):
    store = await open_store(url)
    sessions = await store.take(SESSIONS, NOW)
    while True:
        writes = await commit(store, sessions, sys.argv[2])
        sessions = [applied(session, write) for session, write in zip(sessions, writes)]
        print(sessions[0].step, flush=True)

asyncio.run(main(sys.argv[1]))
"""


def tick(sessions: list[Record]) -> list[Write]:
    """A chunk of two steps for each session, of a size that makes a commit many pages."""
    return [
        after(each, 2, states=b"%d " % (each.step + 2) * 700, forget_before=max(0, each.step - 2 * (WINDOW - 1)))
        for each in sessions
    ]


def columns(sessions: list[Record]) -> Tick:
    """The same, as a server writes it. They are at the same step."""
    writes = tick(sessions)
    (answer,) = writes[0].replies
    count = len(sessions)
    rest = rows([answer.payload[5:]] * count)[None]
    answered = Answered(answer.timesteps, rows([answer.request_digest] * count)[None], answer.payload[:5], rest)
    return Tick(
        tuple([each.id for each in writes]),
        np.array([(each.epoch, each.revision, each.step) for each in writes]),
        answer.timesteps,
        writes[0].last_used,
        rows([each.states or b"" for each in writes]),
        (answered,),
        WINDOW,
    )


async def commit(store: Store, sessions: list[Record], how: str) -> list[Write]:
    """Has a store keep a tick, as writes or in columns: the writes."""
    writes = tick(sessions)
    if how != "writes":
        assert await store.commit_ticks([columns(sessions)]) == [[True] * len(writes)]
    else:
        assert await store.commit(writes) == [True] * len(writes)
    return writes


def check(session: Record, acknowledged: int) -> None:
    """Everything stored is of one moment, which is not before what was acknowledged."""
    step = session.step
    assert step >= acknowledged
    assert session.revision * 2 == step
    assert session.states == (b"%d " % step * 700 if step else b"state 0")
    firsts = list(range(max(0, step - 2 * WINDOW), step, 2))
    assert [reply.first_step for reply in session.replies] == firsts
    assert [reply.payload for reply in session.replies] == [b"y of %d" % first for first in firsts]


async def check_all(store: Store, acknowledged: int) -> list[Record]:
    """What is stored, after it was checked."""
    found = [session for session in await store.take(SESSIONS, NOW) if session is not None]
    assert len(found) == len(SESSIONS)
    for session in found:
        check(session, acknowledged)
    return found


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


def kill_while_writing(url: str, how: str, rng: random.Random, commits: int) -> int:
    """Lets another process commit, and kills it around so many commits. The last step that it acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, url, how], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    assert process.stdout is not None
    acknowledged = 0
    for _ in range(commits):
        acknowledged = int(process.stdout.readline())
    for _ in range(rng.randrange(20_000)):  # somewhere within the commits that follow
        pass
    process.kill()
    acknowledged = int(([str(acknowledged), *process.stdout.read().split("\n")[:-1]])[-1])
    process.stdout.close()
    process.wait()
    return acknowledged


@pytest.mark.parametrize("how", ["writes", "columns", "full"])
def test_sqlite_survives_its_process(tmp_path: Path, how: str) -> None:
    """A process that is killed while it commits leaves whole commits, and all that it acknowledged: also where the
    oldest ticks are brought to the sessions' rows with each.
    """
    path = tmp_path / "s.db"

    async def begin() -> None:
        store = await SqliteStore.open(path)
        assert await store.create([record(name) for name in SESSIONS]) == [True] * len(SESSIONS)
        await store.close()

    async def look(acknowledged: int) -> None:
        store = await SqliteStore.open(path)
        found = await check_all(store, acknowledged)
        assert len({session.step for session in found}) == 1  # a tick is one transaction
        await store.close()

    asyncio.run(begin())
    for seed in range(6):
        rng = random.Random(seed)
        asyncio.run(look(kill_while_writing(str(path), how, rng, rng.randrange(1, 40))))


@pytest.mark.parametrize("how", ["writes", "columns", "full"])
async def test_sqlite_survives_a_log_that_ends_anywhere(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much of the log reached the disk before a power cut, what is found is a moment that was."""
    if how == "full":
        monkeypatch.setattr(sqlite_journal, "_MOST_TICKS", 2)
    store = await SqliteStore.open(tmp_path / "s.db")
    assert all(await store.create([record(name) for name in SESSIONS]))
    await store.close()  # which empties the log
    store = await SqliteStore.open(tmp_path / "s.db")
    sessions, ends = await check_all(store, 0), [(0, 0)]
    log = tmp_path / "s.db-wal"
    for _ in range(12):
        writes = await commit(store, sessions, how)
        sessions = [applied(session, write) for session, write in zip(sessions, writes, strict=True)]
        ends.append((log.stat().st_size, sessions[0].step))
    rng = random.Random(5)
    for cut in [*(size for size, _ in ends[1:]), *(rng.randrange(ends[-1][0]) for _ in range(30))]:
        torn = tmp_path / f"torn{cut}"
        shutil.copy(tmp_path / "s.db", torn)
        content = bytearray(log.read_bytes())
        content[cut:] = rng.randbytes(rng.randrange(5000))  # what the disk held there before
        (tmp_path / f"torn{cut}-wal").write_bytes(content)
        other = await SqliteStore.open(torn)
        found = await check_all(other, max(step for size, step in ends if size <= cut))
        assert len({session.step for session in found}) == 1
        await other.close()
    await store.close()


@pytest.mark.parametrize("how", ["writes", "columns"])
def test_redis_survives_its_clients_process(redis_server: RedisServer, how: str) -> None:
    """A server that is killed while it commits leaves each session whole, and all that it acknowledged."""

    async def begin() -> None:
        store = await RedisStore.open(redis_server.url)
        assert await store.create([record(name) for name in SESSIONS]) == [True] * len(SESSIONS)
        await store.close()

    async def look(acknowledged: int) -> None:
        store = await RedisStore.open(redis_server.url)
        await check_all(store, acknowledged)
        await store.close()

    asyncio.run(begin())
    for seed in range(4):
        rng = random.Random(seed)
        asyncio.run(look(kill_while_writing(redis_server.url, how, rng, rng.randrange(1, 40))))


async def test_redis_killed_while_it_is_written_to(redis_server: RedisServer) -> None:
    """A Redis that is killed amid commits and started again on its log has all that it acknowledged, in whole
    sessions; the same store goes on with it."""
    store = await RedisStore.open(redis_server.url)
    store._per_call = 1  # a script each, so that the kill may come between two sessions of a tick
    assert all(await store.create([record(name) for name in SESSIONS]))
    sessions = await check_all(store, 0)
    for seed in range(5):
        rng = random.Random(seed)
        kill_at = sessions[0].step + 2 * rng.randrange(1, 10)
        died = False
        while not died:
            acknowledged, writes = sessions[0].step, tick(sessions)
            if acknowledged == kill_at:
                asyncio.get_running_loop().call_later(rng.random() * 0.002, redis_server.kill)
            try:
                assert await store.commit(writes) == [True] * len(SESSIONS)
            except StoreUnavailable:
                died = True
            else:
                sessions = [applied(session, write) for session, write in zip(sessions, writes, strict=True)]
        await asyncio.to_thread(redis_server.start)
        assert await store.commit(writes) == [True] * len(SESSIONS)  # the very same: applied, or recognised
        sessions = await check_all(store, acknowledged + 2)
    await store.close()


@pytest.mark.parametrize(("how", "per_call"), [("writes", 1), ("writes", 64), ("columns", 1), ("columns", 64)])
async def test_a_wire_cut_at_any_byte(redis_server: RedisServer, tmp_path: Path, how: str, per_call: int) -> None:
    """Wherever a pipeline is cut, on its way there or back, each session is before or after its write; the very same
    writes sent again are applied once."""
    rng = random.Random(per_call)
    plain = await RedisStore.open(redis_server.url)
    assert all(await plain.create([record(name) for name in SESSIONS]))
    async with Wire(redis_server, tmp_path / "wire") as wire:
        store = await RedisStore.open(wire.url, retries=0)
        store._per_call = per_call
        sessions = await check_all(store, 0)
        for _ in range(2):  # at the first, the server is still to be given the script
            wire.sent = wire.received = 0
            writes = await commit(store, sessions, how)
            sessions = [applied(session, write) for session, write in zip(sessions, writes, strict=True)]
        there, back = wire.sent, wire.received
        cuts = [*(("sent", rng.randrange(there)) for _ in range(40)), *(("received", cut) for cut in range(back))]
        for way, cut in cuts:
            sessions = await check_all(plain, sessions[0].step)
            wire.sent = wire.received = 0
            wire.cut_sent, wire.cut_received = (cut, None) if way == "sent" else (None, cut)
            with pytest.raises(StoreUnavailable):
                await commit(store, sessions, how)
            wire.cut_sent = wire.cut_received = None
            writes = await commit(store, sessions, how)
            sessions = [applied(session, write) for session, write in zip(sessions, writes, strict=True)]
            await check_all(plain, sessions[0].step)
        await store.close()
    await plain.close()


async def stale(store: Store, session: Record, how: str) -> bool:
    """Writes to a session that is another's by then: whether that was accepted."""
    if how == "columns":
        return (await store.commit_ticks([columns([session])]))[0][0]
    return (await store.commit([after(session, states=b"stale")]))[0]


@pytest.mark.parametrize("how", ["writes", "columns"])
async def test_a_stale_write_that_was_held_back(redis_server: RedisServer, tmp_path: Path, how: str) -> None:
    """Two servers on one Redis: the old owner's write is on its way when the other takes the session, and arrives
    after that. It is refused, before and after the new owner's own."""
    new = await RedisStore.open(redis_server.url)
    async with Wire(redis_server, tmp_path / "wire") as wire:
        old = await RedisStore.open(wire.url, retries=0)
        session = await created(old)
        for write_first in (False, True):
            wire.waiting.clear()
            wire.open.clear()
            under_way = asyncio.create_task(stale(old, session, how))
            await wire.waiting.wait()
            (mine,) = await new.take(["a"], NOW)
            assert mine is not None
            assert (mine.step, mine.epoch) == (session.step, session.epoch + 1)
            if write_first:
                assert await new.commit([after(mine)]) == [True]
                mine = applied(mine, after(mine))
            wire.open.set()
            assert not await under_way
            (session,) = await old.take(["a"], NOW)
            assert session is not None
            assert session.states == mine.states
            assert session.step == mine.step
        await old.close()
    await new.close()


async def test_a_write_that_arrives_twice(redis_server: RedisServer, tmp_path: Path) -> None:
    """A write that was given up and sent again another way, and arrives late all the same, changes nothing: not even
    after a rewind to the very step that it was made for."""
    quick = await RedisStore.open(redis_server.url)
    async with Wire(redis_server, tmp_path / "wire") as wire:
        slow = await RedisStore.open(wire.url, retries=0)
        session = await created(slow)
        wire.open.clear()
        write = after(session)
        under_way = asyncio.create_task(slow.commit([write]))
        await wire.waiting.wait()
        assert await quick.commit([write]) == [True]
        session = applied(session, write)
        back = after(session, 0, step=0, states=b"rewound")
        assert await quick.commit([back]) == [True]
        wire.open.set()
        assert await under_way == [False]
        (found,) = await quick.take(["a"], NOW)
        assert found is not None
        assert (found.step, found.states, found.replies) == (0, b"rewound", ())
        await slow.close()
    await quick.close()


@pytest.mark.parametrize("how", ["again", "taken over", "ended"])
async def test_a_push_that_was_given_up_and_arrives_late(redis_server: RedisServer, tmp_path: Path, how: str) -> None:
    """A tick that is pushed without a question, is given up and arrives after all changes nothing any more: not when it
    was sent again another way and more came after it, nor when another server has the session, or a new one of its id.
    """
    quick = await RedisStore.open(redis_server.url)
    async with Wire(redis_server, tmp_path / "wire") as wire:
        slow = await RedisStore.open(wire.url, retries=0, patience=0.3)
        session, other = await created(slow, "a", states=b"state 0"), await created(slow, "b", states=b"state 0")
        assert await slow.commit_ticks([columns([session, other])]) == [[True, True]]
        session, other = applied(session, tick([session])[0]), applied(other, tick([other])[0])
        wire.waiting.clear()
        wire.open.clear()
        with pytest.raises(StoreUnavailable):
            await slow.commit_ticks([columns([session])])
        assert wire.waiting.is_set()
        if how == "again":
            for _ in range(2):
                (write,) = tick([session])
                assert await quick.commit([write]) == [True]
                session = applied(session, write)
        elif how == "taken over":
            (taken,) = await quick.take(["a"], NOW)
            assert taken is not None
            assert await quick.commit_ticks([columns([taken])]) == [[True]]
            session = applied(taken, tick([taken])[0])
        else:
            assert await quick.delete([("a", session.epoch)], End.CLOSED, NOW) == [True]
            session = await created(quick, "a", states=b"state 0")
            assert await quick.commit_ticks([columns([session])]) == [[True]]
            session = applied(session, tick([session])[0])
        wire.open.set()
        found = await slow.take(["a", "b"], NOW)
        assert [each and replace(each, epoch=1) for each in found] == [replace(e, epoch=1) for e in (session, other)]
        await slow.close()
    await quick.close()
