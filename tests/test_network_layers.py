"""Recurrent layers from Keras's configs: both engines against each other and against Keras's loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from keras_loop import keras_loop
from network_cases import TOLERANCE, assert_close, cell_of, config, leaves, rnn, weights_for
from rnnserve_models import LayerOptions, layer_from_config
from rnnserve_models.network.program import MAX_GRAPHS

LAYERS = {
    "lstm": rnn("LSTM"),
    "gru": rnn("GRU"),
    "gru_reset_before": rnn("GRU", reset_after=False),
    "simple": rnn("SimpleRNN"),
    "lstm_scan": rnn("LSTM", activation="gelu", recurrent_activation="hard_sigmoid"),
    "gru_scan": rnn("GRU", activation="mish", use_bias=False),
    "stack": rnn("LSTM", "GRU", "SimpleRNN"),
}
FLAGS = tuple(LayerOptions.__dataclass_fields__)
OPTIONS = st.fixed_dictionaries({name: st.booleans() for name in FLAGS})
ENGINES = ("numpy", "onnx")


def with_options(document, **options):
    return {**document, "config": {**document["config"], **options}}


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("f")


@settings(deadline=None, max_examples=120)
@given(st.data(), st.sampled_from(sorted(LAYERS)), OPTIONS, st.sampled_from(ENGINES))
def test_any_options_and_masks_are_keras(data, name, options, engine):
    """Any options, any mask and any initial state give what Keras's loop gives; NaN in a masked step never leaks."""
    document = with_options(LAYERS[name], **options)
    weights = weights_for(document, 2)
    cell = cell_of(document)
    cell = cell.with_weights(dict(zip(cell.weight_shapes(2), weights, strict=True)), 2)
    steps, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    mask = data.draw(st.none() | arrays(bool, (steps, rows)))
    x = random(steps, rows, 2)
    if mask is not None:
        x[~mask] = data.draw(st.sampled_from([np.nan, np.inf, 0]))
    states = [random(rows, *spec.shape, seed=i) for i, spec in enumerate(cell.state_specs())]
    expected, finals = keras_loop(cell, x, mask, states, LayerOptions(**options))
    if not options["time_major"]:
        x, mask = x.swapaxes(0, 1), None if mask is None else mask.T
        expected = expected.swapaxes(0, 1) if options["return_sequences"] else expected
    layer = layer_from_config(document, weights, engine=engine, keras_version=3)
    assert layer.engine == engine
    got = layer(x, mask=mask, initial_state=cell.nest_states(states))
    assert_close(got, [expected, *cell.nest_states(finals)] if options["return_state"] else expected, 2e-5)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(sorted(LAYERS)), OPTIONS, st.sampled_from(["concat", "sum", "mul", "ave", None]))
def test_bidirectional_on_both_engines(data, name, options, merge):
    """Merge modes, options and masks: ONNX gives what NumPy gives."""
    inner = with_options(LAYERS[name], **{**options, "go_backwards": False})
    document = config("Bidirectional", layer=inner, merge_mode=merge)
    weights = weights_for(document, 2)
    steps, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    shape = (steps, rows) if options["time_major"] else (rows, steps)
    mask, x = data.draw(st.none() | arrays(bool, shape)), random(*shape, 2)
    if mask is not None:
        x[~mask] = np.nan
    numpy, onnx = (layer_from_config(document, weights, engine=engine) for engine in ENGINES)
    expected = numpy(x, mask)
    assert np.isfinite(np.concatenate([leaf.ravel() for leaf in leaves(expected)])).all()
    assert_close(onnx(x, mask), expected, 2e-5)
    assert_close(onnx(x, mask), numpy(x, mask), 2e-5)  # again, from the recorded states if stateful


