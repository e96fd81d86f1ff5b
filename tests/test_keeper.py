"""Sessions that are kept: they outlive their server, rest, move, and are never run twice or on other weights."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from redis_server import RedisServer, Wire, running_redis
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import session_pb2
from rnnserve_models.cells import LSTMCell
from rnnserve_models.layers import RNN
from rnnserve_models.load import load_cell, load_model
from rnnserve_models.spec import read_spec
from rnnserve_models.weights import save_weights
from rnnserve_server.store import open_store
from serving import ZOO, RunningServer, running_server
from torture.servers import ServerProcess, server_process
from torture.wire import Talk, config, frame, hint, info, outputs, reason

MODEL = "lstm-4"
FEATURES = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the one small model, so that servers start at once."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ZOO / MODEL, folder / MODEL)
    return folder


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store of either kind, that is empty."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/sessions.db"
    else:
        with running_redis() as server:
            yield server.url


def chunks(count: int, *, seed: int = 0, batch: int = 1, longest: int = 6) -> list[np.ndarray]:
    """Chunks of random lengths, each [batch, time, features]."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(batch, int(rng.integers(1, longest + 1)), FEATURES)).astype(np.float32) for _ in range(count)
    ]


_engine = load_model(ZOO / MODEL / "1").engine


def oracle(xs: list[np.ndarray]) -> list[np.ndarray]:
    """What an uninterrupted run gives for chunks, as sequences: the engine over all of them at once."""
    x = np.concatenate(xs, axis=1).swapaxes(0, 1)  # [T, batch, features]
    states = {spec.name: spec.initial(x.shape[1]) for spec in _engine.states}
    y, _ = _engine.run({"input": x}, np.full(x.shape[1], len(x)), states)
    cuts = np.cumsum([chunk.shape[1] for chunk in xs])[:-1]
    return np.split(y["output"].swapaxes(0, 1), cuts, axis=1)


def same(got: Any, expected: list[np.ndarray]) -> bool:
    """Bit for bit."""
    return [each.tobytes() for each in got] == [np.ascontiguousarray(each).tobytes() for each in expected]


def first_steps(xs: list[np.ndarray]) -> list[int]:
    return [0, *np.cumsum([x.shape[1] for x in xs]).tolist()]


@contextmanager
def killable(models: Path, store: str, tmp_path: Path, **settings: Any) -> Iterator[ServerProcess]:
    with server_process(tmp_path / "log", models=str(models), store=store, **settings) as server:
        yield server


def in_memory(server: RunningServer) -> int:
    return server.call(lambda: len(server.server.core.sessions))


async def test_answers_that_are_large_together(models: Path, store: str) -> None:
    """What one commit stores is answered in responses of about a MiB, however much it is, each chunk once and in its
    order.
    """
    lanes, batch, steps, count = list(range(16)), 16, 40, 20  # 164 kB of outputs in each of the frames
    rng = np.random.default_rng(5)
    xs = [rng.normal(size=(16, batch, steps, FEATURES)).astype(np.float32) for _ in range(count)]
    expected = oracle([np.concatenate(list(x)) for x in xs])
    with running_server(
        models=models, store=store, durability="step", slice_steps=1000, max_batch_rows=1 << 16
    ) as server:
        async with Talk(server.address) as talk:
            for lane in lanes:
                await talk.create(lane, config(MODEL, f"s{lane}", batch=batch, return_sequences=True))
            frames = [frame(lanes, [number * steps] * 16, x) for number, x in enumerate(xs)]
            await talk.write(frames=frames)
            found: list[np.ndarray] = []
            while len(found) < count:
                response = await talk.read()
                assert response.ByteSize() < (1 << 20) + 200_000
                assert not response.errors
                assert [each.first_steps[0] for each in response.frames] == [
                    (len(found) + position) * steps for position in range(len(response.frames))
                ]
                found += [np.concatenate(list(outputs(each)["output"])) for each in response.frames]
    assert same(found, expected)


# A server ends


