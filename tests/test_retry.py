from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnserve._retry import Retry


class Clock:
    """A clock that a test sets, and a chance that it chooses."""

    def __init__(self, chance=1.0):
        self.now = 100.0
        self.chance = chance

    def policy(self, limit=30.0, **settings):
        return Retry(limit, clock=lambda: self.now, chance=lambda: self.chance, **settings)


def waits(clock, trial, most=100, least=None):
    """The waits of a trial that sleeps them all, until it gives up."""
    found = []
    while len(found) < most and (wait := trial.next(least)) is not None:
        clock.now += wait
        found.append(round(wait, 6))
    return found


def test_backoff_grows_to_its_longest():
    """Each wait may be twice the last one, up to the longest, and the last ends at the limit."""
    clock = Clock()
    assert waits(clock, clock.policy().begin())[:8] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2]
    assert clock.now == 130
    for_ever = waits(clock, clock.policy(None).begin(), 2000)
    assert for_ever[-1] == 2


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 20))
def test_full_jitter(chance, tries):
    """Chance chooses from nothing to the whole backoff."""
    clock = Clock(chance)
    trial = clock.policy(None).begin()
    for _ in range(tries):
        trial.next()
    assert trial.next() == pytest.approx(chance * min(2, 0.05 * 2**tries))
    assert trial.tries == tries + 1


def test_the_servers_hint_is_the_least():
    """What the server asks for is waited, and more than is left is not waited at all."""
    clock = Clock()
    trial = clock.policy(5.0).begin()
    assert trial.next(1.5) == pytest.approx(1.55)
    clock.now += 4
    assert trial.next(1.5) is None
    assert trial.next(0.9) == pytest.approx(1.0)
    clock.now += 1
    assert (trial.left, trial.seconds, trial.next()) == (0, 5, None)


def test_no_retries():
    """With a limit of 0 nothing is tried again; with None there is no limit."""
    assert Clock().policy(0).begin().next() is None
    assert Clock().policy(None).begin().left is None
