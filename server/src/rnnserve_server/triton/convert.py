"""A stateful ONNX model of Triton's as a served model.

Triton's config.pbtxt says which tensors are states, what they start from, and which inputs tell the graph where its
sequence stands. All of it has its place in a model.yaml. Clients of the Open Inference Protocol see the tensors as they
saw them in Triton; those of rnnserve.v1 see [batch, time, *shape].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from google.protobuf import text_format
from pydantic import ValidationError
from safetensors.numpy import save

from rnnserve_models.engine.base import Array
from rnnserve_models.errors import ModelError
from rnnserve_models.importers.files import place_model
from rnnserve_models.options import LayerOptions
from rnnserve_models.spec import GraphSpec
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.triton.check import check
from rnnserve_server.triton.surgery import with_batch_axis

_DTYPES = {
    pb.TYPE_BOOL: "bool",
    pb.TYPE_UINT8: "uint8",
    pb.TYPE_INT32: "int32",
    pb.TYPE_INT64: "int64",
    pb.TYPE_FP16: "float16",
    pb.TYPE_FP32: "float32",
    pb.TYPE_FP64: "float64",
}
_IDS = {pb.TYPE_INT32: "int32", pb.TYPE_INT64: "int64", pb.TYPE_UINT32: "uint32", pb.TYPE_UINT64: "uint64"}
_CONTROL = pb.ModelSequenceBatching.Control
_KINDS = {
    _CONTROL.CONTROL_SEQUENCE_START: "start",
    _CONTROL.CONTROL_SEQUENCE_END: "end",
    _CONTROL.CONTROL_SEQUENCE_READY: "ready",
    _CONTROL.CONTROL_SEQUENCE_CORRID: "corrid",
}
_VALUES = (("int32_false_true", "int32"), ("fp32_false_true", "float32"), ("bool_false_true", "bool"))
# A list of messages may do without a colon, and then an unknown one is not passed over.
_LIST = re.compile(r"\b([a-z_]+)\s*\[(?=\s*\{)")
_GRAPH, _DEFAULTS = "model.onnx", "defaults.safetensors"


def import_triton(directory: Path, models: Path, name: str = "", version: str = "") -> tuple[Path, list[str]]:
    """Makes a served model of a Triton model directory: ``config.pbtxt`` and ``<version>/model.onnx``.

    Args:
        directory: Triton's.
        models: the folder of models.
        name: of the new model; empty: Triton's.
        version: which version to take, and what to call it; empty: the newest.

    Returns:
        The new model directory, and what was found and measured, line by line.

    Raises:
        ModelError: it cannot be made a served model; the message says why.
    """
    config = read_config(directory / "config.pbtxt")
    numbers = sorted(int(path.name) for path in directory.iterdir() if path.is_dir() and path.name.isdecimal())
    if not numbers:
        raise ModelError(f"{directory}: has no version, a folder such as 1/ with {_file(config)} in it")
    version = version or str(numbers[-1])
    graph = directory / version / _file(config)
    if not graph.is_file():
        held = sorted(path.name for path in (directory / version).glob("*")) if (directory / version).is_dir() else []
        raise ModelError(
            f"{graph}: there is no such file (there are {held or 'none'}); only ONNX graphs are converted. A model in "
            "Python or TorchScript has to be exported to ONNX, with its states as inputs and outputs"
        )
    name = name or config.name or directory.resolve().name
    _, findings = place_model(models, name, version, partial(_write, config, graph, directory))
    return models / name / version, findings


def read_config(path: Path) -> pb.ModelConfig:
    """Reads a config.pbtxt; fields that mean nothing here are passed over.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    config = pb.ModelConfig()
    try:
        text_format.Parse(_LIST.sub(r"\1: [", text), config, allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ModelError(f"{path}: is not a ModelConfig: {error}") from error
    return config


def _write(config: pb.ModelConfig, graph: Path, directory: Path, target: Path) -> list[str]:
    if not config.HasField("sequence_batching"):
        raise ModelError(
            "config.pbtxt: has no sequence_batching, so the model keeps no state in Triton; `rnnserve import "
            f"{graph}` finds the states of its recurrent operators"
        )
    content = graph.read_bytes()
    batched = config.max_batch_size > 0
    findings = [f"{graph}: {len(content)} bytes, max_batch_size {config.max_batch_size}"]
    if not batched:
        content = with_batch_axis(content, origin=str(graph))
        findings.append(
            "max_batch_size is 0: the graph is run once for each session; its tensors have a batch axis of 1"
        )
    converted = _Converted(config, batched=batched)
    defaults = {each.input_name: _initial(each, directory) for each in config.sequence_batching.state}
    defaults = {name: value for name, value in defaults.items() if value.any()}
    if defaults:
        (target / _DEFAULTS).write_bytes(save(defaults))
        converted.graph["defaults"] = _DEFAULTS
    (target / _GRAPH).write_bytes(content)
    document = converted.document(graph)
    try:
        spec = GraphSpec.model_validate(document["graph"])
    except ValidationError as error:
        raise ModelError(f"config.pbtxt: {'; '.join(fault['msg'] for fault in error.errors())}") from error
    checked = check(graph.read_bytes(), content, spec, defaults, batched=batched, origin=str(graph))
    if not checked.sliceable:
        document["graph"]["sliceable"] = False
        document["masking"] = False
        document["settable_options"] = [
            option for option in document["settable_options"] if option not in ("go_backwards", "zero_output_for_mask")
        ]
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    (target / "model.yaml").write_text(text, encoding="utf-8")
    return [*findings, *converted.findings, *checked.findings]


class _Converted:
    """What a config says, in the words of a model.yaml.

    Attributes:
        graph: the section of that name.
        axes: of the tensors that clients do not see as [batch, time, *shape].
        findings: for a person.
    """

    def __init__(self, config: pb.ModelConfig, *, batched: bool) -> None:
        self._config = config
        self._leading: list[Any] = ["batch"] if batched else []
        self.graph: dict[str, Any] = {"file": _GRAPH}
        self.axes: dict[str, list[Any]] = {}
        self.findings: list[str] = []
        sequence = config.sequence_batching
        self.graph["inputs"] = [self._tensor(each, "input") for each in config.input]
        self._timed = any("time" in each["axes"] for each in self.graph["inputs"])
        self.graph["outputs"] = [self._tensor(each, "output") for each in config.output]
        if sequence.state:
            self.graph["states"] = [self._state(each) for each in sequence.state]
        if sequence.control_input:
            self.graph["controls"] = [self._control(each) for each in sequence.control_input]
        if not batched:
            self.graph["rows"] = 1
        if not config.output or not config.input:
            raise ModelError("config.pbtxt: names no input or no output; write down what Triton completes by itself")

    def document(self, graph: Path) -> dict[str, Any]:
        """The whole model.yaml."""
        config, closed = self._config, set()
        options: dict[str, bool] = {"return_sequences": True}
        if self._timed and any("time" not in each["axes"] for each in self.graph["outputs"]):
            options, closed = {}, {"return_sequences"}
        if "controls" in self.graph:
            closed.add("go_backwards")  # a sequence that has a start and an end has a direction
        oip: dict[str, Any] = {"max_batch_size": config.max_batch_size}
        if self.axes:
            oip["axes"] = self.axes
        if config.sequence_batching.max_sequence_idle_microseconds:
            oip["idle_lifetime"] = config.sequence_batching.max_sequence_idle_microseconds / 1e6
        document: dict[str, Any] = {"description": f"{config.name or graph.parent.parent.name}, imported from Triton."}
        if options:
            document["options"] = options
        document["settable_options"] = [name for name in LayerOptions.__dataclass_fields__ if name not in closed]
        if any(each["kind"] == "end" for each in self.graph.get("controls", ())):
            document["masking"] = False  # the last step must not be a masked one
        return {**document, "graph": self.graph, "oip": oip}

    def _tensor(self, tensor: pb.ModelInput | pb.ModelOutput, kind: str) -> dict[str, Any]:
        field = f"config.pbtxt: {kind} {tensor.name!r}"
        dims = list(tensor.dims)
        inner = list(tensor.reshape.shape) if tensor.HasField("reshape") else dims
        if inner != dims and [each for each in inner if each != 1] != [each for each in dims if each != 1]:
            raise ModelError(f"{field}: reshape from {dims} to {inner} moves elements; export the graph with {dims}")
        if dims.count(-1) > 1:
            raise ModelError(
                f"{field}: dims {dims} have several variable axes; one of them may be time, so give the others their "
                "size"
            )
        if kind == "output" and -1 in dims and not self._timed:
            raise ModelError(f"{field}: dims {dims} have a variable axis, but no input has one")
        if kind == "input" and getattr(tensor, "optional", False):
            raise ModelError(f"{field}: is optional, and a served graph takes all its inputs; make it a constant of it")
        seen = [*self._leading, *_axes(dims, squeezed=inner != dims)]
        axes = ["batch", *_axes(inner, squeezed=inner != dims)]
        if seen != ["batch", "time", *[each for each in axes if isinstance(each, int)]]:
            self.axes[tensor.name] = seen
        return {"name": tensor.name, "dtype": _dtype(tensor.data_type, field), "axes": axes}

    def _state(self, state: pb.ModelSequenceBatching.State) -> dict[str, Any]:
        field = f"config.pbtxt: state {state.input_name!r}"
        if -1 in state.dims:
            raise ModelError(f"{field}: dims {list(state.dims)} vary; a session's states have a fixed size here")
        self.findings.append(f"state {state.input_name!r} {list(state.dims)}: given back by {state.output_name!r}")
        return {
            "name": state.input_name,
            "input": state.input_name,
            "output": state.output_name,
            "dtype": _dtype(state.data_type, field),
            "axes": ["batch", *state.dims],
        }

    def _control(self, given: pb.ModelSequenceBatching.ControlInput) -> dict[str, Any]:
        field = f"config.pbtxt: control_input {given.name!r}"
        if len(given.control) != 1:
            raise ModelError(f"{field}: expected one control, got {len(given.control)}")
        (control,) = given.control
        kind = _KINDS[control.kind]
        self.findings.append(f"control {given.name!r}: {kind}")
        made: dict[str, Any] = {"kind": kind, "tensor": given.name}
        if kind == "corrid":
            if control.data_type not in _IDS:
                raise ModelError(f"{field}: an id of {pb.DataType.Name(control.data_type)} is not told to graphs here")
            return {**made, "dtype": _IDS[control.data_type], "axes": ["batch", 1]}
        for values, dtype in _VALUES:
            if said := list(getattr(control, values)):
                if len(said) != 2:
                    raise ModelError(f"{field}: {values}: expected two values, got {said}")
                return {**made, "dtype": dtype, "axes": ["batch", 1], "values": [float(value) for value in said]}
        raise ModelError(f"{field}: expected int32_false_true, fp32_false_true or bool_false_true")


def _axes(dims: Sequence[int], *, squeezed: bool) -> list[Any]:
    return ["time" if each == -1 else "squeeze" if each == 1 and squeezed else int(each) for each in dims]


def _dtype(data_type: pb.DataType.ValueType, field: str) -> str:
    if data_type not in _DTYPES:
        names = [pb.DataType.Name(each) for each in _DTYPES]
        raise ModelError(f"{field}: expected a data_type among {names}, got {pb.DataType.Name(data_type)}")
    return _DTYPES[data_type]


def _initial(state: pb.ModelSequenceBatching.State, directory: Path) -> Array:
    """What a state starts from: [*dims]."""
    field = f"config.pbtxt: state {state.input_name!r}: initial_state"
    dtype, shape = np.dtype(_dtype(state.data_type, field)), tuple(state.dims)
    if not state.initial_state or state.initial_state[0].WhichOneof("state_data") != "data_file":
        return np.zeros(shape if -1 not in shape else 0, dtype)
    initial = state.initial_state[0]
    if tuple(initial.dims) != shape or initial.data_type != state.data_type:
        raise ModelError(f"{field}: dims {list(initial.dims)} and data_type must be those of the state, {list(shape)}")
    if Path(initial.data_file).is_absolute() or ".." in Path(initial.data_file).parts:
        raise ModelError(f"{field}: data_file {initial.data_file!r} must be below initial_state/")
    path = directory / "initial_state" / initial.data_file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{field}: {path}: cannot be read: {error}") from error
    needed = int(np.prod(shape)) * dtype.itemsize
    if len(data) != needed:
        raise ModelError(f"{field}: {path}: expected {needed} bytes of {dtype.name} {list(shape)}, got {len(data)}")
    values: Array = np.frombuffer(data, dtype).reshape(shape).copy()
    return values


def _file(config: pb.ModelConfig) -> str:
    return config.default_model_filename or "model.onnx"
