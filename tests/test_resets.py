"""Reset rules: where a session's states go back to their default does not depend on how its steps are cut."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from house import FEATURES, AddingEngine, Notes, loaded, random_cuts
from rnnserve_models.load import load_model
from rnnserve_server.blocks import Sessions
from rnnserve_server.config import Settings
from rnnserve_server.core import Core
from rnnserve_server.errors import BlobInvalid, OptionUnsupported
from rnnserve_server.intake import Frame
from rnnserve_server.repository import Repository
from rnnserve_server.resets import NO_RULES, ResetRules
from rnnserve_server.rollout import rollout
from rnnserve_server.states import export_session, fork, get_state, import_session, rewind
from serving import ZOO

LSTMS = {name: load_model(ZOO / name / "1") for name in ("lstm-4", "lstm-32-64")}
DEFAULT = np.array([3.0, -1.0], np.float32)


class Plain:
    """A session as a plain loop over its steps has it."""

    def __init__(self, rules: ResetRules, batch: int) -> None:
        self.rules, self.step = rules, 0
        self.state = np.tile(DEFAULT, (batch, 1))  # [batch, FEATURES]
        self.run = [0] * batch

    def copy(self) -> Plain:
        made = Plain(self.rules, len(self.run))
        made.step, made.state, made.run = self.step, self.state.copy(), list(self.run)
        return made

    def take(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """A chunk [batch, T, FEATURES] and its mask [batch, T]: the outputs, as Keras has them."""
        y = np.zeros_like(x)
        for t in range(x.shape[1]):
            for row in range(len(x)):
                if mask is None or mask[row, t]:
                    self.run[row] = 0
                    self.state[row] += x[row, t]
                    y[row, t] = self.state[row]
                else:
                    self.run[row] += 1
                    if t and mask[row, :t].any():
                        y[row, t] = y[row, t - 1]
                if self.run[row] == self.rules.masked_steps > 0:
                    self.state[row] = DEFAULT
            self.step += 1
            if self.rules.every_steps and self.step % self.rules.every_steps == 0:
                self.state[:] = DEFAULT
        return y


class Here:
    """A core, and how chunks are sent to it."""

    def __init__(self, core: Core) -> None:
        self.core = core

    async def create(self, model="adder", **wish) -> str:
        group, slots, _ = await self.core.create_sessions(
            model, "1", wish.pop("batch_size", 1), {"return_sequences": True, **wish.pop("options", {})}, **wish
        )
        await self.core.keep(group, slots)
        return group.ids[int(slots[0])]

    async def send(self, ids, x, mask=None, first_steps=None):
        """A chunk [N, batch, T, features] of sessions of one group, as one frame: outputs [N, batch, ...]."""
        sink = Notes()
        found = [await self.core.session(each) for each in ids]
        group = found[0].group
        place = Sessions(
            group,
            np.array([each.slot for each in found]),
            np.array([each.generation for each in found]),
            None if first_steps is None else np.array(first_steps, np.uint64),
        )
        given: list = [None] * len(ids)
        sink.result = lambda answers: [
            given.__setitem__(tag, {name: y[at] for name, y in (answers.outputs | answers.states).items()})
            for at, tag in enumerate(answers.tags.tolist())
        ]
        self.core.submit_frame(Frame(sink, np.arange(len(ids)), place, {"input": x}, mask))
        worker = self.core.worker(group.model)
        await worker.settle()
        assert not sink.errors
        return given


@asynccontextmanager
async def core(folder: Path | None = None, **chosen):
    repository = Repository(ZOO)
    engine = AddingEngine(DEFAULT)
    repository.put("adder", "1", loaded(engine))
    for name in LSTMS:
        repository.put(name, "1", LSTMS[name])
    if folder is not None:
        chosen["store"] = f"sqlite:///{folder}/s.db"
    made = Core(Settings(**{"inline_seconds": 1.0, "slice_steps": 5, **chosen}), repository)
    await made.open_store()
    here = Here(made)
    here.engine = engine
    try:
        yield here
    finally:
        await made.close()


rules = st.builds(ResetRules, st.integers(0, 7), st.integers(0, 4)).filter(lambda each: each != NO_RULES)


@st.composite
def masks(draw, rows: int, steps: int):
    """bool [rows, steps], in runs; or None."""
    if draw(st.booleans()):
        return None
    runs = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=rows * steps))
    flat = np.concatenate([np.full(length, valid) for valid, length in runs])
    return np.resize(flat, (rows, steps))


@settings(max_examples=80)
@given(data=st.data())
def test_any_cut_gives_what_a_plain_loop_gives(data):
    """Sessions of one group that stand at different steps, rows whose gaps differ, frames of several sessions, chunks
    that are longer than a slice: every output and every state is the loop's, whatever the chunks.
    """
    chosen, batch, count = data.draw(rules), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    phases = data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))

    async def run() -> None:
        async with core() as here:
            options = {"return_state": data.draw(st.booleans())}
            ids = [await here.create(batch_size=batch, rules=chosen, options=options) for _ in range(count)]
            loops = [Plain(chosen, batch) for _ in ids]
            rng = np.random.default_rng(0)

            def noise(*shape):
                return rng.integers(0, 9, shape).astype(np.float32)

            for session_id, loop, steps in zip(ids, loops, phases, strict=True):
                if steps:
                    x, mask = noise(batch, steps, FEATURES), data.draw(masks(batch, steps))
                    await here.send([session_id], x[None], None if mask is None else mask[None])
                    loop.take(x, mask)
            for steps in lengths:
                x = noise(count, batch, steps, FEATURES)
                flat = data.draw(masks(count * batch, steps))
                mask = None if flat is None else flat.reshape(count, batch, steps)
                answers = await here.send(ids, x, mask)
                for at, (session_id, loop) in enumerate(zip(ids, loops, strict=True)):
                    y = loop.take(x[at], None if mask is None else mask[at])
                    np.testing.assert_array_equal(answers[at]["output"], y)
                    np.testing.assert_array_equal(answers[at].get("sum", loop.state), loop.state)
                    session, states = await get_state(here.core, session_id)
                    assert (session.step, list(states)) == (loop.step, ["sum"])
                    np.testing.assert_array_equal(states["sum"], loop.state)

    asyncio.run(run())


@settings(max_examples=40)
@given(data=st.data(), chosen=rules)
def test_rules_hold_through_replay_rewind_fork_export_and_restart(data, chosen):
    """Whatever is done with a session between two chunks, in the middle of a gap too, it goes on as the loop does."""
    ops = ["again", "rewind", "fork", "carry", "rest", "restart", "nothing"]

    async def run(folder: Path) -> None:
        rng = np.random.default_rng(1)
        loop, session_id, said = Plain(chosen, 2), "", []
        turns = data.draw(st.lists(st.tuples(st.sampled_from(ops), st.integers(1, 7)), min_size=2, max_size=10))
        while turns:
            async with core(folder) as here:
                session_id = session_id or await here.create(batch_size=2, rules=chosen)
                while turns:
                    op, steps = turns.pop(0)
                    if op == "again" and said:
                        before, x, mask, y = said[-1]
                        (answer,) = await here.send([session_id], x, mask, [before.step])
                        np.testing.assert_array_equal(answer["output"], y)
                    elif op == "rewind" and said:
                        back = min(len(said), steps)
                        loop = said[-back][0].copy()
                        await rewind(here.core, session_id, loop.step)
                        del said[-back:]
                    elif op == "fork":
                        (made,) = await fork(here.core, session_id, 1, ())
                        session_id, said = made.id, []
                    elif op == "carry":
                        session_id = (
                            await import_session(here.core, await export_session(here.core, session_id), "")
                        ).id
                        said = []
                    elif op == "rest":
                        await here.core.keeper.rest(0.0, here.core._line_up)
                        said = said[:0]
                    elif op == "restart":
                        said = []
                        break
                    x = rng.integers(0, 9, (1, 2, steps, FEATURES)).astype(np.float32)
                    mask = data.draw(masks(2, steps))
                    mask = None if mask is None else mask[None]
                    before = loop.copy()
                    y = loop.take(x[0], None if mask is None else mask[0])
                    (answer,) = await here.send([session_id], x, mask, [before.step])
                    np.testing.assert_array_equal(answer["output"], y)
                    said.append((before, x, mask, y))
                session, states = await get_state(here.core, session_id)
                assert session.group.rules == chosen
                np.testing.assert_array_equal(states["sum"], loop.state)

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        asyncio.run(run(Path(folder)))


@pytest.mark.parametrize("name", LSTMS)
def test_bits_do_not_depend_on_chunks(name):
    """Real LSTMs: the outputs of steps that count, and the states at the end, are the same bits however the steps are
    cut; and those of sessions that were reset by hand at the same places.
    """

    async def run() -> None:
        rng = np.random.default_rng(2)
        x = rng.normal(size=(1, 2, 60, 5)).astype(np.float32)
        mask = rng.random((1, 2, 60)) < 0.6
        mask[:, 0] = mask[:, 0] | (np.arange(60) % 20 < 10)
        results = []
        async with core() as here:
            for _ in range(4):
                chosen = ResetRules(17, 3)
                group, slots, _ = await here.core.create_sessions(
                    name, "1", 2, {"return_sequences": True}, rules=chosen
                )
                session_id, parts = group.ids[int(slots[0])], []
                for start, stop in random_cuts(rng, 60):
                    part = slice(start, stop)
                    (answer,) = await here.send([session_id], x[:, :, part], mask[:, :, part])
                    parts.append(answer["output"])
                _, states = await get_state(here.core, session_id)
                results.append((np.concatenate(parts, axis=1)[mask[0]], states))
            by_hand = await _by_hand(here, name, x, mask)
        first, states = results[0]
        assert np.abs(first).max() > 0
        for y, after in results[1:]:
            assert y.tobytes() == first.tobytes()
            assert {key: value.tobytes() for key, value in after.items()} == {
                key: value.tobytes() for key, value in states.items()
            }
        assert by_hand[mask[0]].tobytes() == first.tobytes()

    asyncio.run(run())


async def _by_hand(here, name, x, mask):
    """The same without rules: a session for each row, stepped one by one and reset where the rules say."""
    rows = []
    for row in range(2):
        group, slots, _ = await here.core.create_sessions(name, "1", 1, {"return_sequences": True})
        session_id, run, ys = group.ids[int(slots[0])], 0, []
        for t in range(60):
            one = (slice(None), slice(row, row + 1), slice(t, t + 1))
            (answer,) = await here.send([session_id], x[one], mask[one])
            ys.append(answer["output"][0])
            run = 0 if mask[0, row, t] else run + 1
            if run == 3 or (t + 1) % 17 == 0:
                await here.core.reset_session(session_id, None, None)
        rows.append(np.concatenate(ys))
    return np.stack(rows)


def test_chunks_that_wait_are_run_together_and_rewound_into():
    """What a client sends ahead is still run in one go, cut at the resets, and each chunk can be gone back to."""

    async def run() -> None:
        async with core(slice_steps=32) as here:
            session_id = await here.create(rules=ResetRules(4, 0))
            here.engine.calls.clear()
            session = here.core.sessions.get(session_id)
            sinks = [Notes() for _ in range(5)]
            x = np.ones((1, 1, 2, FEATURES), np.float32)
            for at, sink in enumerate(sinks):
                place = Sessions(
                    session.group,
                    np.array([session.slot]),
                    np.array([session.generation]),
                    np.array([2 * at], np.uint64),
                )
                here.core.submit_frame(Frame(sink, np.zeros(1, np.int64), place, {"input": x}, None))
            worker = here.core.worker(session.group.model)
            await worker.settle()
            assert [steps for steps, _ in here.engine.calls] == [4, 4, 2]  # five chunks, of which the rule cuts two
            ys = [sink.results[0][1][:, 0, 0].tolist() for sink in sinks]
            assert ys == [[4.0, 5.0], [6.0, 7.0], [4.0, 5.0], [6.0, 7.0], [4.0, 5.0]]
            for step, expected in ((8, 3.0), (6, 5.0), (4, 3.0), (2, 5.0)):
                await rewind(here.core, session_id, step)
                _, states = await get_state(here.core, session_id)
                assert states["sum"][0, 0] == expected

    asyncio.run(run())


def test_a_rollout_is_reset_as_its_session_would_be():
    async def run() -> None:
        async with core() as here:
            session_id = await here.create(rules=ResetRules(3, 0))
            x = np.ones((1, 1, 2, FEATURES), np.float32)
            await here.send([session_id], x)
            inputs = {"input": np.ones((1, 2, FEATURES), np.float32)}
            outputs, _ = await rollout(here.core, session_id, 3, inputs, (), None, None)
            # 3+1+1 | +1 -> 6, reset to 3 | +1 -> 4; fed back: 4+4=8; then 3+... after step 6
            loop = Plain(ResetRules(3, 0), 1)
            loop.take(x[0], None)
            y = loop.take(x[0], None)[:, -1:]
            for at in range(3):
                y = loop.take(y, None)
                np.testing.assert_array_equal(outputs["output"][:, at : at + 1], y)

    asyncio.run(run())


def test_states_that_are_set_stay_at_a_boundary_and_begin_a_new_gap():
    """A rule strikes behind the step that fulfils it: what is set there afterwards is what the next step sees."""

    async def run() -> None:
        async with core() as here:
            session_id = await here.create(rules=ResetRules(2, 3))
            mine = {"sum": np.array([[10.0, 10.0]], np.float32)}
            x = np.ones((1, 1, 2, FEATURES), np.float32)
            none = np.zeros((1, 1, 2), bool)
            await here.send([session_id], x)
            await here.core.reset_session(session_id, mine, 2)
            (answer,) = await here.send([session_id], x[:, :, :1])
            assert answer["output"][0, 0, 0] == 11.0
            long = await here.create(rules=ResetRules(0, 3))
            await here.send([long], x, none)
            await here.core.reset_session(long, mine, None)
            await here.send([long], x, none)  # four masked steps, two of them since
            (answer,) = await here.send([long], x[:, :, :1])
            assert answer["output"][0, 0, 0] == 11.0

    asyncio.run(run())


def test_rules_are_refused_where_chunks_are_whole():
    """A network computes its chunks whole: the error says so, and nothing is made."""

    class Whole(AddingEngine):
        whole = True

    async def run() -> None:
        async with core() as here:
            here.core.repository.put("whole", "1", loaded(Whole(), name="whole"))
            with pytest.raises(OptionUnsupported, match="reset_rules"):
                await here.create("whole", rules=ResetRules(4, 0))
            assert len(here.core.sessions) == 0

    asyncio.run(run())


def test_a_session_without_rules_is_in_a_group_without():
    """Sessions with rules share no group with others, and a blob without rules is what it always was."""

    async def run() -> None:
        async with core() as here:
            plain, ruled = await here.create(), await here.create(rules=ResetRules(0, 2))
            groups = [here.core.sessions.get(each).group for each in (plain, ruled)]
            assert [group.rules for group in groups] == [None, ResetRules(0, 2)]
            await here.send([plain], np.ones((1, 1, 2, FEATURES), np.float32))
            assert not here.core.worker(groups[0].model)._resetting
            assert b'"version":"1"' in await export_session(here.core, plain)
            blob = await export_session(here.core, ruled)
            assert b'"version":"2"' in blob
            with pytest.raises(BlobInvalid):
                await import_session(here.core, blob.replace(b'"2"', b'"1"'), "")

    asyncio.run(run())
