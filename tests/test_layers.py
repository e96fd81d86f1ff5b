"""The local layer: Keras's options against Keras's loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from keras_loop import keras_loop, with_random_weights
from rnnserve_models import RNN, DenseCell, GRUCell, InputError, LayerOptions, LSTMCell, ModelError, SimpleRNNCell
from rnnserve_models.stack import StackedRNNCells

LSTM = with_random_weights(LSTMCell(units=3), 2)
GRU = with_random_weights(GRUCell(units=3), 2)
STACK = with_random_weights(StackedRNNCells([LSTMCell(units=3), DenseCell(units=4), GRUCell(units=2)]), 2)

OPTIONS = st.builds(LayerOptions, *[st.booleans()] * 7)


def random(shape, seed=1, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def layer(cell, options):
    return RNN(cell, **vars(options))


def initial(cell, rows):
    return [random((rows, *spec.shape), seed) for seed, spec in enumerate(cell.state_specs())]


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from([LSTM, GRU, STACK]), OPTIONS)
def test_options_and_masks_are_keras(data, cell, options):
    """Any options, any mask and any initial state give, to the bit, what Keras's loop gives; NaN never leaks."""
    steps, rows = data.draw(st.integers(1, 6)), data.draw(st.integers(0 if options.return_sequences else 1, 4))
    mask = data.draw(st.none() | arrays(bool, (steps, rows)))
    x, states = random((steps, rows, 2)), initial(cell, rows)
    if mask is not None:
        x[~mask] = data.draw(st.sampled_from([np.nan, np.inf, 0]))
    if rows:
        expected, finals = keras_loop(cell, x, mask, states, options)
    else:
        expected, finals = np.zeros((steps, 0, cell.output_size)), states

    if not options.time_major:
        x, mask = x.swapaxes(0, 1), None if mask is None else mask.T
        expected = expected.swapaxes(0, 1) if options.return_sequences else expected
    got = layer(cell, options)(x, mask, cell.nest_states(states))
    output, *nested = got if options.return_state else [got]
    np.testing.assert_array_equal(output, expected)
    if options.return_state:
        for state, final in zip(cell.flat_states(nested), finals, strict=True):
            np.testing.assert_array_equal(state, final)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([LSTM, GRU, STACK]), st.booleans())
def test_a_stateful_layer_may_be_fed_in_chunks(data, cell, masked):
    """Chunks of a sequence give a stateful layer the states, and at valid steps the outputs, of the whole."""
    steps, rows = data.draw(st.integers(1, 9)), 3
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, steps - 1)), max_size=3)))
    x = random((rows, steps, 2))
    mask = data.draw(arrays(bool, (rows, steps))) if masked else np.ones((rows, steps), bool)
    whole = RNN(cell, return_sequences=True, return_state=True)(x, mask)
    chunked = RNN(cell, return_sequences=True, stateful=True)
    parts = [chunked(x[:, a:b], mask[:, a:b]) for a, b in zip([0, *cuts], [*cuts, steps], strict=True) if a < b]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1)[mask], whole[0][mask])
    for state, final in zip(cell.flat_states(chunked.states), cell.flat_states(whole[1:]), strict=True):
        np.testing.assert_array_equal(state, final)


def test_all_masked_keeps_the_initial_state():
    """A row without a valid step gives 0, not h0, and keeps its state."""
    h0 = random((2, 3))
    output, h = RNN(GRU, return_state=True)(random((2, 4, 2)), np.zeros((2, 4)), h0)
    assert not output.any()
    np.testing.assert_array_equal(h, h0)


def test_mask_shapes():
    """A mask is [B, T], [B, T, 1] or one row for all, of any dtype."""
    x, mask = random((3, 4, 2)), np.array([[1, 0, 1, 0]] * 3)
    expected = RNN(GRU)(x, mask)
    for same in (mask[:1], mask[:, :, None], mask[:1, :, None], mask * 0.5, mask.tolist()):
        np.testing.assert_array_equal(RNN(GRU)(x, same), expected)
    np.testing.assert_array_equal(RNN(GRU, time_major=True)(x.swapaxes(0, 1), mask[:1].T), expected)


def test_state_is_recorded_reset_and_overridden():
    """Stateful: calls go on from the recorded state, reset_states sets it, initial_state replaces it (Keras 3)."""
    x, fresh = random((2, 3, 2)), RNN(LSTM, return_state=True)
    stateful = RNN(LSTM, stateful=True)
    assert stateful.states is None
    stateful.reset_states()
    first = stateful(x)
    second = stateful(x)
    np.testing.assert_array_equal(first, fresh(x)[0])
    np.testing.assert_array_equal(second, fresh(x, None, fresh(x)[1:])[0])
    stateful.reset_states()
    assert not np.any(stateful.states)
    np.testing.assert_array_equal(stateful(x), first)
    given = [random((2, 3), 5), random((2, 3), 6)]
    np.testing.assert_array_equal(stateful(x, None, given), fresh(x, None, given)[0])
    stateful.reset_states(given)
    np.testing.assert_array_equal(stateful.states, given)


def test_recorded_state_is_the_layers_own():
    """Writing into what a layer took or gave does not change what it recorded."""
    given = [random((2, 3))]
    stateful = RNN(GRU, stateful=True, return_state=True)
    stateful.reset_states(given)
    given[0][:] = 7
    _, h = stateful(random((2, 3, 2)))
    recorded = stateful.states[0].copy()
    h[:] = 7
    stateful.states[0][:] = 7
    np.testing.assert_array_equal(stateful.states[0], recorded)


