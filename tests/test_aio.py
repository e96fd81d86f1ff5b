from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

import rnnserve
from fake_server import failure, running
from rnnserve.aio import Client


@pytest.fixture
def server():
    with running() as fake:
        yield fake


@pytest.fixture
async def client(server):
    async with Client(server.target, timeout=30) as made:
        yield made


def row(value, features=3):
    return np.full(features, value, "f4")


async def arrived(server, rows):
    """Returns once the server has so many chunks."""
    await asyncio.to_thread(server.wait_for_rows, rows)


# Layers


async def test_a_layer_sends_keras_options_explicitly(server, client):
    """A layer has Keras's defaults, and every option is in the request whatever the model's own defaults are."""
    y = await client.RNN("sum")(np.ones((2, 4, 3)))
    np.testing.assert_array_equal(y, np.full((2, 3), 4))
    options = server.predicts[0].options
    assert {field.name for field, _ in options.ListFields()} == set(rnnserve.LayerOptions.__dataclass_fields__)
    assert not any(value for _, value in options.ListFields())


async def test_a_layer_takes_and_returns_states(client):
    """With return_state the output comes first and the states after it, in a form that initial_state takes."""
    rnn = client.RNN("sum", return_sequences=True, return_state=True)
    x = np.ones((2, 4, 3))
    y, *states = await rnn(x, mask=[[1, 0, 1, 1]] * 2)
    np.testing.assert_array_equal(y[0, :, 0], [1, 1, 2, 3])
    again, _ = await rnn(x, initial_state=states)
    np.testing.assert_array_equal(again[0, :, 0], [4, 5, 6, 7])


async def test_several_inputs_and_outputs(client):
    """A model of several inputs takes a mapping, and one of several outputs gives one."""
    rnn = client.RNN("pair", return_state=True)
    y, a, b = await rnn({"a": np.ones((2, 3, 2)), "b": np.ones((2, 3), int)})
    assert (list(y), y["p"].shape, y["q"].tolist()) == (["p", "q"], (2, 2), [3, 3])
    assert (a.shape, b.shape) == ((2, 2), (2,))
    async with client.session("pair") as session:
        y = await session.step({"a": [1.0, 2.0], "b": 5})
        assert (y["p"].tolist(), y["q"]) == ([1, 2], 5)


async def test_sizes_and_shapes(client):
    """A built layer tells Keras's sizes, shapes and initial state; before it is built it says so."""
    rnn = client.RNN("sum", return_sequences=True, return_state=True)
    with pytest.raises(RuntimeError, match="not built"):
        _ = rnn.state_size
    await rnn.build()
    assert (rnn.state_size, rnn.output_size) == ([3], 3)
    assert rnn.compute_output_shape((2, 5, 3)) == [(2, 5, 3), (2, 3)]
    assert client.RNN("sum").options == rnnserve.LayerOptions()
    (zeros,) = rnn.get_initial_state(4)
    assert (zeros.shape, zeros.dtype, zeros.any()) == ((4, 3), np.float32, False)
    pair = client.RNN("pair")
    await pair.build()
    assert pair.state_size == [2, ()]
    assert pair.compute_output_shape({"a": (2, 5, 2), "b": (2, 5)}) == {"p": (2, 2), "q": (2,)}
    major = client.RNN("sum", time_major=True, return_sequences=True)
    await major.build()
    assert major.compute_output_shape((5, 2, 3)) == (5, 2, 3)


async def test_a_stack_is_one_layer(client):
    """A list of models runs one over the other's whole sequence; time is turned once; states are nested per model."""
    x = np.arange(12, dtype="f4").reshape(1, 4, 3)
    mask = np.array([[True, True, True, False]])
    stack = client.RNN(["sum", "wide"], return_sequences=True, return_state=True, go_backwards=True)
    y, *states = await stack(x, mask=mask)
    below = np.cumsum(np.where(mask[..., None], x, 0)[:, ::-1], axis=1)
    expected = np.cumsum(np.where(mask[:, ::-1, None], below, 0), axis=1)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(states[0][0], below[:, -1])
    np.testing.assert_array_equal(states[1][0], expected[:, -1])
    assert stack.state_size == [[3], [3]]
    again, *_ = await stack(x, mask=mask, initial_state=states)
    assert not np.array_equal(again, y)
    with pytest.raises(rnnserve.InvalidInput, match="a list of 2"):
        await stack(x, initial_state=states[:1])


