"""Chunks that are lost with their streams, by their numbers alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rnnserve._losses import LOSSES, LOSSES_ALONE, Losses


@given(st.sets(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_the_one_to_blame_is_found(numbers, data):
    """Whichever of the chunks breaks every stream: it alone is given up, after so many losses, and by then each of the
    others was answered.
    """
    culprit = data.draw(st.sampled_from(sorted(numbers)))
    losses, waiting, streams = Losses(), sorted(numbers), 0
    while culprit in waiting:
        streams += 1
        sent, broken = [], False
        for number in waiting:
            if losses and losses.hold(number, others=bool(sent)):
                broken = culprit in sent
                if broken:
                    break
                waiting = [each for each in waiting if each not in sent]  # they were answered
                sent = []
                assert not losses.hold(number, others=False)
            sent.append(number)
        assert broken or culprit in sent
        given_up = losses.count(set(sent), set(waiting) - set(sent))
        assert given_up <= {culprit}
        waiting = [number for number in waiting if number not in given_up]
        if given_up:
            assert streams == LOSSES + LOSSES_ALONE
            assert all(number > culprit for number in waiting)  # not yet sent alone: they come behind it
        assert streams <= LOSSES + LOSSES_ALONE


def test_what_is_lost_beside_others_is_never_given_up():
    """Losses of many chunks at once tell nothing of each, however often."""
    losses = Losses()
    for _ in range(50):
        assert losses.count({1, 2, 3}, ()) == set()
    assert losses.hold(1, others=True)
    assert not losses.hold(1, others=False)
    assert losses.hold(9, others=True)  # nothing goes beside it


def test_what_was_answered_is_forgotten():
    """A number that is neither lost nor waiting any more is not counted on."""
    losses = Losses()
    for _ in range(LOSSES):
        losses.count({1}, {2})
    assert losses
    losses.count((), {2})
    assert not losses
