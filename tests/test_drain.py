"""A server that drains while sessions stream: its clients take them elsewhere before it ends their streams.

Real servers on one Redis. What is not so is seen in the client's log, which tells of every stream that was lost under
chunks that wait.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import rnnserve
from fleet.traffic import Traffic
from redis_server import running_redis
from rnnserve import aio
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2, inference_pb2_grpc
from serving import RunningServer, running_server
from tcp_proxy import TcpProxy

SESSIONS = 24


async def roll(client: aio.Client, old: RunningServer, move: Callable[[], None]) -> None:
    """Has the old server drain while sessions stream: each of their outputs must be the oracle's."""
    traffic = Traffic(client, SESSIONS, pause=0.05, steps=3000)
    async with traffic.flowing():
        await traffic.go_on(4)
        assert len(old.server.core.sessions) > 0
        move()
        await asyncio.to_thread(old.stop)
        await traffic.go_on(4)


@pytest.mark.parametrize("durability", ["step", "interval", "none"])
async def test_sessions_leave_before_their_stream_ends(durability: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without a proxy: no chunk waits for another stream, and whatever the durability, no step is lost."""
    caplog.set_level(logging.INFO, "rnnserve")
    with (
        running_redis() as redis,
        running_server(store=redis.url, durability=durability, store_interval=3600) as old,
        running_server(store=redis.url, durability=durability, store_interval=3600) as new,
    ):
        async with aio.Client([old.address, new.address], timeout=60) as client:
            await roll(client, old, lambda: None)
        assert new.server.core.sessions.fetched.total() > 0
    assert "is on a server that shuts down" in caplog.text
    assert "go to other replicas" not in caplog.text


async def test_behind_a_proxy_too(caplog: pytest.LogCaptureFixture) -> None:
    """With several streams through one address: each is followed by another one, to where the proxy leads by then."""
    caplog.set_level(logging.INFO, "rnnserve")
    with running_redis() as redis, running_server(store=redis.url) as old, running_server(store=redis.url) as new:
        async with TcpProxy(old.address) as proxy, aio.Client(proxy.address, timeout=60, streams=3) as client:
            await roll(client, old, lambda: proxy.aim(new.address))
        assert new.server.core.sessions.fetched.total() == SESSIONS
    assert "is on a server that shuts down" in caplog.text
    assert "no stream to" not in caplog.text


def test_what_calls_did_is_stored_before_callers_are_sent_elsewhere() -> None:
    """Whatever the durability: once a server says that it does not serve, another one goes on where it was."""
    with (
        running_redis() as redis,
        running_server(store=redis.url, durability="interval", store_interval=3600, drain_seconds=20.0) as old,
        running_server(store=redis.url) as new,
        rnnserve.Client(old.address) as client,
        grpc.insecure_channel(old.address) as to_old,
        grpc.insecure_channel(new.address) as to_new,
    ):
        session = client.session("lstm-4")
        x = np.zeros((1, 3, *session.model.inputs[0].shape), np.float32)
        request = inference_pb2.PredictRequest(
            session_id=session.session_id, inputs=encode_named({"input": x}), first_step=0
        )
        inference_pb2_grpc.InferenceServiceStub(to_old).Predict(request)
        told = health_pb2_grpc.HealthStub(to_old).Watch(health_pb2.HealthCheckRequest())
        assert next(told).status == health_pb2.HealthCheckResponse.SERVING
        stopping = threading.Thread(target=old.stop)
        stopping.start()
        assert next(told).status == health_pb2.HealthCheckResponse.NOT_SERVING
        request.first_step = 3
        assert inference_pb2_grpc.InferenceServiceStub(to_new).Predict(request).step == 6
        told.cancel()
        stopping.join()
