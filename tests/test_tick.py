"""Ticks as stores keep them: in columns."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compliance.store_suite import NOW, after, applied, created, record, tick
from rnnserve_server.store import End, StoreCorrupt, Write
from rnnserve_server.store.base import Reply
from rnnserve_server.store.sqlite import SqliteStore
from rnnserve_server.store.tick import Tick


def pack(made: Tick) -> bytes:
    """As it lies in a file."""
    return b"".join([*made.pieces(7), b"something else"])


def test_a_packed_tick_is_the_tick() -> None:
    """What it stands for is the same; what was cut off is told."""
    made = tick([record(name) for name in "abc"], [2, 1, 1, 1, 3])
    assert [len(each) for each in made.answered] == [1, 3, 1]
    assert [reply.first_step for reply in made.replies(2)] == [0, 2, 3, 4, 5]
    packed = pack(made)
    assert Tick.unpack(packed).writes() == made.writes()
    assert Tick.unpack(pack(made.part(1, 2))).writes() == made.writes()[1:2]
    floors = replace(made, forget_before=np.array([0, 1, 2]))
    assert [write.forget_before for write in Tick.unpack(pack(floors)).writes()] == [0, 1, 2]
    assert Tick.unpack(packed).number == 7
    for cut in (0, 3, 20, len(packed) - 15):
        with pytest.raises(StoreCorrupt):
            Tick.unpack(packed[:cut])
    stop = 4 + int.from_bytes(packed[:4], "little")
    for replies in (b"-1", b"1.5", b"9" * 30, b"1, 1"):
        said = packed[4:stop].replace(b"[2, 1, ", b"[2, %s, " % replies)
        assert said != packed[4:stop]
        with pytest.raises(StoreCorrupt):
            Tick.unpack(len(said).to_bytes(4, "little") + said + packed[stop:])


@pytest.mark.parametrize("version", [2, 3])
def test_a_tick_of_an_earlier_format(version: int) -> None:
    """The second had its numbers as lists; neither it nor the third says how many replies of each session are alike. It
    is read.
    """
    made = replace(tick([record(name) for name in "ab"], [2, 1]), forget_before=np.array([0, 2]))
    answered = [
        [each.timesteps, each.digests.shape[2], each.head.decode(), each.rest.shape[2]] for each in made.answered
    ]
    common = [made.timesteps, made.last_used, made.keep, made.states.shape[1], answered]
    contents = [made.states, *(part for each in made.answered for part in (each.digests, each.rest))]
    if version == 2:
        what = json.dumps([made.ids, *made.numbers.T.tolist(), [0, 2], *common])
    else:
        what = json.dumps(["\n".join(made.ids), *common, True])
        contents = [made.numbers, np.array([0, 2]), *contents]
    packed = b"".join([len(what).to_bytes(4, "little"), what.encode(), *(each.tobytes() for each in contents)])
    assert Tick.unpack(packed).writes() == made.writes()


def test_a_window_smaller_than_what_is_new() -> None:
    """A write cannot keep less than it brings."""
    (write,) = tick([record()], [1, 1, 1]).writes()
    with pytest.raises(ValueError, match="3 new replies in a window of 2"):
        replace(write, keep=2)
    assert isinstance(replace(write, keep=3), Write)


async def test_a_journal_that_has_grown_is_brought_to_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of it, by its bytes or its ticks, whatever limit comes first; the sessions go on in it."""
    from rnnserve_server.store import sqlite_journal

    store = await SqliteStore.open(tmp_path / "s.db")
    other = sqlite3.connect(tmp_path / "s.db")
    sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
    for limit, value in (("_MOST_BYTES", 500), ("_MOST_TICKS", 2)):
        with monkeypatch.context() as patched:
            patched.setattr(sqlite_journal, limit, value)
            for _ in range(5):
                assert await store.commit_ticks([tick(sessions, [1])]) == [[True, True]]
                sessions = [replace(each, step=each.step + 1, revision=each.revision + 1) for each in sessions]
        ((ticks,),) = other.execute("SELECT count(*) FROM journal")
        ((step,),) = other.execute("SELECT step FROM sessions WHERE id = 'a'")
        assert 0 < ticks < 5
        assert step + ticks == sessions[0].step
    other.close()
    await store.close()


