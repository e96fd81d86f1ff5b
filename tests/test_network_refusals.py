"""What is no layer, no weights or no input of it is refused, by the layer's name and with what was expected."""

from __future__ import annotations

import numpy as np
import pytest

from network_cases import config, rnn, sequential, weights_for
from rnnserve_models import InputError, ModelError, layer_from_config

LSTM = rnn("LSTM", name="memory")
WEIGHTS = weights_for(LSTM, 2)
WIDE = rnn("LSTM", units=4, go_backwards=True)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "config: expected .*'class_name'"),
        ([], "config: expected .*'class_name'"),
        ({"class_name": "LSTM"}, "LSTM: config must be a mapping"),
        (config("ConvLSTM2D", name="c"), r"ConvLSTM2D 'c': unknown layer class; the classes are RNN, "),
        (config("LSTM", name="m"), "LSTM 'm': units: expected a positive integer, got None"),
        (rnn("LSTM", name="m", units=0), "LSTM 'm': units: expected a positive integer, got 0"),
        (rnn("LSTM", name="m", units="4"), "LSTM 'm': units: expected a positive integer, got '4'"),
        (rnn("LSTM", name="m", activation="tahn"), "LSTM 'm': activation: unknown activation 'tahn'; the activations"),
        (rnn("GRU", name="m", activation=3), "GRU 'm': activation: expected the name of an activation, got 3"),
        (rnn("GRU", name="m", return_sequences="yes"), "GRU 'm': return_sequences: expected true or false, got 'yes'"),
        (rnn("GRU", name="m", reset_afer=True), r"GRU 'm': unknown keys \['reset_afer'\]; the keys are .*reset_after"),
        (rnn("GRU", name="m", dtype="bfloat16"), "GRU 'm': dtype: expected one of .*mixed_float16"),
        (config("RNN", name="m", cell=[]), "StackedRNNCells 'cell': cells is empty"),
        (config("RNN", name="m", cell=config("Dense", units=2)), "unknown cell class|must have a state"),
        (config("RNN", name="m"), "RNN 'm': cell: expected .*'class_name'"),
        (config("RNN", name="m", cell=config("LSTMCell", name="k", units=-1)), "LSTMCell 'k': units: expected a pos"),
        (config("Bidirectional", name="b", layer=LSTM, merge_mode="max"), "Bidirectional 'b': merge_mode: expected"),
        (config("Bidirectional", name="b", layer=config("Dense", units=2)), "Bidirectional 'b': layer: expected one"),
        (
            config("Bidirectional", name="b", layer=LSTM, backward_layer=rnn("LSTM")),
            "Bidirectional 'b': backward_layer: expected another go_backwards",
        ),
        (
            config("Bidirectional", name="b", layer=LSTM, backward_layer=rnn("LSTM", go_backwards=True, stateful=True)),
            "Bidirectional 'b': backward_layer: expected stateful as of layer, false",
        ),
        (
            config("Bidirectional", name="b", layer=rnn("LSTM", go_backwards=True, zero_output_for_mask=False)),
            "Bidirectional 'b': layer: expected one that goes forward",
        ),
        (sequential(name="s"), "Sequential 's': layers: expected a list of layers"),
        (sequential(LSTM, 3, name="s"), "Sequential 's': layers.1: expected .*'class_name'"),
        (sequential(config("InputLayer"), name="s"), "Sequential 's': layers: expected at least one"),
        (config("Conv1D", name="c", filters=3, kernel_size=2, padding="reflect"), "Conv1D 'c': padding: expected one"),
        (config("Reshape", name="r", target_shape=[-1, -1]), "Reshape 'r': target_shape: expected -1 at most once"),
        (config("Functional", name="f", layers=[{**LSTM, "inbound_nodes": []}]), "LSTM 'memory': inbound_nodes: expec"),
    ],
)  # fmt: skip
def test_bad_configs(document, message):
    """The message names the layer, the key, what was expected and what was found."""
    with pytest.raises(ModelError, match=message):
        layer_from_config(document, [])


def functional(sources, outputs=(("memory", 0, 0),)):
    layers = [
        {"class_name": "InputLayer", "name": "x", "config": {"batch_shape": [None, None, 2]}, "inbound_nodes": []},
        {**LSTM, "name": "memory", "inbound_nodes": [[[source, 0, 0, {}] for source in sources]]},
    ]
    return config("Functional", name="f", layers=layers, input_layers=[["x", 0, 0]], output_layers=list(outputs))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (functional(["nobody"]), "Functional 'f': layers: 'memory' takes 'nobody/0', which is not there"),
        (functional(["memory"]), r"Functional 'f': layers: \['memory/0'\] feed each other"),
        (functional(["x", "x"]), "LSTM 'memory': initial_state: expected 2 tensors, got 1"),
        (
            functional(["x"], [("nobody", 0, 0)]),
            "Functional 'f': output_layers: 'nobody/0' is not a layer of the model",
        ),
    ],
)
def test_bad_wiring(document, message):
    """A model whose layers do not fit together is refused."""
    with pytest.raises(ModelError, match=message):
        layer_from_config(document, WEIGHTS)