async def test_a_stateful_layer_remembers(server, client):
    """The session is made by the first call, with its batch size; reset, given values and initial_state replace what
    was recorded; the states are shown to whoever asks, but returned only with return_state."""
    async with client.RNN("sum", stateful=True) as live:
        x = np.ones((2, 4, 3))
        assert live.states is None
        np.testing.assert_array_equal(await live(x), np.full((2, 3), 4))
        np.testing.assert_array_equal(await live(x[:, :1]), np.full((2, 3), 5))
        np.testing.assert_array_equal(live.states[0], np.full((2, 3), 5))
        assert live.batch_size == 2
        assert len(server.sessions) == 1
        with pytest.raises(rnnserve.InvalidInput, match="2 rows, the fixed batch size"):
            await live(x[:1])
        await live.reset_states()
        np.testing.assert_array_equal(await live(x), np.full((2, 3), 4))
        await live.reset_states([np.full((2, 3), 10)])
        np.testing.assert_array_equal(await live(x), np.full((2, 3), 14))
        np.testing.assert_array_equal(await live(x, initial_state=[np.full((2, 3), 20)]), np.full((2, 3), 24))
    assert not server.sessions


async def test_a_stateful_stack_does_not_fall_apart(server, client):
    """When a layer of a stateful stack fails, those below it, which had moved on, are put back."""
    x = np.ones((1, 2, 3))
    live = client.RNN(["sum", "wide"], stateful=True)
    expected = [await live(x) for _ in range(3)]
    await live.reset_states()
    for turn in range(3):
        server.broken["wide"] = failure("ENGINE_FAILED", grpc.StatusCode.INTERNAL)
        with pytest.raises(rnnserve.ServerError):
            await live(x)
        server.broken.clear()
        np.testing.assert_array_equal(await live(x), expected[turn])
    await live.close()


async def test_states_before_the_first_call(client):
    """A stateful layer may be given its states before its first call."""
    live = client.RNN("sum", stateful=True)
    await live.reset_states([np.full((1, 3), 5)])
    np.testing.assert_array_equal(await live(np.ones((1, 1, 3))), np.full((1, 3), 6))
    await live.close()
    with pytest.raises(AttributeError, match="stateful"):
        await client.RNN("sum").reset_states()


# Sessions


async def test_a_session_remembers(server, client):
    """Steps and chunks go on from where the last one left the session, which numbers them itself."""
    async with client.session("sum") as session:
        np.testing.assert_array_equal(await session.step(row(1)), row(1))
        np.testing.assert_array_equal(await session(np.ones((1, 4, 3))), np.full((1, 3), 5))
        np.testing.assert_array_equal(await session.step(row(1)), row(6))
        assert session.next_step == 6
        assert (await session.info()).step == 6
        await session.reset_states()
        np.testing.assert_array_equal(await session.step(row(1)), row(1))
        await session.reset_states([np.full((1, 3), 9)])
        np.testing.assert_array_equal(await session.step(row(1)), row(10))
    steps = [list(frame.first_steps) for request in server.requests for frame in request.frames]
    assert steps == [[0], [1], [5], [6], [7]]
    assert not server.sessions


async def test_concurrent_steps_share_a_frame(server, client):
    """What many tasks ask for at once leaves in one message of one frame, and so do the opens of many sessions."""
    sessions = await asyncio.gather(*[client.session("sum") for _ in range(20)])
    assert sum(len(request.opens) for request in server.requests) == 20
    assert sum(bool(request.opens) for request in server.requests) == 1
    server.requests.clear()
    for turn in range(3):
        outputs = await asyncio.gather(*[session.step(row(number)) for number, session in enumerate(sessions)])
        np.testing.assert_array_equal(outputs, [row(number * (turn + 1)) for number in range(20)])
    assert [len(request.frames) for request in server.requests] == [1, 1, 1]
    assert server.streams == 1


