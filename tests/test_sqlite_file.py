"""Who waits for what, where sessions are in a SQLite file: the event loop for nobody, answers for the disk."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import rnnserve
from compliance.store_suite import NOW, applied, record
from rnnserve_server.store import Record, StoreUnavailable
from rnnserve_server.store.base import Applied
from rnnserve_server.store.sqlite import SqliteStore
from rnnserve_server.store.tick import Tick
from serving import running_server
from test_store_crashes import SESSIONS, columns, tick

HANDED_OVER = 0.0
HERE = 10.0


async def opened(path: Path, inline_seconds: float, **options: object) -> tuple[SqliteStore, list[Record]]:
    """A store with sessions of which it is in mind where they stand."""
    store = await SqliteStore.open(path, inline_seconds=inline_seconds, **options)  # type: ignore[arg-type]
    assert all(await store.create([record(name) for name in SESSIONS]))
    sessions = [session for session in await store.take(SESSIONS, NOW) if session is not None]
    assert await store.commit_ticks([columns(sessions)]) == [[True] * len(SESSIONS)]
    return store, stepped(sessions)


def stepped(sessions: list[Record]) -> list[Record]:
    """Sessions after a tick of theirs."""
    return [applied(session, write) for session, write in zip(sessions, tick(sessions), strict=True)]


def begun(store: SqliteStore, *ticks: Tick) -> asyncio.Future[Applied | Exception]:
    """What is told of a commit that has begun."""
    told: asyncio.Future[Applied | Exception] = asyncio.get_running_loop().create_future()
    store.begin_commit(ticks, told.set_result)
    return told


@pytest.mark.parametrize("inline_seconds", [HERE, HANDED_OVER])
async def test_nothing_is_told_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline_seconds: float
) -> None:
    """Of a machine that loses its power when a commit was told, all is there that was told: by ticks or by writes."""
    monkeypatch.setattr(
        "rnnserve_server.store.sqlite_file._LOG_PAGES", 40
    )  # so that the log is moved back now and then
    disk, path = tmp_path / "disk", tmp_path / "s.db"
    disk.mkdir()

    def reaches_the_disk(log: int) -> None:
        for each in (path, path.with_name("s.db-wal")):
            shutil.copy(each, disk)

    monkeypatch.setattr(os, "fdatasync", reaches_the_disk)
    store, sessions = await opened(path, inline_seconds)
    for number in range(40):
        if number % 7:
            assert await begun(store, columns(sessions)) == [[True] * len(SESSIONS)]
        else:
            assert all(await store.commit(tick(sessions)))
        sessions = stepped(sessions)
        after_power = tmp_path / f"after{number}"
        shutil.copytree(disk, after_power)
        again = await SqliteStore.open(after_power / "s.db")
        assert [head and head.step for head in await again.peek(SESSIONS)] == [session.step for session in sessions]
        await again.close()
    await store.close()


async def test_only_a_fast_disk_keeps_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop waits for the disk itself as long as that takes less than it may; once it has taken longer, the
    store's thread does, until the disk has been fast for a while.
    """
    seconds = itertools.chain([0.0001] * 8, [0.1], itertools.repeat(0.0001))
    now, waited = 0.0, list[bool]()

    def takes_time(log: int) -> None:
        nonlocal now
        now += next(seconds)
        waited.append(threading.current_thread() is threading.main_thread())

    monkeypatch.setattr(os, "fdatasync", takes_time)
    monkeypatch.setattr("rnnserve_server.store.sqlite_file._clock", lambda: now)
    store, sessions = await opened(tmp_path / "s.db", 0.0005)
    waited.clear()
    for _ in range(60):
        assert await begun(store, columns(sessions)) == [[True] * len(SESSIONS)]
        sessions = stepped(sessions)
    await store.close()
    fast, slow = waited.index(False), waited.count(False)
    assert fast > 0
    assert slow > 10
    assert waited == [True] * fast + [False] * slow + [True] * (60 - fast - slow)
    assert waited[-1]


