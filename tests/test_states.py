"""State in hand: seen, set, forked, carried to another server and taken back."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from house import FEATURES, AddingEngine, loaded
from rnnserve.codec import decode_named, encode_named
from rnnserve.v1 import inference_pb2, inference_pb2_grpc, session_pb2, session_pb2_grpc
from rnnserve_models.load import load_model
from rnnserve_server.repository import Repository
from serving import ZOO, running_server


class Served:
    """A server and stubs for it."""

    def __init__(self, server, channel):
        self.server = server
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)

    def create(self, model="lstm-4", **config):
        config = session_pb2.SessionConfig(model=model, **config)
        return self.sessions.CreateSession(session_pb2.CreateSessionRequest(config=config)).session.session_id

    def step(self, session_id, x, **fields):
        """A chunk [batch, time, features]: its output."""
        request = inference_pb2.PredictRequest(session_id=session_id, inputs=encode_named({"input": x}), **fields)
        return decode_named(self.inference.Predict(request, timeout=30).outputs)["output"]

    def states(self, session_id):
        response = self.sessions.GetState(session_pb2.GetStateRequest(session_id=session_id))
        return response.session.step, decode_named(response.states)

    def fork(self, session_id, **fields):
        request = session_pb2.ForkSessionRequest(session_id=session_id, **fields)
        return list(self.sessions.ForkSession(request).sessions)

    def export(self, session_id):
        return self.sessions.ExportSession(session_pb2.ExportSessionRequest(session_id=session_id)).blob

    def bring(self, blob, session_id=""):
        request = session_pb2.ImportSessionRequest(blob=blob, session_id=session_id)
        return self.sessions.ImportSession(request).session

    def rewind(self, session_id, step):
        request = session_pb2.RewindSessionRequest(session_id=session_id, step=step)
        return self.sessions.RewindSession(request).session


def repository(*more):
    made = Repository(ZOO)
    for model in (loaded(AddingEngine()), *(load_model(ZOO / name / "1") for name in ("lstm-4", "lstm-32-64")), *more):
        made.put(model.name, model.version, model)
    return made


@pytest.fixture(scope="module")
def served():
    with running_server(repository()) as server, grpc.insecure_channel(server.address) as channel:
        yield Served(server, channel)


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_smoke(served):
    a = served.create()
    xs = noise(10, 1, 2, 5)
    ys = [served.step(a, x) for x in xs[:5]]
    step, states = served.states(a)
    assert step == 10
    b, c = served.fork(a, count=2)
    assert b.step == 10
    d = served.bring(served.export(a))
    outs = [[served.step(i, x) for x in xs[5:]] for i in (a, b.session_id, c.session_id, d.session_id)]
    for o in outs[1:]:
        np.testing.assert_array_equal(o, outs[0])
    assert served.rewind(a, 4).step == 4
    again = [served.step(a, x) for x in xs[2:]]
    np.testing.assert_array_equal(again, ys[2:] + outs[0])
