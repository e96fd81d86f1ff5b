"""Principals: who is let in, whose a session is, and how much each may have."""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
import yaml
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from typer.testing import CliRunner

import rnnserve
from certificates import Authority
from house import FEATURES, AddingEngine, Clock, loaded
from oip import Oip, arrays, request
from oip import said as parameters
from rnnserve.codec import decode_named, encode_named
from rnnserve.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from rnnserve_server.access.access import Access, Defaults
from rnnserve_server.access.authenticators import BearerTokens, ClientCertificates, Shown
from rnnserve_server.access.bucket import Bucket
from rnnserve_server.access.edit import with_token, without
from rnnserve_server.access.principals import PrincipalsError, read_principals
from rnnserve_server.api import errors as api_errors
from rnnserve_server.api.oip import service_pb2
from rnnserve_server.cli import app
from rnnserve_server.errors import PermissionDenied, QuotaExceeded, Unauthenticated
from rnnserve_server.repository import Repository
from serving import ZOO, RunningServer, running_server

ROLES = {"alice": ["use"], "bob": ["use"], "dora": ["deploy"], "root": ["admin"]}
NOW = datetime(2026, 11, 23, 14, tzinfo=UTC)


class As:
    """The stubs of a principal."""

    def __init__(self, server: RunningServer, token: str) -> None:
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.channel = grpc.insecure_channel(server.address)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)

    def create(self, session_id: str = "", **config: Any) -> str:
        wanted = session_pb2.SessionConfig(model="adder", session_id=session_id, **config)
        made = self.sessions.CreateSession(session_pb2.CreateSessionRequest(config=wanted), metadata=self.metadata)
        return made.session.session_id

    def step(self, session_id: str, first_step: int | None = None) -> np.ndarray:
        request = inference_pb2.PredictRequest(session_id=session_id, first_step=first_step, inputs=ONE)
        return decode_named(self.inference.Predict(request, metadata=self.metadata).outputs, "y")["output"]

    def list(self) -> list[str]:
        ids, token = [], ""
        while True:
            request = session_pb2.ListSessionsRequest(page_size=2, page_token=token)
            page = self.sessions.ListSessions(request, metadata=self.metadata)
            ids += [each.session_id for each in page.sessions]
            if not (token := page.next_page_token):
                return ids

    def stream(self, *requests: inference_pb2.StreamRequest) -> Iterator[inference_pb2.StreamResponse]:
        return self.inference.Stream(iter(requests), metadata=self.metadata, timeout=20)


class Lines:
    """A logger that keeps what it is given."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self._lines = lines

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda **line: self._lines.append(line)


def keep(logger: Any, name: str, event: dict[str, Any]) -> dict[str, Any]:
    return event


ONE = encode_named({"input": np.ones((1, 1, FEATURES), np.float32)})
FRAME = encode_named({"input": np.ones((1, 1, 1, FEATURES), np.float32)})


class World:
    """A server with principals, and stubs of each."""

    def __init__(self, server: RunningServer, path: Path, tokens: dict[str, str]) -> None:
        self.server, self.path, self.tokens = server, path, tokens
        self._made: dict[str, As] = {}

    def __getitem__(self, name: str) -> As:
        if name not in self._made:
            self._made[name] = As(self.server, self.tokens.get(name, name))
        return self._made[name]

    def close(self) -> None:
        for each in self._made.values():
            each.channel.close()


@contextlib.contextmanager
def world(path: Path, **settings: Any) -> Iterator[World]:
    tokens = {name: with_token(path, name, roles, NOW, None) for name, roles in ROLES.items()}
    if quotas := settings.pop("quotas", None):
        document = yaml.safe_load(path.read_text())
        document["principals"]["alice"]["quotas"] = quotas
        path.write_text(yaml.safe_dump(document))
    repository = Repository(ZOO)
    repository.put("adder", "1", loaded(AddingEngine()))
    with running_server(repository, principals=path, **settings) as server:
        made = World(server, path, tokens)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(params=["memory", "sqlite"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    store = {} if request.param == "memory" else {"store": f"sqlite://{tmp_path}/sessions.db"}
    with world(tmp_path / "principals.yaml", **store) as made:
        yield made


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, Any, list[str]]:
    """(status, message, details, keys of the trailer) of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return (
        error.code(),
        error.details(),
        rpc_status.from_call(error),
        [key for key, _ in error.trailing_metadata()],
    )