async def test_a_log_is_written_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log grows by whole pieces before SQLite comes to its end, up to the length at which it is moved back, whoever
    of two stores on it writes; and of a machine that is killed at any time, all is there that was told.
    """
    monkeypatch.setattr("rnnserve_server.store.sqlite_file._LOG_PAGES", 100)
    monkeypatch.setattr("rnnserve_server.store.sqlite_file._PAGES_HERE", 50)
    path, log = tmp_path / "s.db", tmp_path / "s.db-wal"
    store, sessions = await opened(path, HERE)
    other = await SqliteStore.open(path, inline_seconds=HERE)
    sizes = {log.stat().st_size}
    for number in range(60):
        writer = other if number % 20 >= 10 else store
        if number % 10 == 0:
            sessions = [session for session in await writer.take(SESSIONS, NOW) if session is not None]
        assert await begun(writer, columns(sessions)) == [[True] * len(SESSIONS)]
        sessions = stepped(sessions)
        sizes.add(log.stat().st_size)
        killed = tmp_path / f"killed{number}"
        killed.mkdir()
        for each in (path, log):
            shutil.copy(each, killed)
        again = await SqliteStore.open(killed / "s.db")
        assert [head and head.step for head in await again.peek(SESSIONS)] == [session.step for session in sessions]
        await again.close()
    await other.close()
    await store.close()
    assert not [size for size in sizes if size % 131072]
    assert len(sizes) > 2
    assert max(sizes) <= 2 * 100 * 16408


async def test_a_log_that_cannot_be_written_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room for what is stored, but not for more, it is stored."""

    def fails(log: int, what: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    store, sessions = await opened(tmp_path / "s.db", HERE)
    assert await begun(store, columns(sessions)) == [[True] * len(SESSIONS)]
    assert (tmp_path / "s.db-wal").stat().st_size % 131072
    await store.close()


@pytest.mark.parametrize("inline_seconds", [HERE, HANDED_OVER])
async def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline_seconds: float) -> None:
    """What may not be on the disk is not told as stored, nor is anything after it, though the disk may seem well: it is
    known what is there when the file is opened again.
    """
    store, sessions = await opened(tmp_path / "s.db", inline_seconds)

    def fails(log: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fails)
        told = await begun(store, columns(sessions))
        assert isinstance(told, StoreUnavailable)
        assert "Input/output error" in str(told)
    told = await begun(store, columns(stepped(sessions)))
    assert isinstance(told, StoreUnavailable)
    assert "look at its disk, and start the server again" in str(told)
    with pytest.raises(StoreUnavailable, match="nothing is stored any more"):
        await store.peek(SESSIONS)
    await store.close()
    again = await SqliteStore.open(tmp_path / "s.db")
    assert all(await again.create([record("d")]))
    assert [head and head.step for head in await again.peek(SESSIONS)] == [sessions[0].step + 2] * len(SESSIONS)
    await again.close()


def test_who_watches_over_a_server_learns_that_its_disk_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that can store nothing any more says that it does not serve, so that it is started again; its client is
    told at once.
    """
    monkeypatch.setattr("rnnserve_server.server._SWEEP_SECONDS", 0.05)

    def fails(log: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with (
        running_server(store=str(tmp_path / "s.db"), drain_seconds=0.1) as server,
        rnnserve.Client(server.address, retry_for=0) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        session = client.session("lstm-4")
        session.step(np.zeros(5, np.float32))
        told = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(told).status == health_pb2.HealthCheckResponse.SERVING
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", fails)
            with pytest.raises(rnnserve.RnnserveError, match="Input/output error"):
                session.step(np.zeros(5, np.float32))
        assert next(told).status == health_pb2.HealthCheckResponse.NOT_SERVING
        told.cancel()


async def test_a_link_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log lies beside the file that a link leads to, and is synced there; the path may be relative."""
    (tmp_path / "there").mkdir()
    (tmp_path / "s.db").symlink_to(Path("there") / "s.db")
    monkeypatch.chdir(tmp_path)
    store, sessions = await opened(Path("s.db"), HERE)
    assert await begun(store, columns(sessions)) == [[True] * len(SESSIONS)]
    assert (tmp_path / "there" / "s.db-wal").exists()
    assert not (tmp_path / "s.db-wal").exists()
    await store.close()


async def test_the_event_loop_waits_for_no_other_process(tmp_path: Path) -> None:
    """While another process has the file locked, the loop goes on; what waits is committed when the lock is gone."""
    store, sessions = await opened(tmp_path / "s.db", HERE, patience=60.0)
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    told = begun(store, columns(sessions))
    looking = asyncio.create_task(store.count(["lstm"]))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not told.done()
    assert not looking.done()
    other.execute("ROLLBACK")
    other.close()
    assert await told == [[True] * len(SESSIONS)]
    assert await looking == [len(SESSIONS)]
    await store.close()


