"""What every store promises, wherever it keeps its sessions.

Inherit `StoreSuite`, give it a fixture `opener`, and pytest holds the store to its contract.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from rnnserve_server.store import End, Ended, Meta, Record, Reply, Store, Write, first_epoch
from rnnserve_server.store.tick import Answered, Rows, Tick

NOW = 1_700_000_000.0
REMEMBER = 100.0
IDLE = 60.0

Opener = Callable[[str], Awaitable[Store]]
"""Opens the store of a name. What is opened by one name is one store, and its handles are as two servers'."""

_places = itertools.count()


def record(session_id: str = "a", **changes: Any) -> Record:
    """A session at step 0."""
    lives = {
        name: changes.pop(name) for name in ("create_time", "idle_lifetime", "lifetime", "model") if name in changes
    }
    meta = replace(Meta("lstm", "1", "sha256:ab", 2, {"return_sequences": True}, NOW, IDLE), **lives)
    start = Record(session_id, meta, first_epoch(), 0, 0, meta.create_time, b"state 0")
    return replace(start, **changes)


def reply(first_step: int, timesteps: int = 1, payload: bytes = b"") -> Reply:
    """An answer that can be told from those to other chunks."""
    return Reply(first_step, timesteps, b"digest %d" % first_step, payload or b"y of %d" % first_step)


def after(before: Record, timesteps: int = 1, **changes: Any) -> Write:
    """What a chunk of some steps leaves behind."""
    step = before.step + timesteps
    write = Write(
        before.id,
        before.epoch,
        before.revision + 1,
        step,
        before.last_used + 1,
        b"state %d" % step,
        (reply(before.step, timesteps),) if timesteps else (),
    )
    return replace(write, **changes)


def applied(before: Record, write: Write) -> Record:
    """What a write makes of a session, said anew: replies in the window are those that both may keep."""
    kept = [r for r in before.replies if r.first_step >= write.forget_before]
    bound = min([write.step, *(r.first_step for r in write.replies)])
    kept = [r for r in kept if r.first_step + r.timesteps <= bound]
    states = before.states if write.states is None else write.states
    if write.keep:
        kept = kept[max(0, len(kept) + len(write.replies) - write.keep) :]
    return replace(
        before,
        revision=write.revision,
        step=write.step,
        last_used=write.last_used,
        states=states,
        replies=(*kept, *write.replies),
    )


def tick(before: Sequence[Record], chunks: Sequence[int], keep: int = 16) -> Tick:
    """What chunks of so many steps leave behind of some sessions."""
    steps = [each.step + sum(chunks) for each in before]
    answered, more = list[Answered](), list(chunks[-keep:]) if keep else []
    at = [each.step + sum(chunks[: len(chunks) - len(more)]) for each in before]
    while more:
        timesteps, alike = more[0], 1
        while alike < len(more) and more[alike] == timesteps:
            alike += 1
        steps_of = [[step + r * timesteps for step in at] for r in range(alike)]
        digests = np.stack([rows([b"%8d" % step for step in some]) for some in steps_of])
        rest = np.stack([rows([b"y%8d" % step for step in some]) for some in steps_of])
        answered.append(Answered(timesteps, digests, b"head", rest))
        at = [step + alike * timesteps for step in at]
        more = more[alike:]
    return Tick(
        tuple([each.id for each in before]),
        np.array([(each.epoch, each.revision + 1, step) for each, step in zip(before, steps, strict=True)]),
        sum(chunks),
        max(each.last_used for each in before) + 1,
        rows([b"%8d" % step for step in steps]),
        tuple(answered),
        keep,
    )


def rows(parts: Sequence[bytes]) -> Rows:
    """As a tick has them."""
    return np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), -1)


async def created(store: Store, session_id: str = "a", **changes: Any) -> Record:
    """A session that was stored."""
    session = record(session_id, **changes)
    assert await store.create([session]) == [True]
    return session


async def stored(store: Store, session_id: str = "a", now: float = NOW) -> Record:
    """What is stored of a session but for its epoch, which this raises."""
    (found,) = await store.take([session_id], now)
    assert found is not None
    return found


