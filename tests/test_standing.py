"""Where sessions stand in a store: what a dict of tuples would say."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rnnserve_server.store.standing import Standing, strangers

_IDS = st.lists(st.integers(0, 300).map(str), min_size=1, max_size=100, unique=True).map(tuple)


@given(st.lists(st.tuples(_IDS, st.booleans()), min_size=1, max_size=20))
def test_it_is_a_dict(calls: list[tuple[tuple[str, ...], bool]]) -> None:
    """Whatever sessions are named together, however many: what was said last of each is found, and -1 of the others."""
    standing, expected = Standing(), dict[str, tuple[int, int, int]]()
    for number, (ids, forgotten) in enumerate(calls):
        assert standing.of(ids).tolist() == [list(expected.get(each, (-1, -1, -1))) for each in ids]
        numbers = np.array([(number, position, 7) for position in range(len(ids))])
        standing.set(ids, numbers)
        expected |= zip(ids, map(tuple, numbers.tolist()), strict=True)
        if forgotten:
            standing.forget(ids[0])
            del expected[ids[0]]
        assert standing.of(ids).tolist() == [list(expected.get(each, (-1, -1, -1))) for each in ids]


def test_strangers_are_those_that_stand_elsewhere() -> None:
    """By any of the three numbers; nobody, if all stand where they are said to."""
    known = np.array([(1, 2, 3), (1, 2, 3), (1, 2, 3), (-1, -1, -1)])
    said = np.array([(1, 2, 3), (1, 2, 4), (2, 2, 3), (1, 2, 3)])
    assert strangers(known, said) == [1, 2, 3]
    assert not strangers(known, known.copy())
