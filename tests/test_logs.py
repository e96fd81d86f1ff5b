"""What the log and channelz tell of a server."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
import structlog
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from structlog.testing import capture_logs

import rnnserve
from rnnserve.errors import ServerError, SessionNotFound
from serving import running_server


def test_a_call_that_fails_is_logged_with_whom_it_concerns(monkeypatch):
    """A bug that a call meets is logged once, with its method, session and model, and with the principal if somebody
    has bound one; the caller is told nothing of it. A refusal is a line of debugging, with its reason.
    """

    async def broken(core, session_id):
        structlog.contextvars.bind_contextvars(principal="alice")  # as who lets calls in does, within the call
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("rnnserve_server.api.sessions.get_state", broken)
    with running_server() as server, rnnserve.Client(server.address) as client:
        session = client.session("lstm-4", session_id="mine")
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
            with pytest.raises(ServerError) as caught:
                session.get_states()
            with pytest.raises(SessionNotFound):
                next(iter([client.attach("nobody")]))
            with pytest.raises(rnnserve.ModelNotFound):
                client.RNN("no-such-model")
    assert "secret" not in str(caught.value)
    (line,) = [line for line in lines if line["event"] == "request failed"]
    assert (line["method"], line["session"], line["principal"], line["log_level"]) == (
        "GetState",
        "mine",
        "alice",
        "error",
    )
    refused = [line for line in lines if line["event"] == "call refused"]
    assert [(line["method"], line["reason"]) for line in refused] == [
        ("GetState", "INTERNAL"),
        ("GetModel", "MODEL_UNKNOWN"),
    ]
    assert refused[1]["model"] == "no-such-model"
    assert "principal" not in refused[1]


def test_a_bug_in_a_frame_is_logged_with_its_sessions(monkeypatch):
    """The line names the stream's peer, the model and the sessions of the frame that met it."""
    with running_server() as server, rnnserve.Client(server.address, retry_for=0.0) as client:
        session = client.session("lstm-4", session_id="mine")

        def broken(frame, key):
            raise ZeroDivisionError

        monkeypatch.setattr(server.server.core, "take_in", broken)
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines, pytest.raises(ServerError):
            session.step(np.zeros(session.model.inputs[0].shape, np.float32))
    (line,) = [line for line in lines if line["event"] == "request failed"]
    assert (line["model"], line["sessions"]) == ("lstm-4", ["mine"])
    assert line["peer"].startswith("ipv4:127.0.0.1:")


def test_a_slow_tick_of_a_server_is_logged():
    """With --slow-tick-seconds, a server logs a tick that took longer, with the session."""
    with running_server(slow_tick_seconds=1e-9) as server, rnnserve.Client(server.address) as client:
        with capture_logs() as lines, client.session("lstm-4", session_id="mine") as session:
            session.step(np.zeros(session.model.inputs[0].shape, np.float32))
        server.call(lambda: None)
    (line,) = [line for line in lines if line["event"] == "slow tick"]
    assert (line["model"], line["sessions"], line["rows"], line["steps"]) == ("lstm-4", ["mine"], 1, 1)
    assert line["seconds"] >= line["engine_seconds"] > 0


def test_channelz_tells_of_connections_if_it_may():
    """With --channelz, grpc.channelz.v1 tells of the server and of the client's socket; without, there is no such
    service.
    """
    for allowed in (True, False):
        with running_server(channelz=allowed) as server, grpc.insecure_channel(server.address) as channel:
            stub = channelz_pb2_grpc.ChannelzStub(channel)
            if not allowed:
                with pytest.raises(grpc.RpcError) as caught:
                    stub.GetServers(channelz_pb2.GetServersRequest())
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
                continue
            with rnnserve.Client(server.address) as client:
                client.models()
                (told,) = [
                    each
                    for each in stub.GetServers(channelz_pb2.GetServersRequest()).server
                    if each.data.calls_started >= 1
                ]
                sockets = stub.GetServerSockets(
                    channelz_pb2.GetServerSocketsRequest(server_id=told.ref.server_id)
                ).socket_ref
                assert len(sockets) == 2
