"""The vectors of real Keras, through a live server: deployed by the SDK, called by the SDK.

What has no time axis, or two sequences of different lengths, cannot be a call of the contract, and a bare layer that
takes any input cannot be served: these cases are run by the local twin alone (test_keras_vectors.py).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnserve
from serving import ZOO, running_server
from vectors.keras.cases import Case, errors, load_cases

CASES = load_cases()
FAMILIES = list(dict.fromkeys(case.family for case in CASES))
RUN: Counter[str] = Counter()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rnnserve.Client]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ZOO / "lstm-4", Path(folder) / "lstm-4")
    with (
        running_server(models=folder, allow_deploy=True) as server,
        rnnserve.Client(server.address, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("family", FAMILIES)
def test_served_as_real_keras(client: rnnserve.Client, family: str) -> None:
    """Shapes, dtypes and values are those of real Keras, to 2e-5 (float16: 4e-3), over gRPC."""
    faults = []
    for case in (case for case in CASES if case.family == family and not case.name.startswith(UNSERVED)):
        try:
            RUN[family] += serve(client, case)
        except Exception as error:
            faults.append(f"{case.name}: {type(error).__name__}: {error}")
    assert not faults, f"{len(faults)} cases:\n" + "\n".join(faults)


UNSERVED = (
    "Embedding/float ids",  # a served model's inputs have one dtype
    "TimeDistributed/LSTM",  # two axes of any length, where a call has one
    "BatchNormalization/axis 1",  # without a batch_shape, it may be of time or of features
)


def test_most_cases_can_be_served() -> None:
    """What is left out is little, and is no recurrent layer by itself."""
    if set(RUN) != set(FAMILIES):
        pytest.skip("needs the tests above")
    assert sum(RUN.values()) >= 1330
    for family, count in Counter(case.family for case in CASES).items():
        if family not in ("activations", "layers around", "Sequential", "functional"):
            assert RUN[family] == count, family


def serve(client: rnnserve.Client, case: Case) -> bool:
    """Deploys a case and runs its calls; False if it cannot be served."""
    try:
        model = client.models.deploy("case", case.config, case.weights, keras_version=case.keras)
    except rnnserve.ModelInvalid as error:
        if "nothing says what the inputs are like" in str(error):
            return False
        raise
    try:
        if not all(fits(model, call["x"]) for call in case.calls):
            return False
        with client.RNN(
            "case",
            return_sequences=model.default_options.return_sequences,
            return_state=len(flat(case.calls[0]["expected"])) > len(model.outputs),
            stateful='"stateful": true' in json.dumps(case.config),
            time_major=model.default_options.time_major,
        ) as layer:
            for call in case.calls:
                if (reset := call.get("reset")) is not None:
                    layer.reset_states(None if reset is True else reset)
                xs = flat(call["x"])
                inputs = {spec.name: x for spec, x in zip(model.inputs, xs, strict=False)}
                # The further inputs of a decoder are the states that it begins with.
                further = {state.name: x for state, x in zip(model.states, xs[len(inputs) :], strict=False)}
                initial_state = call.get("initial_state") or further or None
                got = layer(inputs, mask=call.get("mask"), initial_state=initial_state)
                list(errors("y", flat(call["expected"]), flat(got)))
                if "states" in call:
                    list(errors("states", flat(call["states"]), flat(layer.states), dtypes=False))
        return True
    finally:
        client.models.unload("case")


def fits(model: rnnserve.Model, x: Any) -> bool:
    """Whether the inputs have the axes that a call has: a batch, and one number of time steps for all."""
    xs = flat(x)[: len(model.inputs)]
    ranks = [2 + len(spec.shape) for spec in model.inputs]
    return [x.ndim for x in xs] == ranks and len({x.shape[:2] for x in xs}) == 1


def flat(value: Any) -> list[np.ndarray]:
    """The arrays in nested lists and mappings, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in flat(part)]
    return [value]
