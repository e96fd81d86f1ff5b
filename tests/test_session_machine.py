"""Any order of what can happen to sessions, against a model of ten lines: without gRPC, on a store in a file."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from house import FEATURES, AddingEngine, Clock, Notes, loaded
from oip import arrays, request
from rnnserve_server.api.oip.infer import Inference
from rnnserve_server.api.oip.sequences import session_id
from rnnserve_server.blocks import Sessions
from rnnserve_server.config import Settings
from rnnserve_server.core import Core
from rnnserve_server.errors import InvalidInput, SequenceNotLive, ServiceError, SessionExists
from rnnserve_server.intake import Frame
from rnnserve_server.repository import Repository

WINDOW = 3
IDLE = 60.0
LATER = (
    25.0  # seconds between two looks at the clock: no session is ever due within the second that a sweep may be late
)

names = st.sampled_from(["a", "b"])
values = st.integers(1, 9)
steps = st.integers(1, 3)


@dataclass
class Model:
    """What a session is."""

    used: float
    total: float = 0.0
    step: int = 0
    said: list[tuple[int, int, int, float]] = field(default_factory=list)  # first step, steps, value, answer

    def take(self, count: int, value: int, now: float) -> float:
        self.total += count * value
        self.said.append((self.step, count, value, self.total))
        self.step, self.used = self.step + count, now
        return self.total


class SessionMachine(RuleBasedStateMachine):
    """Sessions ``a`` and ``b``, on a server that keeps them at every step: it may crash at any moment."""

    durability = "step"

    @initialize()
    def begin(self) -> None:
        memory = Path("/dev/shm")  # a disk is waited for at every commit
        self.folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self.runner = asyncio.Runner()
        self.clock, self.wall = Clock(), Clock(1.7e9)
        self.alive: dict[str, Model] = {}
        self.ended: dict[str, str] = {}
        self.cores: list[Core] = []
        self.start()

    def start(self) -> None:
        store = f"sqlite:///{self.folder.name}/s.db"
        chosen = Settings(
            store=store, durability=self.durability, idle_lifetime=IDLE, replay_chunks=WINDOW, inline_seconds=1.0
        )
        repository = Repository(Path(self.folder.name))
        repository.put("adder", "1", loaded(AddingEngine()))
        self.core = Core(chosen, repository, clock=self.clock, wall_clock=self.wall)
        self.runner.run(self.core.open_store())

    def teardown(self) -> None:
        if hasattr(self, "core"):
            self.runner.run(self.core.close())
            self.runner.close()
            self.folder.cleanup()

    def run(self, action: Any) -> str:
        """The reason for which something failed, or nothing."""
        try:
            self.runner.run(action)
        except ServiceError as error:
            return error.reason
        return ""

    def send(self, name: str, first_step: int | None, count: int, value: int) -> tuple[float | None, Any]:
        """One chunk: its answer, or why there is none."""

        async def step() -> Notes:
            session = await self.core.session(name)
            sink = Notes(names={0: name})
            first = None if first_step is None else np.array([first_step], np.uint64)
            place = Sessions(session.group, np.array([session.slot]), np.array([session.generation]), first)
            x = np.full((1, 1, count, FEATURES), value, np.float32)
            self.core.submit_frame(Frame(sink, np.zeros(1, np.int64), place, {"input": x}, None))
            worker = self.core.worker(session.group.model)
            await worker.settle()
            return sink

        try:
            sink = self.runner.run(step())
        except ServiceError as error:
            return None, error
        if sink.errors:
            return None, sink.errors[0]
        return float(sink.results[0][1][0, 0]), None

    def id_of(self, name: str) -> str:
        """The id of a session's."""
        return name

    def gone(self, name: str) -> str:
        return self.ended.get(name, "SESSION_UNKNOWN")

    # What may happen

    @rule(name=names)
    def create(self, name: str) -> None:
        async def make() -> bool:
            group, slots, _ = await self.core.create_sessions("adder", "1", 1, {}, session_ids=[name])
            return bool((await self.core.keep(group, slots)).all())

        try:
            made = self.runner.run(make())
        except SessionExists:
            made = False
        assert made == (name not in self.alive)
        if made:
            self.alive[name] = Model(self.clock.now)
            self.ended.pop(name, None)

    @rule(name=names, count=steps, value=values, said=st.booleans())
    def step(self, name: str, count: int, value: int, said: bool) -> None:
        model = self.alive.get(name)
        answer, error = self.send(name, model.step if model and said else None, count, value)
        if model is None:
            assert error.reason == self.gone(name)
        else:
            assert (answer, error) == (model.take(count, value, self.clock.now), None)

    @rule(name=names, back=st.integers(1, WINDOW + 2))
    def again(self, name: str, back: int) -> None:
        model = self.alive.get(name)
        if model is None or len(model.said) < back:
            return
        first, count, value, before = model.said[-back]
        answer, error = self.send(name, first, count, value)
        if back <= WINDOW:
            assert (answer, error) == (before, None)
        else:
            oldest = str(model.said[-WINDOW][0])
            assert (error.reason, error.metadata["oldest_step"]) == ("STEP_BEHIND", oldest)

    @rule(name=names, back=st.integers(1, WINDOW))
    def conflict(self, name: str, back: int) -> None:
        model = self.alive.get(name)
        if model is None or len(model.said) < back:
            return
        first, count, value, _ = model.said[-back]
        _, error = self.send(name, first, count, value + 1)
        assert (error.reason, error.metadata["expected_step"]) == ("STEP_CONFLICT", str(model.step))

    @rule(name=names, by=st.integers(1, 5))
    def ahead(self, name: str, by: int) -> None:
        if model := self.alive.get(name):
            _, error = self.send(name, model.step + by, 1, 1)
            assert (error.reason, error.metadata["expected_step"]) == ("STEP_AHEAD", str(model.step))

    @rule(name=names, at=st.booleans())
    def reset(self, name: str, at: bool) -> None:
        model = self.alive.get(name)
        step = model.step if model and at else None
        why = self.run(self.core.reset_session(self.id_of(name), None, step))
        assert why == ("" if model else self.gone(name))
        if model:
            model.total, model.used = 0.0, self.clock.now

    @rule(name=names)
    def reset_elsewhere(self, name: str) -> None:
        if model := self.alive.get(name):
            assert self.run(self.core.reset_session(self.id_of(name), None, model.step + 1)) == "STEP_AHEAD"

    @rule(name=names)
    def delete(self, name: str) -> None:
        why = self.run(self.core.delete_session(name))
        assert why == ("" if name in self.alive else self.gone(name))
        if self.alive.pop(name, None):
            self.ended[name] = "SESSION_CLOSED"

    @rule()
    def time_passes(self) -> None:
        self.clock.now += LATER
        self.wall.now += LATER
        self.runner.run(self.core.sweep())
        for name in [name for name, model in self.alive.items() if model.used + IDLE <= self.clock.now]:
            del self.alive[name]
            self.ended[name] = "SESSION_EXPIRED"

    @rule(name=names, resets=st.booleans())
    def live_for_long(self, name: str, resets: bool) -> None:
        """It is used again and again, for longer than it may be idle."""
        for _ in range(4):
            self.reset(name, False) if resets else self.step(name, 1, 1, True)
            self.time_passes()

    @rule()
    def rest(self) -> None:
        self.runner.run(self.core.keeper.rest(0.0, self.core._line_up))
        assert len(self.core.sessions) == 0

    @rule()
    def crash(self) -> None:
        """The process ends: what is only in its memory is gone."""
        for worker in self.core._workers.values():
            worker.shutdown()
        self.runner.run(self.core.keeper.store.close())
        self.start()

    @invariant()
    def listed(self) -> None:
        if not hasattr(self, "core"):
            return
        heads = self.runner.run(self.core.keeper.page("", 10, ""))
        assert {head.id for head in heads} == {self.id_of(name) for name in self.alive}
        for name, model in self.alive.items():
            assert self.runner.run(self.core.show(self.id_of(name))).step == model.step