async def test_a_killed_server_loses_nothing(models: Path, store: str, tmp_path: Path) -> None:
    """After SIGKILL the next server answers the last chunks again, bit for bit, and goes on as if nothing had been."""
    xs = chunks(12)
    starts, expected = first_steps(xs), oracle(xs)
    with killable(models, store, tmp_path) as server:
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            assert same(await talk.steps(0, 0, xs[:8]), expected[:8])
            server.kill()
        server.start()
        async with Talk(server.address) as talk:
            opened = await talk.open(3, "s")
            assert opened.session.step == starts[8]
            assert same(await talk.steps(3, starts[5], xs[5:]), expected[5:])
            assert same(await talk.steps(3, 0, xs[:1]), expected[:1])  # any chunk of the window, in any order


@pytest.mark.parametrize("durability", ["none", "interval", "step"])
async def test_a_server_that_is_shut_down_loses_nothing(
    models: Path, store: str, tmp_path: Path, durability: str
) -> None:
    """After SIGTERM everything is stored, whatever the durability: states, steps, windows and resets."""
    xs = chunks(10)
    starts, expected = first_steps(xs), oracle(xs)
    with killable(models, store, tmp_path, durability=durability, store_interval=3600) as server:
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            await talk.create(1, config(MODEL, "again", return_sequences=True))
            assert same(await talk.steps(0, 0, xs[:6]), expected[:6])
            await talk.steps(1, 0, xs[6:8])
            await talk.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id="again"))
            server.terminate(wait=False)
        server.join()
        server.start()
        async with Talk(server.address) as talk:
            assert (await talk.open(0, "s")).session.step == starts[6]
            assert same(await talk.steps(0, starts[3], xs[3:]), expected[3:])
            step = starts[8] - starts[6]
            assert (await talk.open(1, "again")).session.step == step
            assert same(await talk.steps(1, step, xs[:2]), expected[:2])


async def test_chunks_under_way_at_sigterm_are_answered_or_not_applied(
    models: Path, store: str, tmp_path: Path
) -> None:
    """A client that goes on sending while its server drains finds every answered chunk stored, and the rest not."""
    some, xs, first_step = chunks(100, longest=3), list[np.ndarray](), 0
    with killable(models, store, tmp_path, drain_seconds=3.0) as server:
        got: list[np.ndarray] = []
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            try:
                for number in itertools.count():
                    xs.append(x := some[number % 100])
                    await talk.write(frames=[frame([0], [first_step], x[None])])
                    first_step += x.shape[1]
                    if number == 30:
                        server.terminate(wait=False)
                    if number >= 10:
                        got += [outputs(each)["output"][0] for each in (await talk.read()).frames]
            except (grpc.aio.AioRpcError, AssertionError, asyncio.InvalidStateError):
                pass
        server.join()
        xs += some
        starts, expected = first_steps(xs), oracle(xs)
        assert len(got) > 5
        assert same(got, expected[: len(got)])
        server.start()
        async with Talk(server.address) as talk:
            assert (await talk.open(0, "s")).session.step >= starts[len(got)]
            assert same(await talk.steps(0, starts[len(got)], xs[len(got) :][:20]), expected[len(got) :][:20])


@pytest.mark.parametrize("durability", ["none", "interval"])
async def test_what_a_kill_leaves_is_of_one_moment(models: Path, store: str, tmp_path: Path, durability: str) -> None:
    """Without durability at every step a killed server's session is set back: its step, states and window together,
    and with an interval no further than the interval.
    """
    xs = chunks(8, longest=3)
    starts, expected = first_steps(xs), oracle(xs)
    with killable(models, store, tmp_path, durability=durability, store_interval=0.05) as server:
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            await talk.steps(0, 0, xs[:4])
            if durability == "interval":
                await stored(store, "s", starts[4])
            await talk.steps(0, starts[4], xs[4:6])
            server.kill()
        server.start()
        async with Talk(server.address) as talk:
            step = (await talk.open(0, "s")).session.step
            assert step in (starts[4:7] if durability == "interval" else [0])
            at = starts.index(step)
            if at:
                assert same(await talk.steps(0, starts[at - 1], xs[at - 1 : at]), expected[at - 1 : at])
            assert same(await talk.steps(0, step, xs[at:]), expected[at:])


