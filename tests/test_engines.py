"""Both engines are engines, over the zoo and every kind of cell, and agree."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from compliance.engine_suite import EngineSuite
from graphs import UNITS, lstm, lstm_spec, step_lstm
from keras_loop import with_random_weights
from rnnserve_models import DenseCell, GRUCell, LSTMCell, SimpleRNNCell, StackedRNNCells
from rnnserve_models.engine.numpy import NumpyEngine
from rnnserve_models.engine.onnx import OnnxEngine
from rnnserve_models.export import export_cell
from rnnserve_models.load import load_model
from rnnserve_models.spec import GraphSpec, read_spec
from serving import ZOO

FEATURES = 5
CELLS = {
    "lstm": LSTMCell(units=7),
    "gru": GRUCell(units=6),
    "gru_reset_before": GRUCell(units=6, reset_after=False),
    "simple": SimpleRNNCell(units=5),
    "stack": StackedRNNCells([LSTMCell(units=4), DenseCell(units=6), SimpleRNNCell(units=3), GRUCell(units=7)]),
    "dense": DenseCell(units=3, activation="tanh"),
}
DIRECTORIES = [path.parent for path in sorted(ZOO.glob("*/*/model.yaml"))]
ZOO_CELLS = [path for path in DIRECTORIES if read_spec(path / "model.yaml").cell is not None]
ZOO_GRAPHS = [path for path in DIRECTORIES if path not in ZOO_CELLS]


def zoo_name(path):
    return path.parent.name


@functools.cache
def zoo(path, engine):
    if not all((path / file).is_file() for file in read_spec(path / "model.yaml").files()):
        pytest.skip(f"{path.parent.name}: its files are taken by `rnnserve fetch`")
    return load_model(path, engine=engine).engine


@functools.cache
def of_cell(name, engine, dtype="float32"):
    cell = with_random_weights(CELLS[name], FEATURES, dtype)
    if engine == "numpy":
        return NumpyEngine(cell)
    return OnnxEngine(*export_cell(cell, FEATURES, dtype), states=cell.state_specs())


@pytest.fixture(params=["numpy", "onnx"])
def kind(request):
    return request.param


class Given(EngineSuite):
    """A suite whose engine a fixture chooses."""

    @pytest.fixture(autouse=True)
    def chosen(self, choice):
        self._engine = choice

    def engine(self):
        return self._engine


class TestCells(Given):
    @pytest.fixture(params=list(CELLS))
    def choice(self, request, kind):
        return of_cell(request.param, kind)

    def test_promises_bits(self):
        """Every kind of cell promises bits, under both engines."""
        assert self.engine().bit_identical


class TestFloat64(Given):
    """Engines that promise no bits still agree to rounding."""

    tolerance = 1e-12

    @pytest.fixture(params=["lstm", "gru"])
    def choice(self, request, kind):
        return of_cell(request.param, kind, "float64")


class TestZooCells(Given):
    @pytest.fixture(params=ZOO_CELLS, ids=zoo_name)
    def choice(self, request, kind):
        return zoo(request.param, kind)


class TestZooGraphs(Given):
    @pytest.fixture(params=ZOO_GRAPHS, ids=zoo_name)
    def choice(self, request):
        return zoo(request.param, "onnx")


STEP = {
    "inputs": [{"name": "x", "axes": ["batch", 2], "context": 1}],
    "outputs": [{"name": "y", "axes": ["batch", UNITS]}],
}
GRAPHS = {
    "plain": (lstm(), lstm_spec()),
    "lengths": (lstm(lengths=True), lstm_spec(lengths=True)),
    "batch_major": (lstm(batch_major=True), lstm_spec(batch_major=True)),
    "stepwise": (step_lstm(), lstm_spec(**{**STEP, "inputs": [{"name": "x", "axes": ["batch", 2]}]})),
    "context": (step_lstm(), lstm_spec(**{**STEP, "inputs": [{"name": "x", "axes": ["batch", 1], "context": 1}]})),
}


class TestGraphs(Given):
    @pytest.fixture(params=list(GRAPHS))
    def choice(self, request):
        content, spec = GRAPHS[request.param]
        return OnnxEngine(content, GraphSpec.model_validate(spec["graph"]))


def agree(one, other):
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 12, 17)
    lengths[0] = 11
    x = rng.normal(0, 0.5, (11, 17, *one.inputs[0].shape)).astype(np.float32)
    states = {spec.name: rng.normal(0, 0.5, (17, *spec.shape)).astype(np.float32) for spec in one.states}
    assert (one.inputs, one.outputs, one.states) == (other.inputs, other.outputs, other.states)
    found = [engine.run({"input": x}, lengths, states) for engine in (one, other)]
    valid = np.arange(11)[:, None] < lengths
    np.testing.assert_allclose(found[0][0]["output"][valid], found[1][0]["output"][valid], rtol=1e-5, atol=1e-5)
    for name in states:
        np.testing.assert_allclose(found[0][1][name], found[1][1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ZOO_CELLS, ids=zoo_name)
def test_engines_agree_on_the_zoo(path):
    """NumPy and onnxruntime show the same description and give the same numbers within 1e-5."""
    agree(zoo(path, "numpy"), zoo(path, "onnx"))


@pytest.mark.parametrize("name", CELLS)
def test_engines_agree_on_cells(name):
    """So they do for every kind of cell."""
    agree(of_cell(name, "numpy"), of_cell(name, "onnx"))