@pytest.mark.parametrize("window", [1, 4, 100])
async def test_streaming_keeps_order(client, window):
    """The outputs of a stream come in the order of its frames, from a plain iterable and an asynchronous one."""

    async def live():
        for number in range(10):
            yield row(number)

    expected = np.cumsum(range(10))
    async with client.session("sum") as session:
        got = [y[0] async for y in session.stream((row(number) for number in range(10)), window=window)]
        np.testing.assert_array_equal(got, expected)
        await session.reset_states()
        got = [y[0] async for y in session.stream(live(), window=window)]
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="window"):
        _ = [y async for y in session.stream([], window=0)]


async def test_streaming_runs_ahead_within_its_window(server, client):
    """A stream sends as many steps ahead as its window says, and no more."""
    taken = []

    async def source():
        for number in range(10):
            taken.append(number)
            yield row(number)

    async with client.session("sum") as session:
        server.hold()
        outputs = session.stream(source(), window=3)
        first = asyncio.ensure_future(anext(outputs))
        await arrived(server, 3)
        assert len(taken) <= 4  # the fourth waits in hand
        assert server.rows == 3
        server.release()
        np.testing.assert_array_equal(await first, row(0))
        assert len([y async for y in outputs]) == 9


async def test_a_live_source_is_answered_at_once(client):
    """The output for a frame of an asynchronous source does not wait for the next frame."""
    frames: asyncio.Queue = asyncio.Queue()

    async def microphone():
        while (frame := await frames.get()) is not None:
            yield frame

    async with client.session("sum") as session:
        outputs = session.stream(microphone())
        for number in range(1, 4):
            frames.put_nowait(row(1))
            np.testing.assert_array_equal(await anext(outputs), row(number))
        frames.put_nowait(None)
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)


async def test_a_stream_may_reuse_its_buffer(client):
    """Frames may be the same array, filled anew each time."""

    def source():
        buffer = np.zeros(3, "f4")
        for number in range(10):
            buffer[:] = number
            yield buffer

    async with client.session("sum") as session:
        got = [y[0] async for y in session.stream(source())]
    np.testing.assert_array_equal(got, np.cumsum(range(10)))


async def test_a_failing_source_ends_the_stream(client):
    """What the source of frames raises comes out of the stream, after the outputs of the frames before it."""

    def plain():
        yield row(1)
        raise KeyError("source")

    async def live():
        yield row(1)
        raise KeyError("source")

    async with client.session("sum") as session:
        number = 0
        for source in (plain, live):
            outputs = session.stream(source(), window=1)
            np.testing.assert_array_equal(await anext(outputs), row(number := number + 1))
            with pytest.raises(KeyError, match="source"):
                await anext(outputs)
        assert session.next_step == 2


async def test_a_failed_step_leaves_the_session_as_it_was(server, client):
    """A failure is told to the step that failed; what was sent behind it fails for that reason; the session goes on."""
    async with client.session("sum") as session:
        await session.step(row(1))
        server.failures.append(failure("NOT_FINITE", grpc.StatusCode.INVALID_ARGUMENT, field="inputs.x"))
        results = await asyncio.gather(*[session.step(row(1)) for _ in range(3)], return_exceptions=True)
        assert [type(each) for each in results] == [rnnserve.InvalidInput, rnnserve.StepMismatch, rnnserve.StepMismatch]
        assert results[0].reason == "NOT_FINITE"
        assert results[0].metadata["field"] == "inputs.x"
        assert session.next_step == 1
        np.testing.assert_array_equal(await session.step(row(1)), row(2))


async def test_a_wrong_input_is_not_sent(server, client):
    """What cannot fit is refused before anything leaves, and the session does not move."""
    async with client.session("sum") as session:
        with pytest.raises(rnnserve.InvalidInput, match=r"inputs.x: expected shape \[3\]"):
            await session.step(row(1, features=4))
        assert (server.rows, session.next_step) == (0, 0)


