"""The table of sessions."""

from __future__ import annotations

import math
import re
import weakref
from itertools import islice

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from house import Clock, chunks, loaded, opened, table
from rnnserve_models.options import LayerOptions
from rnnserve_server import directory
from rnnserve_server.errors import (
    SessionAged,
    SessionAway,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionsFull,
    SessionTakenOver,
    SessionUnknown,
)

MODEL = loaded()


def columns(*sessions, first_steps=None):
    slots = [session.slot for session in sessions]
    generations = [session.generation for session in sessions]
    return chunks(sessions[0].group, slots, generations=generations, first_steps=first_steps).sessions


def name(index):
    return f"name-{index}"


def sums(session):
    return session.group.arena.gather(np.array([session.slot]))["sum"]


def test_a_session_begins_at_step_0_and_lives_until_deleted():
    """A new session has an id of its own, is found by it at step 0, and after its end is known to be closed."""
    sessions = table()
    session, other = opened(sessions, MODEL), opened(sessions, MODEL)
    assert session.id != other.id
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", session.id)
    assert sessions.get(session.id) == session
    assert (session.step, session.busy, session.create_time) == (0, False, 1.7e9)
    sessions.delete(session.id)
    for gone in (sessions.get, sessions.delete):
        with pytest.raises(SessionClosed, match="was deleted") as caught:
            gone(session.id)
        assert caught.value.metadata == {"session_id": session.id}
    assert sessions.get(other.id) == other


def test_unknown_closed_and_expired_are_told_apart():
    """The reason says whether a session never was, was deleted, or expired."""
    clock = Clock()
    sessions = table(clock)
    opened(sessions, MODEL, session_id="old", idle_lifetime=5)
    opened(sessions, MODEL, session_id="bye")
    sessions.delete("bye")
    clock.now += 6
    assert sessions.expire() == ["old"]
    for session_id, error in (("old", SessionExpired), ("bye", SessionClosed), ("never", SessionUnknown)):
        with pytest.raises(error):
            sessions.get(session_id)


def test_only_so_many_ends_are_remembered(monkeypatch):
    """The reasons of ended sessions take bounded memory: the oldest becomes unknown."""
    monkeypatch.setattr(directory, "_REMEMBERED_ENDS", 2)
    sessions = table()
    for session_id in "abc":
        opened(sessions, MODEL, session_id=session_id)
        sessions.delete(session_id)
    with pytest.raises(SessionUnknown):
        sessions.get("a")
    with pytest.raises(SessionClosed):
        sessions.get("b")


def test_an_id_is_free_again_after_the_end():
    """A live session's id is refused and the live session untouched; an ended one's can be taken by a new session."""
    sessions = table()
    first = opened(sessions, MODEL, session_id="mine")
    with pytest.raises(SessionExists):
        opened(sessions, MODEL, session_id="mine")
    assert len(sessions) == 1
    sessions.delete("mine")
    second = opened(sessions, MODEL, session_id="mine")
    assert sessions.get("mine") == second
    assert second != first
    sessions.delete("mine")
    with pytest.raises(SessionClosed):
        sessions.get("mine")


def test_why_chunks_that_waited_have_lost_their_session():
    """It was deleted, though its id may be another's by now; it was taken over; or it came back from wherever it was,
    and is here again, or at rest: then it has to be fetched, for it is not unknown.
    """
    sessions = table()
    first = opened(sessions, MODEL, session_id="mine")
    waiting = columns(first, first_steps=[0])

    def told():
        _, ((_, error),) = sessions.check(waiting, lambda _: "mine")
        return type(error)

    sessions.delete("mine")
    assert told() is SessionClosed
    sessions.delete(opened(sessions, MODEL, session_id="mine").id)
    assert told() is SessionClosed
    opened(sessions, MODEL, session_id="mine")
    assert told() is SessionClosed
    here = sessions.get("mine")
    here.group.epoch[here.slot] = 1
    assert told() is SessionAway
    sessions.lose(here.group, np.array([here.slot]), SessionTakenOver)
    assert told() is SessionTakenOver
    back = opened(sessions, MODEL, session_id="mine")
    sessions.forget(back.group, np.array([back.slot]))
    assert told() is SessionAway
    with pytest.raises(SessionUnknown):
        sessions.get("mine")


