"""Real Triton beside rnnserve, and NVIDIA's own load generator. `make .cache/triton/.ready` installs both."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from benchmarks import triton, work
from google.protobuf import text_format

import triton_models
from oip import Oip, arrays
from rnnserve_server.triton.convert import import_triton, read_config
from serving import RunningServer, running_server
from triton_models import BARE, CHUNK, FEATURES, STEP

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not triton.installed(),
        reason="the wheels of Triton and perf_analyzer are not installed: make .cache/triton/.ready",
    ),
]

# Milliseconds of a measurement. Where perf_analyzer has not opened all of its streams when it ends, it hangs: on a busy
# machine it takes a longer one.
WINDOWS = (1000, 8000)
MODEL = Path(__file__).with_name("triton_python_model.py")


def to_python(directory: Path) -> None:
    """Has Triton run a model directory by its Python backend: its wheel has none for ONNX."""
    config = read_config(directory / "config.pbtxt")
    states = []
    for state in config.sequence_batching.state:
        default = np.zeros(tuple(state.dims), np.float32)
        if state.initial_state[0].data_file:
            path = directory / "initial_state" / state.initial_state[0].data_file
            default = np.fromfile(path, np.float32).reshape(default.shape)
        states.append([state.input_name, state.output_name, default.tolist()])
    del config.sequence_batching.state[:]
    config.ClearField("platform")
    config.backend = "python"
    (directory / "config.pbtxt").write_text(
        text_format.MessageToString(config) + "instance_group { kind: KIND_CPU count: 1 }\n"
    )
    (version,) = (path for path in directory.iterdir() if path.name.isdecimal())
    (version / "states.json").write_text(json.dumps(states))
    shutil.copy(MODEL, version / "model.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Oip, Oip]]:
    """Stubs of Triton and of rnnserve, which serve the same model directories."""
    folder, ours = tmp_path_factory.mktemp("triton"), tmp_path_factory.mktemp("models")
    theirs = folder / "models"
    for directory in (
        triton_models.step(theirs),
        triton_models.lstm(theirs, batched=True),
        triton_models.lstm(theirs, batched=False),
    ):
        import_triton(directory, ours)
        to_python(directory)
    with (
        triton.serve(folder) as real,
        running_server(models=ours) as server,
        grpc.insecure_channel(real.address) as their_channel,
        grpc.insecure_channel(server.address) as our_channel,
    ):
        yield Oip(their_channel), Oip(our_channel)


def test_a_converted_model_gives_what_triton_gives_with_state_carried_across_requests(both: tuple[Oip, Oip]) -> None:
    rng = np.random.default_rng(2)
    shapes = {STEP: ("INPUT", (1,), False), CHUNK: ("x", (1,), True), BARE: ("x", (), True)}
    worst = 0.0
    for name, (tensor, leading, timed) in shapes.items():
        for sequence in (3, 4, 3):  # the last one begins a second time
            for k in range(6):
                steps = (int(rng.integers(1, 5)),) if timed else ()
                x = {tensor: rng.standard_normal((*leading, *steps, FEATURES)).astype(np.float32)}
                theirs, ours = (arrays(each.infer(name, x, sequence, start=k == 0, end=k == 5)) for each in both)
                assert theirs.keys() == ours.keys()
                for output, y in theirs.items():
                    assert ours[output].shape == y.shape
                    worst = max(worst, float(np.abs(ours[output] - y).max()))
    print(f"the largest difference: {worst:.2g}")
    assert worst <= 1e-5


def test_interleaved_sequences_give_what_triton_gives(both: tuple[Oip, Oip]) -> None:
    rng = np.random.default_rng(3)
    for k in range(5):
        for sequence in rng.permutation(np.arange(20, 28)).tolist():
            x = {"INPUT": rng.standard_normal((1, FEATURES)).astype(np.float32)}
            theirs, ours = (arrays(each.infer(STEP, x, sequence, start=k == 0, end=k == 4)) for each in both)
            for output, y in theirs.items():
                np.testing.assert_allclose(ours[output], y, atol=1e-5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("work")
    work.write_model(folder)
    with running_server(models=folder) as server:
        yield server


@pytest.mark.timeout(200)
@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
@pytest.mark.parametrize("concurrency", [1, 16, 64, 256])
def test_perf_analyzer_completes_sequences(
    server: RunningServer, tmp_path: Path, concurrency: int, streaming: bool
) -> None:
    """It reads metadata, config and statistics, and each sequence that it starts it ends."""
    triton.link_libraries(tmp_path)
    core = server.server.core
    (model,) = core.repository
    before = core.meter.of(model).success.count
    done = analyzed(server.address, tmp_path, concurrency, streaming=streaming)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    rate = re.search(rf"Concurrency: {concurrency}, throughput: ([0-9.]+) infer/sec", said)
    assert rate is not None, said
    assert float(rate[1]) > 0
    served = re.search(r"Successful request count: (\d+)", said)
    assert served is not None, said
    assert int(served[1]) > 0  # what ModelStatistics says
    print(f"concurrency {concurrency}, {'streaming' if streaming else 'unary'}: {rate[1]} infer/s")
    assert core.meter.of(model).fail.count == 0
    assert core.meter.of(model).success.count > before
    assert len(core.sessions) == 0  # every start had its end


def analyzed(address: str, libraries: Path, concurrency: int, *, streaming: bool) -> subprocess.CompletedProcess[str]:
    """A run of sequences of 20 steps."""
    for milliseconds in WINDOWS:
        try:
            return subprocess.run(
                [
                    *(triton.PERF_ANALYZER, "-m", work.MODEL, "-i", "grpc", "-u", address),
                    *("--shape", f"input:1,{work.FEATURES}", "--concurrency-range", str(concurrency)),
                    *("--sequence-length", "20", "--measurement-interval", str(milliseconds), "--max-trials", "3"),
                    *("--stability-percentage", "999", *(["--streaming"] if streaming else [])),
                ],
                env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
                capture_output=True,
                text=True,
                timeout=3 * milliseconds / 1000 + 40,
            )
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("perf_analyzer does not end")
