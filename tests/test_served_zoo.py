"""The zoo, served: real models on real input, through the SDK and a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import rnnserve
import rnnserve.aio
from rnnserve_models.layers import RNN
from rnnserve_models.load import load_cell
from rnnserve_models.spec import read_spec
from serving import ZOO, RunningServer, running_server
from speech import sample, silero_model, speech_frames

VECTORS = Path(__file__).parent / "vectors" / "silero_aepyx.json"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    silero_model()
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return speech_frames()


@pytest.fixture(scope="module")
def wrapper() -> np.ndarray:
    """The probabilities that Silero's own Python wrapper gives for the recording, frame by frame."""
    return np.array(json.loads(VECTORS.read_text(encoding="utf-8"))["probabilities"], np.float32)


def test_speech_frame_by_frame_equals_the_packages_wrapper(
    server: RunningServer, frames: np.ndarray, wrapper: np.ndarray
) -> None:
    """Every one of the recording's frames, sent by itself, has the probability that the package's wrapper gives it."""
    with rnnserve.Client(server.address) as client, client.session("silero-vad") as vad:
        probabilities = np.array(list(vad.stream(frames)))
    assert probabilities.shape == wrapper.shape
    np.testing.assert_allclose(probabilities, wrapper, rtol=0, atol=1e-4)


