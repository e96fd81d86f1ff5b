from __future__ import annotations

import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest

import rnnserve
from fake_server import failure, running
from rnnserve import Client
from serving import running_server


@pytest.fixture
def server():
    with running() as fake:
        yield fake


@pytest.fixture
def client(server):
    with Client(server.target, timeout=30) as made:
        yield made


def row(value):
    return np.full(3, value, "f4")


def in_threads(count, work):
    """Runs work(number) in so many threads at once, and raises what any of them raised."""
    failures = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_a_layer(client):
    """A layer is called as in Keras, and is described from the start."""
    rnn = client.RNN("sum", return_sequences=True, return_state=True)
    assert (rnn.state_size, rnn.output_size, rnn.models[0].name) == ([3], 3, "sum")
    assert rnn.compute_output_shape((2, 4, 3)) == [(2, 4, 3), (2, 3)]
    y, *states = rnn(np.ones((2, 4, 3)), mask=[[1, 1, 0, 1]], initial_state=rnn.get_initial_state(2))
    np.testing.assert_array_equal(y[1, :, 0], [1, 2, 2, 3])
    np.testing.assert_array_equal(states[0], y[:, -1])
    with pytest.raises(rnnserve.ModelNotFound):
        client.RNN("none")


def test_a_stateful_layer(server, client):
    """A stateful layer's state stays on the server until it is closed."""
    with client.RNN("sum", stateful=True) as live:
        live(np.ones((2, 4, 3)))
        np.testing.assert_array_equal(live(np.ones((2, 1, 3))), np.full((2, 3), 5))
        assert live.batch_size == 2
        live.reset_states([np.full((2, 3), 1)])
        live.reset_state()
        np.testing.assert_array_equal(live(np.ones((2, 1, 3))), np.ones((2, 3)))
        np.testing.assert_array_equal(live.states[0], np.ones((2, 3)))
    assert not server.sessions
    assert rnnserve.LayerOptions(stateful=True) == live.options


def test_a_session(server, client):
    """Steps and chunks go on where the last one left the session."""
    with client.session("sum") as session:
        np.testing.assert_array_equal(session.step(row(1)), row(1))
        np.testing.assert_array_equal(session(np.ones((1, 4, 3)), mask=[[1, 1, 1, 0]]), np.full((1, 3), 4))
        assert (session.next_step, session.info().step, session.batch_size, session.model.name) == (5, 5, 1, "sum")
        assert session.options.stateful
        session.reset_states([np.full((1, 3), 2)])
        np.testing.assert_array_equal(session.step(row(1)), row(3))
        assert [each.session_id for each in client.sessions()] == [session.session_id]
        session.detach()
    with client.attach(session.session_id) as again:
        np.testing.assert_array_equal(again.step(row(1)), row(4))
    assert list(server.sessions) == [session.session_id]
    client.attach(session.session_id).close()
    assert not server.sessions


@pytest.mark.parametrize("window", [1, 4, 100])
def test_streaming_keeps_order(client, window):
    """The outputs of a stream come in the order of its frames, which may share one buffer."""

    def frames():
        buffer = np.zeros(3)
        for number in range(10):
            buffer[:] = number
            yield buffer

    with client.session("sum") as session:
        got = [y[0] for y in session.stream(frames(), window=window)]
        np.testing.assert_array_equal(got, np.cumsum(range(10)))
        with pytest.raises(ValueError, match="window"):
            list(session.stream([], window=0))


def test_streaming_runs_ahead_within_its_window(server, client):
    """A stream asks for no more frames than its window before it hands out an output."""
    taken = []

    def frames():
        for number in range(5):
            taken.append(number)
            if number == 2:
                server.wait_for_rows(2)
                server.release()
            yield row(number)

    with client.session("sum") as session:
        server.hold()
        outputs = session.stream(frames(), window=3)
        np.testing.assert_array_equal(next(outputs), row(0))
        assert taken == [0, 1, 2]
        outputs.close()
        np.testing.assert_array_equal(session.step(row(1)), row(4))


def test_threads_share_one_stream(server, client):
    """Many threads may step sessions of one client, and what they ask for at the same time shares messages."""
    sessions = [client.session("sum") for _ in range(16)]
    server.hold()
    outputs = {}

    def work(number):
        outputs[number] = sessions[number].step(row(number))

    releaser = threading.Thread(target=lambda: (server.wait_for_rows(16), server.release()))
    releaser.start()
    in_threads(16, work)
    releaser.join()
    for number in range(16):
        np.testing.assert_array_equal(outputs[number], row(number))

    def many(number):
        for turn in range(20):
            np.testing.assert_array_equal(sessions[number].step(row(1)), row(number + turn + 1))

    in_threads(16, many)
    assert server.streams == 1