async def test_deadline(server, client):
    """A step that is not answered in time raises DeadlineExceeded; it may be applied, and the session goes on after."""
    async with client.session("sum") as session:
        server.hold()
        with pytest.raises(rnnserve.DeadlineExceeded, match=r"0\.05 s"):
            await session.step(row(1), timeout=0.05)
        with pytest.raises(TimeoutError):
            await client.RNN("sum")(np.ones((1, 1, 3)), timeout=0.05)
        await arrived(server, 1)
        server.release()
        np.testing.assert_array_equal(await session.step(row(1)), row(2))


async def test_a_cancelled_step_harms_nobody(server, client):
    """Cancelling one caller leaves the session, its number and the other callers alone."""
    async with client.session("sum") as session:
        server.hold()
        tasks = [asyncio.create_task(session.step(row(1))) for _ in range(3)]
        await arrived(server, 3)
        tasks[1].cancel()
        server.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        np.testing.assert_array_equal([results[0], results[2]], [row(1), row(3)])
        np.testing.assert_array_equal(await session.step(row(1)), row(4))


async def test_reset_waits_for_what_was_sent_before_it(server, client):
    """A reset takes its turn behind the steps that were asked for before it."""
    async with client.session("sum") as session:
        server.hold()
        step = asyncio.create_task(session.step(row(1)))
        await arrived(server, 1)
        reset = asyncio.create_task(session.reset_states())
        await client.models()  # a call that was made before this one is there by now
        assert not server.resets
        server.release()
        np.testing.assert_array_equal(await step, row(1))
        await reset
        np.testing.assert_array_equal(await session.step(row(1)), row(1))


async def test_leaving_a_session(server, client):
    """`close` and the end of a block end a session; `detach` and the end of a block around an attached one do not."""
    session = await client.session("sum", session_id="mine")
    await session.step(row(1))
    await session.detach()
    assert list(server.sessions) == ["mine"]
    async with client.attach("mine") as again:
        assert (again.session_id, again.next_step, again.model.name, again.batch_size) == ("mine", 1, "sum", 1)
        np.testing.assert_array_equal(await again.step(row(1)), row(2))
    assert list(server.sessions) == ["mine"]
    with pytest.raises(rnnserve.SessionClosed):
        await again.step(row(1))
    await (await client.attach("mine")).close()
    assert not server.sessions
    with pytest.raises(rnnserve.SessionNotFound):
        await client.attach("mine")


@pytest.mark.parametrize(("raised", "told"), [(ZeroDivisionError, ZeroDivisionError), (None, rnnserve.ServerError)])
async def test_an_error_in_a_block_is_not_hidden(server, raised, told):
    """The error that ends a session's block comes out, not one of closing, which comes out otherwise."""

    async def block():
        async with Client(server.target, timeout=30, retry_for=0) as client, client.session("sum") as session:
            server.hold()
            step = asyncio.create_task(session.step(row(1)))
            await arrived(server, 1)
            server.break_streams()
            await asyncio.gather(step, return_exceptions=True)
            server.failures.append(failure("INTERNAL", grpc.StatusCode.INTERNAL))
            if raised:
                raise raised

    with pytest.raises(told):
        await block()


