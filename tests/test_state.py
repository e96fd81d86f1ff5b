"""The arena of states."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rnnserve_models.spec import StateSpec
from rnnserve_server.state import Arena

SPECS = (
    StateSpec("h", np.dtype(np.float32), (3,), (0,)),
    StateSpec("c", np.dtype(np.float64), (2, 2), (1,), np.full((2, 2), 7.0)),
    StateSpec("n", np.dtype(np.int64), (), (2,), np.array(5)),
)


def values(rows, fill):
    return {spec.name: np.full((rows, *spec.shape), fill, spec.dtype) for spec in SPECS}


def assert_default(states, rows):
    np.testing.assert_array_equal(states["h"], np.zeros((rows, 3), np.float32))
    np.testing.assert_array_equal(states["c"], np.full((rows, 2, 2), 7.0))
    np.testing.assert_array_equal(states["n"], np.full(rows, 5))


def test_a_slot_starts_at_the_default_whoever_had_it_before():
    """A slot given out again shows the model's default states, never what another session left."""
    arena = Arena(SPECS, 2)
    slots = [arena.acquire() for _ in range(20)]
    arena.scatter(np.array(slots), values(40, 9))
    for slot in slots:
        arena.release(slot)
    again = [arena.acquire() for _ in range(20)]
    assert set(again) <= set(range(arena.capacity))
    assert_default(arena.gather(np.array(again)), 40)


def test_growth_keeps_states():
    """When the arena doubles, every session keeps its states and no slot is given out twice."""
    arena = Arena(SPECS, 1)
    slots = []
    for number in range(100):
        slots.append(arena.acquire())
        arena.scatter(np.array(slots[-1:]), values(1, number))
    assert len(set(slots)) == 100
    assert arena.capacity == 128
    np.testing.assert_array_equal(arena.gather(np.array(slots))["n"], np.arange(100))
    np.testing.assert_array_equal(arena.gather(np.array(slots))["h"][:, 1], np.arange(100))


def test_gather_is_a_copy_and_in_the_order_asked():
    """What is gathered is [N * batch_size, ...] in the order of the slots, and writing to it changes no session."""
    arena = Arena(SPECS, 2)
    slots = np.array([arena.acquire() for _ in range(3)])
    states = values(6, 0)
    states["n"] = np.arange(6)
    arena.scatter(slots, states)
    found = arena.gather(slots[::-1])
    assert found["n"].tolist() == [4, 5, 2, 3, 0, 1]
    assert found["c"].shape == (6, 2, 2)
    found["n"][:] = -1
    assert arena.gather(slots)["n"].tolist() == list(range(6))


def test_reset_touches_one_slot():
    """Reset sets one slot to given states or to the default, and leaves its neighbours."""
    arena = Arena(SPECS, 2)
    slots = np.array([arena.acquire() for _ in range(3)])
    arena.scatter(slots, values(6, 3))
    arena.reset(int(slots[1]))
    arena.reset(int(slots[2]), values(2, 8))
    assert_default(arena.gather(slots[1:2]), 2)
    assert arena.gather(slots)["n"].tolist() == [3, 3, 5, 5, 8, 8]


def test_session_bytes():
    """A session costs its batch size times the bytes of each state; a model without states costs nothing."""
    assert Arena(SPECS, 2).session_bytes == 2 * (3 * 4 + 4 * 8 + 8)
    empty = Arena((), 3)
    assert empty.session_bytes == 0
    assert empty.gather(np.array([empty.acquire()])) == {}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=80))
def test_slots_as_a_dictionary(steps):
    """Whatever is given out and taken back, a slot holds what was last written to it since it was given out."""
    arena, model = Arena(SPECS, 1), {}
    for acquire, number in steps:
        if acquire or not model:
            slot = arena.acquire()
            assert slot not in model
            assert_default(arena.gather(np.array([slot])), 1)
            arena.scatter(np.array([slot]), values(1, number))
            model[slot] = number
        else:
            slot = sorted(model)[number % len(model)]
            del model[slot]
            arena.release(slot)
        slots = np.array(sorted(model), np.int64)
        assert arena.gather(slots)["n"].tolist() == [model[slot] for slot in slots]
