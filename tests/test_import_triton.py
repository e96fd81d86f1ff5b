"""Model directories of Triton's become served models that clients see as they saw them there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest
import yaml
from typer.testing import CliRunner

import triton_models
from oip import Oip, arrays, request, told
from rnnserve_models.errors import ModelError
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.cli import app
from rnnserve_server.triton.convert import import_triton
from serving import running_server
from triton_models import BARE, CHUNK, FEATURES, STEP, UNITS


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oip]:
    theirs, ours = tmp_path_factory.mktemp("triton"), tmp_path_factory.mktemp("models")
    for directory in (
        triton_models.step(theirs),
        triton_models.lstm(theirs, batched=True),
        triton_models.lstm(theirs, batched=False),
    ):
        import_triton(directory, ours)
    with running_server(models=ours) as server, grpc.insecure_channel(server.address) as channel:
        yield Oip(channel)


def test_tensors_are_seen_as_in_triton(served: Oip) -> None:
    def seen(name: str) -> Any:
        model = served.stub.ModelMetadata(pb.ModelMetadataRequest(name=name))
        config = served.stub.ModelConfig(pb.ModelConfigRequest(name=name)).config
        shapes = {each.name: list(each.shape) for each in (*model.inputs, *model.outputs)}
        dims = {each.name: list(each.dims) for each in (*config.input, *config.output)}
        return list(model.versions), config.max_batch_size, shapes, dims

    assert seen(STEP) == (
        ["1"], 8, {"INPUT": [-1, 2], "OUTPUT": [-1, 2], "TOLD": [-1, 4]}, {"INPUT": [2], "OUTPUT": [2], "TOLD": [4]},
    )  # fmt: skip
    assert seen(CHUNK) == (["3"], 4, {"x": [-1, -1, 2], "y": [-1, -1, 3]}, {"x": [-1, 2], "y": [-1, 3]})
    assert seen(BARE) == (["3"], 0, {"x": [-1, 2], "y": [-1, 3]}, {"x": [-1, 2], "y": [-1, 3]})
    sequence = served.stub.ModelConfig(pb.ModelConfigRequest(name=STEP)).config.sequence_batching
    assert sequence.max_sequence_idle_microseconds == 60_000_000
    assert [each.input_name for each in sequence.state] == ["SUM_IN"]
    kinds = pb.ModelSequenceBatching.Control.Kind
    assert {each.name: kinds.Name(each.control[0].kind) for each in sequence.control_input} == {
        "START": "CONTROL_SEQUENCE_START", "END": "CONTROL_SEQUENCE_END", "READY": "CONTROL_SEQUENCE_READY",
        "CORRID": "CONTROL_SEQUENCE_CORRID",
    }  # fmt: skip
    assert list(sequence.control_input[1].control[0].int32_false_true) == [-1, 5]


def test_control_inputs_are_fed_as_triton_feeds_them_and_states_begin_as_they_do_there(served: Oip) -> None:
    for sequence in (7, (1 << 63) + 5):
        for k in range(4):
            asked = request(STEP, {"INPUT": np.ones((2, FEATURES), np.float32)}, start=k == 0, end=k == 3)
            asked.parameters["sequence_id"].uint64_param = sequence
            asked.parameters["sequence_start"].bool_param, asked.parameters["sequence_end"].bool_param = k == 0, k == 3
            y = arrays(served.stub.ModelInfer(asked))
            assert y["OUTPUT"].tolist() == [[101 + k, 201 + k]] * 2
            assert y["TOLD"].tolist() == [[k == 0, 5 if k == 3 else -1, True, float(np.float32(sequence))]] * 2


def test_a_restarted_sequence_is_told_so(served: Oip) -> None:
    x = {"INPUT": np.ones((1, FEATURES), np.float32)}
    for k in (0, 1, 0, 1):
        y = arrays(served.infer(STEP, x, 9, start=k == 0))
        assert (y["OUTPUT"][0, 0], y["TOLD"][0, 0]) == (101 + k, k == 0)


def test_many_steps_at_once_have_a_start_and_an_end(served: Oip) -> None:
    x = np.ones((1, 5, FEATURES), np.float32)  # a time axis behind the batch axis, which Triton has not
    y = arrays(served.infer(STEP, {"INPUT": x}, 10, start=True, end=True))
    assert y["OUTPUT"][0, :, 0].tolist() == [101, 102, 103, 104, 105]
    assert y["TOLD"][0, :, 0].tolist() == [1, 0, 0, 0, 0]
    assert y["TOLD"][0, :, 1].tolist() == [-1, -1, -1, -1, 5]


def test_what_the_server_feeds_is_nobody_elses_to_give_and_a_text_is_no_number_for_the_graph(served: Oip) -> None:
    x = {"INPUT": np.ones((1, FEATURES), np.float32)}
    for given, sequence, says in (
        ({**x, "START": np.ones((1, 1), np.float32)}, 11, "the server feeds it"),
        (x, "eleven", "a number, which the model's graph is told"),
        ({"INPUT": np.ones((1, 1, 1, FEATURES), np.float32)}, 11, "[batch, 2] or [batch, time, 2]"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            served.infer(STEP, given, sequence, start=True)
        assert says in told(error.value)[2] or says.partition(" or ")[0] in told(error.value)[2]


@pytest.mark.parametrize("name", [CHUNK, BARE])
def test_state_is_carried_over_requests_of_any_length(served: Oip, name: str) -> None:
    """As onnxruntime gives it, when what the graph gave last goes into it again."""
    rng, batched = np.random.default_rng(1), name == CHUNK
    session = ort.InferenceSession(triton_models.lstm_graph(batched=batched), providers=["CPUExecutionProvider"])
    leading = (2,) if batched else ()
    h = c = np.zeros((*leading, UNITS), np.float32)
    lengths = (3, 1, 5, 2)
    for k, steps in enumerate(lengths):
        x = rng.standard_normal((*leading, steps, FEATURES)).astype(np.float32)
        expected, h, c = session.run(["y", "hn", "cn"], {"x": x, "h": h, "c": c})
        y = served.y(name, {"x": x}, 12, start=k == 0, end=k == len(lengths) - 1)
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, atol=1e-6)


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    triton_models.step(tmp_path / "theirs")
    done = CliRunner().invoke(
        app, ["import-triton", str(tmp_path / "theirs" / STEP), "--name", "mine", "--models", str(tmp_path / "ours")]
    )
    assert done.exit_code == 0, done.output
    for said in (
        "state 'SUM_IN' [2]: given back by 'SUM_OUT'",
        "control 'CORRID': corrid",
        "differs from the original",
    ):
        assert said in done.output
    assert "mine/1: ready to serve" in done.output
    document = yaml.safe_load((tmp_path / "ours" / "mine" / "1" / "model.yaml").read_text())
    assert document["oip"]["axes"]["INPUT"] == ["batch", 2]
    again = CliRunner().invoke(
        app, ["import-triton", str(tmp_path / "theirs" / STEP), "--name", "mine", "--models", str(tmp_path / "ours")]
    )
    assert again.exit_code == 1
    assert "the version exists" in again.output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("sequence_batching {", "no_such_thing {"), "has no sequence_batching"),
        (("TYPE_FP32 dims: [ 2 ] }", "TYPE_STRING dims: [ 2 ] }"), "expected a data_type among"),
        (('input_name: "SUM_IN"', 'input_name: "SUM"'), "'SUM'"),
        (("dims: [ 4 ]", "dims: [ -1 ]"), "have a variable axis, but no input has one"),
        (('data_file: "sum"', 'data_file: "../sum"'), "must be below initial_state/"),
        (('data_file: "sum"', 'data_file: "none"'), "cannot be read"),
        (("int32_false_true: [ -1, 5 ]", "int32_false_true: [ 5 ]"), "expected two values"),
        (("int32_false_true: [ -1, 5 ]", "fp32_false_true: [ -1, 5 ]"), "is int32 in the graph, but float32"),
        (("data_type: TYPE_UINT64", "data_type: TYPE_STRING"), "TYPE_STRING is not told to graphs"),
        (("max_batch_size: 8", "max_batch_size: eight"), "is not a ModelConfig"),
        (('name: "READY" control', 'name: "NOBODY" control'), "NOBODY"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(
    tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    directory = triton_models.step(tmp_path)
    config = (directory / "config.pbtxt").read_text()
    assert change[0] in config
    (directory / "config.pbtxt").write_text(config.replace(*change, 1))
    with pytest.raises(ModelError) as error:
        import_triton(directory, tmp_path / "ours")
    assert says in str(error.value)
    assert not list((tmp_path / "ours").glob("*/*"))


def test_a_model_that_is_no_graph_is_refused_with_what_there_is(tmp_path: Path) -> None:
    directory = triton_models.step(tmp_path)
    (directory / "1" / "model.onnx").rename(directory / "1" / "model.py")
    with pytest.raises(ModelError, match=r"only ONNX graphs are converted.*"):
        import_triton(directory, tmp_path / "ours")


def test_the_page_shows_what_the_command_writes(tmp_path: Path) -> None:
    """The config.pbtxt of docs/triton.md becomes the model.yaml beside it."""
    page = (Path(__file__).parents[1] / "docs" / "triton.md").read_text(encoding="utf-8")
    config, document = (
        re.search(rf"```{kind}\n(.*?)```", page[page.index("<table>") :], re.DOTALL) for kind in ("", "yaml")
    )
    assert config is not None
    assert document is not None
    directory = tmp_path / "theirs" / "asr"
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config[1])
    (directory / "1" / "model.onnx").write_bytes(triton_models.page_graph())
    made, _ = import_triton(directory, tmp_path / "ours")
    written, shown = yaml.safe_load((made / "model.yaml").read_text()), yaml.safe_load(document[1])
    del written["settable_options"]
    assert written == shown