async def stored(url: str, session_id: str, step: int) -> None:
    """Returns once a session is stored at a step, or beyond."""
    store = await open_store(url)
    try:
        async with asyncio.timeout(20):
            while (await store.peek([session_id]))[0].step < step:  # noqa: ASYNC110 - another process writes
                await asyncio.sleep(0.01)
    finally:
        await store.close()


@pytest.mark.parametrize("back", [True, False])
async def test_a_store_that_is_away_at_sigterm(models: Path, tmp_path: Path, back: bool) -> None:
    """A server that drains goes on trying to hand its sessions over: nothing is lost if the store comes back meanwhile.
    If it does not, the server says so, and ends in bounded time all the same.
    """
    xs = chunks(5)
    starts, expected = first_steps(xs), oracle(xs)
    with (
        running_redis() as redis,
        killable(models, redis.url, tmp_path, durability="none", drain_seconds=30.0 if back else 1.0) as server,
    ):
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            assert same(await talk.steps(0, 0, xs[:3]), expected[:3])
            redis.kill()
            server.terminate(wait=False)
        if back:
            while "the store does not answer" not in server.log():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            redis.start()
        began = time.monotonic()
        await asyncio.to_thread(server.join)
        assert time.monotonic() - began < 20
        assert server.exit_code == (0 if back else 1)
        assert ("sessions are lost" in server.log()) is not back
        assert "Traceback" not in server.log()
        if not back:
            redis.start()
            return
        server.start()
        async with Talk(server.address) as talk:
            assert (await talk.open(0, "s")).session.step == starts[3]
            assert same(await talk.steps(0, starts[2], xs[2:]), expected[2:])


async def test_the_command_is_what_the_tests_run(models: Path, tmp_path: Path) -> None:
    """`rnnserve serve` itself, killed and started again, goes on with its sessions."""
    xs = chunks(6)
    starts, expected = first_steps(xs), oracle(xs)
    command = [
        Path(sys.executable).with_name("rnnserve"),
        "serve",
        "--models",
        models,
        "--port",
        "0",
        "--store",
        f"sqlite:///{tmp_path}/s.db",
    ]
    got = []
    for part in (slice(0, 3), slice(3, 6)):
        log = tmp_path / f"log{part.start}"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)  # noqa: ASYNC220
        try:
            async with asyncio.timeout(60):
                while "address=" not in log.read_text():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            address = log.read_text().split("address=")[1].split()[0]
            async with Talk(address) as talk:
                if part.start:
                    await talk.open(0, "s")
                else:
                    await talk.create(0, config(MODEL, "s", return_sequences=True))
                got += await talk.steps(0, starts[part.start], xs[part])
        finally:
            process.kill()
            process.wait()
    assert same(got, expected)


# Rest


def resting(models: Path, store: str, **settings: Any) -> Any:
    """A server whose sessions leave memory whenever it looks."""
    return running_server(models=models, store=store, rest_seconds=1e-9, **settings)


def rest(server: RunningServer) -> None:
    """Has all sessions leave memory."""
    server.call(server.server.core.sweep)
    assert in_memory(server) == 0


@pytest.mark.parametrize("durability", ["none", "interval", "step"])
async def test_a_session_that_rests_comes_back(models: Path, store: str, durability: str) -> None:
    """On the lane where it was, on another one, and by every call; each time with its states and its window."""
    xs = chunks(10)
    starts, expected = first_steps(xs), oracle(xs)
    with resting(models, store, durability=durability) as server:
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            assert same(await talk.steps(0, 0, xs[:2]), expected[:2])
            rest(server)
            assert (await talk.get("s")).step == starts[2]
            assert await talk.ids() == ["s"]
            assert in_memory(server) == 0  # to look at it does not bring it back
            assert same(await talk.steps(0, starts[1], xs[1:4]), expected[1:4])
            rest(server)
            assert (await talk.open(5, "s")).session.step == starts[4]
            assert same(await talk.steps(5, starts[4], xs[4:5]), expected[4:5])
            rest(server)
            y, step = await talk.predict("s", xs[5], first_step=starts[5])
            assert (y.tobytes(), step) == (np.ascontiguousarray(expected[5]).tobytes(), starts[6])
            rest(server)
            assert same(await talk.steps(0, starts[6], xs[6:7]), expected[6:7])  # the old lane knows it too
            rest(server)
            await talk.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id="s", step=starts[7]))
            rest(server)
            assert same(await talk.steps(0, starts[7], xs[:2]), expected[:2])
            rest(server)
            await talk.delete("s")
            error = await talk.step(0, None, xs[0])
            assert reason(error) == "SESSION_CLOSED"
            assert await talk.ids() == []


