"""What every engine promises, whatever it computes with.

Inherit `EngineSuite`, give it an `engine`, and pytest holds the engine to its contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pytest

from house import random_cuts
from rnnserve_models.engine.base import Array, Arrays, Engine, EngineError

STEPS, ROWS = 9, 64


class EngineSuite(ABC):
    """The contract of `Engine.run`."""

    tolerance = 1e-5
    """What two ways of cutting or batching may differ by in an engine that does not promise bits."""

    @abstractmethod
    def engine(self) -> Engine:
        """The engine under test."""

    # What the suite feeds it

    def values(self, rng: np.random.Generator, spec: Any, leading: tuple[int, ...]) -> Array:
        """Random values for an input or a state."""
        if spec.dtype.kind == "f":
            return rng.normal(0, 0.5, (*leading, *spec.shape)).astype(spec.dtype)
        return rng.integers(0, 2, (*leading, *spec.shape)).astype(spec.dtype)

    @pytest.fixture
    def batch(self) -> tuple[Engine, Arrays, Array, Arrays]:
        """A ragged batch of many rows: the engine, inputs, lengths and states."""
        engine, rng = self.engine(), np.random.default_rng(11)
        lengths = rng.integers(1, STEPS + 1, ROWS)
        lengths[:2] = STEPS, 1
        inputs = {spec.name: self.values(rng, spec, (STEPS, ROWS)) for spec in engine.inputs}
        for x in inputs.values():
            x[np.arange(STEPS)[:, None] >= lengths] = 0
        return engine, inputs, lengths, {spec.name: self.values(rng, spec, (ROWS,)) for spec in engine.states}

    def assert_same(self, engine: Engine, found: Array, expected: Array, what: str) -> None:
        assert found.dtype == expected.dtype
        if engine.bit_identical:
            assert found.tobytes() == expected.tobytes(), what
        else:
            np.testing.assert_allclose(found, expected, rtol=self.tolerance, atol=self.tolerance, err_msg=what)

    def assert_row(self, engine: Engine, found: Any, at: int, expected: Any, row: int, steps: int) -> None:
        """Row ``at`` of one result is row ``row`` of the other."""
        for name in found[0]:
            self.assert_same(engine, found[0][name][:steps, at], expected[0][name][:steps, row], f"{name}, row {row}")
        for name in found[1]:
            self.assert_same(engine, found[1][name][at], expected[1][name][row], f"{name}, row {row}")

    def run(self, engine: Engine, inputs: Arrays, lengths: Array, states: Arrays, rows: Any) -> tuple[Arrays, Arrays]:
        """The engine over some of the rows."""
        steps = int(lengths[rows].max())
        return engine.run(
            {name: x[:steps, rows] for name, x in inputs.items()},
            lengths[rows],
            {name: state[rows] for name, state in states.items()},
        )

    # The contract

    def test_describes_itself(self) -> None:
        """An engine names itself, at least one input and output, and states with distinct names and places."""
        engine = self.engine()
        assert engine.name in ("numpy", "onnx")
        assert isinstance(engine.bit_identical, bool)
        assert engine.inputs
        assert engine.outputs
        for specs in (engine.inputs, engine.outputs, engine.states):
            assert len({spec.name for spec in specs}) == len(specs)
        assert len({state.path for state in engine.states}) == len(engine.states)

    def test_run_gives_what_it_describes(self, batch: Any) -> None:
        """Every output is [T, R, *shape] and every state [R, *shape], of their dtypes, in order, finite where valid."""
        engine, inputs, lengths, states = batch
        outputs, after = engine.run(inputs, lengths, states)
        assert list(outputs) == [spec.name for spec in engine.outputs]
        assert set(after) == {spec.name for spec in engine.states}
        valid = np.arange(STEPS)[:, None] < lengths
        for spec in engine.outputs:
            assert (outputs[spec.name].shape, outputs[spec.name].dtype) == ((STEPS, ROWS, *spec.shape), spec.dtype)
            assert np.isfinite(outputs[spec.name][valid]).all()
        for spec in engine.states:
            assert (after[spec.name].shape, after[spec.name].dtype) == ((ROWS, *spec.shape), spec.dtype)
            assert np.isfinite(after[spec.name]).all()

    def test_keeps_nothing_and_changes_nothing(self, batch: Any) -> None:
        """What goes in is not written to, may be read-only, and the same again gives the same bits again."""
        engine, inputs, lengths, states = batch
        given = {**inputs, "lengths": lengths, **{f"state {name}": state for name, state in states.items()}}
        before = {name: array.copy() for name, array in given.items()}
        for array in given.values():
            array.flags.writeable = False
        first, second = engine.run(inputs, lengths, states), engine.run(inputs, lengths, states)
        for name, array in given.items():
            assert array.tobytes() == before[name].tobytes(), name
        for one, other in zip(first, second, strict=True):
            for name, array in one.items():
                assert array.tobytes() == other[name].tobytes(), name
        for name, state in first[1].items():
            assert not any(np.shares_memory(state, array) for array in given.values()), name

    def test_strides_do_not_matter(self, batch: Any) -> None:
        """Arrays that lie in memory otherwise, as views of a client's bytes do, give the same bits."""
        engine, inputs, lengths, states = batch
        plain = engine.run(inputs, lengths, states)
        turned = {name: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for name, x in inputs.items()}
        strided = engine.run(turned, lengths, {name: np.asfortranarray(state) for name, state in states.items()})
        valid = np.arange(STEPS)[:, None] < lengths
        for name, y in plain[0].items():
            assert y[valid].tobytes() == strided[0][name][valid].tobytes(), name
        for name, state in plain[1].items():
            assert state.tobytes() == strided[1][name].tobytes(), name

    def test_no_rows_do_no_harm(self, batch: Any) -> None:
        """A batch of no rows is an error or gives none; it does not end the process, as onnxruntime's LSTM would."""
        engine, inputs, lengths, states = batch
        none = (
            {name: x[:1, :0] for name, x in inputs.items()},
            lengths[:0],
            {name: state[:0] for name, state in states.items()},
        )
        try:
            outputs, after = engine.run(*none)
        except EngineError:
            return
        assert {y.shape[:2] for y in outputs.values()} == {(1, 0)}
        assert {len(state) for state in after.values()} <= {0}

    def test_the_state_matters(self, batch: Any) -> None:
        """A recurrent model's results depend on the states that it is given."""
        engine, inputs, lengths, states = batch
        if not states:
            pytest.skip("the model has no states")
        _, after = engine.run(inputs, lengths, states)
        zeros = {name: np.zeros_like(state) for name, state in states.items()}
        _, other = engine.run(inputs, lengths, zeros)
        assert any((state[1] != other[name][1]).any() for name, state in after.items())

    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 15, 16, 31, 33, 64])
    def test_a_row_among_strangers(self, batch: Any, rows: int) -> None:
        """A row's results are its own, among any number of other rows of any lengths and at any place."""
        engine, inputs, lengths, states = batch
        whole = engine.run(inputs, lengths, states)
        chosen = np.random.default_rng(rows).permutation(ROWS)[:rows]
        part = self.run(engine, inputs, lengths, states, chosen)
        for at, row in enumerate(chosen):
            self.assert_row(engine, part, at, whole, row, lengths[row])

    def test_a_row_alone(self, batch: Any) -> None:
        """Every row alone, for exactly its own steps, gives what it gave in the batch."""
        engine, inputs, lengths, states = batch
        whole = engine.run(inputs, lengths, states)
        for row in range(0, ROWS, 5):
            alone = self.run(engine, inputs, lengths, states, slice(row, row + 1))
            self.assert_row(engine, alone, 0, whole, row, lengths[row])

    @pytest.mark.parametrize("seed", range(4))
    def test_steps_cut_in_chunks(self, batch: Any, seed: int) -> None:
        """Steps cut into runs anywhere, with ever other rows beside them, give what one run of all gives."""
        engine, inputs, lengths, states = batch
        whole = engine.run(inputs, lengths, states)
        rng = np.random.default_rng(seed)
        carried = {name: state.copy() for name, state in states.items()}
        outputs = {name: np.zeros_like(y) for name, y in whole[0].items()}
        for start, stop in random_cuts(rng, STEPS):
            live = rng.permutation(np.flatnonzero(lengths > start))
            for rows in np.array_split(live, rng.integers(1, 4)):
                if not len(rows):
                    continue
                left = np.minimum(lengths[rows], stop) - start
                longest = start + left.max()
                y, after = engine.run(
                    {name: x[start:longest, rows] for name, x in inputs.items()},
                    left,
                    {name: state[rows] for name, state in carried.items()},
                )
                for name, state in after.items():
                    carried[name][rows] = state
                for name, part in y.items():
                    outputs[name][start:longest, rows] = part
        for row in range(ROWS):
            self.assert_row(engine, (outputs, carried), row, whole, row, lengths[row])

    def test_what_is_behind_a_row_does_not_matter(self, batch: Any) -> None:
        """Finite values behind a row's length change nothing that is valid."""
        engine, inputs, lengths, states = batch
        whole = engine.run(inputs, lengths, states)
        behind = np.arange(STEPS)[:, None] >= lengths
        noisy = {name: x.copy() for name, x in inputs.items()}
        for x in noisy.values():
            x[behind] = 1
        found = engine.run(noisy, lengths, states)
        for row in range(ROWS):
            self.assert_row(engine, found, row, whole, row, lengths[row])
