"""The vectors of ``make_vectors.py``: what real Keras computed, and what to compare with it.

``cases.json`` is ``{"about": ..., "cases": [case]}``, where a case names the arrays that it has in
``arrays.safetensors``::

    {"family": ..., "name": ..., "keras": 2 or 3, "note": why the expected values were made otherwise, if they were,
     "config": {"class_name": ..., "config": {...}}, "weights": [array],
     "calls": [{"x": array or [array], "mask": array, "initial_state": nested arrays, "reset": true or nested arrays,
                "expected": array or nested arrays, "states": nested arrays}]}

``mask``, ``initial_state``, ``reset`` and ``states`` may be missing. ``reset`` comes before the call, ``states`` is
what a stateful layer has recorded after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
TOLERANCE = {"float16": 4e-3, "float32": 2e-5, "float64": 2e-5}
"""Of absolute errors, by what was expected."""


@dataclass(frozen=True)
class Case:
    """A case with its arrays; see the module."""

    family: str
    name: str
    keras: int
    config: dict[str, Any]
    weights: list[np.ndarray]
    calls: list[dict[str, Any]]
    note: str = ""


def load_cases() -> list[Case]:
    """All cases."""
    arrays = load_file(HERE / "arrays.safetensors")
    document = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))
    cases = []
    for case in document["cases"]:
        case["weights"] = nested(arrays.__getitem__, case["weights"])
        case["calls"] = [
            {key: value if value is True else nested(arrays.__getitem__, value) for key, value in call.items()}
            for call in case["calls"]
        ]
        cases.append(Case(**case))
    return cases


def nested(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of every leaf of nested lists."""
    if isinstance(value, (list, tuple)):
        return [nested(function, part) for part in value]
    return function(value)


def run(case: Case, engine: str) -> float:
    """Runs a case and compares shapes, dtypes, nesting and values.

    Returns:
        The largest absolute error.

    Raises:
        AssertionError: something differs; the message says where.
    """
    from rnnserve_models import layer_from_config

    layer = layer_from_config(case.config, case.weights, engine=engine, keras_version=case.keras)
    worst = 0.0
    for number, call in enumerate(case.calls):
        if (reset := call.get("reset")) is not None:
            layer.reset_states(None if reset is True else reset)
        got = layer(call["x"], mask=call.get("mask"), initial_state=call.get("initial_state"))
        worst = max([worst, *errors(f"call {number}", call["expected"], got)])
        if "states" in call:
            worst = max([worst, *errors(f"call {number}: states", call["states"], layer.states, dtypes=False)])
    return worst


def errors(where: str, expected: Any, got: Any, *, dtypes: bool = True) -> Iterator[float]:
    """The largest absolute error of every array.

    Raises:
        AssertionError: nesting, shapes, dtypes (if ``dtypes``) or values differ.
    """
    if isinstance(expected, list):
        assert isinstance(got, (list, tuple)), f"{where}: expected a list of {len(expected)}, got {type(got).__name__}"
        assert len(got) == len(expected), f"{where}: expected {len(expected)} entries, got {len(got)}"
        for index, (left, right) in enumerate(zip(expected, got, strict=True)):
            yield from errors(f"{where}[{index}]", left, right, dtypes=dtypes)
        return
    assert isinstance(got, np.ndarray), f"{where}: expected an array, got {type(got).__name__}"
    assert got.shape == expected.shape, f"{where}: expected shape {expected.shape}, got {got.shape}"
    assert not dtypes or got.dtype == expected.dtype, f"{where}: expected {expected.dtype}, got {got.dtype}"
    error = float(np.abs(got.astype("float64") - expected.astype("float64")).max(initial=0))
    tolerance = TOLERANCE["float16" if "float16" in (got.dtype.name, expected.dtype.name) else expected.dtype.name]
    assert error <= tolerance, f"{where}: differs by {error:.2e}, at most {tolerance:.0e} is allowed"  # or NaN
    yield error
