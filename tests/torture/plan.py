"""What every session is to do, known before the first step is taken; and what must come of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from rnnserve_models.cells import GRUCell
from rnnserve_models.engine.base import Array, Arrays, Engine
from rnnserve_models.load import load_model
from rnnserve_models.masking import compact
from rnnserve_models.weights import save_weights
from serving import ZOO

FEATURES = 5


@dataclass(frozen=True)
class Kind:
    """Sessions that are alike.

    Attributes:
        model: their model.
        batch: rows of every call.
        masked: every chunk has a mask.
        options: those of the layer that are true.
        every_steps: whenever their step is a multiple of it, they are reset; 0: not.
        masked_steps: with so many masked steps in a row, that row is; 0: not.
    """

    model: str
    batch: int = 1
    masked: bool = False
    options: tuple[str, ...] = ("return_sequences",)
    every_steps: int = 0
    masked_steps: int = 0

    @property
    def sequences(self) -> bool:
        return "return_sequences" in self.options


KINDS = (
    Kind("lstm-4"),
    Kind("lstm-4", batch=3, options=()),
    Kind("lstm-32-64"),
    Kind("lstm-4-numpy", batch=2, masked=True),
    Kind("gru-8", options=("return_sequences", "return_state")),
    Kind("lstm-4", masked=True, options=("return_sequences", "zero_output_for_mask")),
    Kind("lstm-4", options=("return_sequences", "return_state"), every_steps=17),
    Kind("lstm-4-numpy", batch=2, masked=True, every_steps=61, masked_steps=2),
)


def write_models(folder: Path) -> dict[str, Engine]:
    """Writes the models of all kinds, of both engines, and loads them: by name."""
    for name, copy in (("lstm-4", "lstm-4"), ("lstm-32-64", "lstm-32-64"), ("lstm-4", "lstm-4-numpy")):
        shutil.copytree(ZOO / name, folder / copy)
    with (folder / "lstm-4-numpy" / "1" / "model.yaml").open("a") as file:
        file.write("engine: numpy\n")
    rng = np.random.default_rng(8)
    shapes = {"kernel": (FEATURES, 24), "recurrent_kernel": (8, 24), "bias": (2, 24)}
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    version = folder / "gru-8" / "1"
    version.mkdir(parents=True)
    save_weights(version / "weights.safetensors", GRUCell(units=8).with_weights(weights, FEATURES, np.float32))
    (version / "model.yaml").write_text(
        "description: A GRU.\ncell: {class_name: GRUCell, config: {units: 8}}\n"
        f"input_dim: {FEATURES}\nweights: weights.safetensors\n"
    )
    engines = {path.name: load_model(path / "1").engine for path in folder.iterdir()}
    assert all(engine.bit_identical for engine in engines.values())
    assert {engine.name for engine in engines.values()} == {"numpy", "onnx"}
    return engines


@dataclass
class Plan:
    """One session's life.

    Attributes:
        name: its id.
        kind: what it is.
        engine: what computes it.
        seed: of its inputs.
        lengths: of its chunks, in time steps.
    """

    name: str
    kind: Kind
    engine: Engine
    seed: tuple[int, ...]
    lengths: list[int]
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [0, *np.cumsum(self.lengths).tolist()]

    @cached_property
    def x(self) -> Array:
        """All inputs, [T, batch, features]."""
        shape = (self.starts[-1], self.kind.batch, FEATURES)
        return np.random.default_rng(self.seed).standard_normal(shape, np.float32)

    @cached_property
    def mask(self) -> Array | None:
        """Which steps count, bool [T, batch]."""
        if not self.kind.masked:
            return None
        return np.random.default_rng((*self.seed, 1)).random((self.starts[-1], self.kind.batch)) < 0.7

    @cached_property
    def fresh(self) -> Array:
        """Which rows the kind's rules reset behind which steps, bool [T, batch]."""
        steps, run = np.arange(1, self.starts[-1] + 1), np.zeros(self.kind.batch, np.int64)
        fresh = np.zeros((len(steps), self.kind.batch), np.bool_)
        if self.kind.every_steps:
            fresh[steps % self.kind.every_steps == 0] = True
        if self.kind.masked_steps and self.mask is not None:
            for each, counts in zip(fresh, self.mask, strict=True):
                run = np.where(counts, 0, run + 1)
                each |= run == self.kind.masked_steps
        return fresh

    def chunk(self, number: int) -> tuple[Array, Array | None]:
        """The inputs of a chunk, [batch, time, features], and its mask, [batch, time]."""
        steps = slice(self.starts[number], self.starts[number + 1])
        mask = None if self.mask is None else self.mask[steps].T
        return self.x[steps].swapaxes(0, 1), mask

    @property
    def beginning(self) -> Arrays:
        """Its states at step 0."""
        return {spec.name: spec.initial(self.kind.batch) for spec in self.engine.states}

    def expected(self, count: int) -> tuple[list[bytes], Arrays]:
        """The digests of the first answers, and the states behind them, as one run over the whole sequence has them."""
        if "return_state" in self.kind.options or self.fresh.any():  # the states between the chunks are wanted too
            return self._chunk_by_chunk(count)
        stop, states = self.starts[count], self.beginning
        if not stop:
            return [], states
        mask = np.ones((stop, self.kind.batch), np.bool_) if self.mask is None else self.mask[:stop]
        whole = compact({"input": self.x[:stop]}, mask, go_backwards=False)
        (y, states) = _run(self.engine, whole.inputs, whole.lengths, states)
        before = np.concatenate([np.zeros((1, self.kind.batch), np.int64), np.cumsum(mask, axis=0)])  # [T + 1, batch]
        rows, digests = np.arange(self.kind.batch), []
        for number in range(count):
            first, last = self.starts[number], self.starts[number + 1]
            index = before[first + 1 : last + 1] - 1  # [t, batch], the run's last step that counts
            zeros = self.kind.masked and "zero_output_for_mask" in self.kind.options
            shown = mask[first:last] if zeros else index >= before[first]
            out = np.where(shown[..., None], y[np.maximum(index, 0), rows], np.float32(0))  # [t, batch, units]
            digests.append(digest({"output": out.swapaxes(0, 1) if self.kind.sequences else out[-1]}, {}))
        return digests, states

    def answer(self, number: int, states: Mapping[str, Array]) -> tuple[bytes, Arrays]:
        """The digest of the answer to one chunk from given states, and the states behind it."""
        x, mask = self.chunk(number)
        call = compact({"input": x.swapaxes(0, 1)}, None if mask is None else mask.T, go_backwards=False)
        if self.fresh[self.starts[number] : self.starts[number + 1]].any():
            y, after = self._step_by_step(number, states)
        else:
            y, after = _run(self.engine, call.inputs, call.lengths, states)
        out = call.expand(
            y,
            return_sequences=self.kind.sequences,
            zero_output_for_mask="zero_output_for_mask" in self.kind.options,
        )
        shown = after if "return_state" in self.kind.options else {}
        return digest({"output": out.swapaxes(0, 1) if self.kind.sequences else out}, shown), after

    def _step_by_step(self, number: int, states: Mapping[str, Array]) -> tuple[Array, Arrays]:
        """The outputs of a chunk's steps that count, [T', batch, units], and the states behind it, by the rules."""
        steps = range(self.starts[number], self.starts[number + 1])
        (spec,) = self.engine.outputs
        y = np.zeros((len(steps), self.kind.batch, *spec.shape), spec.dtype)
        ran = np.zeros(self.kind.batch, np.int64)
        after, beginning = dict(states), self.beginning
        for step in steps:
            counts = np.ones(self.kind.batch, np.bool_) if self.mask is None else self.mask[step]
            out, after = _run(self.engine, {"input": self.x[step : step + 1]}, counts.astype(np.int64), after)
            y[ran[counts], np.flatnonzero(counts)] = out[0, counts]
            ran += counts
            for name, state in after.items():
                state[self.fresh[step]] = beginning[name][self.fresh[step]]
        return y, after

    def _chunk_by_chunk(self, count: int) -> tuple[list[bytes], Arrays]:
        states, digests = self.beginning, []
        for number in range(count):
            answer, states = self.answer(number, states)
            digests.append(answer)
        return digests, states

    def states_between(self, count: int) -> list[Arrays]:
        """The states before each of the first chunks, and behind the last."""
        found = [self.beginning]
        for number in range(count):
            found.append(self.answer(number, found[-1])[1])
        return found