def info(status: Any) -> error_details_pb2.ErrorInfo:
    found = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(found)
    assert found.domain == "rnnserve"
    return found


# Who is let in


def test_without_a_token_nothing_is_answered_but_health(house: World):
    """Neither is a wrong one, another scheme, or one of a principal that was removed; each with its own status."""
    token = house.tokens["alice"]
    wrong = [
        (),
        (("authorization", ""),),
        (("authorization", "Basic YTpi"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Bearer {token[:-1]}{'A' if token[-1] != 'A' else 'B'}"),),
        (("authorization", f"Bearer rnns_00000000_{token[14:]}"),),
        (("authorization", "Bearer " + "x" * 4000),),
    ]
    stub = house["nobody"]
    calls = (
        lambda metadata: stub.sessions.ListSessions(session_pb2.ListSessionsRequest(), metadata=metadata),
        lambda metadata: stub.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata),
        lambda metadata: next(stub.inference.Stream(iter([inference_pb2.StreamRequest()]), metadata=metadata)),
        lambda metadata: stub.inference.Predict(inference_pb2.PredictRequest(), metadata=metadata),
        lambda metadata: next(
            reflection_pb2_grpc.ServerReflectionStub(stub.channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
            )
        ),
    )
    for metadata in wrong:
        for call in calls:
            code, message, status, _ = refusal(lambda call=call, metadata=metadata: call(metadata))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert info(status).reason == "UNAUTHENTICATED"
            assert "token" in message
            assert token not in message
    health = health_pb2_grpc.HealthStub(stub.channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_who_is_not_let_in_has_nothing_read_or_parsed(house: World):
    """A message that cannot be parsed is an error of who may send one; others hear only that they may not."""

    def send(metadata: Any) -> Callable[[], Any]:
        call = house["nobody"].channel.unary_unary("/rnnserve.v1.SessionService/GetSession")
        return lambda: call(b"\xff" * 1000, metadata=metadata, timeout=10)

    assert refusal(send(()))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert refusal(send(house["alice"].metadata))[0] is not grpc.StatusCode.UNAUTHENTICATED


def test_reflection_is_for_those_who_are_let_in(house: World):
    stub = reflection_pb2_grpc.ServerReflectionStub(house["alice"].channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answers = stub.ServerReflectionInfo(asked, metadata=house["alice"].metadata)
    names = [each.name for each in next(answers).list_services_response.service]
    assert "rnnserve.v1.SessionService" in names


def test_roles_say_what_is_allowed(house: World):
    """use runs, deploy deploys, admin does both; each other call is PERMISSION_DENIED and says which role it takes."""
    run = session_pb2.ListSessionsRequest()
    look = model_pb2.ListModelsRequest()
    deploy = model_pb2.UnloadModelRequest(name="adder")
    for name, may_run, may_deploy in [("alice", True, False), ("dora", False, True), ("root", True, True)]:
        stub = house[name]
        assert stub.models.ListModels(look, metadata=stub.metadata).models
        if may_run:
            stub.sessions.ListSessions(run, metadata=stub.metadata)
        else:
            code, message, status, _ = refusal(lambda s=stub: s.sessions.ListSessions(run, metadata=s.metadata))
            assert (code, info(status).reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
            assert "use" in message
        code, message, status, _ = refusal(lambda s=stub: s.models.UnloadModel(deploy, metadata=s.metadata))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        # Who may deploy hears that the server was not started with --allow-deploy, who may not, that he may not.
        assert info(status).reason == ("DEPLOY_DISABLED" if may_deploy else "PERMISSION_DENIED")


def test_tokens_come_and_go_without_a_restart(house: World):
    """A new one is taken; the streams of one that is removed are ended, with UNAUTHENTICATED."""
    alice = house["alice"]
    requests: Any = queue.SimpleQueue()
    answers = alice.inference.Stream(iter(requests.get, None), metadata=alice.metadata, timeout=30)
    opening = inference_pb2.LaneOpen(lane=0, create=session_pb2.SessionConfig(model="adder"))
    requests.put(inference_pb2.StreamRequest(opens=[opening]))
    assert next(answers).opened[0].lane == 0

    carol = As(house.server, with_token(house.path, "carol", None, NOW, None))
    without(house.path, house.tokens["alice"].split("_")[1])
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert refusal(alice.list)[0] is grpc.StatusCode.UNAUTHENTICATED
    assert carol.list() == []
    carol.channel.close()
    requests.put(None)


def test_log_lines_of_a_call_name_its_principal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever is logged while a call is answered."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(
        api_errors, "log", structlog.wrap_logger(Lines(lines), [structlog.contextvars.merge_contextvars, keep])
    )
    with world(tmp_path / "p.yaml") as house:
        for name in ("alice", "bob"):
            refusal(calls_of(house[name], "unknown")["get"])
    told = [line["principal"] for line in lines if line.get("reason") == "SESSION_UNKNOWN"]
    assert told == ["alice", "bob"]


# Whose a session is


def calls_of(stub: As, session_id: str) -> dict[str, Callable[[], Any]]:
    """Everything that one can do with a session."""
    s, m = session_pb2, stub.metadata
    named = {"session_id": session_id}
    states = encode_named({"sum": np.ones((1, FEATURES), np.float32)})
    return {
        "get": lambda: stub.sessions.GetSession(s.GetSessionRequest(**named), metadata=m),
        "step": lambda: stub.step(session_id),
        "step at": lambda: stub.step(session_id, 1),
        "get state": lambda: stub.sessions.GetState(s.GetStateRequest(**named), metadata=m),
        "set state": lambda: stub.sessions.ResetSession(s.ResetSessionRequest(**named, states=states), metadata=m),
        "reset": lambda: stub.sessions.ResetSession(s.ResetSessionRequest(**named, step=1), metadata=m),
        "fork": lambda: stub.sessions.ForkSession(s.ForkSessionRequest(**named), metadata=m),
        "fork to": lambda: stub.sessions.ForkSession(s.ForkSessionRequest(**named, session_ids=["f"]), metadata=m),
        "export": lambda: stub.sessions.ExportSession(s.ExportSessionRequest(**named), metadata=m),
        "rewind": lambda: stub.sessions.RewindSession(s.RewindSessionRequest(**named, step=0), metadata=m),
        "rollout": lambda: stub.inference.Rollout(
            inference_pb2.RolloutRequest(session_id=session_id, steps=1), metadata=m
        ),
        "delete": lambda: stub.sessions.DeleteSession(s.DeleteSessionRequest(**named), metadata=m),
    }


def on_a_stream(stub: As, session_id: str) -> bytes:
    """What a stream that opens a session, steps it and closes it answers."""
    request = inference_pb2.StreamRequest(
        opens=[inference_pb2.LaneOpen(lane=3, session_id=session_id)],
        frames=[inference_pb2.StepFrame(lanes=[3], inputs=FRAME)],
        closes=[inference_pb2.LaneClose(lane=3, delete_session=True)],
    )
    return b"".join(each.SerializeToString(deterministic=True) for each in stub.stream(request))


@pytest.mark.parametrize("life", ["live", "deleted"])
def test_anothers_session_is_one_that_was_never_seen(house: World, life: str):
    """Every call tells bob of alice's session what it tells him of an id that nobody ever had, byte for byte: status,
    message, details and trailer. And leaves it as it was.
    """
    hers, nobodys = "of-alice-1", "of-nobody1"
    house["alice"].create(hers)
    house["alice"].step(hers)
    if life == "deleted":
        request = session_pb2.DeleteSessionRequest(session_id=hers)
        house["alice"].sessions.DeleteSession(request, metadata=house["alice"].metadata)
    found, expected = calls_of(house["bob"], hers), calls_of(house["bob"], nobodys)
    for name, call in found.items():
        code, message, status, keys = refusal(call)
        other = refusal(expected[name])
        assert (code, message, keys) == (other[0], other[1].replace(nobodys, hers), other[3]), name
        assert code is grpc.StatusCode.NOT_FOUND
        told = status.SerializeToString(deterministic=True).replace(hers.encode(), nobodys.encode())
        assert told == other[2].SerializeToString(deterministic=True), name
        assert info(status).reason == "SESSION_UNKNOWN"
    bob = house["bob"]
    assert on_a_stream(bob, hers).replace(hers.encode(), nobodys.encode()) == on_a_stream(bob, nobodys)
    for guess in (f"alice/{hers}", f"/alice/{hers}", f"../alice/{hers}", f"bob/../alice/{hers}"):
        for call in calls_of(bob, guess).values():
            assert refusal(call)[0] is grpc.StatusCode.NOT_FOUND
    assert bob.list() == []
    if life == "live":
        shown = calls_of(house["alice"], hers)["get"]().session
        assert (shown.session_id, shown.step) == (hers, 1)
        assert (house["alice"].step(hers) == 2).all()


def test_two_principals_may_choose_the_same_id(house: World):
    """Made alone, on a stream, by a fork and by an import: nobody learns that another has the id."""
    blob = None
    for name in ("alice", "bob"):
        stub = house[name]
        assert stub.create("same") == "same"
        stub.step("same")
        fork = session_pb2.ForkSessionRequest(session_id="same", session_ids=["forked"])
        assert [s.session_id for s in stub.sessions.ForkSession(fork, metadata=stub.metadata).sessions] == ["forked"]
        exported = session_pb2.ExportSessionRequest(session_id="same")
        blob = blob or stub.sessions.ExportSession(exported, metadata=stub.metadata).blob
        imported = session_pb2.ImportSessionRequest(blob=blob, session_id="imported")
        assert (
            stub.sessions.ImportSession(imported, metadata=stub.metadata).session.session_id == "imported"
        )  # whoever has the blob has the state: it names nobody
        config = session_pb2.SessionConfig(model="adder", session_id="streamed")
        opened = list(stub.stream(inference_pb2.StreamRequest(opens=[inference_pb2.LaneOpen(lane=0, create=config)])))
        assert opened[0].opened[0].session.session_id == "streamed"
        assert sorted(stub.list()) == ["forked", "imported", "same", "streamed"]
    for make in (
        lambda: house["bob"].create("same"),
        lambda: house["bob"].sessions.ForkSession(fork, metadata=house["bob"].metadata),
        lambda: house["bob"].sessions.ImportSession(imported, metadata=house["bob"].metadata),
    ):
        code, message, status, _ = refusal(make)
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "bob" not in message
        assert "/" not in info(status).metadata["session_id"]


def test_an_id_of_ones_own_cannot_reach_into_anothers_name(house: World):
    for name in ("alice", "root"):
        for wanted in ("bob/x", "/x", "x/y"):
            code, message, _, _ = refusal(lambda name=name, wanted=wanted: house[name].create(wanted))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert f"got '{wanted}'" in message


def test_an_admin_sees_everybodys_sessions_and_names_them_in_full(house: World):
    house["alice"].create("a")
    house["bob"].create("b")
    root = house["root"]
    assert root.create("r") == "r"
    assert sorted(root.list()) == ["alice/a", "bob/b", "r"]
    assert (root.step("alice/a") == 1).all()
    assert calls_of(root, "alice/a")["get"]().session.session_id == "alice/a"
    calls_of(root, "bob/b")["delete"]()
    assert house["bob"].list() == []
    code, message, _, _ = refusal(calls_of(root, "bob/b")["get"])
    assert code is grpc.StatusCode.NOT_FOUND
    assert "'bob/b'" in message


def test_pages_have_only_ones_own(house: World):
    """However many others have: 2 a page of 5, among 20."""
    for number in range(10):
        house["alice"].create(f"a{number}")
        house["bob"].create(f"b{number}")
    assert house["alice"].list() == [f"a{number}" for number in range(10)]
    assert house["bob"].list() == [f"b{number}" for number in range(10)]


def test_another_server_on_the_store_honours_whose_a_session_is(tmp_path: Path):
    """And one that was made while nobody was asked is nobody's: only an admin reaches it."""
    store, path = f"sqlite://{tmp_path}/sessions.db", tmp_path / "principals.yaml"
    repository = Repository(ZOO)
    repository.put("adder", "1", loaded(AddingEngine()))
    with running_server(repository, store=store) as server:
        old = As(server, "")
        old.create("old")
        old.step("old")
        old.channel.close()
    with world(path, store=store) as first:
        first["alice"].create("hers")
        first["alice"].step("hers")
        tokens = first.tokens
        with running_server(repository, store=store, principals=path) as replica:
            second = World(replica, path, tokens)
            for name in ("alice", "bob"):
                assert refusal(calls_of(second[name], "old")["get"])[0] is grpc.StatusCode.NOT_FOUND
            assert refusal(calls_of(second["bob"], "hers")["step"])[0] is grpc.StatusCode.NOT_FOUND
            assert (second["alice"].step("hers") == 2).all()
            assert second["alice"].list() == ["hers"]
            assert sorted(second["root"].list()) == ["/old", "alice/hers"]
            assert (second["root"].step("/old") == 2).all()
            second.close()


# Quotas


def exceeded(call: Callable[[], Any], field: str) -> float:
    """The seconds to wait that a call which exceeds a quota is told."""
    code, message, status, _ = refusal(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, message
    assert (info(status).reason, info(status).metadata["field"]) == ("QUOTA_EXCEEDED", field)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    return retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_sessions_have_a_quota(tmp_path: Path, kind: str):
    """In every way to make one; those that rest in the store count too; what ends makes room; others do not matter."""
    store = {} if kind == "memory" else {"store": f"sqlite://{tmp_path}/sessions.db"}
    with world(tmp_path / "p.yaml", quotas={"sessions": 3}, **store) as house:
        alice = house["alice"]
        alice.create("one")
        alice.create("two")
        if kind == "sqlite":
            house.server.call(lambda: house.server.server.core.keeper.rest(0, lambda group: None))
            assert not house.server.call(lambda: len(house.server.server.core.sessions))
        alice.create("three")
        fork = session_pb2.ForkSessionRequest(session_id="one", count=1)
        exported = session_pb2.ExportSessionRequest(session_id="one")
        blob = alice.sessions.ExportSession(exported, metadata=alice.metadata).blob
        imported = session_pb2.ImportSessionRequest(blob=blob)
        for make in (
            alice.create,
            lambda: alice.sessions.ForkSession(fork, metadata=alice.metadata),
            lambda: alice.sessions.ImportSession(imported, metadata=alice.metadata),
        ):
            assert exceeded(make, "sessions") > 0
        house["bob"].create()
        calls_of(alice, "two")["delete"]()
        create = session_pb2.SessionConfig(model="adder")
        opens = [inference_pb2.LaneOpen(lane=lane, create=create) for lane in range(3)]
        (answer,) = list(alice.stream(inference_pb2.StreamRequest(opens=opens)))
        assert [len(answer.opened), len(answer.errors)] == [1, 2]
        assert {error.status.code for error in answer.errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}


def test_states_have_a_quota_in_bytes(tmp_path: Path):
    """A session of the adder has 8 bytes a row."""
    with world(tmp_path / "p.yaml", quotas={"state_bytes": 100}) as house:
        house["alice"].create("large", batch_size=10)
        assert exceeded(lambda: house["alice"].create(batch_size=3), "state_bytes") > 0
        house["alice"].create(batch_size=2)
        house["bob"].create(batch_size=1000)
        calls_of(house["alice"], "large")["delete"]()
        house["alice"].create(batch_size=10)


def test_rows_have_a_quota_a_second(tmp_path: Path):
    """Of streams, calls and rollouts together, and the session stays where it was. Others are not held back."""
    with world(tmp_path / "p.yaml", quotas={"rows_per_second": 0.01}) as house:
        alice = house["alice"]
        session = alice.create()
        assert (alice.step(session) == 1).all()
        assert 0 < exceeded(lambda: alice.step(session), "rows_per_second") <= 100
        rollout = inference_pb2.RolloutRequest(session_id=session, steps=1, inputs=ONE)
        assert exceeded(lambda: alice.inference.Rollout(rollout, metadata=alice.metadata), "rows_per_second") > 0
        request = inference_pb2.StreamRequest(
            opens=[inference_pb2.LaneOpen(lane=0, session_id=session)],
            frames=[inference_pb2.StepFrame(lanes=[0], inputs=FRAME)],
        )
        errors = [error for response in alice.stream(request) for error in response.errors]
        assert [error.status.code for error in errors] == [grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]]
        assert calls_of(alice, session)["get"]().session.step == 1
        other = house["bob"].create()
        for _ in range(20):
            house["bob"].step(other)
        with rnnserve.Client(house.server.address, token=house.tokens["alice"]) as client:
            attached = client.attach(session)
            with pytest.raises(rnnserve.QuotaExceeded) as caught:
                attached.step(np.ones(FEATURES, np.float32))
            assert caught.value.retry_after > 0


def test_the_bucket_keeps_the_rate_over_time():
    """Frames of any size, at the pace that the bucket tells: never more than the rate and one frame."""
    clock = Clock()
    bucket = Bucket("alice", 100.0, clock)
    began, done, frame = clock.now, 0, 250
    for _ in range(200):
        try:
            bucket.take(frame)
            done += frame
        except QuotaExceeded as error:
            clock.now += (error.retry_after or 0.0) + 1e-6
    assert (clock.now - began) * 100 <= done <= 100 + (clock.now - began) * 100 + frame
    bucket.set_rate(0)
    for _ in range(100):
        bucket.take(10**9)
    bucket.set_rate(1)
    bucket.take(1)
    with pytest.raises(QuotaExceeded):
        bucket.take(1)


# The file


def test_the_file_has_no_token_and_only_its_owner_reads_it(tmp_path: Path):
    path = tmp_path / "principals.yaml"
    token = with_token(path, "alice", ["use", "deploy"], NOW, NOW + timedelta(days=1))
    text = path.read_text()
    assert token not in text
    assert token.split("_", 2)[2] not in text
    assert path.stat().st_mode & 0o077 == 0
    (entry,) = read_principals(path).principals.values()
    assert entry.roles == {"use", "deploy"}
    assert len({with_token(path, "alice", None, NOW, None) for _ in range(20)}) == 20
    assert len(read_principals(path).principals["alice"].tokens) == 21


def test_the_command_makes_shows_and_removes_tokens(tmp_path: Path):
    """The token is printed alone, so that a script can take it; a wrong role, name or id changes nothing."""

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["token", *arguments], env={"RNNSERVE_PRINCIPALS": str(path)})

    path = tmp_path / "principals.yaml"
    made = run("add", "alice", "--role", "use", "--role", "deploy", "--days", "30")
    assert made.exit_code == 0
    token = made.stdout.strip()
    access = Access(path, Defaults())
    shown = access.shown([("authorization", f"Bearer {token}")], {})
    assert access.enter("/rnnserve.v1.ModelService/DeployModel", shown).name == "alice"
    before = path.read_bytes()
    for wrong, said in [
        (("add", "alice", "--role", "king"), "roles"),
        (("add", "a/b"), "a/b"),
        (("rm", "nobody"), "'nobody'"),
    ]:
        done = run(*wrong)
        assert done.exit_code == 1
        assert said in done.stderr
    assert path.read_bytes() == before
    listed = run("ls").stdout
    identity = token.split("_")[1]
    assert "alice: deploy, use" in listed
    assert identity in listed
    assert token not in listed
    assert run("rm", identity).exit_code == 0
    assert identity not in run("ls").stdout
    assert run("rm", "alice").exit_code == 0
    assert run("ls").stdout == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("principals: [", "not YAML"),
        ("principals: {alice: {roles: [king]}}", "alice.roles"),
        ("principals: {a/b: {}}", "a/b"),
        ("principals: {'': {}}", "principals"),
        ("principals: {alice: {tokens: [{id: 00000000, sha256: short}]}}", "sha256"),
        ("principals: {a: {certificates: [x]}, b: {certificates: [x]}}", "'x' is there twice"),
        ("principals: {a: {colour: red}}", "colour"),
        ("- 1", "dictionary"),
    ],
)
def test_a_file_that_says_something_else_is_refused_by_name(tmp_path: Path, text: str, said: str):
    path = tmp_path / "principals.yaml"
    path.write_text(text)
    with pytest.raises(PrincipalsError, match=said) as caught:
        read_principals(path)
    assert str(path) in str(caught.value)


