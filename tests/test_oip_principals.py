"""The Open Inference Protocol on a server that knows principals: the same roles, owners and quotas as everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from house import FEATURES
from oip import arrays, request, told
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip import service_pb2_grpc
from test_principals import World, world

ONE = np.ones((1, 1, FEATURES), np.float32)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "p.yaml", allow_deploy=True) as made:
        yield made


class As:
    """A principal's stub."""

    def __init__(self, house: World, name: str) -> None:
        self._metadata = house[name].metadata
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(house[name].channel)

    def call(self, method: str, message: Any) -> Any:
        return getattr(self._stub, method)(message, metadata=self._metadata, timeout=20)

    def y(self, sequence: int, **how: Any) -> float:
        response = self.call("ModelInfer", request("adder", ONE, sequence, **how))
        return float(arrays(response)["output"].ravel()[0])

    def stream(self, *requests: Any) -> list[Any]:
        return list(self._stub.ModelStreamInfer(iter(requests), metadata=self._metadata, timeout=20))


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status, reason, *_ = told(caught.value)
    return status, reason


def test_two_principals_sequences_of_one_id_are_two(house: World) -> None:
    """Neither sees, moves, restarts or ends the other's, and one that has none is told what it would be of any id."""
    alice, bob = As(house, "alice"), As(house, "bob")
    assert alice.y(7, start=True) == 1
    assert refusal(lambda: bob.y(7)) == refusal(lambda: bob.y(8))
    assert bob.y(7, start=True) == 1
    assert [alice.y(7), alice.y(7), bob.y(7)] == [2, 3, 2]
    assert bob.y(7, end=True) == 3
    assert alice.y(7) == 4
    assert house["bob"].list() == []
    assert len(house["alice"].list()) == 1
    (answer,) = alice.stream(request("adder", ONE, 7, end=True))
    assert not answer.error_message
    assert house["alice"].list() == []


def test_roles_and_tokens_are_asked_for(house: World) -> None:
    """Who shows none is told nothing; who may deploy may not infer; who may infer may not unload."""
    ready = pb.ServerReadyRequest()
    assert refusal(lambda: As(house, "").call("ServerReady", ready))[0] == "UNAUTHENTICATED"
    assert refusal(lambda: As(house, "dora").y(1, start=True))[0] == "PERMISSION_DENIED"
    unload = pb.RepositoryModelUnloadRequest(model_name="adder")
    assert refusal(lambda: As(house, "alice").call("RepositoryModelUnload", unload))[0] == "PERMISSION_DENIED"
    for name in ("alice", "dora"):
        assert As(house, name).call("ServerReady", ready).ready


def test_rows_have_the_same_quota(tmp_path: Path) -> None:
    """A request beyond it is refused with the time to wait, and the sequence stays where it was."""
    with world(tmp_path / "p.yaml", quotas={"rows_per_second": 0.01}) as house:
        alice, bob = As(house, "alice"), As(house, "bob")
        assert alice.y(1, start=True) == 1
        assert refusal(lambda: alice.y(1))[0] == "RESOURCE_EXHAUSTED"
        assert [bob.y(1, start=True), bob.y(1)] == [1, 2]
