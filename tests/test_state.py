"""The arena of states."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path

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
    slots = arena.acquire(20)
    arena.scatter(slots, values(40, 9))
    arena.release(slots)
    again = arena.acquire(20)
    assert again.tolist() == slots.tolist()
    assert_default(arena.gather(again), 40)


def test_growth_keeps_states():
    """When the arena grows, every session keeps its states and no slot is given out twice."""
    arena = Arena(SPECS, 1)
    slots = []
    for number in range(100):
        slots += arena.acquire(1).tolist()
        arena.scatter(np.array(slots[-1:]), values(1, number))
    assert slots == list(range(100))
    assert arena.capacity == 128
    np.testing.assert_array_equal(arena.gather(np.array(slots))["n"], np.arange(100))
    np.testing.assert_array_equal(arena.gather(np.array(slots))["h"][:, 1], np.arange(100))


def test_gather_is_a_copy_and_in_the_order_asked():
    """What is gathered is [N * batch_size, ...] in the order of the slots, and writing to it changes no session."""
    arena = Arena(SPECS, 2)
    slots = arena.acquire(3)
    states = values(6, 0)
    states["n"] = np.arange(6)
    arena.scatter(slots, states)
    found = arena.gather(slots[::-1])
    assert found["n"].tolist() == [4, 5, 2, 3, 0, 1]
    assert found["c"].shape == (6, 2, 2)
    found["n"][:] = -1
    assert arena.gather(slots)["n"].tolist() == list(range(6))


def test_reset_touches_the_slots_named():
    """Reset sets slots to given states or to the default, and leaves their neighbours."""
    arena = Arena(SPECS, 2)
    slots = arena.acquire(4)
    arena.scatter(slots, values(8, 3))
    arena.reset(int(slots[1]))
    arena.reset(slots[2:], values(2, 8))
    assert_default(arena.gather(slots[1:2]), 2)
    assert arena.gather(slots)["n"].tolist() == [3, 3, 5, 5, 8, 8, 8, 8]


def test_session_bytes():
    """A session costs its batch size times the bytes of each state; a model without states costs nothing."""
    assert Arena(SPECS, 2).session_bytes == 2 * (3 * 4 + 4 * 8 + 8)
    empty = Arena((), 3)
    assert empty.session_bytes == 0
    assert empty.gather(empty.acquire(1)) == {}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300), st.integers(0, 1000)), max_size=40))
def test_slots_as_a_dictionary(steps):
    """Whatever is given out, taken back and trimmed, the lowest free slots are given out, at the default, and a slot
    holds what was last written to it since.
    """
    arena, model = Arena(SPECS, 1), {}
    for acquire, count, number in steps:
        if acquire or not model:
            slots = arena.acquire(count)
            free = (slot for slot in itertools.count() if slot not in model)
            assert slots.tolist() == list(itertools.islice(free, count))
            assert_default(arena.gather(slots), count)
            arena.scatter(slots, values(count, number))
            model |= dict.fromkeys(slots.tolist(), number)
        else:
            slots = np.random.default_rng(number).permutation(sorted(model))[:count]
            arena.release(slots)
            for slot in slots.tolist():
                del model[slot]
            while arena.trim():
                pass
        assert arena.all_used().tolist() == sorted(model)
        slots = np.array(sorted(model), np.int64)
        assert arena.gather(slots)["n"].tolist() == [model[slot] for slot in slots]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_is_given_back_after_a_peak():
    """When 100,000 sessions of 1 KiB ended and 10 here and there remain, their memory is the system's again; those
    that remain are untouched, and the slots are given out again at the default.
    """
    specs = tuple(StateSpec(name, np.dtype(np.float32), (128,), (0,)) for name in "hc")
    arena = Arena(specs, 1)
    before = resident_bytes()
    slots = np.concatenate([arena.acquire(1000) for _ in range(100)])
    arena.scatter(slots, {name: np.full((100_000, 128), 3, np.float32) for name in "hc"})
    assert resident_bytes() - before > 95_000_000
    remaining = slots[5_000::10_000]
    arena.release(np.setdiff1d(slots, remaining))
    while arena.trim():
        pass
    assert resident_bytes() - before < 10_000_000
    assert (arena.gather(remaining)["h"] == 3).all()
    again = arena.acquire(99_990)
    assert not np.isin(again, remaining).any()
    assert not arena.gather(again)["c"].any()


def test_a_trim_is_a_bounded_piece_of_work():
    """However much is free, one call gives back 8 MiB at most, and says that there is more."""
    arena = Arena((StateSpec("h", np.dtype(np.float32), (256,), (0,)),), 1)
    arena.release(arena.acquire(50_000))
    calls = 1
    while arena.trim():
        calls += 1
    assert calls >= 50_000 * 1024 // (8 << 20)
    assert not arena.trim()
