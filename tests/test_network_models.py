"""Models from Keras's configs: the layers around the recurrent ones, wiring, masks, and states in and out."""

from __future__ import annotations

import numpy as np
import pytest

from network_cases import TOLERANCE, assert_close, config, rnn, sequential, weights_for
from rnnserve_models import InputError, layer_from_config

ENGINES = ("numpy", "onnx")
TABLE = config("Embedding", input_dim=7, output_dim=4, mask_zero=True)
DENSE = config("Dense", units=2, activation="softmax")
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(0, 7, (3, 6)).astype(np.int32)
X = RANDOM.normal(size=(3, 6, 4)).astype("f")
X[0, 2] = X[1, :3] = X[2] = 0  # what Masking masks; the last row is masked throughout

MODELS = {
    "embedding": (sequential(TABLE, rnn("GRU", return_sequences=True), rnn("LSTM"), DENSE), IDS),
    "masking": (sequential(config("Masking"), rnn("LSTM", return_sequences=True), rnn("GRU")), X),
    "backwards": (
        sequential(config("Masking"), rnn("GRU", return_sequences=True, go_backwards=True), rnn("GRU")),
        X,
    ),
    "convolution": (
        sequential(
            config("Conv1D", filters=4, kernel_size=3, strides=2, padding="same", groups=2, activation="relu"),
            config("MaxPooling1D", pool_size=2, padding="same"),
            config("Conv1D", filters=3, kernel_size=2, dilation_rate=2, padding="causal"),
            rnn("LSTM"),
        ),
        X,
    ),
    "norms": (
        sequential(
            config("LayerNormalization"),
            config("Dropout", rate=0.5),
            rnn("GRU", return_sequences=True),
            config("BatchNormalization"),
            config("LeakyReLU", negative_slope=0.1),
            config("TimeDistributed", layer=config("Dense", units=3, activation="gelu")),
        ),
        X,
    ),
    "average": (
        sequential(TABLE, rnn("LSTM", return_sequences=True), config("GlobalAveragePooling1D"), DENSE),
        np.maximum(IDS, 1) * (np.arange(6) < 4),
    ),
    "maximum": (sequential(rnn("LSTM", return_sequences=True), config("GlobalMaxPooling1D", keepdims=True)), X),
    "repeat": (
        sequential(
            rnn("LSTM"),
            config("RepeatVector", n=4),
            rnn("GRU", return_sequences=True),
            config("Permute", dims=[2, 1]),
        ),
        X,
    ),
    "flat": (
        sequential(
            rnn("LSTM", return_sequences=True),
            config("Flatten"),
            config("Reshape", target_shape=[9, -1]),
            batch_shape=[None, 6, 4],
        ),
        X,
    ),
    "nested": (
        sequential(
            config("TimeDistributed", layer=sequential(config("Dense", units=4), config("ReLU"))),
            config("Bidirectional", layer=rnn("GRU", return_sequences=True), merge_mode="ave"),
        ),
        X,
    ),
}  # fmt: skip