def test_initial_states():
    """A session starts from the states it was given, else from the model's default, whoever had the slot before."""
    sessions = table()
    given = opened(sessions, MODEL, batch_size=2, states={"sum": np.array([[1, 2], [3, 4]], np.float32)})
    np.testing.assert_array_equal(sums(given), [[1, 2], [3, 4]])
    sibling = opened(sessions, MODEL, batch_size=2)
    np.testing.assert_array_equal(sums(sibling), np.zeros((2, 2)))
    sessions.delete(given.id)
    heir = opened(sessions, MODEL, batch_size=2)
    assert heir.slot == given.slot
    np.testing.assert_array_equal(sums(heir), np.zeros((2, 2)))


def test_sessions_of_another_kind_are_in_another_group():
    """Model version, batch size and options each tell groups apart; sessions that agree in all share columns."""
    sessions = table()
    base = opened(sessions, MODEL).group
    assert opened(sessions, MODEL).group is base
    assert opened(sessions, MODEL, batch_size=2).group is not base
    assert opened(sessions, loaded(version="2")).group is not base
    assert opened(sessions, MODEL, options=LayerOptions(stateful=True, return_state=True)).group is not base


def test_check_tells_each_chunk_its_own_fault():
    """Chunks ahead, behind and of ended sessions are told apart; those that fit are kept; nothing is written."""
    sessions = table()
    four = [opened(sessions, MODEL) for _ in range(4)]
    four[0].group.step[[session.slot for session in four]] = 5
    found = columns(*four, first_steps=[5, 7, 3, 5])
    sessions.delete(four[3].id)
    kept, errors = sessions.check(found, lambda index: four[index].id)
    assert kept is not None
    assert kept.tolist() == [0]
    assert [(index, error.reason) for index, error in errors] == [
        (1, "STEP_AHEAD"),
        (2, "STEP_BEHIND"),
        (3, "SESSION_CLOSED"),
    ]
    assert errors[0][1].metadata == {"field": "first_step", "expected": "5", "got": "7", "expected_step": "5"}
    assert [session.step for session in four[:3]] == [5, 5, 5]


def test_check_fills_in_first_steps():
    """Where the request left the first steps out they become where each session is, once all chunks fit."""
    sessions = table()
    two = [opened(sessions, MODEL) for _ in range(2)]
    two[0].group.step[two[1].slot] = 9
    found = columns(*two)
    assert sessions.check(found, name) == (None, [])
    assert found.first_steps.tolist() == [0, 9]


def test_late_work_never_touches_the_next_session_of_a_slot():
    """Work for a deleted session is refused although another session has its slot, and does not learn its step."""
    sessions = table()
    dead, bystander = opened(sessions, MODEL), opened(sessions, MODEL)
    late = columns(dead, bystander)
    sessions.delete(dead.id)
    heir = opened(sessions, MODEL, states={"sum": np.full((1, 2), 5, np.float32)})
    assert heir.slot == dead.slot
    heir.group.step[heir.slot] = 77
    kept, errors = sessions.check(late, lambda index: [dead.id, bystander.id][index])
    assert kept is not None
    assert kept.tolist() == [1]
    assert [(index, error.reason) for index, error in errors] == [(0, "SESSION_CLOSED")]
    assert late.first_steps is None
    assert heir.step == 77
    np.testing.assert_array_equal(sums(heir), [[5, 5]])


def test_commit_moves_sessions_on():
    """A commit writes the states, adds the time steps and counts as use."""
    clock = Clock()
    sessions = table(clock)
    two = [opened(sessions, MODEL, idle_lifetime=10) for _ in range(2)]
    clock.now += 8
    sessions.commit(columns(two[1], first_steps=[0]), {"sum": np.full((1, 2), 4, np.float32)}, 3)
    assert [session.step for session in two] == [0, 3]
    np.testing.assert_array_equal(sums(two[1]), [[4, 4]])
    clock.now += 4
    assert sessions.expire() == [two[0].id]


def test_use_postpones_expiry():
    """A session expires when it was neither stepped nor reset for its own lifetime, whatever the others' are."""
    clock = Clock()
    sessions = table(clock)
    short, long = opened(sessions, MODEL, idle_lifetime=10), opened(sessions, MODEL, idle_lifetime=100)
    for _ in range(5):
        clock.now += 9
        sessions.reset(short, None)
        assert sessions.expire() == []
    clock.now += 9.5
    assert sessions.expire() == []
    clock.now += 1
    assert sessions.expire() == [short.id]
    clock.now += 45
    assert sessions.expire() == [long.id]
    assert len(sessions) == 0