def test_steps_of_threads_share_frames(server, client):
    """Threads that step again and again, with no appointment, send a fraction of a message for each step."""
    threads, steps = 16, 50
    sessions = [client.session("sum") for _ in range(threads)]
    before = len(server.requests)

    def work(number):
        for step in range(1, steps + 1):
            np.testing.assert_array_equal(sessions[number].step(row(number)), row(number * step))

    in_threads(threads, work)
    assert len(server.requests) - before < threads * steps / 3


def test_threads_may_share_one_session(client):
    """Steps of one session from several threads are all taken, each once."""
    with client.session("sum") as session:
        outputs = []
        in_threads(8, lambda _: outputs.extend(float(session.step(row(1))[0]) for _ in range(10)))
        assert sorted(outputs) == list(range(1, 81))


def test_failures(server, client):
    """Failures come out of the call that failed, and the session goes on."""
    with client.session("sum") as session:
        server.failures.append(failure("ENGINE_FAILED", grpc.StatusCode.INTERNAL))
        with pytest.raises(rnnserve.ServerError):
            session.step(row(1))
        server.hold()
        with pytest.raises(rnnserve.DeadlineExceeded):
            session.step(row(1), timeout=0.05)
        server.wait_for_rows(2)
        server.break_streams()
        server.release()
        with pytest.raises(rnnserve.InvalidInput):
            session.step(np.ones(4))
    with pytest.raises(rnnserve.SessionClosed):
        session.step(row(1))


def test_a_group(server, client):
    """A group steps in one frame; where some fail, the error has the others' result."""
    with client.session_group("sum", 4) as group:
        np.testing.assert_array_equal(group.step(np.ones((4, 3))), np.ones((4, 3)))
        np.testing.assert_array_equal(group(np.ones((4, 1, 2, 3))), np.full((4, 1, 3), 3))
        server.failures.append(failure("ENGINE_FAILED", grpc.StatusCode.INTERNAL))
        with pytest.raises(rnnserve.GroupError) as caught:
            group.step(np.ones((4, 3)))
        assert caught.value.partial[:, 0].tolist() == [0, 4, 4, 4]
        assert group.next_steps == [3, 4, 4, 4]
        assert len(group) == len(group.session_ids)


def test_descriptions(client):
    """Models and sessions are listed through all their pages."""
    assert [model.name for model in client.models()] == ["pair", "scalar", "sum", "wide"]
    assert client.model("sum").outputs[0].name == "y"
    assert client.health()
    group = client.session_group("sum", 5)
    assert [each.session_id for each in client.sessions()] == group.session_ids
    group.close()


def test_closing_the_client(server):
    """Closing joins the thread; what is asked afterwards fails with ClientClosed, and closing again does nothing."""
    client = Client(server.target)
    session = client.session("sum")
    client.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rnnserve"]
    for late in (lambda: session.step(row(1)), client.models, session.close):
        with pytest.raises(rnnserve.ClientClosed):
            late()
    client.close()


def test_closing_answers_those_who_wait(server):
    """A thread that waits for a step when another closes the client is told so."""
    client = Client(server.target)
    session = client.session("sum")
    server.hold()

    def close():
        server.wait_for_rows(1)
        client.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(rnnserve.ClientClosed):
        session.step(row(1))
    closer.join()


def test_importing_is_cheap():
    """The package brings nothing but grpcio, protobuf and NumPy, and its codec does not bring the clients."""
    script = """
import sys
import grpc, numpy, google.protobuf
before = set(sys.modules)
import rnnserve.codec
assert "rnnserve.client" not in sys.modules
import rnnserve, rnnserve.aio, rnnserve.client
for name in rnnserve.__all__:
    assert getattr(rnnserve, name) is not None
brought = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert brought <= {"rnnserve", "google", "grpc", "numpy"}, brought
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_real_server():
    """Against the real server: a session's steps are bit for bit the layer's sequence, whoever shares the stream."""
    x = np.random.default_rng(0).standard_normal((4, 6, 5), np.float32)
    with running_server() as server, Client(server.address, timeout=30) as client:
        assert client.health()
        rnn = client.RNN("lstm-32-64", return_sequences=True, return_state=True)
        y, *states = rnn(x)
        assert y.shape == (4, 6, 64)
        assert rnn.state_size == [[32, 32], [64, 64]]
        assert [[state.shape for state in cell] for cell in states] == [[(4, 32)] * 2, [(4, 64)] * 2]
        sessions = [client.session("lstm-32-64") for _ in range(4)]

        def work(number):
            np.testing.assert_array_equal(list(sessions[number].stream(x[number])), y[number])

        in_threads(4, work)
        with client.session_group("lstm-32-64", 4, return_sequences=True) as group:
            np.testing.assert_array_equal(group(x[:, None])[:, 0], y)
        with client.RNN("lstm-32-64", stateful=True) as live:
            live(x[:, :2])
            np.testing.assert_array_equal(live(x[:, 2:]), y[:, -1])
            live.reset_states(states)
            first = live(x)
            np.testing.assert_array_equal(live(x, initial_state=states), first)
        with pytest.raises(rnnserve.OptionUnsupported):
            client.session("silero-vad", go_backwards=True)