def test_a_token_ends_when_it_says(tmp_path: Path):
    path, clock = tmp_path / "p.yaml", Clock(NOW.timestamp())
    token = with_token(path, "alice", None, NOW, NOW + timedelta(seconds=60))
    access = Access(path, Defaults(), clock=clock, wall_clock=clock)
    method = "/rnnserve.v1.SessionService/GetSession"
    shown = access.shown([("authorization", f"bearer {token}")], {})
    who = access.enter(method, shown)
    assert (who.name, access.still(who, shown)) == ("alice", True)
    clock.now += 60
    assert not access.still(who, shown)
    with pytest.raises(Unauthenticated, match="expired"):
        access.enter(method, access.shown([("authorization", f"bearer {token}")], {}))


def test_a_method_that_nobody_has_thought_of_is_for_admins(tmp_path: Path):
    path = tmp_path / "p.yaml"
    tokens = {name: with_token(path, name, roles, NOW, None) for name, roles in ROLES.items()}
    access = Access(path, Defaults())
    for name, token in tokens.items():
        shown = access.shown([("authorization", f"Bearer {token}")], {})
        if name == "root":
            assert access.enter("/grpc.channelz.v1.Channelz/GetServers", shown).sees_all
        else:
            with pytest.raises(PermissionDenied, match="admin"):
                access.enter("/grpc.channelz.v1.Channelz/GetServers", shown)