class StoreSuite(ABC):
    """The contract of `Store`."""

    durable = True
    """Whether sessions outlive the handles."""

    @pytest.fixture
    @abstractmethod
    def opener(self) -> Opener:
        """Opens stores that remember ends for `REMEMBER` seconds."""

    @pytest.fixture
    async def handles(self, opener: Opener) -> AsyncIterator[Callable[[], Awaitable[Store]]]:
        """Opens handles on one store that is empty at first."""
        place, opened = f"place{next(_places)}", []

        async def handle() -> Store:
            opened.append(await opener(place))
            return opened[-1]

        yield handle
        for each in opened:
            await each.close()

    @pytest.fixture
    async def store(self, handles: Callable[[], Awaitable[Store]]) -> Store:
        return await handles()

    # What is kept

    async def test_what_is_stored_comes_back(self, store: Store) -> None:
        """Every field comes back as it was given, whatever bytes, text and numbers it holds."""
        most = 2**63 - 1
        odd = bytes(range(256)) * 3
        meta = Meta(
            "m/ö \n'", "2", "sha256:x", 7, {"a": True, "b": [1, {"c": None}]}, NOW + 0.123456789, 1 / 3, 1e9, 5, 6
        )
        window = (Reply(0, 2, b"", b""), Reply(2, 1, odd, odd), Reply(most - 3, 3, b"\0", b"\r\n$5\r\n"))
        given = Record("A.b_c:d-9", meta, 2**48, 0, most, NOW + 1 / 7, odd, window)
        bare = record("bare", states=b"")
        assert await store.create([given, bare]) == [True, True]
        heads = await store.peek([given.id, "none", bare.id])
        assert heads[1] is None
        for head, whole in zip((heads[0], heads[2]), (given, bare), strict=True):
            assert head is not None
            assert all(getattr(head, name) == getattr(whole, name) for name in head.__dataclass_fields__)
        assert await store.take([bare.id, "none", given.id], NOW) == [
            replace(bare, epoch=bare.epoch + 1),
            None,
            replace(given, epoch=given.epoch + 1),
        ]

    async def test_outlives_its_handle(self, opener: Opener) -> None:
        """What was committed is there when the store is opened again, and so is why a session ended."""
        if not self.durable:
            pytest.skip("this store lives as long as its process")
        first = await opener("again")
        session, other = await created(first), await created(first, "b")
        assert await first.commit([after(session)]) == [True]
        assert await first.delete([("b", other.epoch)], End.EVICTED, NOW) == [True]
        await first.close()
        second = await opener("again")
        assert (await stored(second)).step == 1
        assert await second.ended(["b"], NOW) == [Ended(End.EVICTED, NOW, other.epoch)]
        await second.close()

    async def test_large_batches_and_values(self, store: Store) -> None:
        """A tick of hundreds of sessions, and one of megabytes, are committed like any other."""
        many = [record(f"s{index}") for index in range(300)]
        assert await store.create(many) == [True] * 300
        assert await store.commit([after(each) for each in many]) == [True] * 300
        big = await created(store, "big", states=bytes(2 << 20))
        write = after(big, states=b"x" * (2 << 20), replies=(reply(0, payload=b"y" * (3 << 20)),))
        assert await store.commit([write]) == [True]
        assert replace(await stored(store, "big"), epoch=big.epoch) == applied(big, write)
        found = await store.take([each.id for each in many], NOW)
        assert [each and each.step for each in found] == [1] * 300

    async def test_nothing_to_do(self, store: Store) -> None:
        """Empty batches are no mistake."""
        assert await store.create([]) == []
        assert await store.take([], NOW) == []
        assert await store.peek([]) == []
        assert await store.commit([]) == []
        assert await store.delete([], End.CLOSED, NOW) == []
        assert await store.ended([], NOW) == []
        assert await store.expire(NOW, 10) == []
        assert await store.page("", 10) == []

    async def test_a_session_is_named_once_in_a_batch(self, store: Store) -> None:
        """Two writes for one session in one batch are a mistake of the caller's, and neither is applied."""
        session = await created(store)
        with pytest.raises(ValueError, match="twice"):
            await store.commit([after(session), after(session)])
        with pytest.raises(ValueError, match="twice"):
            await store.take(["a", "a"], NOW)
        with pytest.raises(ValueError, match="twice"):
            await store.create([record("b"), record("b")])
        with pytest.raises(ValueError, match="twice"):
            await store.delete([("a", 1), ("a", 2)], End.CLOSED, NOW)
        assert (await stored(store)).step == 0

    # Writes

    async def test_steps_one_after_the_other(self, store: Store) -> None:
        """Each write follows the one before, and state, step, use and window are always of the same write."""
        session = await created(store)
        for timesteps in (1, 3, 2, 1):
            write = after(session, timesteps, forget_before=max(0, session.step - 3))
            assert await store.commit([write]) == [True]
            session = applied(session, write)
            session = replace(session, epoch=session.epoch + 1)
            assert await store.take(["a"], NOW) == [session]

    async def test_a_write_sent_again_is_recognised(self, store: Store) -> None:
        """The very same write is answered True again and applied once; another of its number is refused."""
        session = await created(store)
        write = after(session, 2)
        assert [await store.commit([write]) for _ in range(3)] == [[True]] * 3
        for other in (
            replace(write, states=b"else"),
            replace(write, step=3),
            replace(write, replies=(replace(write.replies[0], request_digest=b"else"),)),
            replace(write, replies=(replace(write.replies[0], payload=b"else"),)),
        ):
            assert await store.commit([other]) == [False]
        assert replace(await stored(store), epoch=session.epoch) == applied(session, write)

    async def test_a_write_must_follow(self, store: Store) -> None:
        """A write that leaves one out, comes behind, or is of another epoch changes nothing."""
        session = await created(store)
        write = after(session)
        for other in (
            replace(write, revision=2),
            replace(write, revision=3),
            replace(write, epoch=session.epoch + 1),
            replace(write, epoch=session.epoch - 1 or 2),
            replace(write, id="none"),
        ):
            assert await store.commit([other]) == [False]
        assert replace(await stored(store), epoch=session.epoch) == session

    async def test_a_refused_write_leaves_the_others_alone(self, store: Store) -> None:
        """Of a batch, the writes that fit are applied, and only those."""
        sessions = [await created(store, name) for name in "abcd"]
        writes = [after(each) for each in sessions]
        writes[1] = replace(writes[1], epoch=writes[1].epoch + 5)
        writes[2] = replace(writes[2], id="none")
        assert await store.commit(writes) == [True, False, False, True]
        found = await store.take(list("abcd"), NOW)
        assert [each and each.step for each in found] == [1, 0, 0, 1]

    async def test_states_and_replies_may_stay(self, store: Store) -> None:
        """A use without states keeps them; a reset changes them and keeps step and window."""
        session = await created(store)
        for change in (
            lambda s: after(s, 2),
            lambda s: after(s, 0, states=None, replies=(), last_used=NOW + 9),
            lambda s: after(s, 0, states=b"", replies=()),
        ):
            write = change(session)
            assert await store.commit([write]) == [True]
            assert await store.commit([write]) == [True]
            session = applied(session, write)
        assert session.replies == (reply(0, 2),)
        assert replace(await stored(store), epoch=session.epoch) == session

    async def test_several_chunks_in_one_write(self, store: Store) -> None:
        """A write may carry many replies, and need not begin where the last one ended: not every tick is stored."""
        session = await created(store)
        for write in (
            after(session, 2),
            Write("a", session.epoch, 2, 9, NOW, b"9", (reply(5, 1), reply(6, 3)), forget_before=5),
            Write("a", session.epoch, 3, 12, NOW, b"12", (reply(9, 1), reply(10, 2)), forget_before=6),
        ):
            assert await store.commit([write]) == [True]
            assert await store.commit([write]) == [True]
            session = applied(session, write)
        assert [each.first_step for each in session.replies] == [6, 9, 10]
        assert replace(await stored(store), epoch=session.epoch) == session

    async def test_a_window_of_so_many(self, store: Store) -> None:
        """A write may say how many replies stay, old and new."""
        session = await created(store)
        for keep in (0, 0, 0, 3, 3, 1):
            write = after(session, keep=keep)
            assert await store.commit([write]) == [True]
            session = applied(session, write)
        assert [r.first_step for r in session.replies] == [5]
        assert replace(await stored(store), epoch=session.epoch) == session

    async def test_ticks_are_their_writes(self, store: Store) -> None:
        """Ticks of several sessions and chunks, with writes, looks and other handles' sessions in between, leave behind
        what their writes one by one would.
        """
        rng = random.Random(7)
        sessions = {name: await created(store, name, states=b"\0" * 8) for name in "abcde"}
        for number in range(60):
            names = rng.sample(sorted(sessions), rng.randrange(1, 6))
            some = [sessions[name] for name in names]
            if rng.random() < 0.2:
                writes = [after(each, rng.randrange(3), states=b"%8d" % number) for each in some]
                assert await store.commit(writes) == [True] * len(some)
            elif rng.random() < 0.1:
                writes = [after(each, 0, step=max(0, each.step - 2), states=b"%8d" % number) for each in some]
                assert await store.commit(writes) == [True] * len(some)
            else:
                made = tick(some, [rng.randrange(1, 4) for _ in range(rng.randrange(1, 4))], keep=rng.choice((3, 4)))
                writes = made.writes()
                cut = rng.randrange(len(some) + 1)
                parts = [part for part in (made.part(0, cut), made.part(cut, len(some))) if part.ids]
                done = await store.commit_ticks(parts)
                assert done == [[True] * len(part.ids) for part in parts]
                if rng.random() < 0.3:
                    assert await store.commit_ticks(parts) == done  # sent again: recognised
            for write in writes:
                sessions[write.id] = applied(sessions[write.id], write)
            if rng.random() < 0.2:
                heads = await store.peek(sorted(sessions))
                assert [(h and h.step, h and h.revision) for h in heads] == [
                    (each.step, each.revision) for _, each in sorted(sessions.items())
                ]
            if rng.random() < 0.2:
                name = rng.choice(sorted(sessions))
                found = await stored(store, name)
                assert found == replace(sessions[name], epoch=found.epoch)
                sessions[name] = found
        for name, session in sessions.items():
            assert replace(await stored(store, name), epoch=session.epoch) == session

    async def test_a_tick_that_is_partly_stale(self, handles: Callable[[], Awaitable[Store]]) -> None:
        """Of a tick, those sessions that another handle has taken, moved on or ended are refused, and only those."""
        old, new = await handles(), await handles()
        sessions = [await created(old, name, states=b"\0" * 8) for name in "abcd"]
        first = tick(sessions, [1])
        assert await old.commit_ticks([first]) == [[True] * 4]
        sessions = [applied(each, write) for each, write in zip(sessions, first.writes(), strict=True)]
        (taken,) = await new.take(["b"], NOW)
        assert taken is not None
        assert await new.delete([("d", sessions[3].epoch)], End.CLOSED, NOW) == [True]
        assert await old.commit_ticks([tick(sessions, [2])]) == [[True, False, True, False]]
        assert await new.commit_ticks([tick([taken], [1, 1])]) == [[True]]
        assert (await stored(new, "a")).step == 3
        assert (await stored(new, "b")).step == 3
        assert await new.peek(["d"]) == [None]

    @pytest.mark.parametrize("what", ["taken", "written", "ended", "made anew"])
    async def test_a_tick_of_before(self, store: Store, what: str) -> None:
        """A tick that goes on from where a session was before it was taken, written to, ended or made anew is refused,
        also by who has stored all ticks before.
        """
        sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
        for _ in range(2):
            made = tick(sessions, [1])
            assert await store.commit_ticks([made]) == [[True, True]]
            sessions = [applied(each, write) for each, write in zip(sessions, made.writes(), strict=True)]
        if what == "taken":
            await stored(store, "a")
        elif what == "written":
            assert await store.commit([after(sessions[0], 2)]) == [True]
        else:
            assert await store.delete([("a", sessions[0].epoch)], End.CLOSED, NOW) == [True]
        if what == "made anew":
            await created(store, "a", states=b"\0" * 8)
        assert await store.commit_ticks([tick(sessions, [1])]) == [[False, True]]
        assert (await stored(store, "b")).step == 3

    async def test_a_session_made_anew_after_ticks(self, handles: Callable[[], Awaitable[Store]]) -> None:
        """It has nothing of the one before, whose ticks may still be there."""
        store, other = await handles(), await handles()
        sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
        made = tick(sessions, [1, 1])
        assert await store.commit_ticks([made]) == [[True, True]]
        assert await store.delete([("a", sessions[0].epoch)], End.CLOSED, NOW) == [True]
        anew = await created(store, "a", states=b"\1" * 8)
        assert replace(await stored(other, "a"), epoch=anew.epoch) == anew
        assert (await stored(other, "b")).replies == made.writes()[1].replies

    async def test_ticks_are_use(self, handles: Callable[[], Awaitable[Store]]) -> None:
        """A session whose ticks are stored does not expire before it was left alone for as long as it may be."""
        store, other = await handles(), await handles()
        sessions = [await created(store, name, states=b"\0" * 8) for name in "ab"]
        assert await store.commit_ticks([replace(tick(sessions[:1], [1]), last_used=NOW + IDLE / 2)]) == [[True]]
        assert await store.expire(NOW + IDLE, 10) == ["b"]
        assert await other.expire(NOW + IDLE, 10) == []
        assert await store.expire(NOW + 1.5 * IDLE, 10) == ["a"]

    async def test_moving_back_forgets_what_was_not_done(self, store: Store) -> None:
        """After a rewind the window holds no reply that reaches beyond the step, not even half of one."""
        session = await created(store)
        for timesteps in (1, 4, 2):
            write = after(session, timesteps)
            assert await store.commit([write]) == [True]
            session = applied(session, write)
        back = after(session, 0, step=3, states=b"state 3", replies=())
        assert await store.commit([back]) == [True]
        session = applied(session, back)
        assert session.replies == (reply(0, 1),)
        write = after(session, 1)
        assert await store.commit([write]) == [True]
        assert replace(await stored(store), epoch=session.epoch) == applied(session, write)

    async def test_a_write_that_was_long_under_way_never_fits_again(self, store: Store) -> None:
        """A write that arrives a second time after resets and rewinds is refused, even at the step it was made for."""
        session = await created(store)
        reset, step = after(session, 0, states=b"R1", replies=()), None
        assert await store.commit([reset]) == [True]
        session = applied(session, reset)
        second = after(session, 0, states=b"R2", replies=())
        assert await store.commit([second]) == [True]
        session = applied(session, second)
        step = after(session)
        assert await store.commit([step]) == [True]
        session = applied(session, step)
        back = after(session, 0, step=0, states=b"R3", replies=())
        assert await store.commit([back]) == [True]
        session = applied(session, back)
        for late in (reset, second, step):
            assert await store.commit([late]) == [False]
        assert replace(await stored(store), epoch=session.epoch) == session

    # Owners

    async def test_the_owner_before_writes_no_more(self, handles: Callable[[], Awaitable[Store]]) -> None:
        """Once a session is taken, its old owner can neither write nor end it; the new one goes on from its last."""
        old, new = await handles(), await handles()
        session = await created(old)
        assert await old.commit([after(session)]) == [True]
        mine = await stored(new)
        assert (mine.epoch, mine.step, mine.states) == (session.epoch + 1, 1, b"state 1")
        assert await old.commit([after(replace(mine, epoch=session.epoch))]) == [False]
        assert await old.commit([after(session)]) == [False]  # not even what was applied before
        assert await old.delete([("a", session.epoch)], End.CLOSED, NOW) == [False]
        assert await new.commit([after(mine)]) == [True]
        assert replace(await stored(old), epoch=mine.epoch) == applied(mine, after(mine))

    @pytest.mark.parametrize("seed", range(8))
    async def test_two_owners_at_once(self, handles: Callable[[], Awaitable[Store]], seed: int) -> None:
        """However takes and writes of two servers cross, the history is one line: each revision is written once, by
        the owner at that moment, on top of the one before."""
        session = await created(await handles())
        written: list[Write] = []

        async def server(store: Store, rng: random.Random, name: bytes) -> None:
            mine = session
            for count in range(30):
                if rng.random() < 0.25:
                    taken = await store.take(["a"], NOW)
                    assert taken[0] is not None
                    mine = taken[0]
                else:
                    write = after(mine, rng.randint(1, 3), states=mine.states[-40:] + name + b"%d" % count)
                    if await store.commit([write]) == [True]:
                        written.append(write)
                        mine = applied(mine, write)
                if rng.random() < 0.3:
                    await asyncio.sleep(0)

        rng = random.Random(seed)
        servers = [await handles(), await handles()]
        await asyncio.gather(
            *(server(each, random.Random(rng.random()), b"ab"[at : at + 1]) for at, each in enumerate(servers))
        )
        written.sort(key=lambda write: write.revision)
        assert [write.revision for write in written] == list(range(1, len(written) + 1))
        assert [write.epoch for write in written] == sorted(write.epoch for write in written)
        for write in written:
            assert write.states is not None
            assert write.states.startswith(session.states[-40:] if write.revision > 1 else b"state 0")
            session = applied(session, write)
        found = await stored(servers[0])
        assert replace(found, epoch=session.epoch) == session

    async def test_a_session_made_anew_is_another(self, store: Store) -> None:
        """The owner of an ended session cannot write to a new one of the same id."""
        old = await created(store)
        assert await store.delete([("a", old.epoch)], End.CLOSED, NOW) == [True]
        new = await created(store)
        assert await store.commit([after(old)]) == [False]
        assert await store.delete([("a", old.epoch)], End.CLOSED, NOW) == [False]
        assert replace(await stored(store), epoch=new.epoch) == new

    async def test_an_id_lives_once(self, store: Store) -> None:
        """A live id is not given again; a creation that is sent again is recognised."""
        session = await created(store)
        assert await store.create([session, record("b")]) == [True, True]
        assert await store.create([record("a", states=b"other"), record("c")]) == [False, True]
        assert await store.commit([after(session)]) == [True]
        assert await store.create([session]) == [False]
        assert (await stored(store)).states == b"state 1"
        await created(store, "d")
        assert await store.create([record("d", idle_lifetime=2 * IDLE)]) == [False]
        assert "d" in await store.expire(NOW + IDLE, 10)  # what was refused, in the very same instant, left no trace

    async def test_cancelled(self, store: Store) -> None:
        """After a call that was cancelled the store still works, and the session is before or after the write."""
        session = await created(store)
        for _ in range(10):
            write = after(session)
            task = asyncio.create_task(store.commit([write]))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            found = await stored(store)
            assert replace(found, epoch=session.epoch) in (session, applied(session, write))
            assert await store.commit([write]) == [False]
            session = found

    # Ends

    async def test_why_it_ended_is_remembered_for_a_while(self, store: Store) -> None:
        """`ended` tells each reason until it is forgotten, and nothing of sessions that live, or never did."""
        sessions = {why: await created(store, why.value) for why in End}
        for why, session in sessions.items():
            assert await store.delete([(why.value, session.epoch)], why, NOW + 5) == [True]
            assert await store.delete([(why.value, session.epoch)], why, NOW + 6) == [True]
            assert await store.commit([after(session)]) == [False]
        assert await store.delete([("closed", sessions[End.CLOSED].epoch)], End.EVICTED, NOW) == [False]
        ids = [why.value for why in End]
        notes = [Ended(why, NOW + 5, session.epoch) for why, session in sessions.items()]
        await created(store, "alive")
        assert await store.ended([*ids, "alive", "none"], NOW + 5) == [*notes, None, None]
        await created(store, "closed")
        assert await store.ended(["closed"], NOW + 6) == [None]
        assert await store.ended(["idle"], NOW + 5 + REMEMBER - 1) == [notes[1]]
        assert await store.ended(["idle"], NOW + 5 + REMEMBER) == [None]
        assert await store.peek([*ids[1:], "none"]) == [None] * len(ids)
        assert await store.take([*ids[1:], "none"], NOW) == [None] * len(ids)

    async def test_expires_what_is_due_and_nothing_else(self, store: Store) -> None:
        """A session ends when its idle or its absolute lifetime is over, not a moment before, and a use prolongs only
        the idle one. Each end is told once."""
        idle = await created(store, "idle")
        used = await created(store, "used")
        aged = await created(store, "aged", lifetime=IDLE + 20)
        assert await store.expire(NOW + IDLE - 0.001, 10) == []
        assert await store.commit([after(used, last_used=NOW + 50), after(aged, last_used=NOW + 50)]) == [True, True]
        assert await store.expire(NOW + IDLE, 10) == ["idle"]
        assert await store.expire(NOW + IDLE, 10) == []
        assert await store.expire(NOW + IDLE + 20, 10) == ["aged"]
        assert await store.expire(NOW + IDLE + 50, 10) == ["used"]
        assert await store.ended(["idle", "aged", "used"], NOW + IDLE + 50) == [
            Ended(End.IDLE, NOW + IDLE, idle.epoch),
            Ended(End.AGED, NOW + IDLE + 20, aged.epoch),
            Ended(End.IDLE, NOW + IDLE + 50, used.epoch),
        ]
        assert await store.page("", 10) == []

    async def test_expires_a_few_at_a_time(self, handles: Callable[[], Awaitable[Store]]) -> None:
        """A call ends at most so many, fewer only if no more are due, and two sweepers share the work."""
        one, two = await handles(), await handles()
        ids = [f"s{index}" for index in range(25)]
        sessions = [record(each) for each in ids]
        await one.create(sessions)
        used = [after(each, last_used=NOW + 1) for each in sessions[::5]]
        assert await one.commit(used) == [True] * 5
        parts = [
            await one.expire(NOW + IDLE, 8),
            *await asyncio.gather(one.expire(NOW + IDLE, 6), two.expire(NOW + IDLE, 6)),
        ]
        parts.append(await two.expire(NOW + IDLE, 8))
        assert max(map(len, parts)) <= 8
        assert sorted(itertools.chain(*parts)) == sorted(set(ids) - {write.id for write in used})
        assert sorted(await one.expire(NOW + IDLE + 1, 8)) == sorted(write.id for write in used)

    async def test_what_is_due_is_as_good_as_ended(self, store: Store) -> None:
        """A session that has come to its end is not taken, and makes room for a new one, before any sweep."""
        session, aged = await created(store), await created(store, "b", lifetime=10.0)
        assert await store.take(["a", "b"], NOW + IDLE) == [None, None]
        assert await store.ended(["a", "b"], NOW + IDLE) == [
            Ended(End.IDLE, NOW + IDLE, session.epoch),
            Ended(End.AGED, NOW + IDLE, aged.epoch),
        ]
        await created(store, "c", replies=(), states=b"old")
        new = await created(store, "c", create_time=NOW + IDLE)
        assert replace(await stored(store, "c", NOW + IDLE), epoch=new.epoch) == new
        assert await store.expire(NOW + IDLE, 10) == []
        assert await store.expire(NOW + 2 * IDLE, 10) == ["c"]

    async def test_pages_show_each_session_once_oldest_first(self, store: Store) -> None:
        """One that lives through all pages is on exactly one, whatever comes and goes meanwhile."""
        rng = random.Random(3)
        sessions = [
            record(f"s{index}", create_time=NOW + rng.choice([0.5, 1, 2, 3]), model=rng.choice(["m", "n"]))
            for index in range(40)
        ]
        await store.create(sessions)
        ordered = sorted(sessions, key=lambda each: (each.meta.create_time, each.id))
        for model in ("", "m", "n", "none"):
            expected = [each.id for each in ordered if model in ("", each.meta.model)]
            for size in (1, 7, 40, 100):
                found, after_ = [], ""
                while page := await store.page(after_, size, model):
                    assert len(page) <= size
                    found += [head.id for head in page]
                    after_ = page[-1].cursor
                    if len(page) < size:
                        break
                assert found == expected
        numbers = [sum(each.meta.model == model for each in sessions) for model in ("m", "n", "none")]
        assert await store.count(["m", "n", "none"]) == numbers
        assert await store.count([]) == []
        first = await store.page("", 10)
        gone = [first[-1], *(await store.page(first[-1].cursor, 3))]
        assert await store.delete([(head.id, head.epoch) for head in gone], End.CLOSED, NOW) == [True] * 4
        await created(store, "late", create_time=NOW + 9)
        rest = await store.page(first[-1].cursor, 100)
        assert [head.id for head in rest] == [*(each.id for each in ordered[13:]), "late"]

    async def test_pages_and_counts_of_one_principal(self, store: Store) -> None:
        """Those whose ids begin with its name and a slash, and no others: not of a longer name, and not nobody's."""
        rng = random.Random(4)
        owners = ("al/", "alice/", "alice@x/", "")
        sessions = [
            record(f"{owner}s{index}", create_time=NOW + rng.choice([0.5, 1, 2]), model=rng.choice(["m", "n"]))
            for index in range(12)
            for owner in owners
        ]
        await store.create(sessions)
        ordered = sorted(sessions, key=lambda each: (each.meta.create_time, each.id))
        for owner in (*owners[:3], "bob/"):
            assert await store.count_of(owner) == (0 if owner == "bob/" else 12)
            for model in ("", "m", "none"):
                expected = [e.id for e in ordered if e.id.startswith(owner) and model in ("", e.meta.model)]
                for size in (1, 5, 100):
                    found, after_ = [], ""
                    while page := await store.page(after_, size, model, owner):
                        assert len(page) <= size
                        found += [head.id for head in page]
                        after_ = page[-1].cursor
                    assert found == expected
        (gone,) = await store.take(["alice/s3"], NOW + 1)
        assert gone is not None
        assert await store.delete([("alice/s3", gone.epoch)], End.CLOSED, NOW) == [True]
        await store.expire(NOW + 1, 100)
        assert await store.count_of("alice/") == 11
        assert "alice/s3" not in [head.id for head in await store.page("", 100, "", "alice/")]

    # Anything in any order

    def test_is_a_dict(self, opener: Opener) -> None:
        """Random batches by two servers, stale, repeated and crossed, are answered as a plain dict would."""
        machine = _machine(opener, self.durable)
        quick = settings(
            max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        )
        run_state_machine_as_test(machine, settings=quick)