async def test_what_another_process_wrote_is_looked_at(tmp_path: Path) -> None:
    """Ticks that do not follow what another process left are refused, though they follow what was in mind."""
    store, sessions = await opened(tmp_path / "s.db", HERE)
    assert await begun(store, columns(sessions)) == [[True] * len(SESSIONS)]
    other = await SqliteStore.open(tmp_path / "s.db")
    assert (await other.take(["b"], NOW))[0] is not None
    assert await begun(store, columns(stepped(sessions))) == [[True, False, True]]
    await other.close()
    await store.close()


def on_the_loops_thread(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each commit whether the event loop made it."""
    made: list[bool] = []
    here = store._file.here

    def noted(function: Callable[[], bool], pages: int) -> bool:
        made.append(here(function, pages))
        return made[-1]

    monkeypatch.setattr(store._file, "here", noted)
    return made


async def test_the_log_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ticks the event loop appends: now and then the thread does it, and moves the log into the file."""
    monkeypatch.setattr("rnnserve_server.store.sqlite_file._LOG_PAGES", 60)
    monkeypatch.setattr("rnnserve_server.store.sqlite_file._PAGES_HERE", 30)
    store, sessions = await opened(tmp_path / "s.db", HERE)
    made = on_the_loops_thread(store, monkeypatch)
    moved = 0
    for _ in range(300):
        before = (tmp_path / "s.db").stat().st_mtime_ns
        assert await begun(store, columns(sessions)) == [[True] * len(SESSIONS)]
        sessions = stepped(sessions)
        if (tmp_path / "s.db").stat().st_mtime_ns != before:
            moved += 1
            assert not made[-1], "the event loop has moved the log"
    assert sum(made) > 200
    assert moved > 3
    # What follows the commit that moves the log begins it anew, which waits for the disk.
    assert {len(list(turns)) for here, turns in itertools.groupby(made) if not here} == {2}
    assert (tmp_path / "s.db-wal").stat().st_size < 200 * 16384
    assert [head and head.step for head in await store.peek(SESSIONS)] == [each.step for each in sessions]
    await store.close()


@pytest.mark.parametrize(("inline_seconds", "here"), [(HERE, True), (1e-6, False), (HANDED_OVER, False)])
async def test_a_large_commit_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline_seconds: float, here: bool
) -> None:
    """What keeps the event loop for longer than it may be kept is the thread's work."""
    store, sessions = await opened(tmp_path / "s.db", inline_seconds)
    made = on_the_loops_thread(store, monkeypatch)
    assert await begun(store, columns(sessions)) == [[True] * len(SESSIONS)]
    assert (made == [True]) == here
    await store.close()


async def test_the_connection_is_used_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the thread has something to do with the file, ticks wait for their turn there."""
    store, sessions = await opened(tmp_path / "s.db", HERE)
    made, gate = on_the_loops_thread(store, monkeypatch), threading.Event()
    first = asyncio.create_task(store._file.run(gate.wait))
    await asyncio.sleep(0)
    second = asyncio.create_task(store.peek(SESSIONS))
    await asyncio.sleep(0)
    first.cancel()  # nobody waits for it, but it goes on
    told = begun(store, columns(sessions))
    assert made == []
    gate.set()
    assert await told == [[True] * len(SESSIONS)]
    assert [head and head.step for head in await second] == [each.step for each in sessions]
    assert await begun(store, columns(stepped(sessions))) == [[True] * len(SESSIONS)]
    assert made == [True]
    await store.close()


async def test_a_call_that_nobody_waits_for_any_more(tmp_path: Path) -> None:
    """It is done all the same, and the file is used by one at a time."""
    store, sessions = await opened(tmp_path / "s.db", HERE)
    for _ in range(50):
        calls = [asyncio.create_task(store.peek(SESSIONS)) for _ in range(3)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        told = begun(store, columns(sessions))
        await asyncio.gather(*calls, return_exceptions=True)
        assert await told == [[True] * len(SESSIONS)]
        sessions = stepped(sessions)
    assert store._file.is_idle
    assert [head and head.step for head in await store.peek(SESSIONS)] == [each.step for each in sessions]
    await store.close()