def test_a_certificate_is_a_principals(tmp_path: Path):
    """Over mutual TLS, by its common name; a token beside it counts first, and a wrong one is not made good by it."""
    path = tmp_path / "p.yaml"
    token = with_token(path, "bob", None, NOW, None)
    document = yaml.safe_load(path.read_text())
    document["principals"]["edge"] = {"roles": ["use"], "certificates": ["edge-7"]}
    path.write_text(yaml.safe_dump(document))
    ca = Authority(tmp_path)
    cert, key = ca.issue("server")
    repository = Repository(ZOO)
    repository.put("adder", "1", loaded(AddingEngine()))
    settings = {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca.root, "principals": path}
    with running_server(repository, **settings) as server:
        known, strange = (rnnserve.TLS(ca.root, *ca.issue(name)) for name in ("edge-7", "edge-8"))
        with rnnserve.Client(server.address, tls=known) as client:
            made = client.session("adder", session_id="x")
            assert [each.session_id for each in client.sessions()] == ["x"]
        with rnnserve.Client(server.address, tls=known, token=token) as client:
            assert list(client.sessions()) == []
        for tls, shown in ((strange, None), (known, "wrong")):
            with (
                rnnserve.Client(server.address, tls=tls, token=shown) as client,
                pytest.raises(rnnserve.Unauthenticated),
            ):
                list(client.sessions())
        assert made.session_id == "x"


