"""The command, as a process of its own."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from graphs import directory, lstm, lstm_spec
from rnnserve.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc, session_pb2
from rnnserve_server.cli import app
from rnnserve_server.config import Settings

COMMAND = [sys.executable, "-m", "rnnserve_server"]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def environment(**variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RNNSERVE_")}
    return {**kept, **variables}


def run(*arguments, **variables):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def invoke(*arguments, **variables):
    """The same, in this process, for what serves nothing."""
    return CliRunner().invoke(app, list(map(str, arguments)), env=variables)


@contextmanager
def process(*arguments, **variables):
    """`rnnserve serve` on a free port: (the process, its address)."""
    server = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", *map(str, arguments)],
        env=environment(**variables),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    with server:
        try:
            address = next(
                found[1] for line in server.stderr if (found := re.search(r"(?:serving|address).*?([\d.]+:\d+)", line))
            )
            yield server, address
        finally:
            server.kill()


@pytest.fixture
def small(tmp_path):
    directory(tmp_path / "models", lstm_spec(), graph=lstm())
    return tmp_path / "models"


def test_serve_answers_and_drains(small):
    """The server says where it listens and that it is SERVING; on SIGTERM a Watch sees NOT_SERVING, an open stream is
    answered, new work is refused, and the process exits with 0 in bounded time.
    """
    with process("--models", small, "--drain-seconds", "2", "--log-format", "json") as (server, address):
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""), timeout=30)
            assert next(watch).status == SERVING
            models = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
            assert [model.name for model in models.models] == ["m"]
            opening = inference_pb2.StreamRequest()
            opening.opens.add(lane=1, create=session_pb2.SessionConfig(model="m"))
            stream = inference_pb2_grpc.InferenceServiceStub(channel).Stream(iter([opening]), timeout=30)
            assert next(stream).opened[0].lane == 1
            server.send_signal(signal.SIGTERM)
            assert next(watch).status == NOT_SERVING
            assert server.wait(15) == 0
        rest = server.stderr.read()
        assert '"event": "stopped"' in rest
        assert "Traceback" not in rest


@pytest.mark.parametrize("loaded", ["", "pydantic_core", "numpy", "onnxruntime_pybind11"])
def test_a_server_that_starts_can_be_ended(small, loaded):
    """SIGTERM while modules or models load ends the process with 0 and a word, whatever is loading."""
    server = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--models", small], env=environment(), stderr=subprocess.PIPE, text=True
    )
    with server:
        try:
            _wait_for(lambda: _heeds(server.pid, signal.SIGTERM))
            _wait_for(lambda: loaded in Path(f"/proc/{server.pid}/maps").read_text())
            server.send_signal(signal.SIGTERM)
            said = server.stderr.read()
            assert server.wait(15) == 0, said
        finally:
            server.kill()
    assert "SIGTERM before anything was served: ended" in said or "stopped" in said
    assert "Traceback" not in said


def _heeds(pid, number):
    """Whether a process has a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _wait_for(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_stream_that_stays_open_is_told(small):
    """A client that neither speaks nor leaves is told that the server drains, and then UNAVAILABLE; not cut off."""
    with (
        process("--models", small, "--drain-seconds", "5") as (server, address),
        grpc.insecure_channel(address) as channel,
    ):
        stream = inference_pb2_grpc.InferenceServiceStub(channel).Stream(requests := _Requests(), timeout=30)
        requests.send(lane=0)
        assert next(stream).opened
        server.send_signal(signal.SIGTERM)
        (notice,) = next(stream).notices
        assert (notice.reason, notice.time_left.seconds) == (inference_pb2.NOTICE_REASON_DRAINING, 5)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in caught.value.details()
        assert server.wait(15) == 0


class _Requests:
    """Requests that never end by themselves."""

    def __init__(self):
        self._queue = queue.SimpleQueue()

    def send(self, lane):
        request = inference_pb2.StreamRequest()
        request.opens.add(lane=lane, create=session_pb2.SessionConfig(model="m"))
        self._queue.put(request)

    def __iter__(self):
        return self

    def __next__(self):
        return self._queue.get(timeout=30)


def test_health_exit_codes(small):
    """`rnnserve health` exits with 0 if a server takes calls, else with 1 and the reason."""
    with process(RNNSERVE_MODELS=str(small)) as (server, address):
        answer = run("health", "--address", address)
        assert (answer.returncode, answer.stdout.strip()) == (0, f"{address}: SERVING")
        server.send_signal(signal.SIGINT)
        assert server.wait(15) == 0
    answer = run("health", "--address", address, "--timeout", "1")
    assert answer.returncode == 1
    assert re.search("UNAVAILABLE|DEADLINE_EXCEEDED", answer.stderr)


def test_serve_refuses_bad_settings(tmp_path, small):
    """A setting that is wrong, unknown or unreadable ends the command with 2 and a line that names it, no traceback."""
    config = tmp_path / "server.yaml"
    config.write_text("prot: 1\n")
    for arguments, said in (
        (["--port", "70000"], "port: "),
        (["--slice-steps", "0"], "slice_steps: "),
        (["--engine", "torch"], "torch"),
        (["--config", config], "prot: "),
        (["--config", tmp_path / "nowhere.yaml"], "nowhere.yaml"),
    ):
        answer = invoke("serve", "--models", small, *arguments)
        assert answer.exit_code == 2, arguments
        assert said in answer.stderr
        assert isinstance(answer.exception, SystemExit)


def test_serve_refuses_what_it_cannot_serve(tmp_path, small):
    """No models, and a port that is taken, end the command with 1 and the reason."""
    answer = run("serve", "--models", tmp_path / "nowhere")
    assert answer.returncode == 1
    assert "--models" in answer.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answer = run("serve", "--models", small, "--port", taken.getsockname()[1])
    assert answer.returncode == 1
    assert "cannot listen on" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_serve_says_which_file_lets_nobody_in(tmp_path, small):
    """Of principals, or of certificates: rather than serve everybody."""
    path = tmp_path / "principals.yaml"
    path.write_text("principals: 3")
    for flags in (("--principals", path), ("--tls-cert", path, "--tls-key", path)):
        done = run("serve", "--port", "0", "--models", small, *flags)
        assert done.returncode == 1
        assert str(path) in done.stderr


def test_fetch(tmp_path, small):
    """`rnnserve fetch` says of every model whether its files are there, and exits with 1 if one's are not."""
    answer = invoke("fetch", small)
    assert (answer.exit_code, answer.stdout.strip()) == (0, f"{small / 'm' / '1'}: ready")
    directory(small, "cell: [", name="bad")
    answer = invoke("fetch", small)
    assert answer.exit_code == 1
    assert "is not YAML" in answer.stderr
    assert "ready" in answer.stdout


def test_help_names_every_setting():
    """Every setting is a flag of `rnnserve serve`."""
    answer = invoke("serve", "--help", COLUMNS="200", NO_COLOR="1", TERM="dumb")
    assert answer.exit_code == 0
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in answer.stdout
