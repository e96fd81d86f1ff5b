"""Files made elsewhere, sent to a live server and called there: what comes back is what the framework computed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import rnnserve
from rnnserve_server.cli import app
from serving import ZOO, running_server

VECTORS = Path(__file__).parent / "vectors"
KERAS = VECTORS / "keras" / "files"
ARRAYS = load_file(KERAS / "files.safetensors")
# Two sequences of different lengths are not one call of the contract.
TWO_LENGTHS = ("encoder_decoder", "shared")
FILES = sorted(p.name for p in KERAS.iterdir() if p.suffix != ".safetensors" and not p.name.startswith(TWO_LENGTHS))
GRAPHS = ("script_lstm", "dynamo_lstm", "keras2_lstm", "keras3_lstm")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rnnserve.Client]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ZOO / "lstm-4", Path(folder) / "lstm-4")
    with (
        running_server(models=folder, allow_deploy=True) as server,
        rnnserve.Client(server.address, timeout=60) as client,
    ):
        yield client


def arrays(prefix: str) -> list[np.ndarray]:
    """The arrays named ``<prefix>0``, ``<prefix>1`` and so on."""
    return [ARRAYS[f"{prefix}{index}"] for index in range(sum(name.startswith(prefix) for name in ARRAYS))]


@pytest.mark.parametrize("name", FILES)
def test_a_keras_file_deployed_computes_what_keras_did(client: rnnserve.Client, name: str) -> None:
    """Call after call; a stateful model goes on from where it was."""
    model = client.models.deploy_file("keras", KERAS / name)
    stateful = "stateful" in name
    options = {"return_sequences": model.default_options.return_sequences, "stateful": stateful}
    numbers = sorted({int(key.split(":")[1]) for key in ARRAYS if key.startswith(f"{name}:") and ":x" in key})
    with client.RNN("keras", time_major=model.default_options.time_major, **options) as layer:
        for number in numbers:
            xs, expected = arrays(f"{name}:{number}:x"), arrays(f"{name}:{number}:y")
            inputs = {spec.name: x for spec, x in zip(model.inputs, xs, strict=False)}
            states = {spec.name: x for spec, x in zip(model.states, xs[len(inputs) :], strict=False)}
            got = layer(inputs, initial_state=states or None)
            got = list(got.values()) if isinstance(got, dict) else [got]
            for left, right in zip(got, expected, strict=False):
                np.testing.assert_allclose(left, right, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in GRAPHS if (VECTORS / "onnx" / f"{name}.onnx").exists()])
def test_a_stateless_onnx_export_is_served_stateful(client: rnnserve.Client, name: str) -> None:
    """A sequence cut in two calls of a session gives what the framework gave for the whole of it."""
    stored = load_file(VECTORS / "onnx" / f"{name}.safetensors")
    model = client.models.deploy_file("graph", VECTORS / "onnx" / f"{name}.onnx")
    assert model.states
    sequence = "return_sequences" in model.settable_options or model.default_options.return_sequences
    x, want = stored["in.0"], stored["out.0"]  # batch-major
    if x.shape[0] != want.shape[0]:
        x, want = x.swapaxes(0, 1), want.swapaxes(0, 1)
    with client.session("graph", batch_size=len(x), return_sequences=sequence) as session:
        parts = [session(x[:, :3]), session(x[:, 3:])]
    got = np.concatenate(parts, axis=1) if sequence else parts[-1]
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=0, atol=2e-5)


def test_rnnserve_import_makes_a_model_that_serves(tmp_path: Path) -> None:
    """The command's model directory is served as it is, and the command says what it found."""
    done = CliRunner().invoke(
        app, ["import", str(KERAS / "stacked3.keras"), "--name", "stacked", "--models", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "ready to serve" in done.output
    assert "LSTM" in done.output
    x, y = arrays("stacked3.keras:0:x")[0], arrays("stacked3.keras:0:y")[0]
    with running_server(models=tmp_path) as server, rnnserve.Client(server.address) as client:
        options = client.model("stacked").default_options
        got = client.RNN("stacked", return_sequences=options.return_sequences)(x)
    np.testing.assert_allclose(got, y, rtol=0, atol=2e-5)
