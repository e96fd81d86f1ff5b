from __future__ import annotations

import numpy as np
import pytest

from rnnserve import nest
from rnnserve.errors import InvalidInput
from rnnserve.models import StateSpec

F4 = np.dtype("f4")


def specs(*paths):
    return [StateSpec(f"s{'_'.join(map(str, path))}", F4, (2,), path) for path in paths]


LSTM = specs((0,), (1,))
GRU = specs((0,))
LSTM_OVER_GRU = specs((0, 0), (0, 1), (1, 0))


@pytest.mark.parametrize(
    ("layer", "packed"),
    [
        (LSTM, ["s0", "s1"]),
        (GRU, ["s0"]),
        (LSTM_OVER_GRU, [["s0_0", "s0_1"], ["s1_0"]]),
        (LSTM_OVER_GRU[::-1], [["s0_0", "s0_1"], ["s1_0"]]),
        ([], []),
        ([StateSpec("h", F4, (2,)), StateSpec("c", F4, (2,))], ["h", "c"]),
    ],
)
def test_pack_and_flatten(layer, packed):
    """States stand where Keras has them, whatever their order in the description, and find their names again."""
    assert nest.pack(layer, lambda spec: spec.name) == packed
    assert nest.flatten(layer, packed) == {spec.name: spec.name for spec in layer}


def test_tuples_and_names():
    """Keras 3's tuples are as good as lists, and so is a mapping by name."""
    assert nest.flatten(LSTM, (1, 2)) == {"s0": 1, "s1": 2}
    assert nest.flatten(LSTM, {"s1": 2, "s0": 1}) == {"s0": 1, "s1": 2}


def test_bare_states():
    """A layer or a cell of one state may have it bare, as Keras 3 allows."""
    array = np.zeros((3, 2))
    assert nest.flatten(GRU, array)["s0"] is array
    assert nest.flatten(LSTM_OVER_GRU, [[1, 2], array])["s1_0"] is array


@pytest.mark.parametrize(
    ("layer", "given", "got"),
    [
        (LSTM, [1], "[int]"),
        (LSTM, np.zeros((3, 2)), "ndarray[3, 2]"),
        (LSTM_OVER_GRU, [np.zeros(2), np.zeros(2), np.zeros(2)], "[ndarray[2], ndarray[2], ndarray[2]]"),
        (LSTM_OVER_GRU, [[1], [2]], "[[int], [int]]"),
        (LSTM, {"s0": 1}, "['s0']"),
    ],
)
def test_wrong_structure(layer, given, got):
    """A flat list for nested cells, a missing or an extra state is refused with the right nesting in the message."""
    with pytest.raises(InvalidInput) as caught:
        nest.flatten(layer, given)
    assert caught.value.metadata["got"] == got
    assert "s0" in caught.value.metadata["expected"]