class SequenceMachine(SessionMachine):
    """The same by the Open Inference Protocol: sequences, which begin and end with a chunk of their own."""

    def start(self) -> None:
        super().start()
        self.inference = Inference(self.core)

    def id_of(self, name: str) -> str:
        return session_id("adder", name)

    def send(self, name: str, first_step: int | None, count: int, value: int, **flags: bool) -> tuple[Any, Any]:
        said = {} if first_step is None else {"step": first_step}
        x = np.full((1, count, FEATURES), value, np.float32)
        try:
            answer = self.runner.run(self.inference.answer(request("adder", x, name, **said, **flags), None))
        except SequenceNotLive as error:
            return None, SimpleNamespace(reason=error.metadata["why"])
        except ServiceError as error:
            return None, error
        return float(arrays(answer)["output"][0, 0]), None

    @rule(name=names)
    def create(self, name: str) -> None:
        """It begins, or begins anew."""
        model = Model(self.clock.now)
        assert self.send(name, None, 1, 1, start=True) == (model.take(1, 1, self.clock.now), None)
        self.alive[name] = model
        self.ended.pop(name, None)

    @rule(name=names, said=st.booleans())
    def delete(self, name: str, said: bool) -> None:
        """Its last chunk, which may be sent again if it says where it belongs."""
        model = self.alive.get(name)
        first = model.step if model and said else None
        answer = self.send(name, first, 1, 1, end=True)
        if model is None:
            assert answer[1].reason == self.gone(name)
            return
        assert answer == (model.take(1, 1, self.clock.now), None)
        if said:
            assert self.send(name, first, 1, 1, end=True) == answer
        del self.alive[name]
        self.ended[name] = "SESSION_CLOSED"

    @rule(name=names)
    def bad_start(self, name: str) -> None:
        """It is refused, and what was there is there."""
        x = np.ones((1, 1, FEATURES + 1), np.float32)
        try:
            self.runner.run(self.inference.answer(request("adder", x, name, start=True), None))
        except InvalidInput:
            return
        raise AssertionError("the input does not fit")


class ShutdownMachine(SessionMachine):
    """The same, stored only when sessions rest and at shutdown: so it is shut down instead."""

    durability = "none"

    @rule()
    def crash(self) -> None:
        self.runner.run(self.core.close())
        self.start()


def test_a_session_that_was_idle_before_it_was_fetched_expires_no_later() -> None:
    """Memory and store agree on when: else its id would be taken by nobody."""
    machine = ShutdownMachine()
    machine.begin()
    try:
        machine.create(name="a")
        machine.time_passes()
        machine.crash()
        machine.reset_elsewhere(name="a")  # fetches it, and does not use it
        machine.time_passes()
        machine.time_passes()
        machine.create(name="a")
    finally:
        machine.teardown()


TestSessions = SessionMachine.TestCase
TestSessions.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestSequences = SequenceMachine.TestCase
TestSequences.settings = TestSessions.settings
TestSessionsStoredLate = ShutdownMachine.TestCase
TestSessionsStoredLate.settings = TestSessions.settings
