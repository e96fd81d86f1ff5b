"""Weights in safetensors files."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keras_loop import with_random_weights
from rnnserve_models import DenseCell, GRUCell, LSTMCell, ModelError, StackedRNNCells
from rnnserve_models.weights import load_weights, save_weights


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("cell", [LSTMCell(units=3), StackedRNNCells([GRUCell(units=3), DenseCell(units=1)])])
def test_round_trip(tmp_path, cell, dtype):
    """What is saved loads, to the bit, into a cell of the same configuration."""
    bound = with_random_weights(cell, 2, dtype)
    save_weights(tmp_path / "w.safetensors", bound)
    loaded = load_weights(tmp_path / "w.safetensors", cell, 2, dtype)
    assert list(loaded.weights) == list(bound.weights)
    for name, weight in bound.weights.items():
        assert loaded.weights[name].dtype == dtype
        np.testing.assert_array_equal(loaded.weights[name], weight)


def test_names(tmp_path):
    """Tensors are named by the index of their cell, for a single cell too."""
    path = tmp_path / "w.safetensors"
    save_weights(path, with_random_weights(LSTMCell(units=3), 2))
    assert sorted(load_file(path)) == ["0.bias", "0.kernel", "0.recurrent_kernel"]
    save_weights(path, with_random_weights(StackedRNNCells([GRUCell(units=3), DenseCell(units=1)]), 2))
    assert sorted(load_file(path)) == ["0.bias", "0.kernel", "0.recurrent_kernel", "1.bias", "1.kernel"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.kernel": np.ones((2, 1), "f4")}, r"w\.safetensors: weights \['0\.bias'\] are missing"),
        (
            {"0.kernel": np.ones((2, 1), "f4"), "0.bias": np.ones(1, "f4"), "1.bias": np.ones(1, "f4")},
            r"w\.safetensors: unexpected weights \['1\.bias'\]; expected \['0\.kernel', '0\.bias'\]",
        ),
        (
            {"0.kernel": np.ones((3, 1), "f4"), "0.bias": np.ones(1, "f4")},
            r"w\.safetensors: 0\.kernel: expected shape \[2, 1\], got \[3, 1\]",
        ),
        (
            {"0.kernel": np.ones((2, 1), "f4"), "0.bias": np.ones(1, "f8")},
            r"w\.safetensors: 0\.bias: expected dtype float32, got float64",
        ),
    ],
)
def test_misfits(tmp_path, tensors, message):
    """A tensor that is missing, unexpected or of another shape or dtype is refused by file and name."""
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=message):
        load_weights(tmp_path / "w.safetensors", DenseCell(units=1), 2)


def test_bad_files(tmp_path):
    """A file that is missing or is no safetensors file is refused by name, and an unbound cell is not saved."""
    with pytest.raises(ModelError, match=r"none\.safetensors: cannot be read"):
        load_weights(tmp_path / "none.safetensors", DenseCell(units=1), 2)
    (tmp_path / "bad.safetensors").write_bytes(b"not at all")
    with pytest.raises(ModelError, match=r"bad\.safetensors: is not a safetensors file"):
        load_weights(tmp_path / "bad.safetensors", DenseCell(units=1), 2)
    with pytest.raises(ModelError, match=r"DenseCell has no weights to save"):
        save_weights(tmp_path / "w.safetensors", DenseCell(units=1))
