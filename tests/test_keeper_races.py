"""What a keeper does while it waits for its store, and sessions end, begin and are used meanwhile."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from house import Clock, chunks, loaded
from rnnserve_models.options import LayerOptions
from rnnserve_server.errors import SessionError
from rnnserve_server.keeper import Keeper
from rnnserve_server.repository import Repository
from rnnserve_server.sessions import Group, SessionTable
from rnnserve_server.store.memory import MemoryStore

MODEL, OPTIONS = loaded(), LayerOptions(stateful=True)


class SlowStore(MemoryStore):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def peek(self, ids):
        await self.gate.wait()
        return await super().peek(ids)

    async def commit(self, writes):
        await self.gate.wait()
        applied = await super().commit(writes)
        await asyncio.sleep(0)
        return applied


class House:
    """A table of sessions and its keeper."""

    def __init__(self, tmp_path) -> None:
        self.clock = Clock()
        self.sessions = SessionTable(
            max_sessions=1000, max_state_bytes=1 << 30, clock=self.clock, wall_clock=self.clock
        )
        self.store = SlowStore()
        models = Repository(tmp_path)
        models.put(MODEL.name, MODEL.version, MODEL)
        self.keeper = Keeper(self.store, "interval", self.sessions, models, clock=self.clock, wall_clock=self.clock)

    async def create(self, *ids: str) -> tuple[Group, np.ndarray]:
        group, slots, full = self.sessions.create_many(
            MODEL,
            1,
            OPTIONS,
            len(ids),
            initial_states=None,
            idle_lifetime=1000.0,
            session_ids=ids,
        )
        assert full is None
        assert all(await self.keeper.create(group, slots))
        return group, slots

    def use(self, session_id: str) -> None:
        """A chunk of one step."""
        session = self.sessions.get(session_id)
        block = chunks(session.group, [session.slot], first_steps=[session.step])
        self.sessions.commit(block.sessions, session.group.arena.gather(np.array([session.slot])), 1)

    def check(self) -> None:
        """The ids, the slots and the counts tell the same of every session."""
        live = [session.id for session in self.sessions.after(0)]
        assert len(live) == len(set(live)) == len(self.sessions)
        assert all(self.sessions.get(session_id).id == session_id for session_id in live)
        assert sum(group.live for group in self.sessions.groups()) == len(live)
        held = sum(group.live * group.arena.session_bytes for group in self.sessions.groups())
        assert self.sessions.state_bytes == held


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path)


async def test_a_session_that_ends_while_its_save_waits_in_line(house):
    """It is not saved, and its slot's memory is not given back a second time."""
    group, slots = await house.create("first", "ends", "stays")
    for session_id in ("first", "ends", "stays"):
        house.use(session_id)
    house.store.gate.clear()
    saving = [asyncio.create_task(house.keeper.save(group, each)) for each in (slots[:1], slots)]
    await asyncio.sleep(0)
    house.sessions.delete("ends")
    house.store.gate.set()
    await asyncio.gather(*saving)
    house.check()
    assert {session.id for session in house.sessions.after(0)} == {"first", "stays"}
    assert [head.step for head in await house.store.peek(["first", "stays"])] == [1, 1]


async def test_a_session_that_is_asked_for_while_another_of_its_id_is_made(house):
    """Whoever asks for the session that is in the store has it, though somebody would make one of that id here: who is
    told that there is one.
    """
    group, slots = await house.create("mine")
    house.use("mine")
    await house.keeper.save_all()
    house.sessions.forget(group, slots)

    async def make() -> bool:
        group, slots, _ = house.sessions.create_many(
            MODEL, 1, OPTIONS, 1, initial_states=None, idle_lifetime=1000.0, session_ids=["mine"]
        )
        (made,) = await house.keeper.create(group, slots)
        if not made:
            house.sessions.forget(group, slots)
        return made

    house.store.gate.clear()
    asking = asyncio.create_task(house.keeper.attach(["mine"], lambda group: None))
    await asyncio.sleep(0)
    making = asyncio.create_task(make())
    await asyncio.sleep(0)
    assert len(house.sessions) == 1
    house.store.gate.set()
    assert await asking == {}
    assert not await making
    assert house.sessions.get("mine").step == 1
    house.check()


DEEDS = ["create", "use", "use", "end", "save", "rest", "room", "stop", "go"]
OPS = st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 7)), max_size=40)


@settings(deadline=None, max_examples=150)
@given(OPS)
def test_whatever_happens_while_the_store_is_slow_no_session_is_lost(ops):
    """Sessions are used and ended, and others take their slots, while saves and rests wait for the store: every session
    that was not ended is in memory or in the store, at its step, and what the table counts is what it holds.
    """

    async def run() -> None:
        house, steps, tasks, made = House(None), dict[str, int](), list[asyncio.Task](), 0
        nothing = lambda group: None  # noqa: E731
        for what, number in ops:
            alive = sorted(each for each in steps if each in house.sessions)
            if what == "create":
                made += 1
                await house.create(f"s{made}")
                steps[f"s{made}"] = 0
            elif what == "use" and alive:
                session_id = alive[number % len(alive)]
                house.use(session_id)
                steps[session_id] += 1
            elif what == "end" and alive:
                house.sessions.delete(alive[number % len(alive)])
                del steps[alive[number % len(alive)]]
            elif what == "save":
                tasks.append(asyncio.create_task(house.keeper.save_all()))
            elif what == "rest":
                house.clock.now += 1
                tasks.append(asyncio.create_task(house.keeper.rest(1.0 + number % 2, nothing)))
            elif what == "room":
                tasks.append(asyncio.create_task(house.keeper.make_room(10**6, 1, nothing)))
            elif what == "stop":
                house.store.gate.clear()
            elif what == "go":
                house.store.gate.set()
            for _ in range(number % 3):
                await asyncio.sleep(0)
            house.check()
        house.store.gate.set()
        await asyncio.gather(*tasks)
        await house.keeper.save_all()
        await house.keeper.settle()
        house.check()
        heads = await house.store.peek(sorted(steps))
        assert {head.id: head.step for head in heads if head} == steps
        for session_id in steps:
            try:
                assert house.sessions.get(session_id).step == steps[session_id]
            except SessionError:  # it rests
                assert session_id not in house.sessions

    asyncio.run(run())
