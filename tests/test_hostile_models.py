"""Model files made to do harm: they are refused with the reason, take neither long nor much, and leave no trace."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import save

import rnnserve
from rnnserve_models.errors import ModelError
from rnnserve_models.graph import external_tensors
from rnnserve_models.importers import apart
from rnnserve_models.importers.apart import load_apart, write_apart
from rnnserve_models.importers.files import import_file
from serving import running_server

VECTORS = Path(__file__).parent / "vectors"
FILES = {
    ".onnx": VECTORS / "onnx" / "script_lstm.onnx",
    ".safetensors": None,
    ".keras": next((VECTORS / "keras" / "files").glob("*.keras")),
}


def torch_state() -> bytes:
    rng = np.random.default_rng(0)
    return save(
        {
            "weight_ih_l0": rng.standard_normal((16, 3)).astype(np.float32),
            "weight_hh_l0": rng.standard_normal((16, 4)).astype(np.float32),
            "bias_ih_l0": np.zeros(16, np.float32),
            "bias_hh_l0": np.zeros(16, np.float32),
        }
    )


def refused(content: bytes, suffix: str, folder: Path) -> str:
    """Why a file of that content is no model. The folder of models stays empty."""
    path = folder / f"hostile{suffix}"
    path.write_bytes(content)
    models = folder / "none"
    models.mkdir(exist_ok=True)
    with pytest.raises(ModelError) as caught:
        import_file(path, models, "hostile")
    assert list(models.rglob("*")) == []
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_bytes_turned_over_never_end_otherwise_than_in_a_reason(suffix: str, tmp_path: Path):
    """A damaged file is a model nonetheless, or is refused; nothing else happens. (.keras: see test_keras_file.)"""
    content = torch_state() if suffix == ".safetensors" else FILES[suffix].read_bytes()
    rng = np.random.default_rng(7)
    for number in range(60):
        damaged = bytearray(content)
        places = rng.integers(0, len(content) if number % 2 else min(400, len(content)), 1 + number % 7)
        for place in places:
            damaged[place] ^= int(rng.integers(1, 256))
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(damaged[: len(damaged) - (number % 5 == 0) * int(rng.integers(1, len(damaged)))])
        try:
            import_file(path, tmp_path / "models", f"model-{number}")
        except ModelError as error:
            assert str(error)  # noqa: PT017
    assert not list((tmp_path / "models").glob(".import-*"))


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (struct.pack("<Q", 2**63) + b"{}", b""),
        (struct.pack("<Q", 100_000_001) + b"{", b" " * 100),
        (None, {"weight_ih_l0": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}),
        (None, {"weight_ih_l0": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**40]}}),
        (None, {"weight_ih_l0": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}),
        (None, {"weight_ih_l0": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        (None, {"weight_ih_l0": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}),
        (None, {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(2)}),
    ],
)
def test_a_safetensors_file_that_claims_what_it_has_not(header: bytes | None, body: Any, tmp_path: Path):
    """Headers, shapes and offsets beyond the file, tensors on top of one another, dtypes that NumPy has not."""
    if header is None:
        text = json.dumps(body).encode()
        header, body = struct.pack("<Q", len(text)) + text, b"\0" * 4
    assert "hostile.safetensors" in refused(header + body, ".safetensors", tmp_path)


def hidden_tensor(where: str) -> onnx.ModelProto:
    """A model of an LSTM with a tensor that is kept in another file."""
    model = onnx.load_model(FILES[".onnx"])
    outside = numpy_helper.from_array(np.zeros(4, np.float32), "outside")
    outside.ClearField("raw_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/passwd")
    constant = helper.make_node("Constant", [], ["unused"], value=outside)
    if where == "initializer":
        model.graph.initializer.append(outside)
    elif where == "constant":
        model.graph.node.insert(0, constant)
    elif where == "sparse":
        sparse = model.graph.sparse_initializer.add(dims=[4])
        sparse.values.CopyFrom(outside)
        sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(4), "i"))
    elif where == "function":
        model.functions.append(
            helper.make_function("local", "f", [], ["unused"], [constant], [helper.make_opsetid("", 18)])
        )
    elif where == "list":
        node = helper.make_node("Constant", [], ["unused"])
        node.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS).tensors.append(outside)
        model.graph.node.insert(0, node)
    else:
        model.training_info.add().initialization.initializer.append(outside)
    return model


@pytest.mark.parametrize("where", ["initializer", "constant", "sparse", "function", "list", "training"])
def test_a_graph_has_no_file_but_its_own_read(where: str, tmp_path: Path):
    """Wherever in the graph it refers to one."""
    model = hidden_tensor(where)
    assert [each.name for each in external_tensors(model)] == ["outside"]
    assert "in other files" in refused(model.SerializeToString(), ".onnx", tmp_path)


def test_a_zip_is_read_by_name_and_never_unpacked(tmp_path: Path):
    """Members that lead elsewhere, links, and ones with the name of what is read, twice."""
    path = tmp_path / "evil.keras"
    path.write_bytes(FILES[".keras"].read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../../escaped", "/tmp/escaped-rnnserve", "..\\escaped"):
            archive.writestr(name, b"x")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    import_file(path, tmp_path / "models", "fine")
    assert sorted(each.name for each in (tmp_path / "models" / "fine" / "1").iterdir()) == [
        "model.yaml",
        "network.json",
        "weights.safetensors",
    ]
    assert not list(tmp_path.parent.glob("escaped*"))
    assert not Path("/tmp/escaped-rnnserve").exists()
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", b"{}")
    assert "expected one member config.json, got 2" in refused(path.read_bytes(), ".keras", tmp_path)


def test_a_zip_bomb_is_refused_by_its_size(tmp_path: Path):
    """64 megabytes of zeros in 64 kilobytes, and a directory that lies about its size: soon, and in little memory."""
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": []}}))
        with archive.open("model.weights.h5", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(1 << 20))
    content = path.read_bytes()
    assert len(content) < 1 << 17
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "holds 67108864 bytes" in refused(content, ".keras", tmp_path)
    lied = content.replace(struct.pack("<Q", 64 << 20), struct.pack("<Q", 1000)).replace(
        struct.pack("<I", 64 << 20), struct.pack("<I", 1000)
    )
    assert refused(lied, ".keras", tmp_path)
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "system", "module": "os", "config": {"command": "touch {}"}, "registered_name": "system"},
        {"class_name": "__import__('os').system('touch {}')", "config": {}},
        {"class_name": "Lambda", "config": {"name": "f", "function": {"class_name": "__lambda__", "config": {}}}},
        {"class_name": "LSTM", "config": {"units": 4, "activation": "__import__('os').system('touch {}')"}},
        {"class_name": "LSTM", "config": {"units": 4, "activation": {"module": "os", "class_name": "system"}}},
    ],
)
def test_a_client_has_no_code_run(config: Any, tmp_path: Path):
    """A config names layers; it imports, evaluates and calls nothing. Code of one's own is read from the server's disk
    only, where a model.yaml names it, and clients write none.
    """
    trace = tmp_path / "trace"
    config = json.loads(json.dumps(config).replace("{}", str(trace)).replace(f'"config": {trace}', '"config": {}'))
    folder = tmp_path / "models"
    folder.mkdir()
    weights = [np.zeros((3, 16), np.float32), np.zeros((4, 16), np.float32), np.zeros(16, np.float32)]
    os.symlink(Path(__file__).parent.parent / "models" / "zoo" / "lstm-4", folder / "lstm-4")
    with (
        running_server(models=folder, allow_deploy=True) as server,
        rnnserve.Client(server.address) as client,
        pytest.raises((rnnserve.ModelInvalid, rnnserve.InvalidRequest)),
    ):
        client.models.deploy("evil", config, weights)
    assert not trace.exists()


def endless() -> onnx.ModelProto:
    """A model of an LSTM, and a loop of 2**62 rounds beside it."""
    model = onnx.load_model(FILES[".onnx"])
    model.graph.initializer.append(helper.make_tensor("limit", onnx.TensorProto.INT64, [], [2**62]))
    model.graph.initializer.append(helper.make_tensor("go", onnx.TensorProto.BOOL, [], [True]))
    scalars = {"i": onnx.TensorProto.INT64, "c": onnx.TensorProto.BOOL, "d": onnx.TensorProto.BOOL}
    value = {name: helper.make_tensor_value_info(name, kind, []) for name, kind in scalars.items()}
    s, t = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "st")
    nodes = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["s"], ["t"])]
    body = helper.make_graph(nodes, "body", [value["i"], value["c"], s], [value["d"], t])
    x = model.graph.input[0].name
    model.graph.node.insert(0, helper.make_node("Loop", ["limit", "go", x], ["looped"], body=body))
    for node in model.graph.node:
        if node.op_type == "LSTM":
            node.input[0] = "looped"
    return model


def greedy() -> onnx.ModelProto:
    """A model of an LSTM, and 2**32 zeros added up, of a shape that is known only when it is run."""
    model = onnx.load_model(FILES[".onnx"])
    x = model.graph.input[0].name
    for name, numbers in (("many", [2**32, 1, 1]), ("none", [0, 0, 0])):
        model.graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [3], numbers))
    nodes = [
        helper.make_node("Shape", [x], ["shape"]),
        helper.make_node("Mul", ["shape", "none"], ["nothing"]),
        helper.make_node("Add", ["nothing", "many"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        helper.make_node("Add", [x, "sum"], ["added"]),
    ]
    for node in model.graph.node:
        if node.op_type == "LSTM":
            node.input[0] = "added"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return model


def test_a_graph_without_an_end_is_given_up(tmp_path: Path):
    """It is read in a process of its own, which has a time; nothing of it is left, no process either."""
    path = tmp_path / "endless.onnx"
    path.write_bytes(endless().SerializeToString())
    target = tmp_path / "target"
    target.mkdir()
    began = time.monotonic()
    with pytest.raises(ModelError, match="as long as a model may take"):
        write_apart(path, target, seconds=3)
    assert time.monotonic() - began < 30


def test_a_graph_that_wants_all_memory_is_refused(tmp_path: Path):
    """16 GB of it: it is read in a process of its own, which may have 4."""
    path = tmp_path / "greedy.onnx"
    path.write_bytes(greedy().SerializeToString())
    target = tmp_path / "target"
    target.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="memory"):
        write_apart(path, target)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20


def test_a_model_that_ends_the_process_that_loads_it_ends_no_other(tmp_path: Path):
    """By a signal, as a fault in a library does."""
    source = (
        "import os, signal\nfrom rnnserve_models import Cell\n"
        "class Mine(Cell):\n    pass\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    (tmp_path / "cells.py").write_text(source)
    (tmp_path / "model.yaml").write_text("python: cells.py\ncell: {class_name: Mine, config: {}}\ninput_dim: 1\n")
    with pytest.raises(ModelError, match="ended with signal 11"):
        load_apart(tmp_path)


def test_the_process_that_forks_is_had_anew_when_it_has_ended():
    """As it does when it has had nothing to do."""
    lstm = Path(__file__).parent.parent / "models" / "zoo" / "lstm-4" / "1"
    load_apart(lstm)
    assert apart._FORKS._process is not None
    apart._FORKS._process.kill()
    apart._FORKS._process.wait()
    load_apart(lstm)


def test_nothing_goes_on_when_its_server_is_killed(tmp_path: Path):
    """Neither the process that forks, nor the child that has a graph without an end."""
    (tmp_path / "endless.onnx").write_bytes(endless().SerializeToString())
    (tmp_path / "target").mkdir()
    code = f"""
