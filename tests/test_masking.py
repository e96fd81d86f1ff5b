"""Compaction: any mask becomes right padding, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rnnserve_models import InputError, compact

MASKS = st.tuples(st.integers(1, 7), st.integers(0, 4)).flatmap(lambda shape: arrays(bool, shape))


def steps_of(mask):
    """x [T, R, 1] whose valid elements say where they were, and whose masked ones are NaN."""
    x = np.arange(1.0, mask.size + 1).reshape(*mask.shape, 1)
    x[~mask] = np.nan
    return x


@given(MASKS, st.booleans())
def test_valid_steps_come_first_in_order(mask, go_backwards):
    """Each row holds its valid steps in the order of iteration, then zeros; nothing masked is left."""
    packed = compact({"x": steps_of(mask)}, mask, go_backwards=go_backwards)
    order = slice(None, None, -1 if go_backwards else 1)
    assert packed.timesteps == len(mask)
    assert packed.lengths.tolist() == mask.sum(axis=0).tolist()
    if mask.shape[1]:
        assert len(packed.inputs["x"]) == packed.lengths.max()
    for row, length in enumerate(packed.lengths):
        expected = steps_of(mask)[order, row][mask[order, row]]
        np.testing.assert_array_equal(packed.inputs["x"][:length, row], expected)
        assert (packed.inputs["x"][length:, row] == 0).all()


@given(MASKS, st.booleans(), st.booleans(), st.booleans())
def test_expand_is_keras_rule(mask, go_backwards, return_sequences, zero_output_for_mask):
    """A masked step repeats the output before, or is 0; before the first valid step the output is 0."""
    packed = compact({"x": steps_of(mask)}, mask, go_backwards=go_backwards)
    # An engine whose output is its input, and that leaves garbage behind each row's length.
    y = np.where(
        np.arange(len(packed.inputs["x"]))[:, None, None] < packed.lengths[:, None], packed.inputs["x"], np.nan
    )
    x, valid = steps_of(mask), mask
    if go_backwards:
        x, valid = x[::-1], valid[::-1]
    expected = np.zeros_like(x)
    previous = np.zeros_like(x[0])
    for t in range(len(x)):
        masked = np.zeros_like(previous) if zero_output_for_mask else previous
        expected[t] = previous = np.where(valid[t][:, None], x[t], masked)
    output = packed.expand(y, return_sequences=return_sequences, zero_output_for_mask=zero_output_for_mask)
    np.testing.assert_array_equal(output, expected if return_sequences else expected[-1])


@pytest.mark.parametrize("mask", [None, np.ones((4, 2)), np.full((4, 1), 3)])
def test_nothing_masked_copies_nothing(mask):
    """Without a masked step, inputs and outputs are views."""
    x = np.arange(16.0).reshape(4, 2, 2)
    forward = compact({"x": x}, mask, go_backwards=False)
    assert np.shares_memory(forward.inputs["x"], x)
    backward = compact({"x": x}, mask, go_backwards=True)
    assert np.shares_memory(backward.inputs["x"], x)
    np.testing.assert_array_equal(backward.inputs["x"], x[::-1])
    assert forward.lengths.tolist() == [4, 4]
    assert forward.expand(x, return_sequences=True, zero_output_for_mask=True) is x
    assert np.shares_memory(forward.expand(x, return_sequences=False, zero_output_for_mask=True), x)


def test_everything_masked():
    """No valid step at all leaves no time steps to compute, and outputs of zeros."""
    packed = compact({"x": np.full((3, 2, 1), np.nan)}, np.zeros((3, 2)), go_backwards=False)
    assert packed.inputs["x"].shape == (0, 2, 1)
    assert packed.lengths.tolist() == [0, 0]
    y = np.ones((0, 2, 5), np.float16)
    sequence = packed.expand(y, return_sequences=True, zero_output_for_mask=False)
    assert sequence.shape == (3, 2, 5)
    assert sequence.dtype == np.float16
    assert not sequence.any()
    assert not packed.expand(y, return_sequences=False, zero_output_for_mask=False).any()


def test_one_mask_for_all_rows_and_many_inputs():
    """A mask [T, 1] is every row's, any nonzero is valid, and inputs of any shape move together."""
    inputs = {"a": np.arange(6).reshape(3, 2), "b": np.arange(36.0).reshape(3, 2, 3, 2)}
    packed = compact(inputs, np.array([[-0.5], [0], [2]]), go_backwards=False)
    np.testing.assert_array_equal(packed.inputs["a"], inputs["a"][[0, 2]])
    np.testing.assert_array_equal(packed.inputs["b"], inputs["b"][[0, 2]])
    assert packed.lengths.dtype == np.int64


def test_misfits():
    """Inputs and masks that differ in time or batch are refused by name."""
    with pytest.raises(InputError, match=r"mask: expected time and batch \[3, 2\], got \[2, 3\]"):
        compact({"x": np.zeros((3, 2, 1))}, np.ones((2, 3)), go_backwards=False)
    with pytest.raises(InputError, match=r"inputs\.b: expected time and batch \[3, 2\], got \[3, 1, 1\]"):
        compact({"a": np.zeros((3, 2, 1)), "b": np.zeros((3, 1, 1))}, None, go_backwards=False)
    with pytest.raises(InputError, match="at least one input"):
        compact({}, None, go_backwards=False)