async def test_a_journal_loses_what_nobody_wants_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks whose replies are in no window any more: so the journal of sessions that go on is small without being
    brought to the rows, and what is brought there in the end is right all the same.
    """
    monkeypatch.setattr("rnnserve_server.store.sqlite_journal._LOOK_BYTES", 3000)
    store, other = await SqliteStore.open(tmp_path / "s.db"), sqlite3.connect(tmp_path / "s.db")
    sessions = [await created(store, name, states=b"\0" * 8) for name in "abc"]
    windows: dict[str, list[Reply]] = {each.id: [] for each in sessions}
    for number in range(60):
        some = sessions if number % 7 else sessions[:1]
        made = tick(some, [1, 2], keep=5)
        assert await store.commit_ticks([made]) == [[True] * len(some)]
        for position, each in enumerate(some):
            windows[each.id] = [*windows[each.id], *made.replies(position)][-5:]
            sessions[position] = replace(each, step=each.step + 3, revision=each.revision + 1)
    ((nbytes,),) = other.execute("SELECT sum(length(tick)) FROM journal")
    ((step,),) = other.execute("SELECT max(step) FROM sessions")
    assert 0 < nbytes < 4000
    assert step == 0
    other.close()
    for session in sessions:
        (found,) = await store.take([session.id], NOW)
        assert found is not None
        assert (found.step, found.revision) == (session.step, session.revision)
        assert list(found.replies) == windows[session.id]
    await store.close()


async def test_sessions_that_come_and_go_leave_the_others_in_the_journal(tmp_path: Path) -> None:
    """Who opens, takes, looks at, writes to or ends a session keeps nobody waiting for what is stored of others."""
    store, other = await SqliteStore.open(tmp_path / "s.db"), sqlite3.connect(tmp_path / "s.db")
    sessions = [await created(store, name, states=b"\0" * 8) for name in "abcde"]
    assert await store.commit_ticks([tick(sessions, [1])]) == [[True] * 5]
    await created(store, "f")
    (taken,) = await store.take(["b"], NOW)
    assert taken is not None
    assert await store.commit([after(applied(sessions[2], tick(sessions, [1]).writes()[2]))]) == [True]
    assert await store.delete([("d", sessions[3].epoch)], End.CLOSED, NOW) == [True]
    heads = await store.peek(["e", "none"])
    assert [head and head.step for head in heads] == [1, None]
    assert await store.expire(NOW, 10) == []
    steps = dict(other.execute("SELECT id, step FROM sessions"))
    assert steps == {"a": 0, "b": 1, "c": 2, "e": 1, "f": 0}
    assert other.execute("SELECT count(*) FROM journal").fetchone() == (1,)
    assert [(head.id, head.step) for head in await store.page("", 10)] == [
        ("a", 1), ("b", 1), ("c", 2), ("e", 1), ("f", 0)
    ]  # fmt: skip
    other.close()
    await store.close()


async def test_sessions_that_have_ended_leave_nothing_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do those that were taken, which are as their rows say. What is in mind of sessions goes too."""
    monkeypatch.setattr("rnnserve_server.store.sqlite_journal._MORE_TICKS", 4)
    monkeypatch.setattr("rnnserve_server.store.sqlite_journal._MOST_SESSIONS", 8)
    store, other = await SqliteStore.open(tmp_path / "s.db"), sqlite3.connect(tmp_path / "s.db")
    stays = await created(store, "stays", states=b"\0" * 8)
    assert await store.commit_ticks([tick([stays], [1])]) == [[True]]
    for number in range(40):
        session = await created(store, f"s{number}", states=b"\0" * 8)
        assert await store.commit_ticks([tick([session], [1])]) == [[True]]
        if number % 2:
            assert await store.delete([(session.id, session.epoch)], End.CLOSED, NOW) == [True]
        else:
            await store.take([session.id], NOW)
    assert other.execute("SELECT count(*) FROM journal").fetchone()[0] < 10
    assert len(store._journal._known) <= 16
    (head,) = await store.peek(["stays"])
    assert head is not None
    assert head.step == 1
    other.close()
    await store.close()


