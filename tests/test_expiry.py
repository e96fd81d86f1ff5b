"""When slots must be looked at."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnserve_server.expiry import Expiry

SLOTS = 6
PUT = st.tuples(st.just("put"), st.integers(0, SLOTS - 1), st.floats(0, 50))
FREE = st.tuples(st.just("free"), st.integers(0, SLOTS - 1), st.just(0.0))
WAIT = st.tuples(st.just("wait"), st.integers(1, 5), st.floats(0, 20))


@settings(deadline=None)
@given(st.lists(st.one_of(PUT, FREE, WAIT), max_size=80))
def test_nothing_due_is_missed(steps):
    """Whatever is put, freed, used again and taken in whatever pieces: every slot that is due is taken within a second,
    none twice, and entries stay few.
    """
    expiry, now, due = Expiry(), 100.0, {}
    expiry.grow(SLOTS)
    for step, number, seconds in steps:
        if step == "put":
            due[number] = now + seconds
            expiry.put(np.array([number]), np.array([due[number]]))
        elif step == "free":
            due.pop(number, None)
        else:
            now += seconds
            while expiry.soonest is not None and expiry.soonest <= now:
                slots = expiry.take(now, number)
                assert len(set(slots.tolist())) == len(slots) <= number
                for slot in slots.tolist():
                    if due.get(slot, now) > now:
                        expiry.put(np.array([slot]), np.array([due[slot]]))
                    else:
                        due.pop(slot, None)
            assert all(time > now - 1 for time in due.values())
        assert expiry._held == sum(map(len, expiry._buckets.values())) <= 2 * SLOTS + 1
        assert sorted(expiry._buckets) == sorted(expiry._order)


def test_a_mass_is_taken_in_pieces():
    """However many come up at once, a call looks at as many as it was asked to."""
    expiry = Expiry()
    expiry.grow(10_000)
    expiry.put(np.arange(10_000), np.repeat([7.5, 8.5], 5000))
    assert expiry.soonest == 8
    assert len(expiry.take(7.9, 1000)) == 0
    pieces = [expiry.take(9, 1500) for _ in range(7)]
    assert [len(piece) for piece in pieces] == [1500] * 6 + [1000]
    assert sorted(np.concatenate(pieces).tolist()) == list(range(10_000))
    assert expiry.soonest is None
