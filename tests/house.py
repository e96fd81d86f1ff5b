"""Parts of the server on their own: an engine that adds, a clock that stands still, a sink that writes down."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from rnnserve_models.engine.base import Engine, EngineError
from rnnserve_models.load import LoadedModel
from rnnserve_models.masking import compact
from rnnserve_models.options import LayerOptions
from rnnserve_models.spec import CellSpec, ModelSpec, StateSpec, TensorSpec
from rnnserve_server.blocks import Block, Sessions
from rnnserve_server.sessions import Group, Session, SessionTable

FEATURES = 2


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class AddingEngine(Engine):
    """output_t = state_t+1 = state_t + input_t.

    Attributes:
        calls: (T, lengths) of each run, failed ones too.
        poison: a run whose inputs hold this number raises EngineError.
        bug: raised by the next run.
        gate: what a run waits for before it returns; `running` is set while it does.
    """

    name = "adding"
    bit_identical = True

    def __init__(self, default: np.ndarray | None = None, *, finite: bool = False) -> None:
        self.inputs = (TensorSpec("input", np.dtype(np.float32), (FEATURES,), finite),)
        self.outputs = (TensorSpec("output", np.dtype(np.float32), (FEATURES,)),)
        self.states = (StateSpec("sum", np.dtype(np.float32), (FEATURES,), (0,), default),)
        self.calls: list[tuple[int, list[int]]] = []
        self.poison = -1.0
        self.bug: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()

    def run(self, inputs, lengths, states):
        x, state = inputs["input"], states["sum"].copy()
        self.calls.append((len(x), lengths.tolist()))
        self.running.set()
        assert self.gate.wait(30)
        if self.bug is not None:
            bug, self.bug = self.bug, None
            raise bug
        if (x == self.poison).any():
            raise EngineError("the adder does not like this number")
        y = np.full_like(x, np.nan)  # what is behind a row's length is unspecified
        for t in range(len(x)):
            live = lengths > t
            state[live] += x[t, live]
            y[t, live] = state[live]
        return {"output": y}, {"sum": state}


def loaded(engine: Engine | None = None, *, name: str = "adder", version: str = "1", **spec: Any) -> LoadedModel:
    described = ModelSpec(cell=CellSpec(class_name="Adder", config={}), input_dim=FEATURES, weights="w", **spec)
    return LoadedModel(name, version, f"sha256:{name}/{version}", described, engine or AddingEngine())


def table(clock: Callable[[], float] | None = None, **limits: int) -> SessionTable:
    limits = {"max_sessions": 1000, "max_state_bytes": 1 << 30, **limits}
    return SessionTable(**limits, clock=clock or Clock(), wall_clock=lambda: 1.7e9)


def opened(
    sessions: SessionTable,
    model: LoadedModel,
    *,
    batch_size: int = 1,
    options: LayerOptions | None = None,
    states: dict[str, np.ndarray] | None = None,
    idle_lifetime: float = 60.0,
    lifetime: float = math.inf,
    session_id: str = "",
    **terms: Any,
) -> Session:
    return sessions.create(
        model,
        batch_size,
        options or LayerOptions(stateful=True),
        initial_states=states,
        idle_lifetime=idle_lifetime,
        lifetime=lifetime,
        session_id=session_id,
        **terms,
    )


class Notes:
    """A sink that writes down what it is told, in order.

    Attributes:
        unsent: results that were told and not flushed.
    """

    def __init__(self, deadline: float | None = None, names: dict[int, str] | None = None) -> None:
        self.cancelled = False
        self.deadline = deadline
        self.results: list[tuple[list[int], np.ndarray]] = []
        self.errors: dict[int, Exception] = {}
        self.first_steps: list[list[int]] = []
        self.told: list[int] = []
        self.readied: list[int] = []
        self.flushes = 0
        self.unsent = 0
        self._names = names or {}

    def session_id(self, tag: int) -> str:
        return self._names.get(tag, "")

    def result(self, answers):
        """Outputs as the engine has them: [T, N * batch, ...], or [N * batch, ...] without sequences."""
        y = answers.outputs.get("output")  # [N, batch, (T,) ...]
        if y is not None and y.ndim == 4:
            y = np.moveaxis(y, 2, 0)
            y = y.reshape(len(y), -1, y.shape[-1])
        elif y is not None:
            y = y.reshape(-1, y.shape[-1])
        self.told += answers.tags.tolist()
        self.unsent += len(answers.tags)
        self.results.append((answers.tags.tolist(), y))
        if answers.first_steps is not None:
            self.first_steps.append(answers.first_steps.tolist())

    def ready(self, answers):
        def tell():
            for each in answers:
                self.result(each)

        self.readied += [tag for each in answers for tag in each.tags.tolist()]
        return tell

    def failed(self, failures):
        for failure in failures:
            self.told.append(failure.tag)
            self.errors[failure.tag] = failure.error

    def flush(self):
        self.flushes += 1
        self.unsent = 0


def chunks(
    group: Group,
    slots: Any,
    steps: int = 1,
    *,
    sink: Any = None,
    tags: Any = None,
    first_steps: Any = None,
    x: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    generations: Any = None,
) -> Block:
    """A block of a chunk for each slot; x is [T, N * batch_size, FEATURES], mask [T, N * batch_size]."""
    slots = np.asarray(slots, np.int64)
    sink = sink or Notes()
    if x is None:
        x = np.ones((steps, len(slots) * group.batch_size, FEATURES), np.float32)
    return Block(
        compact({"input": x}, mask, go_backwards=group.options.go_backwards),
        group.batch_size,
        group.options,
        [(sink, len(slots))],
        np.arange(len(slots)) if tags is None else np.asarray(tags),
        Sessions(
            group,
            slots,
            group.generation[slots] if generations is None else np.asarray(generations),
            None if first_steps is None else np.asarray(first_steps, np.uint64),
        ),
    )


def random_cuts(rng: np.random.Generator, steps: int) -> list[tuple[int, int]]:
    """[0, steps) in chunks of random lengths."""
    inner = np.flatnonzero(rng.random(steps - 1) < rng.uniform(0.05, 0.9)) + 1
    return list(pairwise([0, *inner.tolist(), steps]))