def test_another_way_to_show_who_one_is_is_another_class(tmp_path: Path):
    """The seam: the first one that finds something of its kind decides."""

    class Header:
        def authenticate(self, shown: Shown, known: Any) -> str | None:
            return shown.metadata.get("x-forwarded-user")

    path = tmp_path / "p.yaml"
    with_token(path, "alice", None, NOW, None)
    access = Access(path, Defaults(), [Header(), BearerTokens(), ClientCertificates()])
    method = "/rnnserve.v1.SessionService/GetSession"
    assert access.enter(method, access.shown([("x-forwarded-user", "alice")], {})).name == "alice"
    with pytest.raises(Unauthenticated):
        access.enter(method, access.shown([("x-forwarded-user", "mallory")], {}))


# The client


def test_a_client_shows_its_token_and_says_what_it_is_told(house: World):
    shown = []

    def token() -> str:
        shown.append(1)
        return house.tokens["alice"]

    with (
        rnnserve.Client(house.server.address, token=token) as client,
        client.session("adder", session_id="mine") as session,
    ):
        assert (session.step(np.ones(FEATURES, np.float32)) == 1).all()
        assert [each.session_id for each in client.sessions()] == ["mine"]
        fork = session.fork()
        assert (fork.step(np.ones(FEATURES, np.float32)) == 2).all()
        fork.close()
        assert len(shown) > 2
    for wrong in (None, "rnns_00000000_x"):
        with (
            rnnserve.Client(house.server.address, token=wrong, retry_for=5) as client,
            pytest.raises(rnnserve.Unauthenticated),
        ):
            client.session("adder")
    with rnnserve.Client(house.server.address, token=house.tokens["dora"]) as client:
        with pytest.raises(rnnserve.PermissionDenied, match="use"):
            client.session("adder")
        with pytest.raises(rnnserve.DeployDisabled):
            client.models.unload("adder")