async def test_resting_sessions_make_room(models: Path, store: str) -> None:
    """`max_sessions` counts those in memory: any number may be stored, and each comes back when there is room."""
    xs = chunks(3)
    expected = oracle(xs)
    with resting(models, store, max_sessions=4) as server:
        async with Talk(server.address) as talk:
            for number in range(12):
                opened = await talk.create(number, config(MODEL, f"s{number}", return_sequences=True))
                assert isinstance(opened, pb.LaneOpened)
                await talk.steps(number, 0, xs[:1])
                if number % 4 == 3:
                    rest(server)
            assert len(await talk.ids()) == 12
            for number in range(12):
                assert same(await talk.steps(number, xs[0].shape[1], xs[1:]), expected[1:])
                rest(server)


async def test_a_full_server_lets_the_idle_rest(models: Path, store: str) -> None:
    """`max_sessions` is of memory alone: whoever comes finds room as long as not all are busy."""
    xs = chunks(3)
    starts, expected = first_steps(xs), oracle(xs)
    with running_server(models=models, store=store, max_sessions=2) as server:
        async with Talk(server.address) as talk:
            for number in range(5):
                opened = await talk.create(number, config(MODEL, f"s{number}", return_sequences=True))
                assert isinstance(opened, pb.LaneOpened)
                assert same(await talk.steps(number, 0, xs[:1]), expected[:1])
            for at in (1, 2):
                for number in range(5):
                    assert same(await talk.steps(number, starts[at], xs[at : at + 1]), expected[at : at + 1])
            assert in_memory(server) <= 2
            assert len(await talk.ids()) == 5


async def test_many_sessions_that_come_and_go(models: Path, store: str) -> None:
    """Streams that step while the server lets sessions rest all the time see nothing of it."""
    count, xs = 12, chunks(30, longest=3)
    starts, expected = first_steps(xs), oracle(xs)
    with resting(models, store) as server:
        stop = asyncio.Event()

        async def sweep() -> None:
            while not stop.is_set():
                await asyncio.to_thread(server.call, server.server.core.sweep)

        async def drive(name: str) -> list[np.ndarray]:
            async with Talk(server.address) as talk:
                await talk.create(0, config(MODEL, name, return_sequences=True))
                got = []
                for number, x in enumerate(xs):
                    await talk.write(frames=[frame([0], [starts[number]], x[None])])
                    if number % 3 == 2:
                        while len(got) <= number:
                            response = await talk.read()
                            assert not response.errors, response.errors
                            got += [outputs(each)["output"][0] for each in response.frames]
                return got

        sweeper = asyncio.create_task(sweep())
        answers = await asyncio.gather(*(drive(f"s{number}") for number in range(count)))
        stop.set()
        await sweeper
    assert all(same(got, expected) for got in answers)


# Take-over


@contextmanager
def two_servers(models: Path, store: str, **settings: Any) -> Iterator[tuple[RunningServer, RunningServer]]:
    with ExitStack() as stack:
        a, b = (stack.enter_context(running_server(models=models, store=store, **settings)) for _ in range(2))
        yield a, b