import threading, time
from pathlib import Path
from rnnserve_models.importers import apart
folder = Path({str(tmp_path)!r})
threading.Thread(target=apart.write_apart, args=(folder / "endless.onnx", folder / "target"), daemon=True).start()
while not (forks := apart._FORKS._process):
    time.sleep(0.01)
children = Path(f"/proc/{{forks.pid}}/task/{{forks.pid}}/children")
while not (child := children.read_text().split()):
    time.sleep(0.01)
print(forks.pid, *child, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        processes = server.stdout.readline().split()
        server.kill()
    assert len(processes) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{each}").exists() for each in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_goes_on_while_a_hostile_graph_is_deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sessions step meanwhile; the graph is refused with the reason, and leaves nothing."""
    monkeypatch.setattr(apart, "SECONDS", 3.0)
    folder = tmp_path / "models"
    folder.mkdir()
    os.symlink(Path(__file__).parent.parent / "models" / "zoo" / "lstm-4", folder / "lstm-4")
    path = tmp_path / "endless.onnx"
    path.write_bytes(endless().SerializeToString())
    with running_server(models=folder, allow_deploy=True) as server, rnnserve.Client(server.address) as client:
        with ThreadPoolExecutor(1) as pool, client.session("lstm-4") as session:
            deploying = pool.submit(client.models.deploy_file, "endless", path)
            steps = 0
            while not deploying.done():
                session.step(np.zeros(5, np.float32), timeout=5)
                steps += 1
        with pytest.raises(rnnserve.ModelInvalid, match=r"endless\.onnx|as long as a model may take"):
            deploying.result()
        assert steps > 100
        assert [model.name for model in client.models()] == ["lstm-4"]
    assert sorted(each.name for each in folder.iterdir()) == ["lstm-4"]


def test_a_graph_nested_beyond_reason_is_refused(tmp_path: Path):
    """And does not run the stack over, which would end the process: so in a process of its own."""
    code = f"""
import onnx
from onnx import helper
from pathlib import Path
from rnnserve_models.errors import ModelError
from rnnserve_models.importers.files import import_file
raw = b""
for _ in range(2000):  # a graph in an attribute in a node in a graph
    for field in (0x32, 0x2A, 0x0A):
        size, head = len(raw), bytearray()
        while size >= 128:
            head.append(size % 128 + 128)
            size //= 128
        raw = bytes([field]) + bytes(head) + bytes([size]) + raw
path = Path({str(tmp_path)!r}) / "deep.onnx"
path.write_bytes(b"\\x3a" + raw[1:])
try:
    import_file(path, path.parent / "models", "deep")
except ModelError as error:
    print("refused:", str(error)[:200])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("refused:"), done.stderr
