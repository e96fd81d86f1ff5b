"""A stranger's tool, grpcurl, against a real server: what it learns comes from reflection alone."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving import RunningServer, running_server

GRPCURL = Path(sys.executable).with_name("grpcurl")


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


def grpcurl(server: RunningServer, *arguments: str, said: str = "") -> str:
    """What grpcurl prints. ``said`` is the request, in JSON."""
    before, method = arguments[:-1], arguments[-1]
    request = ("-d", said) if said else ()
    done = subprocess.run(
        [GRPCURL, "-plaintext", *request, *before, server.address, method],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_grpcurl_lists_the_services(server: RunningServer) -> None:
    """Reflection names every service of the contract, and health."""
    assert set(grpcurl(server, "list").split()) >= {
        "grpc.health.v1.Health",
        "rnnserve.v1.InferenceService",
        "rnnserve.v1.ModelService",
        "rnnserve.v1.SessionService",
    }


@pytest.mark.parametrize("service", ["", "rnnserve.v1.InferenceService"])
def test_grpcurl_is_told_that_the_server_serves(server: RunningServer, service: str) -> None:
    """Health says SERVING, for the server and for a service."""
    answer = grpcurl(server, "grpc.health.v1.Health/Check", said=json.dumps({"service": service}))
    assert json.loads(answer) == {"status": "SERVING"}


def test_grpcurl_predicts(server: RunningServer) -> None:
    """A call can be written by hand in JSON: the contract needs no client of ours."""
    x = np.zeros((1, 3, 5), np.float32)
    tensor = {"dataType": "DATA_TYPE_FLOAT32", "shape": [1, 3, 5], "data": base64.b64encode(x.tobytes()).decode()}
    said = json.dumps({"model": "lstm-4", "inputs": [{"name": "input", "tensor": tensor}]})
    (output,) = json.loads(grpcurl(server, "rnnserve.v1.InferenceService/Predict", said=said))["outputs"]
    assert output["name"] == "output"
    assert output["tensor"]["shape"] == ["1", "4"]