async def test_an_abandoned_open_is_closed(server, client):
    """A session whose opening is given up is ended, so that it does not linger on the server."""
    server.hold_opens()
    opening = asyncio.ensure_future(client.session("sum")._open())
    await asyncio.to_thread(server.wait_for_opens, 1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    server.release()
    async with client.session("sum"):
        pass  # answers come in order: what became of the other is known by now
    async with client.session("sum"):
        assert len(server.sessions) == 1


async def test_initial_state_and_options_of_a_session(server, client):
    """A session starts from what it is given, with the options that are given and no others."""
    async with client.session(
        "sum", batch_size=2, initial_state=[np.full((2, 3), 7)], return_state=True, idle_lifetime=1.5
    ) as session:
        y, total = await session.step(np.ones((2, 3)))
        np.testing.assert_array_equal(y, np.full((2, 3), 8))
        np.testing.assert_array_equal(total, y)
        assert session.options == rnnserve.LayerOptions(return_state=True, stateful=True)
    config = next(opening.create for request in server.requests for opening in request.opens)
    assert [field.name for field, _ in config.options.ListFields()] == ["return_state"]
    assert config.idle_lifetime.ToMilliseconds() == 1500
    for wrong in ({"batch_size": 0}, {"idle_lifetime": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            await client.session("sum", **wrong)


# Groups


async def test_a_group_steps_in_one_frame(server, client):
    """A group opens in one message, and each of its steps and chunks is one frame."""
    async with client.session_group("sum", 5) as group:
        assert len(group) == len(set(group.session_ids)) == 5
        x = np.arange(15, dtype="f4").reshape(5, 3)
        np.testing.assert_array_equal(await group.step(x), x)
        y = await group(np.stack([x[:, None]] * 2, axis=2), mask=np.ones((5, 1, 2)))
        np.testing.assert_array_equal(y, 3 * x[:, None])
        assert group.next_steps == [3] * 5
        await group.reset_states()
        np.testing.assert_array_equal(await group.step(x), x)
        with pytest.raises(rnnserve.InvalidInput, match=r"\[5, 3\]"):
            await group.step(x[:4])
    assert not server.sessions
    assert [len(request.opens) for request in server.requests if request.opens] == [5]
    assert [len(request.frames) for request in server.requests if request.frames] == [1, 1, 1]


async def test_a_group_fails_in_part(server, client):
    """Where some of a group fail, the error names them and has the result of the others, who have moved on."""
    async with client.session_group("sum", 3, batch_size=2) as group:
        server.failures.append(failure("ENGINE_FAILED", grpc.StatusCode.INTERNAL))
        with pytest.raises(rnnserve.GroupError) as caught:
            await group.step(np.ones((3, 2, 3)))
        assert list(caught.value.errors) == [0]
        assert caught.value.partial[:, 0, 0].tolist() == [0, 1, 1]
        assert group.next_steps == [0, 1, 1]
        y = await group.step(np.ones((3, 2, 3)))
        assert y[:, 0, 0].tolist() == [1, 2, 2]


async def test_a_group_opens_as_a_whole_or_not_at_all(server, client):
    """When one session of a group cannot be made, the others are ended again."""
    server.failures.append(failure("SESSIONS_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED))
    with pytest.raises(rnnserve.ServerBusy):
        await client.session_group("sum", 3)
    async with client.session("sum"):
        assert len(server.sessions) == 1


# The client


async def test_descriptions(client):
    """Models and sessions are listed through all their pages."""
    assert [model.name for model in await client.models()] == ["pair", "scalar", "sum", "wide"]
    model = await client.model("sum")
    assert model.inputs == (rnnserve.TensorSpec("x", np.dtype("f4"), (3,)),)
    assert model.states == (rnnserve.StateSpec("total", np.dtype("f4"), (3,), (0,)),)
    with pytest.raises(rnnserve.ModelNotFound):
        await client.model("none")
    sessions = await asyncio.gather(*[client.session("sum") for _ in range(5)])
    other = await client.session("wide")
    assert [each.session_id async for each in client.sessions(model="sum")] == [each.session_id for each in sessions]
    assert len([each async for each in client.sessions()]) == 6
    await asyncio.gather(*[each.close() for each in (*sessions, other)])


async def test_health(server, client):
    """A server that serves is healthy; one that cannot be reached is not."""
    assert await client.health()
    async with Client("127.0.0.1:1", timeout=5, retry_for=0) as nobody:
        assert not await nobody.health()
        with pytest.raises(rnnserve.Unavailable):
            await nobody.session("sum")


async def test_closing_the_client(server):
    """Closing fails what is unanswered with ClientClosed, and so fails whatever is asked afterwards."""
    async with Client(server.target) as client:
        session = await client.session("sum")
        rnn = client.RNN("sum")
        await rnn.build()
        server.hold()
        step = asyncio.create_task(session.step(row(1)))
        call = asyncio.create_task(rnn(np.ones((1, 1, 3))))
        await arrived(server, 1)
    for task in (step, call):
        with pytest.raises(rnnserve.ClientClosed):
            await task
    for late in (session.step(row(1)), client.models(), client.session("sum")._open()):
        with pytest.raises(rnnserve.ClientClosed):
            await late
    await client.close()