async def test_a_session_is_taken_over_and_taken_back(models: Path, store: str) -> None:
    """Whoever opens a session has it. Its owner before is told so at its next chunk, which is not applied."""
    xs = chunks(8)
    starts, expected = first_steps(xs), oracle(xs)
    with two_servers(models, store) as (a, b):
        async with Talk(a.address) as first, Talk(b.address) as second:
            await first.create(0, config(MODEL, "s", return_sequences=True))
            assert same(await first.steps(0, 0, xs[:2]), expected[:2])
            assert (await second.open(0, "s")).session.step == starts[2]
            error = await first.step(0, starts[2], -xs[2])
            assert reason(error) == "SESSION_TAKEN_OVER"
            assert error.status.code == grpc.StatusCode.ABORTED.value[0]
            assert info(error.status).metadata["session_id"] == "s"
            assert same(await second.steps(0, starts[1], xs[1:4]), expected[1:4])
            again = await first.step(0, starts[2], xs[2])
            assert reason(again) == "SESSION_TAKEN_OVER"  # it is not fetched behind the client's back
            assert (await first.open(1, "s")).session.step == starts[4]
            assert same(await first.steps(1, starts[3], xs[3:6]), expected[3:6])
            assert reason(await second.step(0, starts[6], xs[6])) == "SESSION_TAKEN_OVER"
            y, _ = await second.predict("s", xs[6], first_step=starts[6])  # a call names the session anew
            assert same([y], expected[6:7])
            assert reason(await first.step(1, starts[7], xs[7])) == "SESSION_TAKEN_OVER"


async def test_an_owner_that_does_not_know_that_it_lost(models: Path, store: str) -> None:
    """A server whose session was taken over and moved on, and that has not tried to write since, does not tell what was
    true long ago: not when it is opened, shown, reset, deleted or stepped there.
    """
    xs = chunks(9)
    starts, expected = first_steps(xs), oracle(xs)
    with two_servers(models, store) as (a, b):
        async with Talk(a.address) as first, Talk(b.address) as second:
            await first.create(0, config(MODEL, "s", return_sequences=True))
            await first.steps(0, 0, xs[:2])
            await second.open(0, "s")
            await second.steps(0, starts[2], xs[2:3])
            assert (await first.open(1, "s")).session.step == starts[3]
            assert same(await first.steps(1, starts[3], xs[3:4]), expected[3:4])
            await second.open(1, "s")
            await second.steps(1, starts[4], xs[4:5])
            assert (await first.get("s")).step == starts[5]
            await first.open(2, "s")
            await second.open(2, "s")
            await second.steps(2, starts[5], xs[5:6])
            assert reason(await first.step(2, starts[6], xs[6])) == "SESSION_TAKEN_OVER"  # and not STEP_AHEAD
            await first.open(3, "s")
            await second.open(3, "s")
            await second.steps(3, starts[6], xs[6:7])
            await first.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id="s", step=starts[7]))
            await second.open(4, "s")
            assert same(await second.steps(4, starts[7], xs[:2]), expected[:2])
            await first.delete("s")
            assert reason(await second.open(5, "s")) == "SESSION_CLOSED"

            await first.create(10, config(MODEL, "t", return_sequences=True))
            await second.open(10, "t")
            await first.write(closes=[pb.LaneClose(lane=10, delete_session=True)])
            (error,) = (await first.read()).errors
            assert (error.operation, reason(error)) == (pb.LANE_OPERATION_CLOSE, "SESSION_TAKEN_OVER")
            assert same(await second.steps(10, 0, xs[:2]), expected[:2])


async def test_a_session_that_rested_elsewhere_is_not_taken_back_unasked(models: Path, store: str) -> None:
    """A lane whose session left memory, and was then taken over: its next chunk brings it back, in order."""
    xs = chunks(6)
    starts, expected = first_steps(xs), oracle(xs)
    with two_servers(models, store) as (a, b):
        async with Talk(a.address) as first, Talk(b.address) as second:
            await first.create(0, config(MODEL, "s", return_sequences=True))
            await first.steps(0, 0, xs[:2])
            a.call(lambda: a.server.core.keeper.rest(0.0, lambda group: None))
            await second.open(0, "s")
            assert same(await second.steps(0, starts[2], xs[2:4]), expected[2:4])
            behind = await first.step(0, starts[2], -xs[2])
            assert reason(behind) == "STEP_CONFLICT"
            assert same(await first.steps(0, starts[4], xs[4:]), expected[4:])