def reference(document, x):
    weights = weights_for(document, 4)
    return weights, layer_from_config(document, weights, engine="numpy")(x)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_engines_agree(name, dtype):
    """ONNX gives what NumPy gives, in every dtype."""
    document, x = MODELS[name]
    layers = [{**layer, "config": {"dtype": dtype, **layer["config"]}} for layer in document["config"]["layers"]]
    document = {**document, "config": {**document["config"], "layers": layers}}
    weights, expected = reference(document, x)
    layer = layer_from_config(document, weights, engine="onnx")
    assert_close(layer(x), expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_go_on(engine):
    """A mask of an Embedding passes Dense and recurrent layers with sequences, and is flipped with the sequence."""
    weights = weights_for(document := sequential(
        TABLE, DENSE, rnn("GRU", return_sequences=True, go_backwards=True), rnn("LSTM")), 4)  # fmt: skip
    dense, gru, lstm = (
        layer_from_config(part, own, engine="numpy")
        for part, own in zip(document["config"]["layers"][1:], (weights[1:3], weights[3:6], weights[6:]), strict=True)
    )
    mask = IDS != 0
    expected = lstm(gru(dense(weights[0][IDS]), mask), mask[:, ::-1])
    assert_close(layer_from_config(document, weights, engine=engine)(IDS), expected, 2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_steps_never_leak(engine):
    """Whatever stands in masked steps, NaN too, the results are the same."""
    document = sequential(
        config("Masking", mask_value=-1.0),
        rnn("GRU", return_sequences=True),
        config("Bidirectional", layer=rnn("LSTM", return_sequences=True)),
        config("GlobalAveragePooling1D"),
    )
    layer = layer_from_config(document, weights_for(document, 4), engine=engine)
    mask = RANDOM.random((3, 6)) < 0.5
    mask[:, 1] = True
    x = np.where(mask[..., None], X + 5, -1)
    expected = layer(x)
    without = sequential(*document["config"]["layers"][1:])
    given = layer_from_config(without, weights_for(document, 4), engine=engine)
    assert_close(given(np.where(mask[..., None], x, np.nan), mask=mask), expected, 0)


def functional(version):
    """An LSTM decoder whose state comes in and goes out, as each Keras writes it."""
    layers = [
        ("InputLayer", "x", {"batch_shape": [None, None, 4]}, []),
        ("InputLayer", "h", {"batch_shape": [None, 3]}, []),
        ("InputLayer", "c", {"batch_shape": [None, 3]}, []),
        ("LSTM", "lstm", {"units": 3, "return_sequences": True, "return_state": True}, ["x", "h", "c"]),
        ("Dense", "dense", {"units": 2}, ["lstm"]),
    ]

    def tensor(name):
        history = {"shape": [None], "dtype": "float32", "keras_history": [name, 0, 0]}
        return {"class_name": "__keras_tensor__", "config": history}

    def nodes(sources):
        if not sources:
            return []
        if version == 2:
            return [[[source, 0, 0, {}] for source in sources]]
        first, *states = map(tensor, sources)
        return [{"args": [first], "kwargs": {"initial_state": states} if states else {}}]

    return config(
        "Functional",
        layers=[
            {"class_name": kind, "name": name, "config": {"name": name, **values}, "inbound_nodes": nodes(sources)}
            for kind, name, values, sources in layers
        ],
        input_layers=[["x", 0, 0], ["h", 0, 0], ["c", 0, 0]],
        output_layers=[["dense", 0, 0], ["lstm", 0, 1], ["lstm", 0, 2]],
    )


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_state_in_state_out(engine, version):
    """A model takes its states as inputs, or as initial_state, and gives them as outputs; steps make up a sequence."""
    parts = [rnn("LSTM", return_sequences=True, return_state=True), config("Dense", units=2)]
    weights = weights_for(sequential(*parts), 4)
    states = [RANDOM.normal(size=(3, 3)).astype("f") for _ in range(2)]
    y, h, c = layer_from_config(parts[0], weights[:3])(X, None, states)
    expected = [y @ weights[3] + weights[4], h, c]
    model = layer_from_config(functional(version), weights, engine=engine)
    assert_close(model([X, *states]), expected, 2e-5)
    assert_close(model({"c": states[1], "h": states[0], "x": X}), expected, 2e-5)
    assert_close(model(X, initial_state=[states]), expected, 2e-5)
    steps = []
    for t in range(X.shape[1]):
        y, *states = model([X[:, t : t + 1], *states])
        steps.append(y)
    assert_close([np.concatenate(steps, axis=1), *states], expected, 2e-5)
    with pytest.raises(InputError, match=r"the other initial states too|3 tensors"):
        model([X, states[0]])


@pytest.mark.parametrize("engine", ENGINES)
def test_ids_out_of_the_table(engine):
    """An id that is not in the table is refused; Keras 3 counts negative ones from the end, Keras 2 does not."""
    document, ids = MODELS["embedding"]
    weights = weights_for(document, 4)
    with pytest.raises(InputError, match="ids from -7 to 6 for 'embedding', got 0 to 7"):
        layer_from_config(document, weights, engine=engine)(np.where(ids == 0, 7, 0))
    layer_from_config(document, weights, engine=engine)(-ids)
    with pytest.raises(InputError, match="ids from 0 to 6"):
        layer_from_config(document, weights, engine=engine, keras_version=2)(-ids)


def test_time_is_free_where_it_may_be():
    """A model that was made for a number of steps takes any, unless a layer of it cannot."""
    document, x = MODELS["flat"]
    weights = weights_for(document, 4)
    flat = layer_from_config(document, weights)
    with pytest.raises(InputError, match=r"inputs: expected shape \[batch, 6, 4\], got shape \[3, 5, 4\]"):
        flat(x[:, :5])
    loose = {**document, "config": {**document["config"], "layers": document["config"]["layers"][:1]}}
    assert layer_from_config(loose, weights)(x[:, :5]).shape == (3, 5, 3)


def test_a_layer_without_weights_takes_what_comes():
    """Where nothing says what the inputs are like, the first call does."""
    layer = layer_from_config(config("Activation", activation="relu"), [])
    assert_close(layer(X), np.maximum(X, 0), 0)
    assert_close(layer(X[0]), np.maximum(X[0], 0), 0)
    dense = layer_from_config(config("Dense", units=2), [np.ones((4, 2)), np.zeros(2)])
    assert dense(X).shape == (3, 6, 2)
    assert dense(X[0]).shape == (6, 2)