@pytest.mark.parametrize("merge", ["concat", "sum", "mul", "ave", None])
@pytest.mark.parametrize("engine", ENGINES)
def test_bidirectional_is_two_layers(engine, merge):
    """It is a layer and one that goes backwards, flipped back, zeros at masked steps."""
    document = config("Bidirectional", layer=rnn("LSTM", return_sequences=True), merge_mode=merge)
    weights = weights_for(document, 2)
    x, mask = random(2, 4, 2), np.array([[1, 1, 0, 1], [0, 0, 1, 0]])
    ahead = with_options(rnn("LSTM", return_sequences=True), zero_output_for_mask=True)
    a = layer_from_config(ahead, weights[:3], engine="numpy")(x, mask)
    b = layer_from_config(with_options(ahead, go_backwards=True), weights[3:], engine="numpy")(x, mask)[:, ::-1]
    expected = {"concat": np.concatenate([a, b], -1), "sum": a + b, "mul": a * b, "ave": (a + b) / 2, None: [a, b]}
    assert_close(layer_from_config(document, weights, engine=engine)(x, mask), expected[merge], 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes(name, dtype):
    """float16, float32, float64 and mixed_float16: the same on both engines, of the compute dtype."""
    document = with_options(LAYERS[name], dtype=dtype, return_sequences=True, return_state=True)
    weights = weights_for(document, 2)
    x, mask = random(2, 5, 2), np.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    numpy, onnx = (layer_from_config(document, weights, engine=engine)(x, mask) for engine in ENGINES)
    assert leaves(numpy)[0].dtype == dtype.removeprefix("mixed_")
    assert_close(onnx, numpy, TOLERANCE[dtype])


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from(sorted(LAYERS)), st.sampled_from(ENGINES), st.booleans())
def test_a_stateful_layer_may_be_fed_in_chunks(data, name, engine, unroll):
    """Chunks of a sequence give a stateful layer the states, and at valid steps the outputs, of the whole."""
    document = with_options(LAYERS[name], return_sequences=True, return_state=True, unroll=unroll)
    weights = weights_for(document, 2)
    steps = data.draw(st.integers(1, 8))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, steps - 1)), max_size=3)))
    x, mask = random(2, steps, 2), data.draw(arrays(bool, (2, steps)))
    whole = layer_from_config(document, weights, engine=engine)(x, mask)
    chunked = layer_from_config(with_options(document, stateful=True), weights, engine=engine)
    parts = [chunked(x[:, a:b], mask[:, a:b]) for a, b in zip([0, *cuts], [*cuts, steps], strict=True) if a < b]
    output = np.concatenate([part[0] for part in parts], axis=1)
    np.testing.assert_allclose(output[mask], whole[0][mask], rtol=0, atol=2e-5)
    assert_close(parts[-1][1:], whole[1:], 2e-5)
    assert_close(chunked.states, whole[1:], 2e-5)
    chunked.reset_states()
    assert not any(state.any() for state in leaves(chunked.states))
    chunked.reset_states(parts[-1][1:])
    assert_close(chunked.states, parts[-1][1:], 0)


@pytest.mark.parametrize("name", LAYERS)
def test_unrolled_graphs_are_bounded(name):
    """unroll makes a graph for each number of time steps, keeps only so many, and changes no result."""
    document = with_options(LAYERS[name], unroll=True, return_sequences=True)
    weights = weights_for(document, 2)
    unrolled = layer_from_config(document, weights, engine="onnx")
    rolled = layer_from_config(with_options(document, unroll=False), weights, engine="onnx")
    for steps in (*range(1, MAX_GRAPHS + 3), 200, 1):
        x = random(2, steps, 2)
        assert_close(unrolled(x), rolled(x), 2e-5)
    assert len(unrolled._program._sessions) <= MAX_GRAPHS


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_rows(engine, name):
    """A batch of none gives arrays of no rows."""
    document = with_options(LAYERS[name], return_sequences=True, return_state=True)
    output, *states = layer_from_config(document, weights_for(document, 2), engine=engine)(np.zeros((0, 4, 2)))
    assert output.shape == (0, 4, 3)
    assert all(state.shape == (0, 3) for state in leaves(states))


def test_hard_sigmoid_is_of_the_version():
    """Keras 2 and Keras 3 name two functions so; the config says whose it is, or the caller does."""
    plain = rnn("SimpleRNN", activation="hard_sigmoid")
    weights = weights_for(plain, 2)
    x = random(2, 1, 2)
    z = x[:, 0] @ weights[0] + weights[2]
    two, three = np.clip(0.2 * z + 0.5, 0, 1), np.clip(z / 6 + 0.5, 0, 1)
    for document, version, expected in (
        (plain, None, three),
        (plain, 3, three),
        (plain, 2, two),
        (with_options(plain, time_major=False), None, two),
        (with_options(plain, zero_output_for_mask=False), None, three),
    ):
        got = layer_from_config(document, weights, keras_version=version)(x)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_auto_says_why_it_is_not_onnx():
    """A cell without a form in ONNX runs in NumPy, and the layer says why."""
    from rnnserve_models import CELL_CLASSES, GRUCell

    class Own(GRUCell):
        pass

    CELL_CLASSES["Own"] = Own
    try:
        document = config("RNN", cell=config("Own", units=3))
        weights = weights_for(rnn("GRU"), 2)
        layer = layer_from_config(document, weights)
        assert layer.engine == "numpy"
        assert "Own has no form in ONNX" in layer.engine_reason
        np.testing.assert_allclose(
            layer(random(2, 3, 2)), layer_from_config(rnn("GRU"), weights)(random(2, 3, 2)), atol=2e-5
        )
    finally:
        del CELL_CLASSES["Own"]


def test_a_layer_says_what_keras_says():
    """state_size, get_initial_state and compute_output_shape."""
    document = rnn("LSTM", "GRU", return_sequences=True, return_state=True)
    layer = layer_from_config(document, weights_for(document, 2))
    assert layer.state_size == [[3, 3], [3]]
    assert [[state.shape for state in part] for part in layer.get_initial_state(4)] == [[(4, 3), (4, 3)], [(4, 3)]]
    assert layer.compute_output_shape((None, 7, 2)) == [(None, 7, 3), [(None, 3), (None, 3)], [(None, 3)]]
    assert layer.states is None
    with pytest.raises(AttributeError, match="Layer must be stateful"):
        layer.reset_states()