def test_the_command_shows_its_token_too(house: World):
    """`rnnserve sessions` sees what the token's principal may see; an admin names another's in full."""
    house["alice"].create("hers")
    house["bob"].create("his")
    address = ["--address", house.server.address]
    for name, code, seen in (("alice", 0, {"hers"}), ("root", 0, {"alice/hers", "bob/his"}), ("nobody", 1, set())):
        environment = {"RNNSERVE_TOKEN": house.tokens.get(name, "")}
        done = CliRunner().invoke(app, ["sessions", "ls", "--json", *address], env=environment)
        assert done.exit_code == code, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # the server logs here too
        assert {json.loads(line)["session_id"] for line in lines} == seen
    environment = {"RNNSERVE_TOKEN": house.tokens["root"]}
    assert CliRunner().invoke(app, ["sessions", "rm", "bob/his", *address], env=environment).exit_code == 0
    assert house["bob"].list() == []


async def test_the_asyncio_client_shows_its_token_too(house: World):
    async with (
        rnnserve.aio.Client(house.server.address, token=house.tokens["bob"]) as client,
        client.session("adder") as session,
    ):
        assert (await session.step(np.ones(FEATURES, np.float32)) == 1).all()


def test_a_token_is_not_sent_in_clear_to_another_machine():
    for target in ("example.org:50051", "dns:///example.org:50051", "10.0.0.1:50051"):
        with pytest.raises(ValueError, match="in clear"):
            rnnserve.Client(target, token="t")
        rnnserve.Client(target, token="t", tls=True).close()
        rnnserve.Client(target, token="t", tls=False).close()
    for target in ("localhost:50051", "127.0.0.1:50051", "unix:/tmp/x", "dns:///localhost:50051"):
        rnnserve.Client(target, token="t").close()


def test_a_sequence_of_the_open_inference_protocol_is_its_principals_own(house: World) -> None:
    """Two may have the same id, calls and streams alike, and neither reaches what the other has."""
    x = np.ones((1, 1, FEATURES), np.float32)
    for name in ("alice", "bob"):
        stub, who = Oip(house[name].channel).stub, {"metadata": house[name].metadata, "timeout": 20}
        first = stub.ModelInfer(request("adder", x, 5, start=True), **who)
        assert arrays(first)["output"].tolist() == [[1, 1]]
        assert parameters(first)["rnnserve_session_id"] == "seq:adder:i:5"
        (second,) = stub.ModelStreamInfer(iter([request("adder", x, 5)]), **who)
        assert arrays(second.infer_response)["output"].tolist() == [[2, 2]]
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(request("adder", x, 6), **who)
        assert name not in str(rpc_status.from_call(error.value))
        with pytest.raises(grpc.RpcError) as error:
            stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="adder"), **who)
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert "seq:adder:i:5" in house[name].list()
    with pytest.raises(grpc.RpcError) as error:
        Oip(house["nobody"].channel).stub.ModelInfer(request("adder", x, 5), timeout=20)
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