def test_a_lifetime_ends_whether_used_or_not():
    """A session with a lifetime ends when it is over, however often it was used and whatever waits for it."""
    clock = Clock()
    sessions = table(clock)
    made = [opened(sessions, MODEL, idle_lifetime=10, lifetime=lifetime) for lifetime in (25, 25, 100)]
    used, busy, idle = made
    for now in (9, 18, 24):
        clock.now = 1000 + now
        sessions.reset(used, None)
        sessions.reset(busy, None)
        busy.group.tail[busy.slot] = 3
        assert sessions.expire() == ([idle.id] if now == 18 else [])
    clock.now = 1026
    assert sessions.overdue()
    assert sessions.expire() == [used.id, busy.id]
    for session, error in ((used, SessionAged), (busy, SessionAged), (idle, SessionExpired)):
        with pytest.raises(error):
            sessions.get(session.id)
    heir = opened(sessions, MODEL, idle_lifetime=1000)
    clock.now += 900
    assert sessions.expire() == []
    assert heir.lifetime == math.inf


def test_a_busy_session_does_not_expire():
    """A session whose chunks wait is in use."""
    clock = Clock()
    sessions = table(clock)
    session = opened(sessions, MODEL, idle_lifetime=10)
    session.group.tail[session.slot] = 3
    clock.now += 11
    assert sessions.expire() == []
    session.group.tail[session.slot] = -1
    clock.now += 11
    assert sessions.expire() == [session.id]


def test_expiry_looks_at_due_sessions_only(monkeypatch):
    """A pass over 500 sessions of which 3 are due looks at those 3; a second pass at none."""
    clock = Clock()
    sessions = table(clock)
    made = [opened(sessions, MODEL, idle_lifetime=10 if index < 3 else 1000 + index) for index in range(500)]
    looked = []
    used = made[0].group.arena.used
    monkeypatch.setattr(made[0].group.arena, "used", lambda slots: looked.extend(slots.tolist()) or used(slots))
    clock.now += 20
    assert sessions.overdue()
    assert sorted(sessions.expire()) == sorted(session.id for session in made[:3])
    assert sorted(looked) == [0, 1, 2]
    assert not sessions.overdue()
    assert sessions.expire() == []
    assert len(looked) == 3


def test_a_mass_expiry_is_done_in_pieces():
    """However many are due at once, a call of `expire` ends as many as it was asked to, and more are overdue."""
    clock = Clock()
    sessions = table(clock)
    for batch_size in (1, 2):
        for _ in range(50):
            opened(sessions, MODEL, batch_size=batch_size, idle_lifetime=10)
    clock.now += 11
    ends = []
    while sessions.overdue():
        ends.append(sessions.expire(30))
    assert [len(ended) for ended in ends] == [30, 30, 30, 10]
    assert len({session_id for ended in ends for session_id in ended}) == 100
    assert len(sessions) == 0


def test_an_old_entry_does_not_end_a_new_session_of_the_same_id():
    """The lifetime of a deleted session says nothing about the session that has its id now."""
    clock = Clock()
    sessions = table(clock)
    opened(sessions, MODEL, session_id="mine", idle_lifetime=10)
    sessions.delete("mine")
    opened(sessions, MODEL, session_id="mine", idle_lifetime=100)
    clock.now += 50
    assert sessions.expire() == []


def test_sessions_that_come_and_go_leave_nothing(monkeypatch):
    """A million sessions made and deleted within an idle lifetime do not pile up until it is over."""
    monkeypatch.setattr(directory, "_REMEMBERED_ENDS", 10)
    sessions = table()
    lasting = opened(sessions, MODEL)
    for number in range(5000):
        sessions.delete(opened(sessions, MODEL, idle_lifetime=10_000 - number).id)
    assert lasting.group.expiry._held < 20
    assert sum(map(len, sessions._directory._known)) == 11
    assert lasting.group.arena.capacity == 8