async def test_a_commit_on_its_way_when_the_session_is_taken(models: Path, tmp_path: Path) -> None:
    """A server's commit of a chunk is held back on its way to Redis while another server takes the session over and
    moves it on. It arrives after that, and is refused: its client is told so and not answered, and nothing of the
    chunk is in the session's history.
    """
    xs = chunks(8)
    starts, expected = first_steps(xs), oracle(xs)
    with running_redis() as redis:
        async with (
            Wire(redis, tmp_path / "wire") as wire,
            beside(models, wire.url) as a,
            beside(models, redis.url) as b,
            Talk(a.address) as first,
            Talk(b.address) as second,
        ):
            await first.create(0, config(MODEL, "s", return_sequences=True))
            assert same(await first.steps(0, 0, xs[:3]), expected[:3])
            for lane, number in enumerate((3, 5)):
                wire.waiting.clear()
                wire.open.clear()
                under_way = asyncio.create_task(first.step(lane, starts[number], -xs[number]))
                await wire.waiting.wait()
                assert (await second.open(lane, "s")).session.step == starts[number]
                moved = slice(number, number + 2)
                assert same(await second.steps(lane, starts[number], xs[moved]), expected[moved])
                wire.open.set()
                assert reason(await under_way) == "SESSION_TAKEN_OVER"
                assert (await first.open(lane + 1, "s")).session.step == starts[number + 2]
            assert same(await first.steps(2, starts[7], xs[7:]), expected[7:])


@asynccontextmanager
async def beside(models: Path, store: str) -> AsyncIterator[RunningServer]:
    """A server that begins and ends while this event loop goes on."""
    server = running_server(models=models, store=store)
    running = await asyncio.to_thread(server.__enter__)
    try:
        yield running
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


@pytest.mark.parametrize("seed", range(3))
async def test_two_servers_race_for_a_session(models: Path, store: str, seed: int) -> None:
    """Two clients at two servers step the same session at the same time, with other numbers: one line of history comes
    of it, in which each step is one client's, and every answer is the one of that line.
    """
    rng = random.Random(seed)
    line: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by first step: the chunk, and what was answered
    takes = [0, 0]  # how often each client was told that its session is the other's
    with two_servers(models, store) as (a, b):
        async with Talk(a.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))

        async def race(number: int, address: str) -> None:
            numbers, lane = np.random.default_rng([seed, number]), 0
            async with Talk(address) as talk:
                step = (await talk.open(lane, "s")).session.step
                # How often they meet is the machine's affair, so the line is as long as four meetings of each make it.
                while step < 150 or min(takes) < 4:
                    assert step < 50_000, f"one of them is hardly ever taken from: {takes}"
                    x = numbers.normal(size=(1, rng.randrange(1, 4), FEATURES)).astype(np.float32)
                    answer = await talk.step(lane, step, x)
                    if isinstance(answer, np.ndarray):
                        assert step not in line, "a step was given to both"
                        line[step] = x, answer
                        step += x.shape[1]
                        continue
                    said = info(answer.status)
                    if said.reason == "SESSION_TAKEN_OVER":
                        lane, takes[number] = lane + 1, takes[number] + 1
                        step = (await talk.open(lane, "s")).session.step
                    else:
                        assert said.reason in ("STEP_BEHIND", "STEP_CONFLICT"), said
                        step = int(said.metadata["expected_step"])

        await asyncio.gather(*(race(number, each.address) for number, each in enumerate((a, b))))
    xs = [x for _, (x, _) in sorted(line.items())]
    assert sorted(line) == first_steps(xs)[:-1]  # no gap and no overlap
    assert same([line[step][1] for step in sorted(line)], oracle(xs))


# Models


def write_model(models: Path, seed: int) -> None:
    """The same name and version, with weights of that seed."""
    folder = models / MODEL / "1"
    rng = np.random.default_rng(seed)
    weights = {
        "kernel": rng.normal(size=(FEATURES, 16)).astype(np.float32),
        "recurrent_kernel": rng.normal(size=(4, 16)).astype(np.float32),
        "bias": np.zeros(16, np.float32),
    }
    save_weights(folder / "weights.safetensors", LSTMCell(units=4).with_weights(weights, FEATURES, np.float32))