def make_plans(
    engines: Mapping[str, Engine],
    seed: int,
    sessions: int,
    steps: int,
    longest: int,
    kinds: Sequence[Kind] = KINDS,
    abreast: int = 1,
) -> list[Plan]:
    """Sessions of all kinds in turn, that take so many steps together, in chunks of 1 to ``longest``; so many that
    follow one another are of one kind, in chunks of the same lengths.
    """
    plans = []
    for number in range(sessions):
        column = number // abreast
        kind, rng = kinds[column % len(kinds)], np.random.default_rng((seed, column, 2))
        lengths = rng.integers(1, longest + 1, 1 + 2 * steps // sessions // (longest + 1)).tolist()
        plans.append(Plan(f"torture-{seed}-{number}", kind, engines[kind.model], (seed, number), lengths))
    return plans


def digest(outputs: Mapping[str, Array], states: Mapping[str, Array]) -> bytes:
    """What tells one answer from another: 16 bytes over every bit of it."""
    total = hashlib.blake2b(digest_size=16)
    for arrays in (outputs, states):
        for name in sorted(arrays):
            total.update(f"{name} {arrays[name].shape} ".encode())
            total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.digest()


def _run(
    engine: Engine, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]
) -> tuple[Array, Arrays]:
    """An engine over rows of which some may have nothing that counts: the output [T', R, units], and the states."""
    live = np.flatnonzero(lengths)
    (spec,) = engine.outputs
    y = np.zeros((max(1, len(inputs["input"])), len(lengths), *spec.shape), spec.dtype)
    after = {name: state.copy() for name, state in states.items()}
    if len(live):
        some = {name: state[live] for name, state in states.items()}
        outputs, changed = engine.run({"input": inputs["input"][:, live]}, lengths[live], some)
        y[:, live] = outputs[spec.name]
        for name, state in changed.items():
            after[name][live] = state
    return y, after
