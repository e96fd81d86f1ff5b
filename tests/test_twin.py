"""The local twin of model directories and of files that are not Keras's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rnnserve_models import RNN, InputError, ModelError, model_from_file
from rnnserve_models.load import load_cell
from rnnserve_models.spec import read_spec
from serving import ZOO
from speech import silero_model, speech_frames

VECTORS = Path(__file__).parent / "vectors" / "onnx"
DIRECTORY = ZOO / "lstm-32-64" / "1"


def leaves(value: Any) -> list[np.ndarray]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_sequences": True, "return_state": True},
        {"return_sequences": True, "time_major": True, "go_backwards": True},
        {"return_sequences": True, "zero_output_for_mask": True, "return_state": True},
    ],
    ids=str,
)
def test_a_model_directory_computes_what_its_cells_do(engine: Any, options: dict[str, bool]) -> None:
    """With any options, a mask and an initial state: the same as the local layer of the same cells."""
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((4, 9, 5)).astype(np.float32), rng.random((4, 9)) < 0.5
    mask[0] = False
    x[~mask] = np.nan
    states = [[rng.standard_normal((4, units)).astype(np.float32) for _ in "hc"] for units in (32, 64)]
    if options.get("time_major"):
        x, mask = x.swapaxes(0, 1), mask.T
    twin = model_from_file(DIRECTORY, engine, **options)
    assert twin.engine == engine
    local = RNN(load_cell(DIRECTORY, read_spec(DIRECTORY / "model.yaml")), **options)
    got, want = leaves(twin(x, mask, states)), leaves(local(x, mask, states))
    assert [y.shape for y in got] == [y.shape for y in want]
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


def test_a_stateful_twin_goes_on() -> None:
    """Two calls are one long call, and reset_states starts anew from zeros or from values."""
    x = np.random.default_rng(1).standard_normal((2, 8, 5)).astype(np.float32)
    once = model_from_file(DIRECTORY)(x)
    live = model_from_file(DIRECTORY, stateful=True)
    assert live.states is None
    live(x[:, :3])
    middle = live.states
    assert np.array_equal(live(x[:, 3:]), once)
    live.reset_states(middle)
    assert np.array_equal(live(x[:, 3:]), once)
    live.reset_states()
    assert np.array_equal(live(x), once)
    with pytest.raises(InputError, match="batch size 2"):
        live(x[:1])
    assert live.state_size == [[32, 32], [64, 64]]
    assert [[h.shape for h in cell] for cell in live.get_initial_state(3)] == [[(3, 32)] * 2, [(3, 64)] * 2]


def test_an_onnx_export_goes_on_from_call_to_call() -> None:
    """A stateless export, loaded by its twin, carries its states: two calls are what the framework gave for one."""
    stored = load_file(VECTORS / "keras2_lstm.safetensors")
    twin = model_from_file(VECTORS / "keras2_lstm.onnx", stateful=True, return_sequences=True)
    x = stored["in.0"]
    got = np.concatenate([twin(x[:, :3]), twin(x[:, 3:])], axis=1)
    np.testing.assert_allclose(got, stored["out.0"], rtol=0, atol=2e-5)


def test_silero_hears_speech_without_a_server() -> None:
    """The graph of the zoo, with its context, on real speech."""
    twin = model_from_file(silero_model(), stateful=True)
    heard = twin(speech_frames()[None, :200])
    assert heard.shape == (1, 200)
    assert heard.max() > 0.9


def test_what_does_not_fit_is_named() -> None:
    """Shapes, masks, states, options and files that are none."""
    twin = model_from_file(DIRECTORY)
    with pytest.raises(InputError, match=r"inputs\.input: expected shape"):
        twin(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(InputError, match="mask"):
        twin(np.zeros((2, 3, 5), np.float32), mask=np.ones((2, 4), bool))
    with pytest.raises(InputError, match=r"initial_state\.0\.h"):
        twin(np.zeros((2, 3, 5), np.float32), initial_state=[[np.zeros((2, 3))] * 2] * 2)
    with pytest.raises(AttributeError, match="stateful"):
        twin.reset_states()
    with pytest.raises(InputError, match="return_sequence"):
        model_from_file(DIRECTORY, return_sequence=True)
    with pytest.raises(ModelError, match="expected a file"):
        model_from_file(Path(__file__))