async def test_a_session_is_not_run_on_other_weights(tmp_path: Path, store: str) -> None:
    """With other weights under the name a stored session is refused, by every call, and goes on when they are back."""
    models = tmp_path / "models"
    shutil.copytree(ZOO / MODEL, models / MODEL)
    right = (models / MODEL / "1" / "weights.safetensors").read_bytes()
    xs = chunks(5)
    starts, expected = first_steps(xs), oracle(xs)
    with running_server(models=models, store=store) as server:
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            await talk.steps(0, 0, xs[:3])
    write_model(models, 1)
    with running_server(models=models, store=store) as server:
        async with Talk(server.address) as talk:
            error = await talk.open(0, "s")
            assert reason(error) == "MODEL_CHANGED"
            assert error.status.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await talk.predict("s", xs[3])
            assert reason(caught.value) == "MODEL_CHANGED"
            assert (await talk.get("s")).step == starts[3]
            opened = await talk.create(1, config(MODEL, "new", return_sequences=True))
            assert isinstance(opened, pb.LaneOpened)  # new ones get the new weights
    (models / MODEL / "1" / "weights.safetensors").write_bytes(right)
    with running_server(models=models, store=store) as server:
        async with Talk(server.address) as talk:
            assert (await talk.open(0, "s")).session.step == starts[3]
            assert same(await talk.steps(0, starts[2], xs[2:]), expected[2:])
            assert reason(await talk.open(1, "new")) == "MODEL_CHANGED"


def test_the_oracle_is_the_reference(models: Path) -> None:
    """What the tests hold answers against is what the cells compute."""
    xs = chunks(4)
    directory = models / MODEL / "1"
    layer = RNN(load_cell(directory, read_spec(directory / "model.yaml")), return_sequences=True)
    np.testing.assert_allclose(np.concatenate(oracle(xs), axis=1), layer(np.concatenate(xs, axis=1)), atol=1e-5)


# The store is away


class Away:
    """A store that can be taken away and given back."""

    def __init__(self, url: str, away: Callable[[], None], back: Callable[[], None]) -> None:
        self.url, self.away, self.back = url, away, back


@pytest.fixture(params=["sqlite", "redis"])
def weak(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Away]:
    """SQLite with a file that another process keeps locked; Redis that is killed and started again on its disk."""
    if request.param == "redis":
        with running_redis() as server:
            yield Away(f"{server.url}", server.kill, server.start)
            _ensure_running(server)
        return
    path = tmp_path / "s.db"
    other: list[sqlite3.Connection] = []

    def lock() -> None:
        other.append(sqlite3.connect(path, isolation_level=None))
        other[-1].execute("BEGIN IMMEDIATE")

    def unlock() -> None:
        other.pop().close()

    yield Away(f"sqlite:///{path}", lock, unlock)
    for each in other:
        each.close()


def _ensure_running(server: RedisServer) -> None:
    """The block around it kills it, which needs it to be there."""


def _impatient(server: RunningServer) -> None:
    """A store of SQLite that waits for others for a tenth of a second."""
    file = getattr(server.server.core.keeper.store, "_file", None)
    if file is not None:
        file._patience = 0.1


async def test_the_store_goes_away_and_comes_back(models: Path, weak: Away) -> None:
    """Meanwhile chunks fail with STORE_DOWN and a hint, calls without sessions go on, and afterwards whoever sends
    again has everything done exactly once.
    """
    xs = chunks(10)
    starts, expected = first_steps(xs), oracle(xs)
    with running_server(models=models, store=weak.url) as server:
        _impatient(server)
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            await talk.create(1, config(MODEL, "t", return_sequences=True))
            assert same(await talk.steps(0, 0, xs[:3]), expected[:3])
            assert same(await talk.steps(1, 0, xs[:2]), expected[:2])
            weak.away()
            for _ in range(2):  # the second time it is not in memory any more
                error = await talk.step(0, starts[3], xs[3])
                assert reason(error) == "STORE_DOWN"
                assert error.status.code == grpc.StatusCode.UNAVAILABLE.value[0]
                assert hint(error.status) is not None
            request = pb.PredictRequest(model=MODEL, inputs=frame([0], None, xs[0]).inputs)
            assert (await talk.inference.Predict(request)).outputs
            for number in (3, 4, 5):  # sent ahead
                await talk.write(frames=[frame([1], [starts[number - 1]], xs[number - 1][None])])
            failed = 0
            while failed < 3:
                for error in (await talk.read()).errors:
                    failed += 1
                    assert reason(error) in ("STORE_DOWN", "STEP_AHEAD"), error
            assert reason(await talk.create(2, config(MODEL, "u"))) == "STORE_DOWN"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await talk.predict("s", xs[3])
            assert reason(caught.value) == "STORE_DOWN"
            weak.back()
            assert same(await talk.steps(0, starts[2], xs[2:]), expected[2:])
            assert same(await talk.steps(1, starts[2], xs[2:]), expected[2:])
            opened = await talk.create(2, config(MODEL, "u"))
            assert isinstance(opened, pb.LaneOpened)


