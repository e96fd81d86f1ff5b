"""The work that every row does: an LSTM of 128 units on 64 features, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rnnserve_models.cells import LSTMCell
from rnnserve_models.weights import save_weights

MODEL = "lstm-128"
UNITS = 128
FEATURES = 64
SEED = 20_240_601

Array = NDArray[np.float32]


def cell() -> LSTMCell:
    """The cell, with weights that keep its states in the range of a trained one's."""
    random = np.random.default_rng(SEED)
    weights = {
        "kernel": random.normal(0, FEATURES**-0.5, (FEATURES, 4 * UNITS)),
        "recurrent_kernel": random.normal(0, UNITS**-0.5, (UNITS, 4 * UNITS)),
        "bias": np.repeat([0.0, 1.0, 0.0, 0.0], UNITS),  # Keras's i, f, c, o
    }
    made = LSTMCell(units=UNITS).with_weights(
        {k: w.astype(np.float32) for k, w in weights.items()}, FEATURES, np.float32
    )
    assert isinstance(made, LSTMCell)
    return made


def write_model(models: Path) -> None:
    """Puts the cell into a folder of models, as `rnnserve serve --models` reads one."""
    version = models / MODEL / "1"
    version.mkdir(parents=True)
    save_weights(version / "weights.safetensors", cell())
    (version / "model.yaml").write_text(
        f"description: The work of the benchmarks.\n"
        f"cell: {{class_name: LSTMCell, config: {{units: {UNITS}}}}}\n"
        f"input_dim: {FEATURES}\n"
        f"weights: weights.safetensors\n"
    )


def numbers(*shape: int) -> Array:
    """Inputs of a shape: standard normal, the same each time."""
    return np.random.default_rng(SEED).standard_normal(shape, np.float32)