def _machine(opener: Opener, durable: bool) -> type[RuleBasedStateMachine]:
    names = st.lists(st.sampled_from(["a", "b", "c.c", "d:d"]), unique=True, min_size=1)
    servers = st.sampled_from([0, 0, 0, 1])  # one is alone mostly, and has in mind what is stored

    class StoreMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.runner = asyncio.Runner()
            self.place = f"place{next(_places)}"
            self.stores = [self.runner.run(opener(self.place)) for _ in range(2)]
            self.now = NOW
            self.live: dict[str, Record] = {}
            self.notes: dict[str, Ended] = {}
            self.sent: dict[str, Write] = {}

        def teardown(self) -> None:
            for store in self.stores:
                self.runner.run(store.close())
            self.runner.close()

        def end(self, session_id: str, why: End) -> None:
            self.notes[session_id] = Ended(why, self.now, self.live.pop(session_id).epoch)

        def end_due(self, session_id: str) -> bool:
            found = self.live.get(session_id)
            if found is None:
                return False
            aged = found.meta.lifetime is not None and found.meta.create_time + found.meta.lifetime <= self.now
            if aged or found.last_used + found.meta.idle_lifetime <= self.now:
                self.end(session_id, End.AGED if aged else End.IDLE)
                return True
            return False

        @initialize()
        def begin(self) -> None:
            self.create(0, ["a", "b"], 30, None, b"begin")

        @rule(
            server=servers,
            ids=names,
            idle=st.integers(1, 40),
            life=st.none() | st.integers(1, 60),
            states=st.binary(max_size=8),
        )
        def create(self, server: int, ids: list[str], idle: int, life: int | None, states: bytes) -> None:
            new = [
                record(
                    each, create_time=self.now, idle_lifetime=float(idle), lifetime=life, states=states, model=each[0]
                )
                for each in ids
            ]
            for each in ids:
                self.end_due(each)
            expected = [each not in self.live for each in ids]
            for session, fits in zip(new, expected, strict=True):
                if fits:
                    self.live[session.id] = session
                    self.notes.pop(session.id, None)
            for _ in range(2):
                assert self.runner.run(self.stores[server].create(new)) == [self.live[each.id] == each for each in new]

        @rule(server=servers, ids=names)
        def take(self, server: int, ids: list[str]) -> None:
            for each in ids:
                if not self.end_due(each) and each in self.live:
                    self.live[each] = replace(self.live[each], epoch=self.live[each].epoch + 1)
            found = self.runner.run(self.stores[server].take(ids, self.now))
            assert found == [self.live.get(each) for each in ids]

        @rule(server=servers, ids=names, data=st.data())
        def commit(self, server: int, ids: list[str], data: st.DataObject) -> None:
            writes, expected = [], []
            for each in ids:
                before = self.live.get(each) or record(each)
                timesteps = data.draw(st.integers(-3, 3))
                step = max(0, before.step + timesteps)
                write = Write(
                    each,
                    max(1, before.epoch - data.draw(st.sampled_from([0, 0, 0, 1]))),
                    max(1, before.revision + data.draw(st.sampled_from([1, 1, 1, 0, 2]))),
                    step,
                    self.now,
                    data.draw(st.none() | st.binary(max_size=8)),
                    (reply(before.step, timesteps),) if timesteps > 0 else (),
                    data.draw(st.integers(0, max(step, 1))),
                )
                if data.draw(st.integers(0, 4)) == 0:
                    write = self.sent.get(each, write)
                live = self.live.get(each)
                fits = live is not None and (live.epoch, live.revision + 1) == (write.epoch, write.revision)
                same = (
                    live is not None
                    and (live.epoch, live.revision, live.step) == (write.epoch, write.revision, write.step)
                    and write.states in (None, live.states)
                    and (not write.replies or live.replies[-1:] == write.replies)
                )
                if fits:
                    assert live is not None
                    self.live[each] = applied(live, write)
                    self.sent[each] = write
                writes.append(write)
                expected.append(fits or same)
            found = self.runner.run(self.stores[server].commit(writes))
            assert found == expected

        @rule(
            server=servers,
            ids=names,
            chunks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
            stale=st.sampled_from([0, 0, 0, 1]),
            times=st.integers(1, 3),
        )
        def tick(self, server: int, ids: list[str], chunks: list[int], stale: int, times: int) -> None:
            for _ in range(times):
                before = [self.live.get(each) or record(each) for each in ids]
                before = [replace(each, epoch=max(1, each.epoch - stale), states=b"\0" * 8) for each in before]
                made = replace(tick(before, chunks, keep=4), last_used=self.now)
                expected = []
                for write in made.writes():
                    live = self.live.get(write.id)
                    fits = live is not None and live.epoch == write.epoch
                    if live is not None and fits:
                        self.live[write.id] = applied(live, write)
                    expected.append(fits)
                for _ in range(2):  # what is sent again is recognised
                    assert self.runner.run(self.stores[server].commit_ticks([made])) == [expected]

        @rule(server=servers, ids=names, why=st.sampled_from(End), stale=st.booleans())
        def delete(self, server: int, ids: list[str], why: End, stale: bool) -> None:
            owned, expected = [], []
            for each in ids:
                live, note = self.live.get(each), self.notes.get(each)
                epoch = (live.epoch if live else note.epoch if note else 2) - stale
                owned.append((each, epoch))
                if live is not None and live.epoch == epoch:
                    self.end(each, why)
                    expected.append(True)
                else:
                    expected.append(live is None and note is not None and (note.epoch, note.why) == (epoch, why))
            found = self.runner.run(self.stores[server].delete(owned, why, self.now))
            notes = [self.notes.get(each) for each in ids]  # one that is too old may be forgotten, but need not be
            old = [note is not None and note.at + REMEMBER <= self.now for note in notes]
            assert [f for f, skip in zip(found, old, strict=True) if not skip] == [
                e for e, skip in zip(expected, old, strict=True) if not skip
            ]

        @rule(server=servers, seconds=st.integers(0, 30))
        def expire(self, server: int, seconds: int) -> None:
            self.now += seconds
            due = [each for each in list(self.live) if self.end_due(each)]
            assert sorted(self.runner.run(self.stores[server].expire(self.now, 10))) == sorted(due)

        @rule(seconds=st.integers(0, 30))
        def wait(self, seconds: int) -> None:
            self.now += seconds

        @rule(server=servers)
        def look(self, server: int) -> None:
            async def everything(store: Store) -> None:
                ids = ["a", "b", "c.c", "d:d"]
                heads = await store.peek(ids)
                assert [head and (head.epoch, head.revision, head.step, head.last_used) for head in heads] == [
                    s and (s.epoch, s.revision, s.step, s.last_used) for s in map(self.live.get, ids)
                ]
                notes = [self.notes.get(each) for each in ids]
                expected = [note if note and note.at + REMEMBER > self.now else None for note in notes]
                assert await store.ended(ids, self.now) == expected
                ordered = sorted(self.live.values(), key=lambda each: (each.meta.create_time, each.id))
                assert [head.id for head in await store.page("", 10)] == [each.id for each in ordered]

            self.runner.run(everything(self.stores[server]))

        @rule(server=servers)
        def reopen(self, server: int) -> None:
            if durable:
                self.runner.run(self.stores[server].close())
                self.stores[server] = self.runner.run(opener(self.place))

    return StoreMachine