async def test_an_outage_does_not_cost_what_is_only_in_memory(models: Path, weak: Away) -> None:
    """With an interval, chunks are answered while the store is away, and are stored once it is back."""
    xs = chunks(10)
    starts, expected = first_steps(xs), oracle(xs)
    with running_server(models=models, store=weak.url, durability="interval", store_interval=0.05) as server:
        _impatient(server)
        async with Talk(server.address) as talk:
            await talk.create(0, config(MODEL, "s", return_sequences=True))
            assert same(await talk.steps(0, 0, xs[:3]), expected[:3])
            await stored(weak.url, "s", starts[3])
            weak.away()
            for number in range(3, 7):
                assert same(await talk.steps(0, starts[number], xs[number : number + 1]), expected[number : number + 1])
                await asyncio.sleep(0.1)
            weak.back()
            await stored(weak.url, "s", starts[7])
            assert same(await talk.steps(0, starts[7], xs[7:]), expected[7:])


# Ends


async def test_ids_and_ends_are_told_apart_across_replicas(models: Path, store: str) -> None:
    """An id is unique in the store, and why a session ended is known to every replica."""
    xs = chunks(2)
    with two_servers(models, store) as (a, b):
        async with Talk(a.address) as first, Talk(b.address) as second:
            await first.create(0, config(MODEL, "s"))
            taken = await second.create(0, config(MODEL, "s"))
            assert reason(taken) == "SESSION_EXISTS"
            assert in_memory(b) == 0
            request = session_pb2.CreateSessionRequest(config=config(MODEL, "s"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await second.sessions.CreateSession(request)
            assert reason(caught.value) == "SESSION_EXISTS"
            assert isinstance(await first.step(0, 0, xs[0]), np.ndarray)

            await second.delete("s")  # it takes it over to do so
            assert reason(await first.step(0, None, xs[0])) == "SESSION_CLOSED"
            assert reason(await first.open(1, "s")) == "SESSION_CLOSED"
            assert reason(await second.open(1, "s")) == "SESSION_CLOSED"
            assert reason(await second.open(1, "nobody")) == "SESSION_UNKNOWN"
            assert (await second.create(2, config(MODEL, "s"))).session.step == 0
            assert (await first.open(2, "s")).session.step == 0


async def test_sessions_expire_in_the_store(models: Path, store: str) -> None:
    """A session whose server is gone is ended by another's sweep, and every replica says that it expired."""
    xs = chunks(2)
    with two_servers(models, store) as (a, b):
        async with Talk(a.address) as first, Talk(b.address) as second:
            made = config(MODEL, "s")
            made.idle_lifetime.FromMilliseconds(1500)
            await first.create(0, made)
            await first.step(0, 0, xs[0])
            a.call(lambda: a.server.core.keeper.rest(0.0, lambda group: None))
            assert (await second.get("s")).step == xs[0].shape[1]
            later = b.server.core.keeper._wall_clock() + 2
            b.server.core.keeper._wall_clock = lambda: later
            b.call(b.server.core.keeper.sweep)
            for talk in (first, second):
                assert reason(await talk.open(7, "s")) == "SESSION_EXPIRED"
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await talk.get("s")
                assert reason(caught.value) == "SESSION_EXPIRED"
            assert reason(await first.step(0, None, xs[1])) == "SESSION_EXPIRED"