def test_values_given_before_the_first_call_fix_the_batch():
    """reset_states(values) before any call says how many rows there are."""
    stateful = RNN(LSTM, stateful=True)
    with pytest.raises(InputError, match=r"initial_states\.c: expected shape \[2, 3\], got shape \[1, 3\]"):
        stateful.reset_states([np.zeros((2, 3)), np.zeros((1, 3))])
    stateful.reset_states([np.zeros((2, 3)), np.zeros((2, 3))])
    with pytest.raises(InputError, match=r"inputs: expected batch size 2, as in the first call, got 3"):
        stateful(random((3, 1, 2)))


def test_only_a_stateful_layer_resets():
    """As in Keras 2."""
    with pytest.raises(AttributeError, match="Layer must be stateful"):
        RNN(GRU).reset_states()


def test_nesting_of_states():
    """States nest as Keras nests them: flat for a cell, a list for each stacked cell; a lone state needs no list."""
    x = random((2, 3, 2))
    stacked = RNN(STACK, return_state=True)
    output, lstm, gru = stacked(x)
    assert ([state.shape for state in lstm], [state.shape for state in gru]) == ([(2, 3), (2, 3)], [(2, 2)])
    bare, listed = stacked(x, None, [lstm, gru[0]]), stacked(x, None, (tuple(lstm), gru))
    np.testing.assert_array_equal(bare[0], listed[0])
    assert stacked.state_size == [[3, 3], 2]
    assert stacked.output_size == output.shape[1] == 2
    assert RNN(GRU).state_size == [3]
    assert [[state.shape for state in part] for part in stacked.get_initial_state(5)] == [[(5, 3)] * 2, [(5, 2)]]
    with pytest.raises(InputError, match=r"initial_states: expected arrays nested as \[\[3, 3\], 2\], got 3"):
        stacked(x, None, [*lstm, *gru])
    with pytest.raises(InputError, match="initial_states"):
        RNN(LSTM)(x, None, lstm[0])


def test_a_list_of_cells_is_a_stack():
    """RNN([cells]) is RNN(StackedRNNCells(cells))."""
    x = random((2, 3, 2))
    np.testing.assert_array_equal(RNN(list(STACK.cells))(x), RNN(STACK)(x))


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_compute_output_shape(return_sequences, time_major):
    """The shapes it computes are those of the arrays that a call gives."""
    for cell in (LSTM, GRU, STACK):
        stack = RNN(cell, return_sequences=return_sequences, return_state=True, time_major=time_major)
        output, *states = stack(random((4, 5, 2)))
        shape, *state_shapes = stack.compute_output_shape((4, 5, 2))
        assert shape == output.shape
        assert cell.flat_states(state_shapes) == [state.shape for state in cell.flat_states(states)]
    assert RNN(GRU, return_sequences=True).compute_output_shape((None, None, 2)) == (None, None, 3)


@pytest.mark.parametrize("dtype", ["int32", "float16", "float64", "bool"])
def test_inputs_are_converted(dtype):
    """Integers and floats of any precision become the layer's dtype, as in Keras 3."""
    x = np.ones((2, 3, 2), dtype)
    output = RNN(GRU)(x, None, np.ones((2, 3), dtype))
    assert output.dtype == np.float32
    np.testing.assert_array_equal(output, RNN(GRU)(x.astype("float32"), None, np.ones((2, 3), "float32")))


def test_float16_layer():
    """A float16 layer is float16 throughout."""
    output, h = RNN(with_random_weights(SimpleRNNCell(units=3), 2, "float16"), return_state=True)(random((2, 3, 2)))
    assert output.dtype == h.dtype == np.float16


@pytest.mark.parametrize(
    ("x", "mask", "state", "message"),
    [
        (np.zeros((2, 3)), None, None, r"inputs: expected shape \[batch, time, 2\], got shape \[2, 3\]"),
        (np.zeros((2, 3, 5)), None, None, r"inputs: expected shape \[batch, time, 2\], got shape \[2, 3, 5\]"),
        (np.zeros((2, 0, 2)), None, None, r"inputs: expected at least one time step"),
        ([[["a", "b"]]], None, None, r"inputs: expected numbers that convert to float32"),
        ([[[1, 2]], [[1]]], None, None, r"inputs: expected an array of float32"),
        (np.zeros((2, 3, 2)), np.ones((2, 4)), None, r"mask: expected shape \[2, 3\], got shape \[2, 4\]"),
        (np.zeros((2, 3, 2)), np.ones(3), None, r"mask: expected shape \[2, 3\], got shape \[3\]"),
        (np.zeros((2, 3, 2)), None, np.ones((2, 4)), r"initial_states\.h: expected shape \[2, 3\], got shape \[2, 4\]"),
        (np.zeros((2, 3, 2)), None, np.ones((1, 3)), r"initial_states\.h: expected shape \[2, 3\], got shape \[1, 3\]"),
    ],
)
def test_misfits(x, mask, state, message):
    """A tensor that does not fit is refused by name, with what was expected and what came."""
    with pytest.raises(InputError, match=message):
        RNN(GRU)(x, mask, state)


def test_a_failed_call_records_nothing():
    """An error leaves a stateful layer as it was."""
    stateful = RNN(GRU, stateful=True)
    stateful(random((2, 3, 2)))
    before = stateful.states
    with pytest.raises(InputError):
        stateful(random((2, 3, 2)), np.ones((5, 5)))
    np.testing.assert_array_equal(stateful.states, before)


def test_a_cell_without_weights():
    """A layer of a cell that was given no weights says so."""
    with pytest.raises(ModelError, match="has no weights"):
        RNN(GRUCell(units=2))(random((1, 1, 2)))