def test_an_end_that_is_forgotten_takes_no_later_one_along(monkeypatch):
    """Of an id that was used again, the last end is remembered, or its life, whatever became of the earlier ones."""
    monkeypatch.setattr(directory, "_REMEMBERED_ENDS", 2)
    sessions = table()
    for session_id in ("twice", "other", "twice"):
        opened(sessions, MODEL, session_id=session_id)
        sessions.delete(session_id)
    with pytest.raises(SessionClosed):
        sessions.get("twice")
    live = opened(sessions, MODEL, session_id="other")
    for _ in range(2):
        sessions.delete(opened(sessions, MODEL).id)
    assert sessions.get("other") == live
    with pytest.raises(SessionUnknown):
        sessions.get("twice")


def many(sessions, count, **arguments):
    wish = {"initial_states": None, "idle_lifetime": 60.0, **arguments}
    return sessions.create_many(MODEL, 1, LayerOptions(stateful=True), count, **wish)


def test_sessions_made_together_are_like_those_made_alone():
    """Each of many has an id of its own, step 0, the states that were given, and a place behind those before it."""
    sessions = table()
    first = opened(sessions, MODEL)
    group, slots, full = many(sessions, 20, initial_states={"sum": np.full((1, 2), 3, np.float32)}, idle_lifetime=9.0)
    assert full is None
    assert group is first.group
    made = [sessions.at(group, slot) for slot in slots.tolist()]
    assert len({session.id for session in made} | {first.id}) == len(sessions) == 21
    assert [sessions.get(session.id) for session in made] == made
    assert list(sessions.after(0)) == [first, *made]
    assert {(session.step, session.busy, session.create_time, session.idle_lifetime) for session in made} == {
        (0, False, 1.7e9, 9.0)
    }
    assert (group.arena.gather(slots)["sum"] == 3).all()
    assert not sums(first).any()
    sessions.delete_many(group, slots[:5])
    assert list(sessions.after(0)) == [first, *made[5:]]
    with pytest.raises(SessionClosed):
        sessions.get(made[0].id)


@pytest.mark.parametrize("limits", [{"max_sessions": 7}, {"max_state_bytes": 7 * 8 + 7}])
def test_of_many_as_many_are_made_as_there_is_room_for(limits):
    """The first of many are made, and the others are told what one that comes later is told."""
    sessions = table(**limits)
    opened(sessions, MODEL)
    group, slots, full = many(sessions, 10)
    assert (len(slots), len(sessions), group.live) == (6, 7, 7)
    with pytest.raises(SessionsFull) as caught:
        opened(sessions, MODEL)
    assert str(full) == str(caught.value)
    _, none, full = many(sessions, 3)
    assert len(none) == 0
    assert str(full) == str(caught.value)


def test_columns_grow_with_the_sessions():
    """At any number of sessions each has a row of every column, a tail of none, and keeps what it had."""
    sessions = table(max_sessions=50_000)
    group, slots, _ = many(sessions, 5)
    group.step[slots] = 7
    group.tail[slots] = 3
    group.generation[slots] += 1
    kept = group.step
    for _ in range(40):
        many(sessions, 1000)
    assert group.step[slots].tolist() == [7] * 5
    assert group.tail[slots].tolist() == [3] * 5
    assert group.generation[slots].tolist() == [1] * 5
    assert not group.step[5:].any()
    assert (group.tail[5:] == -1).all()
    assert kept[:5].tolist() == [7] * 5


def test_at_most_max_sessions():
    """A full table refuses, with a hint when to come back, until a session ends; the refused one leaves no trace."""
    clock = Clock()
    sessions = table(clock, max_sessions=2)
    first, _ = opened(sessions, MODEL, idle_lifetime=7), opened(sessions, MODEL)
    with pytest.raises(SessionsFull) as caught:
        opened(sessions, MODEL, session_id="third")
    assert caught.value.retry_after == 7
    assert len(sessions) == 2
    with pytest.raises(SessionUnknown):
        sessions.get("third")
    sessions.delete(first.id)
    opened(sessions, MODEL, session_id="third")


def test_at_most_max_state_bytes():
    """States take at most so many bytes in all; a session that does not fit is refused and makes no group."""
    sessions = table(max_state_bytes=40)
    small = opened(sessions, MODEL, batch_size=4)
    assert sessions.state_bytes == 32
    with pytest.raises(SessionsFull, match="16 bytes does not fit"):
        opened(sessions, MODEL, batch_size=2)
    assert len(sessions._groups) == 1
    opened(sessions, MODEL, batch_size=1)
    sessions.delete(small.id)
    assert sessions.state_bytes == 8


