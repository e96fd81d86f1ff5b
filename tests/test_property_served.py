"""Random layers, options, masks and cuts: NumPy, ONNX and a live server agree."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rnnserve
from rnnserve_models import layer_from_config
from serving import ZOO, running_server

GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
OPTIONS = ("return_sequences", "go_backwards", "zero_output_for_mask", "unroll")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rnnserve.Client]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ZOO / "lstm-4", Path(folder) / "lstm-4")
    with (
        running_server(models=folder, allow_deploy=True) as server,
        rnnserve.Client(server.address, timeout=60) as client,
    ):
        yield client


@st.composite
def layers(draw: st.DrawFn) -> tuple[dict[str, Any], list[np.ndarray], np.random.Generator]:
    """A recurrent layer as Keras serializes it, its weights, and what is random from here on."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind, units, features = draw(st.sampled_from(sorted(GATES))), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    config = {"name": "layer", "units": units, **{name: draw(st.booleans()) for name in OPTIONS}}
    config["activation"] = draw(st.sampled_from(["tanh", "relu", "gelu", "softsign", "linear"]))
    columns = GATES[kind] * units
    bias: tuple[int, ...] = (columns,)
    if kind == "GRU":
        config["reset_after"] = draw(st.booleans())
        bias = (2, columns) if config["reset_after"] else bias
    weights = [(0.4 * rng.standard_normal(s)).astype(np.float32) for s in ((features, columns), (units, columns), bias)]
    return {"class_name": kind, "config": config}, weights, rng


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(layer=layers(), batch=st.integers(1, 4), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_session_is_the_stateful_layer(
    client: rnnserve.Client,
    layer: tuple[dict[str, Any], list[np.ndarray], np.random.Generator],
    batch: int,
    lengths: list[int],
) -> None:
    """Call by call, with NaN under the mask, a session gives what the stateful layer gives on both engines."""
    config, weights, rng = layer
    stateful = {**config, "config": {**config["config"], "stateful": True}}
    twins = [layer_from_config(stateful, weights, engine=engine) for engine in ("numpy", "onnx")]
    client.models.deploy("random", config, weights)
    try:
        with client.session("random", batch_size=batch) as session:
            for steps in lengths:
                x = rng.standard_normal((batch, steps, weights[0].shape[0])).astype(np.float32)
                mask = rng.random((batch, steps)) < 0.6 if rng.random() < 0.7 else None
                if mask is not None:
                    x[~mask] = np.nan
                served = session(x, mask=mask)
                assert np.isfinite(served).all()
                for twin in twins:
                    np.testing.assert_allclose(served, twin(x, mask=mask), rtol=0, atol=2e-5)
    finally:
        client.models.unload("random")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(1, 39), max_size=8))
def test_how_a_sequence_is_cut_changes_no_bit(client: rnnserve.Client, seed: int, cuts: list[int]) -> None:
    """A session of a model that promises it gives the same bits however its sequence is cut, masked or not."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 40, 5)).astype(np.float32)
    mask = rng.random((3, 40)) < 0.7
    mask[:, 0] = True  # before a call's first valid step its output is 0
    options = {"return_sequences": True, "zero_output_for_mask": True}
    whole = client.RNN("lstm-4", **options)(x, mask=mask)
    parts = sorted(set(cuts))
    with client.session("lstm-4", batch_size=3, **options) as session:
        served = [
            session(part, mask=valid)
            for part, valid in zip(np.split(x, parts, axis=1), np.split(mask, parts, axis=1), strict=True)
        ]
    assert np.array_equal(np.concatenate(served, axis=1), whole)
