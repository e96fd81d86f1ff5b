"""Writes cases.json and arrays.safetensors: what the real Keras 2 and 3 compute, on CPU, for this project's tests.

The tests do not need the frameworks; this script does. Run it from the repository's root, in an environment of its own:

    pip install 'tensorflow-cpu==2.21.0' 'tf_keras==2.21.0' 'keras==3.15.1' safetensors
    python tests/vectors/keras/make_vectors.py

A case is a layer's (or model's) config as its Keras writes it, its weights in the order of ``get_weights()``, and a
list of calls; see ``cases.py`` for the format. Arrays are kept once, by what they hold. Where this project does on
purpose what a Keras does not (the last sections of its semantics), the expected values are computed by real Keras in
another way, which the case states under ``note``:

* ``unroll=True`` never changes a result here, but has bugs in Keras: expected values are those of ``unroll=False``.
* An ``initial_state`` given to a stateful layer always replaces its state; Keras 2 does so only while all its states
  are zero: there the states are reset before the call.
* A mask goes on past a ``go_backwards`` layer in the order of its outputs; Keras passes it on unreversed: the layers
  of such a chain are called one by one, with their masks.
* A lone state of a stacked cell is listed, ``[h]``, as Keras 3 has it; Keras 2 gives it bare.
* Keras 3 cannot reset a stateful layer of stacked cells, nor set states to values: its variables are assigned.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(
    KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="-1", TF_ENABLE_ONEDNN_OPTS="0", TF_CPP_MIN_LOG_LEVEL="3"
)

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from safetensors.numpy import save

HERE = Path(__file__).parent
KERAS = {2: tf_keras, 3: keras}
LARGEST = 30
"""No expected value is larger: the tolerance is absolute."""

Make = Callable[[Any], Any]
"""From ``keras`` or ``tf_keras`` to a layer or model."""


@dataclass
class Call:
    """One call of a layer; ``reset`` comes before it: True for zeros, or values nested as the states are."""

    x: Any
    mask: Any = None
    initial_state: Any = None
    reset: Any = None


class Vectors:
    """The cases recorded so far."""

    def __init__(self) -> None:
        self.cases: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}

    def save(self) -> None:
        names = {old: f"{index:x}" for index, old in enumerate(sorted(self.arrays))}
        about = {
            "made_by": "tests/vectors/keras/make_vectors.py",
            "versions": {"keras": keras.__version__, "tf_keras": tf_keras.__version__, "tensorflow": tf.__version__},
            "machine": platform.machine(),
        }
        lines = ",\n".join(json.dumps(_renamed(case, names), separators=(",", ":")) for case in self.cases)
        text = f'{{"about":{json.dumps(about)},\n"cases":[\n{lines}\n]}}\n'
        (HERE / "cases.json").write_text(text, encoding="utf-8")
        (HERE / "arrays.safetensors").write_bytes(save({names[old]: array for old, array in self.arrays.items()}))

    def array(self, value: Any) -> str:
        """The name of an array, which is kept once."""
        array = np.array(value, order="C")
        name = "@" + hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:24]
        self.arrays[name] = array
        return name

    def nest(self, value: Any) -> Any:
        """The names of nested arrays; None stays."""
        if isinstance(value, (list, tuple)):
            return [self.nest(part) for part in value]
        return None if value is None else self.array(value)

    def record(
        self,
        family: str,
        name: str,
        make: Make,
        *calls: Call,
        versions: tuple[int, ...] = (2, 3),
        oracle: Make | None = None,
        run: Callable[[Any, Call], Any] | None = None,
        note: str = "",
        scale: float = 1.0,
        legacy: bool = False,
    ) -> None:
        """Records a case for each version.

        Args:
            family: the row of the table that it counts in.
            name: of the case, unique in its family.
            make: makes the layer, whose config is stored.
            calls: what to call it with.
            versions: the Keras versions that have it.
            oracle: makes the layer to take the expected values from, where it is another.
            run: computes a call in another way than by calling the layer.
            note: why there is an ``oracle`` or a ``run``.
            scale: of the weights.
            legacy: store the config in Keras 2's older format, as its .h5 files have it.
        """
        for version in versions:
            framework = KERAS[version]
            case: dict[str, Any] = {"family": family, "name": f"{name}/keras{version}", "keras": version}
            notes = [note] if note else []
            made = []
            for maker in (make, oracle) if oracle else (make,):
                framework.utils.set_random_seed(0)
                (framework.backend if version == 2 else framework.utils).clear_session()
                layer = maker(framework)
                _call(version, layer, _zeros_like(calls[0]))
                made.append(layer)
            layer, runner = made[0], made[-1]
            weights = weights_for(layer, scale)
            for each in made:
                each.set_weights(weights)
            _assign_states(runner, None)
            case["config"] = _config(version, layer, legacy)
            case["weights"] = self.nest(weights)
            case["calls"] = []
            for call in calls:
                entry = {"x": self.nest(call.x)}
                if call.reset is not None:
                    _assign_states(runner, None if call.reset is True else call.reset)
                    entry["reset"] = True if call.reset is True else self.nest(call.reset)
                if call.mask is not None:
                    entry["mask"] = self.nest(call.mask)
                if call.initial_state is not None:
                    entry["initial_state"] = self.nest(call.initial_state)
                    if version == 2 and _stateful(runner):
                        _assign_states(runner, None)
                        notes.append("states reset before a call with initial_state")
                got = run(runner, call) if run else _call(version, runner, call)
                got = _listed(runner, _numpy(got))
                for part in _flat(got):
                    if not np.isfinite(part).all() or np.abs(part).max(initial=0) > LARGEST:
                        sys.exit(f"{family}: {case['name']}: gives values that are too large to compare")
                entry["expected"] = self.nest(got)
                if _stateful(runner) and (states := _states(runner)) is not None:
                    entry["states"] = self.nest(_listed_states(runner, _numpy(states)))
                case["calls"].append(entry)
            if notes:
                case["note"] = "; ".join(dict.fromkeys(notes))
            self.cases.append(case)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_map(function, part) for part in value]
    return None if value is None else function(value)


def _numpy(value: Any) -> Any:
    return _map(np.asarray, value)


def _tensors(value: Any) -> Any:
    return _map(tf.constant, value)


def _zeros_like(call: Call) -> Call:
    return Call(_map(np.zeros_like, call.x))


def _call(version: int, layer: Any, call: Call) -> Any:
    given = {"mask": call.mask, "initial_state": call.initial_state}
    if version == 2 and call.initial_state is not None and _stack(layer):
        # Keras 2 wants the lone state of a stacked cell bare.
        given["initial_state"] = [s[0] if isinstance(s, list) and len(s) == 1 else s for s in call.initial_state]
    return layer(_tensors(call.x), **{key: _tensors(value) for key, value in given.items() if value is not None})


def _config(version: int, layer: Any, legacy: bool) -> dict[str, Any]:
    if legacy:
        config = KERAS[2].layers.serialize(layer, use_legacy_format=True)
    else:
        config = KERAS[version].layers.serialize(layer)
    config = json.loads(
        json.dumps(config, default=lambda value: dict(value) if hasattr(value, "keys") else list(value))
    )
    return {"class_name": config["class_name"], "config": config["config"]}


def _stack(layer: Any) -> bool:
    cell = getattr(getattr(layer, "forward_layer", layer), "cell", None)
    return type(cell).__name__ == "StackedRNNCells"


def _stateful(layer: Any) -> bool:
    return bool(getattr(layer, "stateful", False)) and not hasattr(layer, "layers")


def _recurrent(layer: Any) -> list[Any]:
    """The stateful recurrent layers inside, in order."""
    if hasattr(layer, "layers"):
        return [inner for part in layer.layers for inner in _recurrent(part)]
    if hasattr(layer, "forward_layer"):
        return [*_recurrent(layer.forward_layer), *_recurrent(layer.backward_layer)]
    return [layer] if getattr(layer, "stateful", False) and hasattr(layer, "states") else []


def _states(layer: Any) -> Any:
    return [state for part in _recurrent(layer) for state in part.states]


def _assign_states(layer: Any, values: Any) -> None:
    variables = [v for part in _recurrent(layer) for v in _flat(part.states)]
    flat = [np.zeros(v.shape) for v in variables] if values is None else list(_flat(values))
    for variable, value in zip(variables, flat, strict=True):
        variable.assign(np.asarray(value, tf.as_dtype(variable.dtype).as_numpy_dtype))


def _listed(layer: Any, value: Any) -> Any:
    """What a layer returned, with the lone states of stacked cells listed."""
    if not (getattr(layer, "return_state", False) and _stack(layer)):
        return value
    outputs = 2 if getattr(layer, "merge_mode", "") is None else 1
    return [*value[:outputs], *_listed_states(layer, value[outputs:])]


def _listed_states(layer: Any, states: Any) -> Any:
    return [s if isinstance(s, list) else [s] for s in states] if _stack(layer) else states


# ---------------------------------------------------------------------------------------------------------------
# What the layers are given


def seeded(*parts: Any) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(repr(parts).encode()).digest()[:16]))


def weights_for(layer: Any, scale: float) -> list[np.ndarray]:
    """Weights that depend on their places and shapes only, so that cases share them."""
    weights = []
    for index, (variable, old) in enumerate(zip(layer.weights, layer.get_weights(), strict=True)):
        new = scale * seeded("weights", index, old.shape).uniform(-0.9, 0.9, old.shape)
        if "variance" in getattr(variable, "path", variable.name):
            new = np.abs(new) + 0.3
        weights.append(new.astype(old.dtype))
    return weights


def inputs(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return seeded("x", shape, seed).normal(size=shape).astype(dtype)


def states(*sizes: int, batch: int = 3, seed: int = 0, dtype: str = "float32") -> list[np.ndarray]:
    return [
        seeded("state", batch, size, index, seed).uniform(-0.9, 0.9, (batch, size)).astype(dtype)
        for index, size in enumerate(sizes)
    ]


def masks(batch: int, steps: int) -> dict[str, np.ndarray]:
    """Masks of every family, [batch, steps] unless the name says otherwise."""
    time = np.arange(steps)
    lengths = np.array([steps, steps // 2, 1, steps - 1, 2])[:batch, None]
    holes = np.array([[(3 * t + 2 * row * t + row) % 3 != 0 for t in time] for row in range(batch)])
    holes[:, 0] = True
    first = holes.copy()
    first[:, 0] = False
    row = holes.copy()
    row[-1] = False
    last = np.ones((batch, steps), bool)
    last[0, -1] = last[-1, -2:] = False
    return {
        "right": time < lengths,
        "left": time >= steps - lengths,
        "holes": holes,
        "first": first,
        "last": last,
        "row": row,
        "all": np.zeros((batch, steps), bool),
        "ones": np.ones((batch, steps), bool),
        "broadcast": holes[1:2],
        "column": first[:, :, None],
        "float": holes * np.float32(0.5),
        "int": row.astype("int32"),
    }


KINDS = ("SimpleRNN", "LSTM", "GRU", "GRU-before", "stack", "RNN-LSTM", "RNN-GRU")
SIZES = {
    "SimpleRNN": [3],
    "LSTM": [3, 3],
    "GRU": [3],
    "GRU-before": [3],
    "stack": [[4, 4], [2], [3]],
    "RNN-LSTM": [3, 3],
    "RNN-GRU": [3],
}
CELL_OPTIONS = ("activation", "recurrent_activation", "use_bias", "dropout", "recurrent_dropout")


def recurrent(K: Any, kind: str, units: int = 3, **options: Any) -> Any:
    """A layer of a kind; the options of a cell go to the cells."""
    layers = K.layers
    of_cell = {key: options.pop(key) for key in CELL_OPTIONS if key in options}
    cell_dtype = {"dtype": options["dtype"]} if "dtype" in options else {}
    match kind:
        case "GRU-before":
            return layers.GRU(units, reset_after=False, **of_cell, **options)
        case "stack":
            kinds = (("LSTM", 4), ("GRU", 2), ("SimpleRNN", units))
            cells = [cell(K, *each, **of_cell, **cell_dtype) for each in kinds]
            # A list becomes StackedRNNCells of the default dtype.
            return layers.RNN(layers.StackedRNNCells(cells, **cell_dtype) if cell_dtype else cells, **options)
        case "RNN-LSTM":
            return layers.RNN(cell(K, "LSTM", units, **of_cell, **cell_dtype), **options)
        case "RNN-GRU":
            return layers.RNN(cell(K, "GRU", units, **of_cell, **cell_dtype), **options)
        case _:
            return getattr(layers, kind)(units, **of_cell, **options)


def cell(K: Any, kind: str, units: int, **options: Any) -> Any:
    if kind == "SimpleRNN":
        options.pop("recurrent_activation", None)
    return getattr(K.layers, f"{kind}Cell")(units, **options)


def nested_states(kind: str, batch: int = 3, seed: int = 0, dtype: str = "float32") -> list[Any]:
    return [
        states(*size, batch=batch, seed=seed + 10 * index, dtype=dtype)
        if isinstance(size, list)
        else states(size, batch=batch, seed=seed + 10 * index, dtype=dtype)[0]
        for index, size in enumerate(SIZES[kind])
    ]


def options_name(options: dict[str, Any]) -> str:
    return "+".join(key if value is True else f"{key}={value}" for key, value in options.items()) or "defaults"


def chosen(*names: str) -> list[dict[str, bool]]:
    """Every choice of the options."""
    return [
        {name: True for name, on in zip(names, choice, strict=True) if on}
        for choice in itertools.product((False, True), repeat=len(names))
    ]


# ---------------------------------------------------------------------------------------------------------------
# The families


def options_family(v: Vectors) -> None:
    x = inputs(3, 5, 2)
    for kind in KINDS:
        for options in chosen("return_sequences", "return_state", "go_backwards"):
            if kind.startswith("RNN") and len(options) not in (0, 2):
                continue
            v.record(
                "options", f"{kind}/{options_name(options)}", lambda K, k=kind, o=options: recurrent(K, k, **o), Call(x)
            )
    for kind in ("SimpleRNN", "LSTM", "GRU", "GRU-before", "stack"):
        v.record("no bias", kind, lambda K, k=kind: recurrent(K, k, use_bias=False, return_state=True), Call(x))
    for kind in ("LSTM", "GRU", "stack"):
        v.record(
            "ignored at inference",
            f"{kind}/dropout",
            lambda K, k=kind: recurrent(K, k, dropout=0.4, recurrent_dropout=0.3, return_sequences=True),
            Call(x),
        )
    v.record(
        "ignored at inference",
        "LSTM/unit_forget_bias, initializers, regularizers, constraints",
        lambda K: K.layers.LSTM(
            3,
            unit_forget_bias=False,
            kernel_initializer="he_normal",
            recurrent_initializer=K.initializers.RandomUniform(-0.1, 0.1),
            kernel_regularizer=K.regularizers.L2(0.01),
            activity_regularizer="l1",
            recurrent_constraint=K.constraints.MaxNorm(2.0),
            trainable=False,
            name="a_name",
        ),
        Call(x),
    )
    for implementation in (1, 2):
        v.record(
            "ignored at inference",
            f"GRU/implementation={implementation}",
            lambda K, i=implementation: K.layers.GRU(3, implementation=i, reset_after=False),
            Call(x),
            versions=(2,),
        )


def initial_state_family(v: Vectors) -> None:
    x = inputs(3, 4, 2)
    mask = masks(3, 4)
    for kind in KINDS:
        given = nested_states(kind)
        for name, options in (("last", {}), ("sequence", {"return_sequences": True, "go_backwards": True})):
            v.record(
                "initial state",
                f"{kind}/{name}",
                lambda K, k=kind, o=options: recurrent(K, k, return_state=True, **o),
                Call(x, initial_state=given),
            )
        for name in ("first", "row", "left"):
            v.record(
                "initial state",
                f"{kind}/{name} mask",
                lambda K, k=kind: recurrent(K, k, return_state=True, return_sequences=True),
                Call(x, mask[name], given),
            )


def mask_family(v: Vectors) -> None:
    batch, steps = 4, 6
    x = inputs(batch, steps, 2)
    every = masks(batch, steps)
    settings = [
        {"return_sequences": True},
        {"return_sequences": True, "zero_output_for_mask": True},
        {"return_state": True, "go_backwards": True},
        {"return_sequences": True, "go_backwards": True, "return_state": True},
        {"return_state": True},
        {"return_state": True, "zero_output_for_mask": True},
        {"return_sequences": True, "go_backwards": True, "zero_output_for_mask": True},
        {"go_backwards": True, "zero_output_for_mask": True},
    ]
    # Each kind of layer meets each mask twice, and each setting several times, for each version.
    for number, kind in enumerate(KINDS[:5]):
        for place, (name, mask) in enumerate(every.items()):
            for turn in (0, 1):
                options = settings[(number + place * 3 + turn * 5) % len(settings)]
                v.record(
                    f"mask: {name}",
                    f"{kind}/{options_name(options)}",
                    lambda K, k=kind, o=options: recurrent(K, k, **o),
                    Call(x, mask),
                )
    for kind, name in itertools.product(KINDS[:5], ("right", "first", "row")):
        dirty = np.where(every[name][:, :, None], x, np.float32("nan"))
        dirty[0] = np.where(every[name][0, :, None], x[0], np.float32("inf"))
        v.record(
            "mask: NaN and infinity under it",
            f"{kind}/{name}",
            lambda K, k=kind: recurrent(K, k, return_sequences=True, return_state=True),
            Call(dirty, every[name]),
        )


def unroll_family(v: Vectors) -> None:
    x = inputs(4, 5, 2)
    every = masks(4, 5)
    note = "computed with unroll=False"
    for kind in KINDS[:5]:
        for name in (None, "right", "holes", "row"):
            for options in (
                {"return_sequences": True, "return_state": True},
                {"go_backwards": True},
                {"return_sequences": True, "go_backwards": True, "zero_output_for_mask": True},
                {"zero_output_for_mask": True},
            ):
                if name is None and "zero_output_for_mask" in options:
                    continue
                if name in ("holes", "row") and "return_state" in options and kind in ("GRU", "GRU-before"):
                    continue
                other = name is not None and "zero_output_for_mask" in options
                v.record(
                    "unroll",
                    f"{kind}/{name or 'no'} mask/{options_name(options)}",
                    lambda K, k=kind, o=options: recurrent(K, k, unroll=True, **o),
                    Call(x, None if name is None else every[name]),
                    oracle=(lambda K, k=kind, o=options: recurrent(K, k, **o)) if other else None,
                    note=note if other else "",
                )
    v.record(
        "unroll",
        "GRU/several lengths",
        lambda K: K.layers.GRU(3, unroll=True, return_sequences=True),
        Call(x),
        Call(x[:, :2]),
        Call(x[:, :1]),
    )


def time_major_family(v: Vectors) -> None:
    x = inputs(5, 3, 2)  # [T, B, D]
    every = {name: np.moveaxis(mask, 0, 1) for name, mask in masks(3, 5).items()}
    for kind in KINDS:
        for options in (
            {},
            {"return_sequences": True, "return_state": True},
            {"return_sequences": True, "go_backwards": True},
        ):
            make = lambda K, k=kind, o=options: recurrent(K, k, time_major=True, **o)  # noqa: E731
            v.record("time_major", f"{kind}/{options_name(options)}", make, Call(x), versions=(2,))
        for name in ("right", "first", "row"):
            v.record(
                "time_major",
                f"{kind}/{name} mask",
                lambda K, k=kind: recurrent(K, k, time_major=True, return_sequences=True, return_state=True),
                Call(x, every[name], nested_states(kind)),
                versions=(2,),
            )
    v.record(
        "time_major",
        "LSTM/stateful",
        lambda K: recurrent(K, "LSTM", time_major=True, stateful=True, return_sequences=True),
        Call(x),
        Call(x[:2]),
        Call(x, reset=True),
        versions=(2,),
    )
    for options in ({}, {"return_sequences": True, "return_state": True}):
        for name in (None, "right", "holes"):
            v.record(
                "time_major",
                f"Bidirectional/{name or 'no'} mask/{options_name(options)}",
                lambda K, o=options: K.layers.Bidirectional(recurrent(K, "GRU", time_major=True, **o)),
                Call(x, None if name is None else every[name]),
                versions=(2,),
            )


def stateful_family(v: Vectors) -> None:
    a, b, c = inputs(3, 4, 2, seed=1), inputs(3, 1, 2, seed=2), inputs(3, 6, 2, seed=3)
    mask = masks(3, 4)
    for kind in KINDS:
        given, values = nested_states(kind, seed=3), nested_states(kind, seed=4)
        for options in ({"return_sequences": True}, {"return_state": True, "go_backwards": True}):
            v.record(
                "stateful",
                f"{kind}/calls and resets/{options_name(options)}",
                lambda K, k=kind, o=options: recurrent(K, k, stateful=True, **o),
                *[Call(a), Call(b), Call(c), Call(a, reset=True), Call(b)],
            )
        v.record(
            "stateful",
            f"{kind}/masks",
            lambda K, k=kind: recurrent(K, k, stateful=True, return_sequences=True),
            *[Call(a, mask["first"]), Call(a, mask["row"]), Call(a, mask["left"]), Call(b), Call(a, mask["all"])],
        )
        v.record(
            "stateful",
            f"{kind}/initial_state",
            lambda K, k=kind: recurrent(K, k, stateful=True, return_state=True),
            *[Call(a, initial_state=given), Call(b), Call(b, initial_state=given), Call(a)],
        )
        v.record(
            "stateful",
            f"{kind}/reset to values",
            lambda K, k=kind: recurrent(K, k, stateful=True),
            *[Call(a), Call(b, reset=values), Call(a), Call(a, reset=True)],
        )
    v.record(
        "stateful",
        "GRU/unroll",
        lambda K: recurrent(K, "GRU", stateful=True, unroll=True),
        *[Call(a), Call(a), Call(b), Call(a, reset=True)],
    )


def stacked_family(v: Vectors) -> None:
    x, mask = inputs(3, 4, 2), masks(3, 4)["holes"]
    stacks = {
        "LSTM,LSTM": ("LSTM", 4, "LSTM", 3),
        "GRU,LSTM": ("GRU", 5, "LSTM", 2),
        "SimpleRNN,GRU": ("SimpleRNN", 2, "GRU", 3),
        "GRU": ("GRU", 3),
    }
    for name, parts in stacks.items():
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        for options in ({"return_sequences": True}, {"return_state": True, "go_backwards": True}):
            v.record(
                "stacked cells",
                f"{name}/{options_name(options)}",
                lambda K, p=pairs, o=options: K.layers.RNN([cell(K, *each) for each in p], **o),
                Call(x),
                *([] if name == "GRU" else [Call(x, mask)]),  # Keras 3 fails on a masked stack of one
            )
    v.record(
        "stacked cells",
        "StackedRNNCells/with options of cells",
        lambda K: K.layers.RNN(
            K.layers.StackedRNNCells(
                [
                    K.layers.GRUCell(3, reset_after=False, use_bias=False),
                    K.layers.LSTMCell(2, activation="relu", recurrent_activation="hard_sigmoid"),
                    K.layers.SimpleRNNCell(4, activation="softsign"),
                ]
            ),
            return_sequences=True,
            return_state=True,
            zero_output_for_mask=True,
        ),
        Call(x, mask),
    )


def activation_family(v: Vectors) -> None:
    by_version = {
        3: sorted(
            name
            for name in dir(keras.activations)
            if name[0] != "_" and name not in ("deserialize", "get", "serialize", "glu", "threshold")
        ),
        2: sorted(
            name
            for name in dir(tf_keras.activations)
            if name[0] != "_" and name not in ("deserialize", "get", "serialize")
        ),
    }
    x = inputs(2, 4, 3)
    wide = np.concatenate([inputs(2, 40, 3, seed=1) * 3, np.zeros((2, 1, 3), "float32")], axis=1)
    for version, names in by_version.items():
        for name in names:
            scale = 0.35 if name in ("exponential", "squareplus", "softplus", "sparse_plus", "log_softmax") else 1.0
            for kind in ("SimpleRNN", "LSTM", "GRU"):
                v.record(
                    "activations",
                    f"{kind}/{name}",
                    lambda K, k=kind, n=name: recurrent(K, k, activation=n, return_sequences=True),
                    Call(x),
                    versions=(version,),
                    scale=scale,
                )
            v.record(
                "activations",
                f"Activation/{name}",
                lambda K, n=name: K.layers.Activation(n),
                Call(np.clip(wide, -3, 3) if name in ("exponential", "log_softmax") else wide),
                versions=(version,),
            )
    recurrents = (
        "sigmoid",
        "hard_sigmoid",
        "tanh",
        "relu",
        "linear",
        "softsign",
        "gelu",
        "silu",
        "swish",
        "softmax",
        "elu",
    )
    for name in recurrents:
        versions = (3,) if name == "silu" else (2, 3)
        for kind in ("LSTM", "GRU", "GRU-before"):
            if name in ("softmax", "elu", "gelu") and kind == "GRU-before":
                continue
            v.record(
                "recurrent activations",
                f"{kind}/{name}",
                lambda K, k=kind, n=name: recurrent(
                    K, k, recurrent_activation=n, activation="softsign", return_sequences=True
                ),
                Call(x),
                versions=versions,
                scale=0.6,
            )
    for name in ("hard_sigmoid", "gelu", "exponential"):
        v.record(
            "activations",
            f"masked stack/{name}",
            lambda K, n=name: recurrent(K, "stack", activation=n, return_state=True, return_sequences=True),
            Call(x, masks(3, 4)["first"][:2]),
            scale=0.35,
        )
    v.record(
        "activations",
        "LSTM/None",
        lambda K: recurrent(K, "LSTM", activation=None, recurrent_activation=None),
        Call(x),
        scale=0.6,
    )


def bidirectional_family(v: Vectors) -> None:
    x = inputs(4, 5, 2)
    every = masks(4, 5)
    wrap = lambda K, kind, merge="concat", **o: K.layers.Bidirectional(recurrent(K, kind, **o), merge_mode=merge)  # noqa: E731
    for merge in ("concat", "sum", "mul", "ave", None):
        for kind in ("SimpleRNN", "LSTM", "GRU", "GRU-before"):
            for sequences in (False, True):
                v.record(
                    "Bidirectional",
                    f"{kind}/{merge}/{'sequence' if sequences else 'last'}",
                    lambda K, k=kind, m=merge, s=sequences: wrap(K, k, m, return_sequences=s),
                    Call(x),
                )
        v.record(
            "Bidirectional",
            f"LSTM/{merge}/states",
            lambda K, m=merge: wrap(K, "LSTM", m, return_state=True, return_sequences=True),
            Call(x),
            Call(x, initial_state=states(3, 3, 3, 3, batch=4)),
            Call(x, every["left"], states(3, 3, 3, 3, batch=4)),
        )
    for number, (name, mask) in enumerate(every.items()):
        if name in ("float", "int", "column"):
            continue
        for place, kind in enumerate(("LSTM", "GRU", "SimpleRNN")):
            sequences = (number + place) % 2 == 0
            v.record(
                "Bidirectional with masks",
                f"{kind}/{name}/{'sequence' if sequences else 'last'}",
                lambda K, k=kind, s=sequences: wrap(K, k, return_sequences=s, return_state=True),
                Call(x, mask),
            )
    for zero, sequences in itertools.product((False, True), repeat=2):
        v.record(
            "Bidirectional with masks",
            f"GRU/zero_output_for_mask={zero}/return_sequences={sequences}",
            lambda K, z=zero, s=sequences: wrap(K, "GRU", "sum", zero_output_for_mask=z, return_sequences=s),
            Call(x, every["holes"]),
            Call(x, every["row"]),
        )
    for kind in ("GRU", "SimpleRNN", "RNN-LSTM"):
        given = states(*[3] * (4 if kind == "RNN-LSTM" else 2), batch=4)
        v.record(
            "Bidirectional",
            f"{kind}/initial state",
            lambda K, k=kind: wrap(K, k, return_state=True),
            Call(x, initial_state=given),
        )
    v.record(
        "Bidirectional", "stack", lambda K: wrap(K, "stack", return_sequences=True), Call(x), Call(x, every["holes"])
    )
    v.record("Bidirectional", "LSTM/no bias", lambda K: wrap(K, "LSTM", use_bias=False), Call(x))
    v.record(
        "Bidirectional",
        "LSTM/unroll",
        lambda K: wrap(K, "LSTM", unroll=True, return_sequences=True),
        Call(x),
        Call(x, every["holes"]),
        oracle=lambda K: wrap(K, "LSTM", return_sequences=True),
        note="computed with unroll=False",
    )
    v.record(
        "Bidirectional",
        "GRU/of a go_backwards layer",
        lambda K: wrap(K, "GRU", go_backwards=True, return_sequences=True),
        Call(x),
        versions=(2,),
    )
    for merge in ("concat", None):
        v.record(
            "Bidirectional",
            f"backward_layer of another class/{merge}",
            lambda K, m=merge: K.layers.Bidirectional(
                K.layers.LSTM(3, return_sequences=True),
                backward_layer=K.layers.GRU(2, go_backwards=True, return_sequences=True),
                merge_mode=m,
            ),
            Call(x),
            Call(x, every["first"]),
        )
    v.record(
        "Bidirectional",
        "backward_layer of the same class/sum",
        lambda K: K.layers.Bidirectional(
            K.layers.LSTM(3, activation="relu"),
            backward_layer=K.layers.LSTM(3, go_backwards=True, use_bias=False),
            merge_mode="sum",
        ),
        Call(x),
    )
    for kind in ("LSTM", "GRU", "SimpleRNN"):
        v.record(
            "Bidirectional, stateful",
            f"{kind}/sequence",
            lambda K, k=kind: wrap(K, k, stateful=True, return_sequences=True),
            *[Call(x), Call(x[:, :2]), Call(x, every["holes"]), Call(x, reset=True)],
        )
        v.record(
            "Bidirectional, stateful",
            f"{kind}/states",
            lambda K, k=kind: wrap(K, k, "sum", stateful=True, return_state=True),
            *[Call(x), Call(x[:, :1]), Call(x, reset=True)],
            versions=(2,),
        )
        v.record(
            "Bidirectional, stateful",
            f"{kind}/reset to values",
            lambda K, k=kind: wrap(K, k, "ave", stateful=True),
            *[Call(x, reset=states(*[3] * (4 if k_is_lstm(kind) else 2), batch=4, seed=6)), Call(x[:, :3])],
        )


def k_is_lstm(kind: str) -> bool:
    return kind == "LSTM"


def dtype_family(v: Vectors) -> None:
    x, mask = inputs(3, 4, 2), masks(3, 4)["holes"]
    for dtype, kind in itertools.product(("float16", "float64", "mixed_float16"), KINDS[:5]):
        half = "float16" if dtype == "mixed_float16" else dtype
        v.record(
            f"dtype: {dtype}",
            f"{kind}/sequence and states",
            lambda K, k=kind, d=dtype: recurrent(K, k, dtype=policy(K, d), return_sequences=True, return_state=True),
            Call(x.astype(half)),
            Call(x.astype(half), mask, nested_states(kind, dtype=half)),
        )
        v.record(
            f"dtype: {dtype}",
            f"{kind}/stateful",
            lambda K, k=kind, d=dtype: recurrent(K, k, dtype=policy(K, d), stateful=True),
            *[Call(x.astype(half)), Call(x[:, :2].astype(half)), Call(x.astype(half), reset=True)],
        )
    for dtype in ("float16", "float64"):
        v.record(
            "dtype: of the input",
            f"LSTM/{dtype}",
            lambda K: K.layers.LSTM(3, return_state=True),
            Call(x.astype(dtype)),
        )
        v.record(
            "dtype: of the input",
            f"float64 Bidirectional, {dtype} input",
            lambda K: K.layers.Bidirectional(K.layers.GRU(3, dtype="float64"), dtype="float64"),
            Call(x.astype(dtype)),
        )
    v.record(
        "dtype: of the input", "GRU/int32", lambda K: K.layers.GRU(3), Call((x * 3).astype("int32")), versions=(3,)
    )
    for dtype in ("float16", "float64"):
        v.record(
            f"dtype: {dtype}",
            "Sequential",
            lambda K, d=dtype: K.Sequential(
                [
                    K.layers.Embedding(6, 3, mask_zero=True, dtype=d),
                    K.layers.LSTM(3, dtype=d, return_sequences=True),
                    K.layers.LayerNormalization(dtype=d),
                    K.layers.Bidirectional(K.layers.GRU(2, dtype=d), dtype=d),
                    K.layers.Dense(2, activation="sigmoid", dtype=d),
                ]
            ),
            Call(IDS),
        )


def policy(K: Any, dtype: str) -> Any:
    if dtype != "mixed_float16":
        return dtype
    return K.mixed_precision.Policy(dtype) if K is tf_keras else K.DTypePolicy(dtype)


IDS = np.array([[3, 1, 4, 1, 5], [2, 0, 5, 0, 0], [0, 0, 3, 5, 2]], "int32")


def edge_family(v: Vectors) -> None:
    for kind in KINDS:
        for batch, steps in ((1, 1), (1, 6), (4, 1)):
            v.record(
                "one step, one row",
                f"{kind}/[{batch}, {steps}]",
                lambda K, k=kind: recurrent(K, k, return_sequences=True, return_state=True),
                Call(inputs(batch, steps, 2)),
                Call(inputs(batch, steps, 2), np.arange(batch * steps).reshape(batch, steps) % 3 == 1),
            )
    for kind in ("LSTM", "GRU", "SimpleRNN"):
        v.record(
            "sizes",
            f"{kind}/one unit, one feature",
            lambda K, k=kind: recurrent(K, k, 1, return_sequences=True),
            Call(inputs(2, 3, 1)),
        )
        v.record(
            "sizes",
            f"{kind}/7 units, 5 features, any batch and length",
            lambda K, k=kind: recurrent(K, k, 7, return_sequences=True),
            *[Call(inputs(batch, steps, 5)) for batch, steps in ((2, 8), (1, 3), (4, 1), (2, 8))],
        )
        v.record(
            "sizes",
            f"{kind}/60 steps",
            lambda K, k=kind: recurrent(K, k, 4),
            Call(inputs(2, 60, 2), np.arange(60)[None] % 7 != 2),
        )


def surrounding_family(v: Vectors) -> None:
    flat, x, deep = inputs(3, 4), inputs(3, 5, 4), inputs(2, 3, 4, 2)
    mask = masks(3, 5)["holes"]
    cases: dict[str, tuple[Callable[[Any], Any], list[Call]]] = {
        "Dense/2-D": (lambda L: L.Dense(3, activation="relu"), [Call(flat)]),
        "Dense/3-D": (lambda L: L.Dense(2, activation="softmax"), [Call(x)]),
        "Dense/4-D": (lambda L: L.Dense(3), [Call(deep)]),
        "Dense/no bias": (lambda L: L.Dense(3, use_bias=False, activation="tanh"), [Call(x)]),
        "Dense/hard_sigmoid": (lambda L: L.Dense(3, activation="hard_sigmoid"), [Call(x * 3)]),
        "Embedding": (lambda L: L.Embedding(6, 3), [Call(IDS)]),
        "Embedding/mask_zero": (lambda L: L.Embedding(6, 3, mask_zero=True), [Call(IDS), Call(IDS.astype("int64"))]),
        "Embedding/1-D": (lambda L: L.Embedding(6, 2), [Call(IDS[0])]),
        "Embedding/float ids": (lambda L: L.Embedding(6, 2), [Call(IDS.astype("float32"))]),
        "Masking": (lambda L: L.Masking(0.0), [Call(x * mask[:, :, None])]),
        "Masking/value": (lambda L: L.Masking(mask_value=-1.0), [Call(np.where(mask[:, :, None], x, np.float32(-1)))]),
        "TimeDistributed/Dense": (lambda L: L.TimeDistributed(L.Dense(3, activation="elu")), [Call(x)]),
        "TimeDistributed/Dense/4-D": (lambda L: L.TimeDistributed(L.Dense(3)), [Call(deep)]),
        "TimeDistributed/Flatten": (lambda L: L.TimeDistributed(L.Flatten()), [Call(deep)]),
        "TimeDistributed/LSTM": (lambda L: L.TimeDistributed(L.LSTM(3)), [Call(deep)]),
        "TimeDistributed/LayerNormalization": (lambda L: L.TimeDistributed(L.LayerNormalization()), [Call(x)]),
        "LayerNormalization": (lambda L: L.LayerNormalization(), [Call(x), Call(x[:, :2])]),
        "LayerNormalization/options": (
            lambda L: L.LayerNormalization(epsilon=0.02, center=False),
            [Call(x)],
        ),
        "LayerNormalization/no scale": (lambda L: L.LayerNormalization(scale=False), [Call(flat)]),
        "LayerNormalization/two axes": (lambda L: L.LayerNormalization(axis=[1, 2]), [Call(x)]),
        "BatchNormalization": (lambda L: L.BatchNormalization(), [Call(x), Call(x[:1, :2])]),
        "BatchNormalization/2-D": (lambda L: L.BatchNormalization(epsilon=0.1, momentum=0.5), [Call(flat)]),
        "BatchNormalization/no center": (lambda L: L.BatchNormalization(center=False), [Call(x)]),
        "BatchNormalization/no scale": (lambda L: L.BatchNormalization(scale=False), [Call(x)]),
        "BatchNormalization/axis 1": (lambda L: L.BatchNormalization(axis=1), [Call(x)]),
        "Dropout": (lambda L: L.Dropout(0.5), [Call(x)]),
        "SpatialDropout1D": (lambda L: L.SpatialDropout1D(0.5), [Call(x)]),
        "GaussianDropout": (lambda L: L.GaussianDropout(0.5), [Call(x)]),
        "GaussianNoise": (lambda L: L.GaussianNoise(0.5), [Call(x)]),
        "AlphaDropout": (lambda L: L.AlphaDropout(0.5), [Call(x)]),
        "ActivityRegularization": (lambda L: L.ActivityRegularization(l2=0.1), [Call(x)]),
        "Flatten": (lambda L: L.Flatten(), [Call(x)]),
        "Flatten/4-D": (lambda L: L.Flatten(), [Call(deep)]),
        "Reshape": (lambda L: L.Reshape((10, 2)), [Call(x)]),
        "Reshape/unknown": (lambda L: L.Reshape((-1, 2)), [Call(x), Call(x[:, :2])]),
        "RepeatVector": (lambda L: L.RepeatVector(3), [Call(flat)]),
        "Permute": (lambda L: L.Permute((2, 1)), [Call(x)]),
        "GlobalAveragePooling1D": (lambda L: L.GlobalAveragePooling1D(), [Call(x)]),
        "GlobalAveragePooling1D/mask": (lambda L: L.GlobalAveragePooling1D(), [Call(x, mask)]),
        "GlobalAveragePooling1D/keepdims": (lambda L: L.GlobalAveragePooling1D(keepdims=True), [Call(x)]),
        "GlobalMaxPooling1D": (lambda L: L.GlobalMaxPooling1D(), [Call(x)]),
        "GlobalMaxPooling1D/keepdims": (lambda L: L.GlobalMaxPooling1D(keepdims=True), [Call(x)]),
        "Conv1D/valid": (lambda L: L.Conv1D(3, 2, activation="relu"), [Call(x)]),
        "Conv1D/same": (lambda L: L.Conv1D(3, 3, padding="same"), [Call(x), Call(x[:, :2])]),
        "Conv1D/same, even": (lambda L: L.Conv1D(3, 4, padding="same", activation="tanh"), [Call(x)]),
        "Conv1D/same, stride": (lambda L: L.Conv1D(3, 3, padding="same", strides=2), [Call(x), Call(x[:, :4])]),
        "Conv1D/causal": (lambda L: L.Conv1D(3, 3, padding="causal", use_bias=False), [Call(x)]),
        "Conv1D/causal, dilated": (lambda L: L.Conv1D(3, 2, padding="causal", dilation_rate=2), [Call(x)]),
        "Conv1D/stride": (lambda L: L.Conv1D(2, 2, strides=2), [Call(x)]),
        "Conv1D/dilated": (lambda L: L.Conv1D(2, 2, dilation_rate=3), [Call(x)]),
        "Conv1D/groups": (lambda L: L.Conv1D(4, 2, groups=2), [Call(x)]),
        "ReLU": (lambda L: L.ReLU(), [Call(x)]),
        "ReLU/options": (lambda L: L.ReLU(max_value=1.0, negative_slope=0.1, threshold=0.2), [Call(x)]),
        "LeakyReLU": (lambda L: L.LeakyReLU(), [Call(x)]),
        "ELU": (lambda L: L.ELU(alpha=0.7), [Call(x)]),
        "Softmax": (lambda L: L.Softmax(), [Call(x)]),
    }
    for name, (make, calls) in cases.items():
        v.record("layers around", name, lambda K, m=make: m(K.layers), *calls)


def sequential_family(v: Vectors) -> None:
    x, mask = inputs(3, 5, 2), masks(3, 5)
    masked = {name: np.where(mask[name][:, :, None], x, np.float32(0)) for name in ("right", "left", "holes", "row")}
    chains: dict[str, tuple[Callable[[Any], list[Any]], list[Call]]] = {
        "stacked LSTMs": (
            lambda L: [L.LSTM(4, return_sequences=True), L.LSTM(3, return_sequences=True), L.LSTM(2), L.Dense(2)],
            [Call(x), Call(x[:1, :2])],
        ),
        "Embedding, LSTM": (
            lambda L: [L.Embedding(6, 3, mask_zero=True), L.LSTM(3, return_sequences=True), L.LSTM(3)],
            [Call(IDS), Call(IDS[:, :1])],
        ),
        "Embedding, GRU, TimeDistributed": (
            lambda L: [
                L.Embedding(6, 3, mask_zero=True),
                L.GRU(3, return_sequences=True, zero_output_for_mask=True),
                L.TimeDistributed(L.Dense(2, activation="softmax")),
            ],
            [Call(IDS)],
        ),
        "Embedding, Bidirectional, Dense": (
            lambda L: [
                L.Embedding(6, 3, mask_zero=True),
                L.Bidirectional(L.LSTM(3, return_sequences=True)),
                L.Dropout(0.5),
                L.Bidirectional(L.GRU(2), merge_mode="ave"),
                L.Dense(2, activation="sigmoid"),
            ],
            [Call(IDS)],
        ),
        "Masking, SimpleRNN": (
            lambda L: [L.Masking(0.0), L.SimpleRNN(3, return_sequences=True), L.SimpleRNN(2)],
            [Call(part) for part in masked.values()],
        ),
        "Masking through Dense and normalization": (
            lambda L: [
                L.Masking(0.0),
                L.Dense(3, activation="tanh"),
                L.LayerNormalization(),
                L.BatchNormalization(),
                L.Dropout(0.1),
                L.Activation("relu"),
                L.GRU(3, return_sequences=True),
                L.GlobalAveragePooling1D(),
            ],
            [Call(masked["left"]), Call(masked["holes"])],
        ),
        "Masking, stacked cells": (
            lambda L: [
                L.Masking(0.0),
                L.RNN([L.LSTMCell(3), L.GRUCell(2)], return_sequences=True),
                L.TimeDistributed(L.Dense(2)),
            ],
            [Call(masked["right"])],
        ),
        "Conv1D, LSTM": (
            lambda L: [
                L.Conv1D(4, 3, padding="causal", activation="relu"),
                L.SpatialDropout1D(0.2),
                L.LSTM(3, return_sequences=True),
                L.GlobalMaxPooling1D(),
            ],
            [Call(x)],
        ),
        "Reshape, GRU, Flatten": (
            lambda L: [L.Reshape((5, 2)), L.GRU(2, return_sequences=True), L.Flatten(), L.Dense(3)],
            [Call(x.reshape(3, 10))],
        ),
        "LSTM, RepeatVector, LSTM": (
            lambda L: [L.LSTM(3), L.RepeatVector(4), L.LSTM(2, return_sequences=True), L.TimeDistributed(L.Dense(2))],
            [Call(x)],
        ),
        "go_backwards, LSTM": (
            lambda L: [L.GRU(3, go_backwards=True, return_sequences=True), L.LSTM(2)],
            [Call(x)],
        ),
        "nested Sequential": (
            lambda L: [L.GRU(3, return_sequences=True), _sequential(L, [L.Dense(4, activation="relu"), L.LSTM(2)])],
            [Call(x)],
        ),
    }
    for name, (make, calls) in chains.items():
        v.record("Sequential", name, lambda K, m=make: K.Sequential(m(K.layers)), *calls)
    v.record(
        "Sequential",
        "with an Input",
        lambda K: K.Sequential([K.Input((None, 2)), K.layers.LSTM(3, return_sequences=True), K.layers.Dense(2)]),
        Call(x),
        Call(x[:, :1]),
    )
    v.record(
        "Sequential",
        "stateful",
        lambda K: K.Sequential(
            [K.layers.LSTM(3, stateful=True, return_sequences=True), K.layers.GRU(2, stateful=True), K.layers.Dense(2)]
        ),
        *[Call(x), Call(x[:, :1]), Call(x, reset=True)],
    )
    for name, part in masked.items():
        v.record(
            "Sequential",
            f"Masking, go_backwards, LSTM/{name}",
            lambda K: K.Sequential(
                [K.layers.Masking(0.0), K.layers.GRU(3, go_backwards=True, return_sequences=True), K.layers.LSTM(2)]
            ),
            Call(part),
            run=lambda model, call, n=name: _flipped_chain(model, call, mask[n]),
            note="the mask reversed after go_backwards",
        )


def _sequential(layers: Any, parts: list[Any]) -> Any:
    return (keras if layers is keras.layers else tf_keras).Sequential(parts)


def _flipped_chain(model: Any, call: Call, mask: np.ndarray) -> Any:
    masking, first, second = model.layers
    return second(first(masking(_tensors(call.x)), mask=tf.constant(mask)), mask=tf.constant(mask[:, ::-1]))


def functional_family(v: Vectors) -> None:
    x, later = inputs(3, 5, 2), inputs(3, 4, 2, seed=1)

    def chain(K: Any) -> Any:
        entry = K.Input((None, 2), name="series")
        y = K.layers.LSTM(3, return_sequences=True, name="first")(entry)
        y = K.layers.LayerNormalization()(y)
        y = K.layers.GRU(2, name="second")(y)
        return K.Model(entry, K.layers.Dense(2, name="head")(y))

    def with_states(K: Any) -> Any:
        entry = K.Input((None, 2))
        y, h, c = K.layers.LSTM(3, return_sequences=True, return_state=True)(entry)
        return K.Model(entry, [K.layers.Dense(2)(y), h, c])

    def carried(K: Any) -> Any:
        """State in, state out: one step of a decoder."""
        entry, h, c = K.Input((None, 2), name="x"), K.Input((3,), name="h"), K.Input((3,), name="c")
        y, *after = K.layers.LSTM(3, return_sequences=True, return_state=True)(entry, initial_state=[h, c])
        return K.Model([entry, h, c], [K.layers.Dense(2)(y), *after])

    def encoder_decoder(K: Any) -> Any:
        source, target = K.Input((None, 2), name="source"), K.Input((None, 2), name="target")
        _, h, c = K.layers.LSTM(4, return_state=True, name="encoder")(source)
        y = K.layers.LSTM(4, return_sequences=True, name="decoder")(target, initial_state=[h, c])
        return K.Model([source, target], K.layers.Dense(3, activation="softmax", name="head")(y))

    def gru_encoder_decoder(K: Any) -> Any:
        source, target = K.Input((None,), name="source"), K.Input((None,), name="target")
        table = K.layers.Embedding(6, 3, name="shared")
        _, h = K.layers.GRU(4, return_state=True, name="encoder")(table(source))
        y = K.layers.GRU(4, return_sequences=True, name="decoder")(table(target), initial_state=h)
        return K.Model([source, target], K.layers.TimeDistributed(K.layers.Dense(3))(y))

    def embedded(K: Any) -> Any:
        entry = K.Input((None,), dtype="int32")
        y = K.layers.Embedding(6, 3, mask_zero=True)(entry)
        y = K.layers.Bidirectional(K.layers.LSTM(3, return_sequences=True))(y)
        return K.Model(entry, K.layers.GRU(2)(y))

    def masked(K: Any) -> Any:
        entry = K.Input((5, 2))
        y = K.layers.Masking(0.0)(entry)
        y = K.layers.GRU(3, return_sequences=True)(y)
        return K.Model(entry, K.layers.SimpleRNN(2)(y))

    def bidirectional_encoder(K: Any) -> Any:
        source, target = K.Input((None, 2)), K.Input((None, 2))
        _, *found = K.layers.Bidirectional(K.layers.LSTM(3, return_state=True))(source)
        y = K.layers.Bidirectional(K.layers.LSTM(3, return_sequences=True))(target, initial_state=found)
        return K.Model([source, target], y)

    series = masks(3, 5)["left"][:, :, None] * x
    v.record("functional", "chain", chain, Call(x), Call(x[:1, :2]))
    v.record("functional", "outputs and states", with_states, Call(x))
    v.record("functional", "states in and out", carried, Call([x, *states(3, 3)]))
    v.record("functional", "encoder-decoder", encoder_decoder, Call([x, later]), Call([x[:, :1], later[:, :1]]))
    v.record(
        "functional", "encoder-decoder/GRU, shared Embedding", gru_encoder_decoder, Call([IDS, IDS[:, ::-1].copy()])
    )
    v.record("functional", "encoder-decoder/Bidirectional", bidirectional_encoder, Call([x, later]))
    v.record("functional", "Embedding mask", embedded, Call(IDS))
    v.record("functional", "Masking", masked, Call(series.astype("float32")))


def legacy_family(v: Vectors) -> None:
    x = inputs(3, 4, 2)
    cases: dict[str, tuple[Make, list[Call]]] = {
        "LSTM": (lambda K: K.layers.LSTM(3, recurrent_activation="hard_sigmoid"), [Call(x)]),
        "stack": (lambda K: recurrent(K, "stack", return_state=True), [Call(x)]),
        "Bidirectional": (lambda K: K.layers.Bidirectional(K.layers.GRU(3)), [Call(x, masks(3, 4)["left"])]),
        "Bidirectional, backward_layer": (
            lambda K: K.layers.Bidirectional(
                K.layers.SimpleRNN(3), backward_layer=K.layers.GRU(2, go_backwards=True, reset_after=False)
            ),
            [Call(x)],
        ),
        "TimeDistributed": (lambda K: K.layers.TimeDistributed(K.layers.Dense(3)), [Call(x)]),
        "Sequential": (
            lambda K: K.Sequential([K.layers.Embedding(6, 3, mask_zero=True), K.layers.LSTM(3), K.layers.Dense(2)]),
            [Call(IDS)],
        ),
    }
    for name, (make, calls) in cases.items():
        v.record("Keras 2's older config", name, make, *calls, versions=(2,), legacy=True)


def main() -> None:
    v = Vectors()
    only = sys.argv[1:]
    for family in (
        *(options_family, initial_state_family, mask_family, unroll_family, time_major_family, stateful_family),
        *(stacked_family, activation_family, bidirectional_family, dtype_family, edge_family, surrounding_family),
        *(sequential_family, functional_family, legacy_family),
    ):
        if only and family.__name__ not in only:
            continue
        before = len(v.cases)
        family(v)
        print(f"{family.__name__}: {len(v.cases) - before} cases", flush=True)
    names = [(case["family"], case["name"]) for case in v.cases]
    if twice := {name for name in names if names.count(name) > 1}:
        sys.exit(f"cases recorded twice: {sorted(twice)}")
    if not only:
        v.save()
    print(f"{len(v.cases)} cases, {len(v.arrays)} arrays")


if __name__ == "__main__":
    main()