def test_an_empty_group_gives_its_memory_back():
    """The arena of a group goes when its last session does; a later session finds a new one."""
    sessions = table()
    first, second = opened(sessions, MODEL), opened(sessions, MODEL)
    arena = weakref.ref(first.group.arena)
    sessions.delete(first.id)
    assert arena() is second.group.arena
    sessions.delete(second.id)
    del first, second
    assert arena() is None
    assert opened(sessions, MODEL).slot == 0


def test_listing():
    """Sessions are listed oldest first, a page after another; one that lives throughout is on exactly one page."""
    sessions = table()
    made = [opened(sessions, loaded(name="ab"[index % 2])) for index in range(10)]
    assert list(sessions.after(0)) == made
    assert list(sessions.after(0, "b")) == made[1::2]
    page = list(islice(sessions.after(0), 4))
    sessions.delete(made[0].id)
    sessions.delete(made[5].id)
    late = opened(sessions, MODEL)
    rest = list(sessions.after(page[-1].number))
    assert rest == [made[4], *made[6:], late]
    assert list(sessions.after(10**15)) == []


class Life(RuleBasedStateMachine):
    """Any life of up to four sessions, against a model of ten lines."""

    ids = st.sampled_from("abcd")

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.sessions = table(self.clock, max_sessions=3)
        self.live: dict[str, list[float]] = {}  # id: [step, sum, last used, idle lifetime]
        self.ended: dict[str, type[Exception]] = {}

    @rule(session_id=ids, lifetime=st.integers(1, 30), start=st.integers(0, 9))
    def create(self, session_id, lifetime, start):
        arguments = {"session_id": session_id, "idle_lifetime": lifetime}
        if session_id in self.live:
            with pytest.raises(SessionExists):
                opened(self.sessions, MODEL, **arguments)
        elif len(self.live) == 3:
            with pytest.raises(SessionsFull):
                opened(self.sessions, MODEL, **arguments)
        else:
            opened(self.sessions, MODEL, states={"sum": np.full((1, 2), start, np.float32)}, **arguments)
            self.live[session_id] = [0, start, self.clock.now, lifetime]
            self.ended.pop(session_id, None)

    @rule(session_id=ids)
    def delete(self, session_id):
        if session_id in self.live:
            self.sessions.delete(session_id)
            del self.live[session_id]
            self.ended[session_id] = SessionClosed
        else:
            with pytest.raises(self.ended.get(session_id, SessionUnknown)):
                self.sessions.delete(session_id)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), steps=st.integers(1, 5), value=st.integers(0, 9), ahead=st.integers(0, 1))
    def step(self, data, steps, value, ahead):
        session_id = data.draw(st.sampled_from(sorted(self.live)))
        session = self.sessions.get(session_id)
        found = columns(session, first_steps=[self.live[session_id][0] + ahead])
        kept, errors = self.sessions.check(found, name)
        if ahead:
            assert [error.reason for _, error in errors] == ["STEP_AHEAD"]
            return
        assert kept is None
        self.sessions.commit(found, {"sum": np.full((1, 2), value, np.float32)}, steps)
        self.live[session_id][:3] = self.live[session_id][0] + steps, value, self.clock.now

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def reset(self, data):
        session_id = data.draw(st.sampled_from(sorted(self.live)))
        self.sessions.reset(self.sessions.get(session_id), None)
        self.live[session_id][1:3] = 0, self.clock.now

    @rule(seconds=st.integers(0, 20))
    def wait(self, seconds):
        self.clock.now += seconds
        due = {key for key, (_, _, used, lifetime) in self.live.items() if used + lifetime <= self.clock.now}
        assert set(self.sessions.expire()) == due
        for session_id in due:
            del self.live[session_id]
            self.ended[session_id] = SessionExpired

    @invariant()
    def agree(self):
        assert [session.id for session in self.sessions.after(0)] == list(self.live)
        assert self.sessions.state_bytes == 8 * len(self.live)
        for session_id, (step, value, _, _) in self.live.items():
            session = self.sessions.get(session_id)
            assert session.step == step
            np.testing.assert_array_equal(sums(session), np.full((1, 2), value))
        for session_id, error in self.ended.items():
            with pytest.raises(error):
                self.sessions.get(session_id)


TestLife = Life.TestCase
TestLife.settings = settings(deadline=None, max_examples=40, stateful_step_count=30)
