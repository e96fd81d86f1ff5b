"""Cells that a user wrote in Python, hosted from the server's own disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

import rnnserve
from rnnserve_models import ModelError
from rnnserve_models.load import load_model
from serving import running_server

CELL = '''
import numpy as np
from rnnserve_models import Cell
from rnnserve_models.cell import project


class DecayCell(Cell):
    """h' = decay * h + x W: a leaky sum."""

    bit_identical = True

    def __init__(self, units, decay):
        self.units, self.decay = units, decay

    @property
    def state_size(self):
        return self.units

    @property
    def output_size(self):
        return self.units

    def weight_shapes(self, input_dim):
        return {"kernel": (input_dim, self.units)}

    def call(self, inputs, states):
        (h,) = states
        h = (self.decay * h + project(inputs, self.weights["kernel"])).astype(self.dtype)
        return h, [h]
'''


def model(folder: Path, code: str = CELL, **document: object) -> Path:
    """A model directory with a cell of its own."""
    from safetensors.numpy import save_file

    directory = folder / "leaky" / "1"
    directory.mkdir(parents=True)
    (directory / "cells.py").write_text(code)
    kernel = np.arange(6, dtype=np.float32).reshape(3, 2)
    save_file({"0.kernel": kernel}, directory / "weights.safetensors")
    said = {
        "cell": {"class_name": "DecayCell", "config": {"units": 2, "decay": 0.5}},
        "python": "cells.py",
        "input_dim": 3,
        "weights": "weights.safetensors",
        **document,
    }
    (directory / "model.yaml").write_text(yaml.safe_dump(said))
    return directory


def test_a_cell_of_ones_own_is_served(tmp_path: Path) -> None:
    """It runs under NumPy, the model says why, and a session carries its state."""
    directory = model(tmp_path)
    engine = load_model(directory).engine
    assert engine.name == "numpy"
    assert "DecayCell has no form in ONNX" in engine.reason
    x = np.random.default_rng(0).standard_normal((2, 7, 3)).astype(np.float32)
    kernel = np.arange(6, dtype=np.float32).reshape(3, 2)
    h, expected = np.zeros((2, 2), np.float32), []
    for t in range(7):
        h = 0.5 * h + x[:, t] @ kernel
        expected.append(h)
    with (
        running_server(models=tmp_path) as server,
        rnnserve.Client(server.address) as client,
        client.session("leaky", batch_size=2, return_sequences=True) as session,
    ):
        got = np.concatenate([session(x[:, :3]), session(x[:, 3:])], axis=1)
    np.testing.assert_allclose(got, np.stack(expected, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("code", "document", "said"),
    [
        ("raise RuntimeError('no')", {}, "cells.py: cannot be run: RuntimeError: no"),
        ("x = 1", {}, "defines no class derived from"),
        (CELL, {"cell": {"class_name": "OtherCell", "config": {}}}, "unknown cell class 'OtherCell'"),
        (CELL, {"cell": {"class_name": "DecayCell", "config": {"units": 2}}}, "decay"),
        (CELL, {"python": "../cells.py"}, "must be a file beside model.yaml"),
        (CELL, {"weights": None}, "kernel"),
        (CELL, {"engine": "onnx"}, "has no form in ONNX"),
    ],
)
def test_what_is_wrong_with_a_cell_is_told(tmp_path: Path, code: str, document: dict[str, object], said: str) -> None:
    """A file that fails, a class that is not there, and weights that are missing are named."""
    with pytest.raises(ModelError, match=said.replace("(", r"\(")):
        load_model(model(tmp_path, code, **document))


def test_a_change_of_the_code_changes_the_digest(tmp_path: Path) -> None:
    """The code is part of the model."""
    directory = model(tmp_path)
    before = load_model(directory).digest
    (directory / "cells.py").write_text(CELL.replace("leaky", "lossy"))
    assert load_model(directory).digest != before
