"""A server that is told to end does, whatever its clients and its store's library do."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Literal

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame

from raw_http2 import PREFACE, Wire, headers_of
from rnnserve_server.ending import end
from serving import RunningServer, running_server

SECONDS = 20.0
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def stopped(server: RunningServer) -> bool:
    """Whether a server that is told to ends."""
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(SECONDS)
    return not stopping.is_alive()


async def test_a_cancellation_that_gets_lost() -> None:
    """A task that goes on although it was cancelled is cancelled again."""
    lost = 0

    async def stubborn() -> None:
        nonlocal lost
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        lost += 1
        await asyncio.sleep(3600)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end([task])
    assert task.cancelled()
    assert lost == 1


async def test_who_was_told_has_time_to_clean_up() -> None:
    """What a task does in the end is not cut short if it was cancelled already."""
    cleaned = False

    async def tidy() -> None:
        nonlocal cleaned
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            cleaned = True

    task = asyncio.create_task(tidy())
    await asyncio.sleep(0)
    task.cancel()
    await end([task], told=True)
    assert cleaned


def test_a_chore_that_was_not_heard() -> None:
    """redis-py may swallow the cancellation of the chore that uses it: the server ends all the same."""
    with running_server() as server:
        swept = threading.Event()

        async def sweep() -> int:
            swept.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            return 0

        server.server.core.sweep = sweep  # type: ignore[method-assign]
        assert swept.wait(SECONDS)
        assert stopped(server)


@pytest.mark.parametrize("event_loop", ["completion", "uvloop"])
def test_who_watches_and_reads_nothing(event_loop: Literal["completion", "uvloop"]) -> None:
    """Such a watcher keeps nobody else from learning that the server drains, and it from its end."""
    with (
        running_server(event_loop=event_loop, drain_seconds=1.0) as server,
        Wire(server.address, greet=False) as deaf,
        grpc.insecure_channel(server.address) as channel,
    ):
        deaf.send(PREFACE, SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0}))
        deaf.call(1, headers_of("/grpc.health.v1.Health/Watch"), b"")
        assert any(isinstance(frame, HeadersFrame) for frame in deaf.read())  # the answer has begun
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watched).status == SERVING
        assert stopped(server)
        assert [told.status for told in watched] == [NOT_SERVING]
        assert not any(isinstance(frame, DataFrame) for frame in deaf.frames)


@pytest.mark.parametrize("event_loop", ["completion", "uvloop"])
def test_a_drain_does_not_wait_for_watchers(event_loop: Literal["completion", "uvloop"]) -> None:
    """They are told, and that was all: the time that streams have to finish is not theirs."""
    with (
        running_server(event_loop=event_loop, drain_seconds=3600.0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watched = [
            stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=SECONDS)
            for name in ("", "rnnserve.v1.InferenceService")
        ]
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=SECONDS)
        assert [next(each).status for each in watched] == [SERVING, SERVING]
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert set(stub.List(health_pb2.HealthListRequest()).statuses) >= {"", "rnnserve.v1.InferenceService"}
        assert stopped(server)
        assert [[told.status for told in each] for each in watched] == [[NOT_SERVING], [NOT_SERVING]]
        assert list(unknown) == []
