"""Writes the weights of models/zoo/lstm-4 and models/zoo/lstm-32-64, untrained, as Keras would initialise them.

    pip install -e models
    python models/make_examples.py

The two are the examples of Keras's page on its RNN layer: one LSTMCell(4), and LSTMCell(32) with LSTMCell(64), both on
5 features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

ZOO = Path(__file__).parent / "zoo"
FEATURES = 5
EXAMPLES = {"lstm-4": (4,), "lstm-32-64": (32, 64)}
SEED = 20_240_601


def glorot_uniform(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """[rows, columns], uniform within the square root of 6 / (rows + columns)."""
    limit = np.sqrt(6 / (rows + columns))
    return random.uniform(-limit, limit, (rows, columns))


def orthogonal(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """[rows, columns], rows <= columns, the rows orthonormal and uniformly distributed."""
    q, r = np.linalg.qr(random.standard_normal((columns, rows)))
    return (q * np.sign(np.diag(r))).T


def lstm_weights(random: np.random.Generator, features: int, units: int) -> dict[str, np.ndarray]:
    """The weights of an LSTMCell as Keras initialises them: zeros in the bias, ones for the forget gate."""
    bias = np.zeros(4 * units)
    bias[units : 2 * units] = 1
    return {
        "kernel": glorot_uniform(random, features, 4 * units),
        "recurrent_kernel": orthogonal(random, units, 4 * units),
        "bias": bias,
    }


def main() -> None:
    """Writes both weights files."""
    for name, cells in EXAMPLES.items():
        random = np.random.default_rng(SEED)
        weights, features = {}, FEATURES
        for index, units in enumerate(cells):
            for weight, value in lstm_weights(random, features, units).items():
                weights[f"{index}.{weight}"] = np.ascontiguousarray(value, np.float32)
            features = units
        (ZOO / name / "1" / "weights.safetensors").write_bytes(save(weights))


if __name__ == "__main__":
    main()
