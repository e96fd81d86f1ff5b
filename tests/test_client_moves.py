"""What the client's core does when sessions go from one replica to another, without I/O."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rnnserve._lanes import Account, Lanes
from rnnserve._rendezvous import choose
from rnnserve.errors import GroupError, InvalidInput, StepMismatch
from rnnserve.v1 import session_pb2
from test_client_lanes import chunk
from test_client_replay import SHARE, Oracle, Wire, told


def moved(wire, others, rng):
    """The lanes of a stream that was lost go to others."""
    wire.lose()
    for lane in wire.lanes.part():
        rng.choice(others).lanes.adopt([lane])
    assert not wire.lanes.members
    assert not wire.lanes.wishes


def settle(wires):
    """Goes on until nothing is left to be said by any."""
    while any(wire.lanes.wishes or wire.out or wire.back for wire in wires):
        for wire in wires:
            wire.settle()


@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(0, 25),
    st.floats(0, 0.3),
    st.floats(0, 0.3),
    st.floats(0, 0.5),
    st.floats(0, 0.2),
)
def test_each_chunk_is_applied_once_wherever_sessions_go(seed, count, chunks, losses, moves, walks, refusals):
    """Streams are lost, some for good, and sessions that rest change their replica, with groups across replicas: each
    ticket is answered once, and a session has taken what was answered, in order, nothing twice."""
    rng = random.Random(seed)
    window = rng.choice([1, 2, 16])
    server = Oracle(window)  # one store
    account = Account()
    budget, rows = rng.choice([60, 300, 1 << 20]), rng.choice([3, 100])
    wires = [Wire(Lanes(budget, rows, window * SHARE, account=account), server, rng) for _ in range(3)]
    made = [
        rng.choice(wires).lanes.open(session_pb2.SessionConfig(model="m", session_id=f"s{n}"), f"open{n}")
        for n in range(count)
    ]
    wished = {}
    for ticket in range(1, chunks + 1):
        group = rng.sample(range(count), rng.randint(1, count))
        sign = -1 if rng.random() < refusals else 1
        if rng.random() < 0.4:
            lanes = [made[n] for n in group]
            lanes[0].holder.step_all(lanes, chunk(ticket, sign * ticket * 100, rng.randint(1, 2), len(group)))
        else:
            group = group[:1]
            made[group[0]].holder.step(made[group[0]], chunk(ticket, sign * ticket * 100, rng.randint(1, 2)))
        wished[ticket] = group
        while rng.random() < 0.8:
            wire = rng.choice(wires)
            if rng.random() < losses:
                wire.lose()
            if rng.random() < moves:
                moved(wire, [each for each in wires if each is not wire], rng)
            if rng.random() < walks:
                lane = rng.choice(made)
                if lane.holder.let_go(lane):
                    rng.choice(wires).lanes.adopt([lane])
            wire.move()
    settle(wires)
    answers = told([answer for wire in wires for answer in wire.answers])
    assert set(answers) == set(wished) | {f"open{n}" for n in range(count)}
    applied = {n: [] for n in range(count)}
    for ticket, group in wished.items():
        answer = answers[ticket]
        assert answer.error is None or isinstance(answer.error, (InvalidInput, StepMismatch, GroupError))
        failed = set()
        if isinstance(answer.error, GroupError):
            failed = set(answer.error.errors)
        elif answer.error is not None:
            failed = {0}
        for row, n in enumerate(group):
            if row not in failed:
                applied[n].append(float(ticket * 100 + row if len(group) > 1 else ticket * 100))
    assert {f"s{n}": values for n, values in applied.items()} == server.applied
    for n, lane in enumerate(made):
        assert lane.next_step == server.steps[f"s{n}"]
    assert account.held == 0
    assert [wire.lanes.in_flight for wire in wires] == [0, 0, 0]


@given(st.integers(0, 2**32), st.booleans())
def test_giving_up_where_a_group_is_on_two_replicas(seed, keep):
    """Of a group whose one half is answered and whose other half is given up, whoever waits is told once, and no memory
    is held for it."""
    rng = random.Random(seed)
    server, account = Oracle(), Account()
    wires = [Wire(Lanes(account=account), server, rng) for _ in range(2)]
    made = [
        wire.lanes.open(session_pb2.SessionConfig(model="m", session_id=f"s{n}"), f"open{n}")
        for n, wire in enumerate(wires)
    ]
    settle(wires)
    made[0].holder.step_all(made, chunk("group", 100, rows=2))
    wires[0].settle()
    for _ in range(rng.randint(0, 2)):
        wires[1].move()
    wires[1].lose()
    answered = [answer.ticket for wire in wires for answer in wire.answers]
    given_up = wires[1].lanes.give_up(keep=keep)
    assert ("group" in answered) + ("group" in given_up) == 1
    settle(wires)
    assert account.held == 0
    assert server.applied["s0"] == [100.0]
    if keep:
        assert server.applied["s1"] == [101.0]


def test_few_sessions_move_when_replicas_change():
    """Sessions are spread evenly; when a replica goes only its own move, to all others; when one comes, to it only."""
    replicas = [f"10.0.0.{n}:50051" for n in range(5)]
    sessions = [f"session{n}" for n in range(5000)]
    before = {each: choose(replicas, each) for each in sessions}
    shares = Counter(before.values())
    assert all(800 < shares[each] < 1200 for each in replicas)
    without = {each: choose(replicas[1:], each) for each in sessions}
    went = Counter(without[each] for each in sessions if without[each] != before[each])
    assert sum(went.values()) == shares[replicas[0]]
    assert all(went[each] > 150 for each in replicas[1:])
    more = {each: choose([*replicas, "10.0.0.9:50051"], each) for each in sessions}
    assert {more[each] for each in sessions if more[each] != before[each]} == {"10.0.0.9:50051"}
