"""The models of the zoo are what their descriptions and READMEs say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from rnnserve_models.load import load_model
from rnnserve_models.spec import CellSpec, read_spec
from speech import FRAME, ROOT, SAMPLE_RATE, silero_model, speech_frames

ZOO = ROOT / "models" / "zoo"
DIRECTORIES = sorted(path.parent for path in ZOO.glob("*/*/model.yaml"))
CELLS = [directory for directory in DIRECTORIES if read_spec(directory / "model.yaml").cell is not None]


def label(directory: Path) -> str:
    return directory.parent.name


@pytest.fixture(scope="module")
def silero_steps() -> np.ndarray:
    return speech_frames()


@pytest.mark.parametrize("directory", DIRECTORIES, ids=label)
def test_described(directory: Path) -> None:
    """Every model says what it is, in its model.yaml and in the zoo's table."""
    assert read_spec(directory / "model.yaml").description
    assert directory.parent.name in (ZOO / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("directory", CELLS, ids=label)
def test_weights_are_small_finite_float32(directory: Path) -> None:
    """Committed weights are float32, finite and less than 256 KiB."""
    spec = read_spec(directory / "model.yaml")
    path = directory / str(spec.weights)
    assert path.stat().st_size < 256 * 1024
    for name, weight in load_file(path).items():
        assert weight.dtype == np.float32, name
        assert np.isfinite(weight).all(), name


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize("directory", CELLS, ids=label)
def test_cells_run(directory: Path, engine: str) -> None:
    """Every model of cells loads under both engines, and a step of it is what the zoo's table says."""
    spec = read_spec(directory / "model.yaml")
    model = load_model(directory, engine=engine)
    assert [(tensor.name, tensor.shape) for tensor in model.engine.inputs] == [("input", (spec.input_dim,))]
    inputs = {"input": np.ones((3, 2, spec.input_dim), np.float32)}
    states = {state.name: state.initial(2) for state in model.engine.states}
    outputs, after = model.engine.run(inputs, np.array([3, 3]), states)
    assert list(outputs) == ["output"]
    assert np.isfinite(outputs["output"]).all()
    row = next(row for row in (ZOO / "README.md").read_text().splitlines() if directory.parent.name in row)
    assert f"`output` {list(outputs['output'].shape[2:])}" in row
    assert ", ".join(f"`{name}` {list(state.shape[1:])}" for name, state in after.items()) in row


@pytest.mark.parametrize("name", ["lstm-4", "lstm-32-64"])
def test_examples_are_initialised_as_keras_does(name: str) -> None:
    """Glorot-uniform kernels, orthonormal recurrent kernels, a bias of ones for the forget gate and zeros elsewhere."""
    spec = read_spec(ZOO / name / "1" / "model.yaml")
    cells = (spec.cell,) if isinstance(spec.cell, CellSpec) else spec.cell or ()
    weights = load_file(ZOO / name / "1" / "weights.safetensors")
    features = spec.input_dim
    for index, cell in enumerate(cells):
        units = cell.config["units"]
        kernel, recurrent = weights[f"{index}.kernel"], weights[f"{index}.recurrent_kernel"]
        assert kernel.shape == (features, 4 * units)
        limit = np.sqrt(6 / (features + 4 * units))
        assert 0.9 * limit < np.abs(kernel).max() <= limit * (1 + 1e-6)
        np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(units), atol=1e-6)
        np.testing.assert_array_equal(weights[f"{index}.bias"], np.repeat([0, 1, 0, 0], units))
        features = units


@pytest.fixture
def training() -> ModuleType:
    """models/train_sunspots.py, which is a script and in no package."""
    pytest.importorskip("statsmodels", reason="statsmodels, whose data this needs, is not installed")
    spec = importlib.util.spec_from_file_location("train_sunspots", ROOT / "models" / "train_sunspots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sunspots_readme_states_the_errors_of_the_committed_weights(training: ModuleType) -> None:
    """Every figure of the README's table comes out again, and the model beats every forecast that it is compared to."""
    errors = training.errors()
    readme = (ZOO / "sunspots-lstm" / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("|")]
    assert [name for name, *_ in rows[2:]] == list(errors)
    for name, *figures in rows[2:]:
        np.testing.assert_allclose([float(figure) for figure in figures], errors[name], atol=0.0051, err_msg=name)
    rmse, mae = errors.pop("sunspots-lstm")
    assert rmse < min(theirs for theirs, _ in errors.values())
    assert mae < min(theirs for _, theirs in errors.values())


# pip may take its time to find that there is no network.
@pytest.mark.timeout(660)
def test_silero_gives_what_its_own_wrapper_gives(silero_steps: np.ndarray) -> None:
    """The probabilities of a real recording, every step of it, are those of the package's own Python wrapper.

    The tolerance is for other processors; the package's own two models differ by 5e-6.
    """
    vectors = json.loads((ROOT / "tests" / "vectors" / "silero_aepyx.json").read_text(encoding="utf-8"))
    assert (vectors["sample_rate"], vectors["frame"]) == (SAMPLE_RATE, FRAME)
    expected = np.array(vectors["probabilities"], np.float32)
    model = load_model(silero_model())
    assert model.spec.graph is not None
    assert model.spec.graph.source is not None
    assert model.spec.graph.source.sha256 == vectors["model"]["sha256"]
    states = {state.name: state.initial(1) for state in model.engine.states}
    outputs, _ = model.engine.run({"audio": silero_steps[:, None]}, np.array([len(silero_steps)]), states)
    assert outputs["probability"].shape == (len(expected), 1)
    np.testing.assert_allclose(outputs["probability"][:, 0], expected, rtol=0, atol=2e-5)


@pytest.mark.timeout(660)
def test_silero_is_bit_identical_in_any_batch(silero_steps: np.ndarray) -> None:
    """`bit_identical: true` holds: a row's output and states are the same bits alone and among 63 other rows."""
    engine = load_model(silero_model()).engine
    assert engine.bit_identical
    random = np.random.default_rng(7)
    steps = 8
    starts = random.choice(len(silero_steps) - steps, 64, replace=False)
    audio = np.stack([silero_steps[start : start + steps] for start in starts], axis=1)  # [T, R, 512]
    states = {
        state.name: (0.3 * random.standard_normal((64, *state.shape))).astype(state.dtype) for state in engine.states
    }
    for rows in (2, 3, 17, 64):
        outputs, after = engine.run(
            {"audio": audio[:, :rows]}, np.full(rows, steps), {name: state[:rows] for name, state in states.items()}
        )
        for row in range(rows):
            one = slice(row, row + 1)
            alone, alone_after = engine.run(
                {"audio": audio[:, one]}, np.array([steps]), {name: state[one] for name, state in states.items()}
            )
            assert outputs["probability"][:, one].tobytes() == alone["probability"].tobytes()
            for name, state in alone_after.items():
                assert after[name][one].tobytes() == state.tobytes(), name
