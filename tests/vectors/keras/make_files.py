"""Writes files/: small models saved by the real Keras 2 and 3, and what they compute.

For every file, ``files.safetensors`` has its weights in the order of ``get_weights()``, ``<file>:w<i>``, and some calls
one after the other, ``<file>:<call>:x<input>`` and ``<file>:<call>:y<output>``. See ``make_vectors.py`` for what is
needed to run it, from the repository's root:

    python tests/vectors/keras/make_files.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from make_vectors import IDS, KERAS, Call, _assign_states, _flat, _numpy, inputs, masks, weights_for
from safetensors.numpy import save

FILES = Path(__file__).parent / "files"


def stacked(K: Any) -> Any:
    L = K.layers
    return K.Sequential(
        [
            K.Input((None, 2)),
            L.LSTM(4, return_sequences=True, name="lower"),
            L.LSTM(3, return_sequences=True, recurrent_activation="hard_sigmoid"),
            L.Dropout(0.5),
            L.LSTM(2, use_bias=False),
            L.Dense(3, activation="softmax", name="head"),
        ]
    )


def grus(K: Any) -> Any:
    L = K.layers
    return K.Sequential(
        [
            K.Input((None, 2)),
            L.GRU(3, return_sequences=True, reset_after=True),
            L.GRU(4, return_sequences=True, reset_after=False, go_backwards=True),
            L.SimpleRNN(2, activation="relu"),
        ]
    )


def bidirectional(K: Any) -> Any:
    L = K.layers
    return K.Sequential(
        [
            K.Input((None,), dtype="int32"),
            L.Embedding(6, 3, mask_zero=True, name="words"),
            L.Bidirectional(L.LSTM(3, return_sequences=True)),
            L.Bidirectional(L.GRU(2), backward_layer=L.SimpleRNN(2, go_backwards=True)),
            L.Dense(1, activation="sigmoid"),
        ]
    )


def cells(K: Any) -> Any:
    L = K.layers
    entry = K.Input((None, 2), name="series")
    y = L.RNN([L.GRUCell(3), L.LSTMCell(2), L.GRUCell(2)], return_sequences=True, name="stack")(entry)
    y = L.RNN(L.LSTMCell(3), return_sequences=True)(y)
    return K.Model(entry, L.TimeDistributed(L.Dense(2, activation="tanh"), name="each")(y), name="cells")


def stateful(K: Any) -> Any:
    entry = K.Input(batch_shape=(3, None, 2)) if K is KERAS[3] else K.Input((None, 2), batch_size=3)
    y = K.layers.LSTM(3, stateful=True, return_sequences=True)(entry)
    y = K.layers.GRU(2, stateful=True)(y)
    return K.Model(entry, K.layers.Dense(1)(y))


def encoder_decoder(K: Any) -> Any:
    L = K.layers
    source, target = K.Input((None, 2), name="source"), K.Input((None, 3), name="target")
    _, h, c = L.LSTM(4, return_state=True, name="encoder")(source)
    y = L.LSTM(4, return_sequences=True, name="decoder")(target, initial_state=[h, c])
    return K.Model([source, target], L.Dense(3, activation="softmax", name="head")(y))


def convolution(K: Any) -> Any:
    L = K.layers
    return K.Sequential(
        [
            K.Input((None, 2)),
            L.Conv1D(4, 3, padding="causal", activation="relu"),
            L.BatchNormalization(),
            L.SpatialDropout1D(0.1),
            L.LSTM(3, return_sequences=True, dropout=0.2),
            L.LayerNormalization(),
            L.GlobalMaxPooling1D(),
        ]
    )


def masking(K: Any) -> Any:
    L = K.layers
    entry = K.Input((5, 2))
    y = L.Masking(0.0)(entry)
    y = L.GRU(3, return_sequences=True, zero_output_for_mask=True, name="counted")(y)
    y = L.TimeDistributed(L.Dense(3))(y)
    y, *states = L.LSTM(2, return_state=True)(y)
    return K.Model(entry, [y, *states])


def nested(K: Any) -> Any:
    """Models in a model, with weights that are not trained: an .h5 file has those last."""
    L = K.layers
    inner = K.Sequential(
        [
            K.Input((None, 3)),
            L.BatchNormalization(name="first"),
            L.Dense(3, name="second", trainable=False),
            L.GRU(3, return_sequences=True, name="third"),
            K.Sequential([K.Input((None, 3)), L.BatchNormalization(scale=False), L.Dense(3)], name="innermost"),
        ],
        name="inner",
    )
    entry = K.Input((None, 2))
    y = L.LSTM(3, return_sequences=True)(entry)
    y = inner(y)
    return K.Model(entry, L.LSTM(2, trainable=False)(y))


def shared(K: Any) -> Any:
    L = K.layers
    source, target = K.Input((None,), name="source"), K.Input((None,), name="target")
    table = L.Embedding(6, 3, name="table")
    _, h = L.GRU(3, return_state=True)(table(source))
    y = L.GRU(3, return_sequences=True)(table(target), initial_state=h)
    return K.Model([source, target], L.Dense(2)(y))


def compiled(K: Any) -> Any:
    """With an optimizer that has a state."""
    L = K.layers
    model = K.Sequential([K.Input((None, 2)), L.SimpleRNN(3), L.Dense(1)])
    model.compile("adam", "mse")
    model.train_on_batch(inputs(3, 4, 2), np.zeros((3, 1), "float32"))
    return model


def half(K: Any) -> Any:
    L = K.layers
    return K.Sequential([K.Input((None, 2), dtype="float64"), L.LSTM(3, dtype="float64"), L.Dense(2, dtype="float64")])


X, LATER = inputs(3, 5, 2), inputs(3, 4, 2, seed=1)
MASKED = (X * masks(3, 5)["holes"][:, :, None]).astype("float32")
MODELS: dict[str, tuple[Any, list[Any], dict[int, tuple[str, ...]]]] = {
    "stacked": (stacked, [X, LATER[:1]], {2: ("h5",), 3: ("keras", "h5")}),
    "grus": (grus, [X], {2: ("h5", "keras"), 3: ("keras",)}),
    "bidirectional": (bidirectional, [IDS], {2: ("h5",), 3: ("keras", "h5")}),
    "cells": (cells, [X], {2: ("h5", "keras"), 3: ("keras",)}),
    "stateful": (stateful, [X, X[:, :1], LATER], {2: ("h5",), 3: ("keras",)}),
    "encoder_decoder": (encoder_decoder, [[X, inputs(3, 4, 3)]], {2: ("h5",), 3: ("keras",)}),
    "convolution": (convolution, [X], {2: ("keras",), 3: ("h5",)}),
    "masking": (masking, [MASKED], {2: ("h5",), 3: ("keras",)}),
    "nested": (nested, [X], {2: ("h5", "keras"), 3: ("h5", "keras")}),
    "shared": (shared, [[IDS, IDS[:, :2]]], {2: ("h5",), 3: ("keras",)}),
    "compiled": (compiled, [X], {2: ("h5",), 3: ("keras",)}),
    "float64": (half, [X.astype("float64")], {3: ("keras",)}),
}


def main() -> None:
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    arrays: dict[str, np.ndarray] = {}
    for name, (make, calls, versions) in MODELS.items():
        for version, suffixes in versions.items():
            framework = KERAS[version]
            (framework.backend if version == 2 else framework.utils).clear_session()
            model = make(framework)
            model.set_weights(weights_for(model, 1.0))
            for suffix in suffixes:
                file = f"{name}{version}.{suffix}"
                model.save(FILES / file)
                _assign_states(model, None)
                for index, weight in enumerate(model.get_weights()):
                    arrays[f"{file}:w{index}"] = weight
                for number, x in enumerate(calls):
                    for index, part in enumerate(_flat(x if isinstance(x, list) else [x])):
                        arrays[f"{file}:{number}:x{index}"] = np.ascontiguousarray(part)
                    for index, part in enumerate(_flat([_numpy(call_model(model, Call(x)))])):
                        arrays[f"{file}:{number}:y{index}"] = np.ascontiguousarray(part)
    (FILES / "files.safetensors").write_bytes(save(arrays))
    sizes = {path.name: path.stat().st_size for path in sorted(FILES.iterdir())}
    print(f"{len(sizes) - 1} files, {sum(sizes.values())} bytes", sizes)


def call_model(model: Any, call: Call) -> Any:
    return model(call.x)


if __name__ == "__main__":
    main()
