"""Configs of Keras layers as Keras writes them, and random weights that fit, for the tests of networks."""

from __future__ import annotations

import numpy as np

from rnnserve_models import GRUCell, LSTMCell, SimpleRNNCell, StackedRNNCells

CELLS = {"LSTM": LSTMCell, "GRU": GRUCell, "SimpleRNN": SimpleRNNCell}
TOLERANCE = {"float16": 4e-3, "mixed_float16": 4e-3, "float32": 2e-5, "float64": 2e-5}


def config(class_name, **values):
    return {"class_name": class_name, "config": values}


def sequential(*layers, **values):
    return config("Sequential", layers=list(layers), **values)


def rnn(*kinds, units=3, **values):
    """A layer of its own class, or RNN of several cells."""
    if len(kinds) == 1:
        return config(kinds[0], units=units, **values)
    return config("RNN", cell=[config(f"{kind}Cell", units=units) for kind in kinds], **values)


def cell_of(document):
    """The cell, without weights, of a recurrent layer's config."""
    values = document["config"]
    if document["class_name"] == "RNN":
        return StackedRNNCells(
            [CELLS[cell["class_name"].removesuffix("Cell")](**cell["config"]) for cell in values["cell"]]
        )
    kind = CELLS[document["class_name"]]
    return kind(**{key: value for key, value in values.items() if key in kind.__dataclass_fields__})


def shapes(document, features):
    """The shapes of a layer's weights, in the order of get_weights(), and its number of output features."""
    name, values = document["class_name"], document["config"]
    if name == "Sequential":
        found = []
        for layer in values["layers"]:
            own, features = shapes(layer, features)
            found += own
        return found, features
    if name == "Bidirectional":
        ahead, units = shapes(values["layer"], features)
        back, others = shapes(values.get("backward_layer", values["layer"]), features)
        return ahead + back, units + others if values.get("merge_mode", "concat") == "concat" else units
    if name == "TimeDistributed":
        return shapes(values["layer"], features)
    if name in ("RNN", *CELLS):
        cell = cell_of(document)
        return list(cell.weight_shapes(features).values()), cell.output_size
    if name == "Dense":
        return [(features, values["units"]), (values["units"],)], values["units"]
    if name == "Conv1D":
        kernel = (values["kernel_size"], features // values.get("groups", 1), values["filters"])
        return [kernel, (values["filters"],)], values["filters"]
    if name == "Embedding":
        return [(values["input_dim"], values["output_dim"])], values["output_dim"]
    if name == "LayerNormalization":
        return [(features,)] * 2, features
    if name == "BatchNormalization":
        return [(features,)] * 4, features
    return [], features


def weights_for(document, features, seed=0):
    """Weights of the order of 1 / sqrt(inputs); vectors are positive, as a variance must be."""
    rng = np.random.default_rng(seed)
    return [
        rng.uniform(-1, 1, shape).astype("f") / np.sqrt(shape[0]).astype("f")
        if len(shape) > 1
        else rng.uniform(0.5, 1, shape).astype("f")
        for shape in shapes(document, features)[0]
    ]


def leaves(nested):
    """The arrays in nested lists."""
    return [leaf for part in nested for leaf in leaves(part)] if isinstance(nested, list) else [nested]


def assert_close(got, expected, tolerance):
    """The same nesting, shapes, dtypes and values."""
    assert type(got) is type(expected)
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