def test_speech_in_chunks_equals_speech_frame_by_frame(
    server: RunningServer, frames: np.ndarray, wrapper: np.ndarray
) -> None:
    """Chunks of one to forty frames, cut at random, give the same probabilities, and the context is carried."""
    rng = np.random.default_rng(0)
    cuts = np.cumsum(rng.integers(1, 41, len(frames)))
    with rnnserve.Client(server.address) as client, client.session("silero-vad") as vad:
        parts = [vad(chunk[None]) for chunk in np.split(frames, cuts[cuts < len(frames)])]
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[0], wrapper, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1200, pytest.param(None, marks=pytest.mark.slow, id="all")])
async def test_interleaved_sessions_do_not_hear_each_other(
    server: RunningServer, frames: np.ndarray, wrapper: np.ndarray, count: int | None
) -> None:
    """32 sessions hear the recording side by side, each cut otherwise: all get the wrapper's figures, the same bits."""
    frames, wrapper = frames[:count], wrapper[:count]

    async def listen(client: rnnserve.aio.Client, seed: int) -> np.ndarray:
        cuts = np.cumsum(np.random.default_rng(seed).integers(1, 200, len(frames)))
        async with client.session("silero-vad") as vad:
            return np.concatenate(
                [await vad(part[None]) for part in np.split(frames, cuts[cuts < len(frames)])], axis=1
            )

    async with rnnserve.aio.Client(server.address) as client:
        heard = np.concatenate(await asyncio.gather(*(listen(client, seed) for seed in range(32))))
    assert np.array_equal(heard, np.broadcast_to(heard[0], heard.shape))
    np.testing.assert_allclose(heard[0], wrapper, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
def test_sunspots_forecast_on_both_engines(engine: str) -> None:
    """The sunspot forecaster, a year a step, gives what its cells give in process, under either engine."""
    series = np.loadtxt(sample("sunspots.csv"), np.float32, delimiter=",", skiprows=1)[:, 1:]  # [T, 1]
    directory = ZOO / "sunspots-lstm" / "1"
    expected = RNN(load_cell(directory, read_spec(directory / "model.yaml")), return_sequences=True)(series[None])[0]
    with running_server(engine=engine) as server, rnnserve.Client(server.address) as client:
        assert client.model("sunspots-lstm").engine == engine
        with client.session("sunspots-lstm") as forecaster:
            forecasts = np.array([forecaster.step(year) for year in series])
    np.testing.assert_allclose(forecasts, expected, rtol=1e-5, atol=1e-4)  # sunspot numbers go up to 190


def test_the_examples_of_the_keras_page(server: RunningServer) -> None:
    """RNN(LSTMCell(4)) gives (None, 4), and RNN([LSTMCell(32), LSTMCell(64)]) gives (None, 64)."""
    with rnnserve.Client(server.address) as client:
        x = np.zeros((32, 10, 5), np.float32)
        assert client.RNN("lstm-4")(x).shape == (32, 4)
        rnn = client.RNN("lstm-32-64", return_sequences=True, return_state=True)
        output, *states = rnn(x)
        assert output.shape == (32, 10, 64)
        assert [[state.shape for state in cell] for cell in states] == [[(32, 32)] * 2, [(32, 64)] * 2]
        assert rnn.state_size == [[32, 32], [64, 64]]
        assert rnn.output_size == 64
        assert rnn.compute_output_shape((32, 10, 5)) == [(32, 10, 64), [(32, 32)] * 2, [(32, 64)] * 2]


OPTIONS = [
    {},
    {"return_sequences": True},
    {"return_sequences": True, "go_backwards": True},
    {"return_sequences": True, "zero_output_for_mask": True, "return_state": True},
    {"return_sequences": True, "time_major": True, "return_state": True},
    {"return_state": True, "unroll": True, "go_backwards": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
@pytest.mark.parametrize("name", ["lstm-4", "lstm-32-64"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_a_served_layer_is_the_local_layer(
    server: RunningServer, name: str, options: dict[str, bool], masked: bool
) -> None:
    """With any options and any mask, a served layer computes what the local layer of the same cell computes."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 9, 5)).astype(np.float32)
    mask = rng.random((6, 9)) < 0.6 if masked else None
    if mask is not None:
        mask[0], mask[1] = False, True  # a row with no valid step, and one with all
        x[~mask] = np.nan
    if options.get("time_major"):
        x = x.swapaxes(0, 1)
        mask = None if mask is None else mask.T
    directory = ZOO / name / "1"
    local = RNN(load_cell(directory, read_spec(directory / "model.yaml")), **options)
    start = [
        [rng.standard_normal((6, size)).astype(np.float32) for size in sizes]
        for sizes in ([[32, 32], [64, 64]] if name == "lstm-32-64" else [[4, 4]])
    ]
    initial_state = start if name == "lstm-32-64" else start[0]
    with rnnserve.Client(server.address) as client:
        served = client.RNN(name, **options)(x, mask=mask, initial_state=initial_state)
    expected = local(x, mask=mask, initial_state=initial_state)
    flat_served, flat_expected = _flat(served), _flat(expected)
    assert [part.shape for part in flat_served] == [part.shape for part in flat_expected]
    for part, wanted in zip(flat_served, flat_expected, strict=True):
        assert part.dtype == wanted.dtype
        np.testing.assert_allclose(part, wanted, rtol=0, atol=1e-5)


def test_a_stateful_layer_carries_its_state(server: RunningServer) -> None:
    """Two calls of a stateful layer are one long call; reset_states starts anew, from zeros or from given values."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 20, 5)).astype(np.float32)
    values = [[rng.standard_normal((3, size)).astype(np.float32) for _ in "hc"] for size in (32, 64)]
    with rnnserve.Client(server.address) as client:
        once = client.RNN("lstm-32-64")
        live = client.RNN("lstm-32-64", stateful=True)
        live(x[:, :7])
        assert np.array_equal(live(x[:, 7:]), once(x))
        live.reset_states()
        assert np.array_equal(live(x[:, :5]), once(x[:, :5]))
        live.reset_states(values)
        assert np.array_equal(live(x), once(x, initial_state=values))
        with pytest.raises(rnnserve.InvalidInput, match="3"):
            live(x[:2])
        live.close()


def test_a_session_outlives_its_connection(server: RunningServer) -> None:
    """A detached session is taken up by another client, at the step and with the state at which it was left."""
    x = np.random.default_rng(3).standard_normal((1, 12, 5)).astype(np.float32)
    with rnnserve.Client(server.address) as client:
        expected = client.RNN("lstm-4")(x)
        session = client.session("lstm-4", return_sequences=False)
        session_id = session.session_id
        session(x[:, :8])
        session.detach()
    with rnnserve.Client(server.address) as client:
        session = client.attach(session_id)
        assert session.next_step == 8
        assert np.array_equal(session(x[:, 8:]), expected)
        session.close()
        with pytest.raises(rnnserve.SessionClosed, match="deleted"):
            client.attach(session_id)


def _flat(value: object) -> list[np.ndarray]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _flat(part)]
    assert isinstance(value, np.ndarray)
    return [value]
