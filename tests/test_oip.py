"""The Open Inference Protocol, through stubs of our own on a real server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from house import FEATURES, AddingEngine, loaded
from oip import Oip, arrays, put, request, said, told
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2, inference_pb2_grpc, session_pb2, session_pb2_grpc
from rnnserve_models.errors import ModelError
from rnnserve_models.load import load_model
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip.sequences import session_id
from rnnserve_server.repository import Repository
from serving import ZOO, RunningServer, running_server


def repository() -> Repository:
    made = Repository(ZOO)
    for model in (
        loaded(AddingEngine()),
        loaded(AddingEngine(), version="2"),
        loaded(AddingEngine(finite=True), name="strict"),
        load_model(ZOO / "lstm-4" / "1"),
    ):
        made.put(model.name, model.version, model)
    made.put("broken", "1", ModelError("its weights are gone"))
    return made


class Served:
    """A server, stubs of both protocols, and the engine of the adder."""

    def __init__(self, server: RunningServer, channel: grpc.Channel) -> None:
        self.server = server
        self.oip = Oip(channel)
        self.stub = self.oip.stub
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)

    @property
    def core(self) -> Any:
        return self.server.server.core

    @property
    def adder(self) -> AddingEngine:
        engine = self.core.repository.get("adder", "2").engine
        assert isinstance(engine, AddingEngine)
        return engine

    def refused(self, *args: Any, **kwargs: Any) -> tuple[str, str, str, float | None]:
        """What a request is told that must fail."""
        with pytest.raises(grpc.RpcError) as error:
            self.oip.infer(*args, **kwargs)
        return told(error.value)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    limits = {"inline_seconds": 0.0, "idle_lifetime": 60.0, "max_batch_size": 16}
    with running_server(repository(), **limits) as server, grpc.insecure_channel(server.address) as channel:
        yield Served(server, channel)


def ones(*shape: int, value: float = 1.0) -> np.ndarray:
    return np.full((*shape, FEATURES), value, np.float32)


# The server and its models


def test_a_server_says_what_it_is_and_no_more_than_holds(served: Served) -> None:
    assert served.stub.ServerLive(pb.ServerLiveRequest()).live
    assert served.stub.ServerReady(pb.ServerReadyRequest()).ready
    server = served.stub.ServerMetadata(pb.ServerMetadataRequest())
    assert server.name == "rnnserve"
    assert {"sequence", "sequence(string_id)", "statistics"} <= set(server.extensions)
    assert "model_repository" not in server.extensions  # nobody may deploy here
    ready = {
        (name, version): served.stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready
        for name, version in (("adder", ""), ("adder", "1"), ("adder", "9"), ("broken", ""), ("nobody", ""))
    }
    assert ready == {
        ("adder", ""): True, ("adder", "1"): True, ("adder", "9"): False, ("broken", ""): False, ("nobody", ""): False,
    }  # fmt: skip


def test_a_model_is_described_as_triton_describes_one(served: Served) -> None:
    model = served.stub.ModelMetadata(pb.ModelMetadataRequest(name="adder"))
    assert (model.name, list(model.versions), model.platform) == ("adder", ["2", "1"], "rnnserve_adding")
    (tensor,) = model.inputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("input", "FP32", [-1, -1, FEATURES])
    (tensor,) = model.outputs  # the layer's default is the last output
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("output", "FP32", [-1, FEATURES])
    config = served.stub.ModelConfig(pb.ModelConfigRequest(name="adder")).config
    assert config.max_batch_size == 16
    assert list(config.input[0].dims) == [-1, FEATURES]  # without the batch axis
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    assert config.sequence_batching.max_sequence_idle_microseconds == 60_000_000
    assert [state.input_name for state in config.sequence_batching.state] == ["sum"]
    assert not config.model_transaction_policy.decoupled
    with pytest.raises(grpc.RpcError) as error:
        served.stub.ModelConfig(pb.ModelConfigRequest(name="nobody"))
    assert told(error.value)[:2] == ("NOT_FOUND", "MODEL_UNKNOWN")


def test_the_index_names_models_that_could_not_be_loaded_and_why(served: Served) -> None:
    every = served.stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
    assert [(m.name, m.version, m.state) for m in every] == [
        ("adder", "2", "READY"), ("adder", "1", "READY"), ("broken", "1", "UNAVAILABLE"), ("lstm-4", "1", "READY"),
        ("strict", "1", "READY"),
    ]  # fmt: skip
    assert every[2].reason == "its weights are gone"
    ready = served.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models
    assert [m.name for m in ready] == ["adder", "adder", "lstm-4", "strict"]
    with pytest.raises(grpc.RpcError) as error:
        served.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="adder"))
    assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_models_are_loaded_and_unloaded_where_deploying_is_allowed() -> None:
    with running_server(allow_deploy=True) as server, grpc.insecure_channel(server.address) as channel:
        stub, oip = Oip(channel).stub, Oip(channel)
        assert "model_repository" in stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
        x = np.ones((1, 1, 5), np.float32)
        before = oip.y("lstm-4", x, 7, start=True)
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="lstm-4"))
        assert not stub.ModelReady(pb.ModelReadyRequest(name="lstm-4")).ready
        assert (oip.y("lstm-4", x, 7) != before).all()  # a live sequence goes on
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="lstm-4"))
        assert np.array_equal(oip.y("lstm-4", x, 8, start=True), before)
        load = pb.RepositoryModelLoadRequest(model_name="lstm-4")
        load.parameters["config"].string_param = "{}"
        with pytest.raises(grpc.RpcError) as error:
            stub.RepositoryModelLoad(load)
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


# Sequences


def test_a_sequence_keeps_its_state_from_its_start_to_its_end(served: Served) -> None:
    for sequence in (5, "5", 1 << 62, "an id / with anything: in it"):
        assert served.oip.y("adder", ones(1, 1), sequence, start=True).tolist() == [[1, 1]]
        assert served.oip.y("adder", ones(1, 1), sequence).tolist() == [[2, 2]]
        assert served.oip.y("adder", ones(1, 1), sequence, end=True).tolist() == [[3, 3]]
        assert session_id("adder", sequence) not in served.core.sessions


def test_a_number_and_its_text_are_two_sequences_and_so_is_one_id_of_two_models(served: Served) -> None:
    for model, sequence, value in (("adder", 6, 1.0), ("adder", "6", 2.0), ("strict", 6, 3.0)):
        served.oip.infer(model, ones(1, 1, value=value), sequence, start=True)
    for model, sequence, value in (("adder", 6, 1.0), ("adder", "6", 2.0), ("strict", 6, 3.0)):
        assert served.oip.y(model, ones(1, 1, value=value), sequence, end=True)[0, 0] == 2 * value


def test_a_sequence_is_a_session_of_the_other_protocol(served: Served) -> None:
    answer = served.oip.infer("adder", ones(1, 3), 10, start=True)
    named = said(answer)["rnnserve_session_id"]
    session = served.sessions.GetSession(session_pb2.GetSessionRequest(session_id=named)).session
    assert (session.model, session.version, session.step, session.batch_size) == ("adder", "2", 3, 1)
    predict = inference_pb2.PredictRequest(session_id=named, inputs=encode_named({"input": ones(1, 1)}))
    assert served.inference.Predict(predict).step == 4
    assert served.oip.y("adder", ones(1, 1), 10, end=True).tolist() == [[5, 5]]


def test_the_start_of_a_live_sequence_restarts_it_as_triton_does(served: Served) -> None:
    for _ in range(3):
        assert served.oip.y("adder", ones(2, 1), 11, start=True).tolist() == [[1, 1]] * 2
        assert served.oip.y("adder", ones(2, 1), 11).tolist() == [[2, 2]] * 2
    assert served.oip.y("adder", ones(3, 4), 11, start=True, end=True).tolist() == [[4, 4]] * 3  # another batch size


def test_the_start_of_a_live_sequence_is_refused_where_the_settings_say_so() -> None:
    with (
        running_server(repository(), sequence_restart="refuse") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        served = Served(server, channel)
        served.oip.infer("adder", ones(1, 1), 5, start=True)
        assert served.refused("adder", ones(1, 1), 5, start=True)[:2] == ("ALREADY_EXISTS", "SESSION_EXISTS")
        assert served.oip.y("adder", ones(1, 1), 5).tolist() == [[2, 2]]


def test_a_request_without_a_sequence_keeps_nothing(served: Served) -> None:
    for _ in range(2):
        assert served.oip.y("adder", ones(1, 3)).tolist() == [[3, 3]]
    assert served.refused("adder", ones(1, 1), step=1)[:2] == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    flagged = request("adder", ones(1, 1))
    flagged.parameters["sequence_start"].bool_param = True
    with pytest.raises(grpc.RpcError) as error:
        served.stub.ModelInfer(flagged)
    assert "must specify a non-zero or non-empty correlation ID" in error.value.details()


def test_many_steps_go_by_the_time_axis_and_one_needs_none(served: Served) -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, FEATURES)).astype(np.float32)
    whole = served.oip.y("adder", x, 12, start=True, end=True, return_sequences=True)
    assert whole.shape == (2, 6, FEATURES)
    cut = [served.oip.y("adder", x[:, :4], 12, start=True, return_sequences=True)]
    cut += [served.oip.y("adder", x[:, 4], 12)[:, None], served.oip.y("adder", x[:, 5:], 12)]
    assert [part.shape for part in cut] == [(2, 4, FEATURES), (2, 1, FEATURES), (2, 1, FEATURES)]
    assert np.array_equal(np.concatenate(cut, axis=1), whole)


def test_layer_options_are_parameters_of_the_start(served: Served) -> None:
    x = ones(3, 2)
    y = served.oip.y("adder", x, 13, start=True, return_sequences=True, time_major=True)
    assert y.tolist() == [[[1, 1], [1, 1]], [[2, 2], [2, 2]], [[3, 3], [3, 3]]]  # [time, batch, 2]
    assert served.refused("adder", x, 13, return_sequences=False)[1] == "INVALID_REQUEST"
    assert served.oip.y("adder", x, 13, time_major=True, end=True)[-1].tolist() == [[6, 6], [6, 6]]
    status, _, message, _ = served.refused("adder", x, 13, start=True, return_sequence=True)
    assert status == "INVALID_ARGUMENT"
    assert "rnnserve_return_sequences" in message


def test_states_are_given_with_the_start_and_had_with_any_answer(served: Served) -> None:
    state = np.array([[10, 20]], np.float32)
    given = {"input": ones(1, 1), "sum": state}
    assert served.oip.y("adder", given, 14, start=True).tolist() == [[11, 21]]
    answer = arrays(served.oip.infer("adder", ones(1, 2), 14, outputs=["output", "sum"]))
    assert {name: value.tolist() for name, value in answer.items()} == {"output": [[13, 23]], "sum": [[13, 23]]}
    status, reason, message, _ = served.refused("adder", given, 14)
    assert (status, reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert "only the first request" in message
    assert served.oip.y("adder", ones(1, 1), 14, end=True, outputs=["sum"]).tolist() == [[14, 24]]
    assert arrays(served.oip.infer("adder", given, outputs=["sum"]))["sum"].tolist() == [[11, 21]]  # without a sequence


def test_a_mask_is_an_optional_input(served: Served) -> None:
    mask = np.array([[True, False, True]])
    assert served.oip.y("adder", {"input": ones(1, 3), "mask": mask}).tolist() == [[2, 2]]


def test_the_same_answer_comes_for_typed_contents_and_is_typed_if_that_is_asked_for(served: Served) -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 5)).astype(np.float32)
    typed = pb.ModelInferRequest(model_name="lstm-4")
    typed.inputs.add(name="input", datatype="FP32", shape=x.shape).contents.fp32_contents.extend(x.ravel().tolist())
    expected = served.oip.y("lstm-4", x)
    assert np.array_equal(arrays(served.stub.ModelInfer(typed))["output"], expected)
    put(typed.parameters["rnnserve_contents"], "typed")
    answer = served.stub.ModelInfer(typed)
    assert not answer.raw_output_contents
    assert list(answer.outputs[0].contents.fp32_contents) == expected.ravel().tolist()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.inputs.pop(), "raw_input_contents: expected 0"),
        (lambda r: setattr(r.inputs[0], "name", "x"), "inputs.input: expected a tensor, got none"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP64"), "expected 32 bytes of FP64 for shape [1, 2, 2], got 16"),
        (lambda r: setattr(r.inputs[0], "datatype", "BYTES"), "expected a datatype among"),
        (lambda r: r.inputs[0].shape.__setitem__(0, -1), "extents of 0 or more"),
        (lambda r: r.inputs[0].shape.__setitem__(slice(None), [4]), "expected shape [batch, time, 2] or [batch, 2]"),
        (lambda r: r.inputs[0].contents.fp32_contents.append(1), "raw or typed contents, got both"),
        (lambda r: put(r.inputs[0].parameters["shared_memory_region"], "r"), "shared memory is not offered"),
        (lambda r: r.outputs.add(name="nothing"), "expected one of ['sum', 'output']"),
        (lambda r: put(r.parameters["sequence_end"], "yes"), "expected a bool_param"),
        (lambda r: put(r.parameters["rnnserve_step"], 7), "expects a chunk at step 1, got one at step 7"),
        (lambda r: setattr(r, "model_version", "1"), "expected '2', with which the sequence began"),
        (lambda r: setattr(r, "model_name", "nobody"), "Request for unknown model: no model 'nobody'"),
    ],
)
def test_a_wrong_request_says_what_was_expected_and_changes_nothing(served: Served, change: Any, says: str) -> None:
    served.oip.infer("adder", ones(1, 1), 15, start=True)
    wrong = request("adder", ones(1, 2), 15)
    change(wrong)
    with pytest.raises(grpc.RpcError) as error:
        served.stub.ModelInfer(wrong)
    assert says in error.value.details()
    assert served.oip.y("adder", ones(1, 1), 15, end=True).tolist() == [[2, 2]]


def test_a_start_that_is_refused_leaves_the_live_sequence_as_it_was(served: Served) -> None:
    served.oip.infer("strict", ones(1, 1), 16, start=True)
    assert served.refused("strict", ones(1, 1, value=np.nan), 16, start=True)[1] == "NOT_FINITE"
    assert served.refused("strict", np.ones((1, 1, 3), np.float32), 16, start=True)[1] == "INVALID_INPUT"
    assert served.refused("strict", ones(17, 1), 16, start=True)[1] == "TOO_LARGE"
    assert served.oip.y("strict", ones(1, 1), 16, end=True).tolist() == [[2, 2]]


# Streams


def test_a_stream_answers_in_order_and_says_that_each_answer_is_the_last(served: Served) -> None:
    requests = [
        request("adder", ones(1, 1 + k % 3), sequence, start=k == 0, end=k == 5, id=f"{sequence}/{k}")
        for k in range(6)
        for sequence in (20, 21, "22")
    ]
    answers = list(served.stub.ModelStreamInfer(iter(requests)))
    assert [each.infer_response.id for each in answers] == [each.id for each in requests]
    assert all(said(each.infer_response)["triton_final_response"] is True for each in answers)
    sums = [arrays(each.infer_response)["output"][0, 0] for each in answers]
    assert sums == [total for total in (1, 3, 6, 7, 9, 12) for _ in range(3)]


def test_a_failed_request_does_not_end_the_stream_unless_that_is_asked_for(served: Served) -> None:
    def requests() -> Iterator[pb.ModelInferRequest]:
        yield request("adder", ones(1, 1), 23, start=True)
        yield request("adder", ones(1, 1), 24, id="lost")
        yield request("adder", ones(1, 1), 23, end=True)

    first, failed, last = served.stub.ModelStreamInfer(requests())
    assert arrays(first.infer_response)["output"].tolist() == [[1, 1]]
    assert "sequence 24 to model 'adder' must specify the START flag" in failed.error_message
    assert failed.infer_response.id == "lost"
    assert said(failed.infer_response)["rnnserve_status"] == "INVALID_ARGUMENT"
    assert said(failed.infer_response)["rnnserve_reason"] == "SEQUENCE_NOT_LIVE"
    assert arrays(last.infer_response)["output"].tolist() == [[2, 2]]
    stream = served.stub.ModelStreamInfer(requests(), metadata=[("triton_grpc_error", "true")])
    assert arrays(next(stream).infer_response)["output"].tolist() == [[1, 1]]
    with pytest.raises(grpc.RpcError) as error:
        next(stream)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_requests_of_one_sequence_that_came_together_keep_their_order(served: Served) -> None:
    """Of any length, without waiting: those of equal shape are joined, and still none overtakes another."""
    rng = np.random.default_rng(3)
    chunks = [np.full((1, int(steps), FEATURES), k, np.float32) for k, steps in enumerate(rng.integers(1, 4, 60), 1)]
    requests = [
        request("adder", x, 25, start=k == 0, end=k == len(chunks) - 1, return_sequences=True)
        for k, x in enumerate(chunks)
    ]
    answers = [arrays(each.infer_response)["output"] for each in served.stub.ModelStreamInfer(iter(requests))]
    assert np.array_equal(np.concatenate(answers, axis=1), np.cumsum(np.concatenate(chunks, axis=1), axis=1))


def test_a_start_right_behind_an_end_on_a_stream_is_a_new_sequence(served: Served) -> None:
    requests = [request("adder", ones(1, 1), 26, start=k % 3 == 0, end=k % 3 == 2) for k in range(30)]
    answers = served.stub.ModelStreamInfer(iter(requests))
    assert [arrays(each.infer_response)["output"][0, 0] for each in answers] == [1, 2, 3] * 10


def test_what_is_cancelled_before_its_turn_is_not_applied(served: Served) -> None:
    served.oip.infer("adder", ones(1, 1), 27, start=True)
    served.adder.gate.clear()
    try:
        served.adder.running.clear()
        blocker = served.stub.ModelInfer.future(request("adder", ones(1, 1)))
        assert served.adder.running.wait(30)
        call = served.stub.ModelInfer.future(request("adder", ones(1, 1), 27))
        group = served.server.call(lambda: served.core.sessions.get(session_id("adder", 27)).group)
        waiting = threading.Event()

        def look() -> None:
            served.core.worker(group.model).line_up()
            if (group.tail >= 0).any():
                waiting.set()

        while not waiting.is_set():
            served.server.call(look)
        call.cancel()
        while served.server.call(lambda: len(served.core.meter.waiting)) > 1:
            pass
    finally:
        served.adder.gate.set()
    blocker.result()
    assert served.oip.y("adder", ones(1, 1), 27, end=True).tolist() == [[2, 2]]


def test_a_stream_that_is_cancelled_takes_what_waits_with_it(served: Served) -> None:
    served.oip.infer("adder", ones(1, 1), 28, start=True)
    served.adder.gate.clear()
    try:
        served.adder.running.clear()
        blocker = served.stub.ModelInfer.future(request("adder", ones(1, 1)))
        assert served.adder.running.wait(30)
        sent: queue.Queue[pb.ModelInferRequest] = queue.Queue()
        stream = served.stub.ModelStreamInfer(iter(sent.get, None))
        for _ in range(3):
            sent.put(request("adder", ones(1, 1), 28))
        while served.server.call(lambda: len(served.core.meter.waiting)) < 4:
            pass
        stream.cancel()
        while served.server.call(lambda: len(served.core.meter.waiting)) > 1:
            pass
    finally:
        served.adder.gate.set()
    blocker.result()
    assert served.oip.y("adder", ones(1, 1), 28, end=True).tolist() == [[2, 2]]


def test_a_server_that_drains_ends_streams_and_is_not_ready() -> None:
    with running_server(repository()) as server, grpc.insecure_channel(server.address) as channel:
        oip = Oip(channel)
        sent: queue.Queue[pb.ModelInferRequest] = queue.Queue()
        stream = oip.stub.ModelStreamInfer(iter(sent.get, None))
        sent.put(request("adder", ones(1, 1), 5, start=True))
        assert arrays(next(stream).infer_response)["output"].tolist() == [[1, 1]]
        server.call(lambda: server.server.core.draining.set())
        assert not oip.stub.ServerReady(pb.ServerReadyRequest()).ready
        with pytest.raises(grpc.RpcError) as error:
            next(stream)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


# Statistics


def test_statistics_are_what_was_done() -> None:
    with running_server(repository()) as server, grpc.insecure_channel(server.address) as channel:
        served = Served(server, channel)
        for k in range(5):
            answer = said(served.oip.infer("adder", ones(3, 2), 5, start=k == 0))
            assert answer["rnnserve_batch_rows"] == 3
            assert answer["rnnserve_queue_ns"] >= 0
            assert answer["rnnserve_compute_ns"] > 0
        served.refused("adder", ones(3, 2, value=-1.0), 5)  # the engine fails
        served.refused("adder", ones(3, 2), 6)
        (stats,) = served.stub.ModelStatistics(pb.ModelStatisticsRequest(name="adder", version="2")).model_stats
        assert (stats.inference_count, stats.execution_count) == (15, 5)
        inference = stats.inference_stats
        assert [inference.success.count, inference.fail.count, inference.queue.count] == [5, 2, 5]
        parts = (inference.queue, inference.compute_input, inference.compute_infer, inference.compute_output)
        assert all(part.count == 5 and part.ns > 0 for part in parts)
        assert sum(part.ns for part in parts) <= inference.success.ns
        assert [(each.batch_size, each.compute_infer.count) for each in stats.batch_stats] == [(3, 5)]
        assert stats.last_inference > 1.7e12
        every = served.stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
        assert [(each.name, each.version) for each in every] == [
            ("adder", "2"), ("adder", "1"), ("lstm-4", "1"), ("strict", "1"),
        ]  # fmt: skip
        other = served.sessions.CreateSession(
            session_pb2.CreateSessionRequest(config=session_pb2.SessionConfig(model="adder"))
        ).session
        predict = inference_pb2.PredictRequest(session_id=other.session_id, inputs=encode_named({"input": ones(1, 1)}))
        served.inference.Predict(predict)
        (stats,) = served.stub.ModelStatistics(pb.ModelStatisticsRequest(name="adder", version="2")).model_stats
        assert (stats.inference_count, stats.execution_count) == (15, 6)  # runs are counted, whoever asked


# Better than what it replaces: each a thing that Triton 2.51 was seen to do otherwise


class TestBetterThanWhatItReplaces:
    def test_a_step_after_its_end_after_expiry_or_after_a_restart_says_which(self, tmp_path: Any) -> None:
        """Triton has one message for all."""
        said_ = []
        with running_server(repository()) as server, grpc.insecure_channel(server.address) as channel:
            served = Served(server, channel)
            served.oip.infer("adder", ones(1, 1), 1, start=True, end=True)
            said_.append(served.refused("adder", ones(1, 1), 1))
            served.oip.infer("adder", ones(1, 1), 2, start=True, idle_lifetime=0.001)
            while session_id("adder", 2) in served.core.sessions:
                served.server.call(served.core.sweep)
            said_.append(served.refused("adder", ones(1, 1), 2))
            served.oip.infer("adder", ones(1, 1), 3, start=True)
        with running_server(repository()) as server, grpc.insecure_channel(server.address) as channel:
            said_.append(Served(server, channel).refused("adder", ones(1, 1), 3))
        assert {(status, reason) for status, reason, _, _ in said_} == {("INVALID_ARGUMENT", "SEQUENCE_NOT_LIVE")}
        assert all("must specify the START flag on the first request" in message for _, _, message, _ in said_)
        ended, expired, restarted = [message for _, _, message, _ in said_]
        assert "it has ended" in ended
        assert "idle lifetime and expired" in expired
        assert "unknown to this server" in restarted
        assert "restarted" in restarted
        store = {"store": f"sqlite:///{tmp_path}/s.db"}
        with running_server(repository(), **store) as server, grpc.insecure_channel(server.address) as channel:
            Served(server, channel).oip.infer("adder", ones(1, 1), 4, start=True)
        with running_server(repository(), **store) as server, grpc.insecure_channel(server.address) as channel:
            assert Served(server, channel).oip.y("adder", ones(1, 1), 4).tolist() == [[2, 2]]  # kept, it goes on

    def test_a_full_house_answers_with_a_hint_when_to_try_again(self) -> None:
        """Triton queues without a word."""
        with (
            running_server(repository(), max_sessions=3) as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            served = Served(server, channel)
            for sequence in (1, 2, 3):
                served.oip.infer("adder", ones(1, 1), sequence, start=True)
            status, reason, message, after = served.refused("adder", ones(1, 1), 4, start=True)
            assert (status, reason) == ("RESOURCE_EXHAUSTED", "SESSIONS_FULL")
            assert after is not None
            assert after > 0
            assert f"try again in {after:.1f} s" in message
            (failed,) = served.stub.ModelStreamInfer(iter([request("adder", ones(1, 1), 4, start=True)]))
            assert said(failed.infer_response)["rnnserve_retry_after"] > 0
            served.oip.infer("adder", ones(1, 1), 1, end=True)
            served.oip.infer("adder", ones(1, 1), 4, start=True)

    def test_a_nan_is_refused_where_the_model_says_so_and_never_reaches_a_neighbour(self, served: Served) -> None:
        """Triton accepts it, and the state is poisoned."""
        for sequence in (30, 31):
            served.oip.infer("strict", ones(1, 1), sequence, start=True)
        requests = [
            request("strict", ones(1, 1, value=np.nan), 30),
            request("strict", ones(1, 1), 31),
            request("strict", ones(1, 1), 30),
        ]
        refused, beside, after = served.stub.ModelStreamInfer(iter(requests))
        assert "expected finite numbers" in refused.error_message
        assert arrays(beside.infer_response)["output"].tolist() == [[2, 2]]
        assert arrays(after.infer_response)["output"].tolist() == [[2, 2]]

    def test_the_same_step_sent_again_is_answered_and_not_applied_again(self, served: Served) -> None:
        """Triton applies it twice."""
        steps: list[dict[str, Any]] = [{"start": True}, {}, {}, {"end": True}]
        for number, flags in enumerate(steps):
            x = ones(1, 1, value=float(number + 1))
            first = served.oip.infer("adder", x, 32, step=number, **flags)
            again = served.oip.infer("adder", x, 32, step=number, **flags)
            assert first.raw_output_contents == again.raw_output_contents
            assert [said(each)["rnnserve_replayed"] for each in (first, again)] == [False, True]
        assert arrays(again)["output"].tolist() == [[10, 10]]
        for number, x in ((3, ones(1, 1)), (4, ones(1, 1, value=4.0))):  # other than what was applied there
            assert served.refused("adder", x, 32, step=number)[1] == "SEQUENCE_NOT_LIVE"
        served.oip.infer("adder", ones(1, 1), 32, start=True, step=0)
        assert served.refused("adder", ones(1, 1, value=2.0), 32, step=0)[1] == "STEP_CONFLICT"
        assert served.refused("adder", ones(1, 1), 32, step=5)[1] == "STEP_AHEAD"
        served.oip.infer("adder", ones(1, 1), 32, step=1)
        assert served.oip.y("adder", ones(1, 1), 32, start=True, step=0).tolist() == [[1, 1]]  # that one is a restart
        assert served.oip.y("adder", ones(1, 1), 32, step=1, end=True).tolist() == [[2, 2]]

    def test_a_deadline_of_a_millisecond_or_less_leaves_the_state_untouched_or_replayable(self, served: Served) -> None:
        """Triton applies it, and the retry doubles it."""
        served.oip.infer("adder", ones(1, 1), 33, start=True, step=0)
        late = 0
        for step in range(1, 60):
            while True:
                timeout = 0.001 * 0.9**step if late < 30 else 30.0
                try:
                    answer = served.oip.infer("adder", ones(1, 1), 33, step=step, timeout=timeout)
                    break
                except grpc.RpcError as error:
                    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # noqa: PT017
                    late += 1
            assert arrays(answer)["output"].tolist() == [[step + 1, step + 1]]
        assert late
        assert served.oip.y("adder", ones(1, 1), 33, end=True, step=60).tolist() == [[61, 61]]

    def test_a_timeout_of_the_request_is_heeded_before_its_turn(self, served: Served) -> None:
        served.oip.infer("adder", ones(1, 1), 34, start=True)
        served.adder.gate.clear()
        served.adder.running.clear()
        blocker = served.stub.ModelInfer.future(request("adder", ones(1, 1)))
        assert served.adder.running.wait(30)
        timed = request("adder", ones(1, 1), 34)
        timed.parameters["timeout"].int64_param = 1000
        call = served.stub.ModelInfer.future(timed)
        while served.server.call(lambda: len(served.core.meter.waiting)) < 2:
            pass
        now = served.core.clock()
        while served.core.clock() < now + 0.002:
            pass
        served.adder.gate.set()
        blocker.result()
        with pytest.raises(grpc.RpcError) as error:
            call.result()
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert served.oip.y("adder", ones(1, 1), 34, end=True).tolist() == [[2, 2]]

    def test_expiry_frees_every_byte(self) -> None:
        """Triton never tells the model that a sequence expired."""
        with running_server(repository()) as server, grpc.insecure_channel(server.address) as channel:
            served = Served(server, channel)
            before = served.server.call(lambda: (served.core.sessions.state_bytes, len(served.core.sessions)))
            for sequence in range(1, 101):
                served.oip.infer("adder", ones(2, 1), sequence, start=True, idle_lifetime=0.001)
            while len(served.core.sessions):
                served.server.call(served.core.sweep)
            assert served.server.call(lambda: (served.core.sessions.state_bytes, len(served.core.sessions))) == before
            assert not served.core.sessions.groups()  # nor columns, nor replay windows

    def test_chunks_of_mixed_lengths_share_their_batches(self, served: Served) -> None:
        """Triton's throughput collapses, for only requests of one shape are batched."""
        rows = 8
        for sequence in range(40, 40 + rows):
            served.oip.infer("adder", ones(1, 1), sequence, start=True)
        served.adder.gate.clear()
        served.adder.running.clear()
        blocker = served.stub.ModelInfer.future(request("adder", ones(1, 1)))
        assert served.adder.running.wait(30)
        served.adder.calls.clear()
        lengths = [4, 5, 6, 7, 4, 5, 6, 7]
        with ThreadPoolExecutor(rows) as threads:
            calls = [
                threads.submit(served.oip.y, "adder", ones(1, steps), 40 + k, end=True)
                for k, steps in enumerate(lengths)
            ]
            while served.server.call(lambda: len(served.core.meter.waiting)) < rows + 1:
                pass
            served.adder.gate.set()
            assert [call.result()[0, 0] for call in calls] == [1 + steps for steps in lengths]
        blocker.result()
        assert served.adder.calls[0] == (4, [4] * rows)  # all of them together, as far as the shortest goes