@pytest.mark.parametrize(
    ("document", "weights", "message"),
    [
        (LSTM, WEIGHTS[:2], "LSTM 'memory': expected 3 weights, got 2"),
        (LSTM, [*WEIGHTS, WEIGHTS[0]], "LSTM 'memory': expected 3 weights, got 4"),
        (LSTM, [WEIGHTS[0][:, :8], *WEIGHTS[1:]], r"LSTM 'memory': weight 0 \(kernel\): expected shape \[2, 12\], got"),
        (LSTM, [WEIGHTS[0], WEIGHTS[1].T, WEIGHTS[2]], r"LSTM 'memory': weight 1 \(recurrent_kernel\): expected shape"),
        (LSTM, [*WEIGHTS[:2], [["a"]]], r"weights.2: expected numbers"),
        (LSTM, [*WEIGHTS[:2], [[1], [1, 2]]], r"weights.2: expected an array"),
        (LSTM, None, "weights: expected a list of arrays, got NoneType"),
        (LSTM, WEIGHTS[0], "weights: expected a list of arrays, got ndarray"),
        (sequential(LSTM, rnn("GRU")), [*WEIGHTS, *weights_for(rnn("GRU"), 3)], "GRU 'gru': expected inputs .batch"),
        (sequential(rnn("LSTM", return_state=True), rnn("GRU")), [*WEIGHTS] * 2, "LSTM 'lstm': must have one output"),
        (
            config("Bidirectional", name="b", layer=LSTM, backward_layer=WIDE, merge_mode="sum"),
            [*WEIGHTS, *weights_for(rnn("LSTM", units=4), 2)],
            "Bidirectional 'b': merge_mode 'sum': expected halves of the same units",
        ),
    ],
)  # fmt: skip
def test_bad_weights(document, weights, message):
    """The message names the layer, the weight and the shape."""
    with pytest.raises(ModelError, match=message):
        layer_from_config(document, weights)


X = np.zeros((2, 3, 2))


@pytest.mark.parametrize(
    ("x", "mask", "state", "message"),
    [
        (X[0], None, None, r"inputs: expected shape \[batch, time, 2\], got shape \[3, 2\]"),
        (X[:, :, :1], None, None, r"inputs: expected shape \[batch, time, 2\], got shape \[2, 3, 1\]"),
        (X[:, :0], None, None, "inputs: expected at least one time step"),
        ([[["a", "b"]]], None, None, "inputs: expected numbers that convert to float32, got dtype"),
        ([[[1, 2]], [[1]]], None, None, "inputs: expected an array of float32"),
        (X, np.ones((2, 4)), None, r"mask: expected shape \[2, 3\], got shape \[2, 4\]"),
        (X, np.ones((3, 3)), None, r"mask: expected shape \[2, 3\], got shape \[3, 3\]"),
        (X, np.ones((2, 3, 2)), None, r"mask: expected shape \[2, 3\], got shape \[2, 3, 2\]"),
        (X, [["a"] * 3] * 2, None, r"mask: expected shape \[2, 3\], got dtype"),
        (X, None, np.zeros((2, 3)), r"initial_state: expected arrays nested as \[3, 3\], got 1 where 2 belong"),
        (X, None, [np.zeros((2, 3))] * 3, "got 3 where 2 belong"),
        (
            X,
            None,
            [np.zeros((2, 3)), np.zeros((1, 3))],
            r"initial_state.c: expected shape \[2, 3\], got shape \[1, 3\]",
        ),
        (X, None, [np.zeros((2, 4))] * 2, r"initial_state.h: expected shape \[2, 3\], got shape \[2, 4\]"),
    ],
)
@pytest.mark.parametrize("engine", ["numpy", "onnx"])
def test_bad_inputs(engine, x, mask, state, message):
    """A tensor that does not fit is refused by name, with what was expected and what came."""
    with pytest.raises(InputError, match=message):
        layer_from_config(LSTM, WEIGHTS, engine=engine)(x, mask, state)


def test_a_stateful_layer_keeps_its_batch_size():
    """The first call fixes it, or the config; a failed call records nothing."""
    layer = layer_from_config(rnn("LSTM", stateful=True), WEIGHTS)
    layer(X + 1)
    before = layer.states
    for wrong in (X[:1], np.zeros((2, 3, 5))):
        with pytest.raises(InputError, match=r"batch size 2, as the stateful layer has, got 1|expected shape"):
            layer(wrong)
    np.testing.assert_array_equal(layer.states, before)
    with pytest.raises(InputError, match=r"initial_state.h: expected shape \[2, 3\]"):
        layer.reset_states([np.zeros((1, 3))] * 2)
    fixed = layer_from_config(rnn("LSTM", stateful=True, batch_input_shape=[4, None, 2]), WEIGHTS)
    with pytest.raises(InputError, match="batch size 4"):
        fixed(X)


def test_bad_engine_and_version():
    """These are named too."""
    with pytest.raises(ModelError, match="engine: expected auto, numpy or onnx, got 'torch'"):
        layer_from_config(LSTM, WEIGHTS, engine="torch")
    with pytest.raises(ModelError, match="keras_version: expected 2, 3 or None, got 4"):
        layer_from_config(LSTM, WEIGHTS, keras_version=4)