@pytest.mark.parametrize("seed", range(6))
async def test_rows_of_large_ticks_are_written_over(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of which nothing is wanted any more, so that the file is written in the same places. Whoever opens it after
    a crash finds each session as it was left, whatever lies in the rows behind and beside what counts.
    """
    rng = random.Random(seed)
    monkeypatch.setattr("rnnserve_server.store.sqlite_file.PAGE_BYTES", 512)
    monkeypatch.setattr("rnnserve_server.store.sqlite.PAGE_BYTES", 512)
    for name, value in (("_LARGE_BYTES", 300), ("_LOOK_BYTES", 2000), ("_SPARE_ROWS", 4)):
        monkeypatch.setattr(f"rnnserve_server.store.sqlite_journal.{name}", value)
    store, other = await SqliteStore.open(tmp_path / "s.db"), sqlite3.connect(tmp_path / "s.db")
    sessions = {name: await created(store, name, states=b"\0" * 8) for name in "abcdefgh"}
    for _ in range(60):
        names = rng.choice(["abcd", "efgh", rng.sample("abcdefgh", 3)])
        made = tick([sessions[name] for name in names], rng.choices([1, 2], k=rng.randrange(1, 5)), keep=4)
        assert await store.commit_ticks([made]) == [[True] * len(names)]
        sessions |= {write.id: applied(sessions[write.id], write) for write in made.writes()}
    ((rows, last),) = other.execute("SELECT count(*), max(n) FROM journal")
    assert rows <= last <= 45  # of 60
    other.close()
    for behind in ("", "-wal", "-shm"):
        shutil.copy(tmp_path / f"s.db{behind}", tmp_path / f"crashed.db{behind}")
    for path in (tmp_path / "crashed.db", tmp_path / "s.db"):
        again = await SqliteStore.open(path)
        found = await again.take(list(sessions), NOW)
        assert [each and replace(each, epoch=1) for each in found] == [
            replace(each, epoch=1) for each in sessions.values()
        ]
        await again.close()
    await store.close()


async def test_a_journal_that_a_dead_process_left_behind(tmp_path: Path) -> None:
    """It is brought to the rows by whoever opens the file next."""
    store = await SqliteStore.open(tmp_path / "s.db")
    sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
    assert await store.commit_ticks([tick(sessions, [1, 2])]) == [[True, True]]
    await store._file.run(store._db.close)  # without another word
    again = await SqliteStore.open(tmp_path / "s.db")
    heads = await again.peek(["a", "b"])
    assert [head and head.step for head in heads] == [3, 3]
    (found,) = await again.take(["b"], NOW)
    assert found is not None
    assert [reply.first_step for reply in found.replies] == [0, 1]
    await again.close()


@pytest.mark.parametrize("version", [1, 2, 3, 4])
async def test_a_file_of_an_earlier_format_goes_on(version: int, tmp_path: Path) -> None:
    """The first lacks the journal, and is given one; the others have it. Releases that know of no later format refuse
    the file from then on.
    """
    store = await SqliteStore.open(tmp_path / "s.db")
    session = await created(store, states=b"\0" * 8)
    await store.close()
    with sqlite3.connect(tmp_path / "s.db") as db:
        if version == 1:
            db.execute("DROP TABLE journal")
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    store = await SqliteStore.open(tmp_path / "s.db")
    assert await store.commit_ticks([tick([session], [2])]) == [[True]]
    (head,) = await store.peek(["a"])
    assert head is not None
    assert head.step == 2
    await store.close()
    with sqlite3.connect(tmp_path / "s.db") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (5,)
    db.close()
