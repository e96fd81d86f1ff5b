"""What a model is, in the words of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_models.load import LoadedModel
from rnnserve_models.spec import Axis, GraphControl, StateSpec, TensorSpec
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip.axes import View
from rnnserve_server.api.oip.face import Controls
from rnnserve_server.api.oip.tensors import DATATYPES
from rnnserve_server.config import Settings

_INT32 = (1 << 31) - 1
_KINDS = {
    "start": pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_START,
    "end": pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_END,
    "ready": pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_READY,
    "corrid": pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_CORRID,
}
_VALUES = {"int32": "int32_false_true", "float32": "fp32_false_true", "bool": "bool_false_true"}


def metadata(model: LoadedModel, versions: Sequence[str]) -> pb.ModelMetadataResponse:
    """The tensors of a model, under its default options."""
    batched = _batched(model)
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=versions,
        platform=f"rnnserve_{model.engine.name}",
        inputs=[
            pb.ModelMetadataResponse.TensorMetadata(
                name=spec.name, datatype=DATATYPES[spec.dtype], shape=_extents(model, axes, batch=batched)
            )
            for spec, axes in _inputs(model)
        ],
        outputs=[
            pb.ModelMetadataResponse.TensorMetadata(
                name=spec.name, datatype=DATATYPES[spec.dtype], shape=_extents(model, axes, batch=batched)
            )
            for spec, axes in _outputs(model)
        ],
        properties={"digest": model.digest, "description": model.spec.description},
    )


def config(model: LoadedModel, versions: Sequence[str], settings: Settings) -> pb.ModelConfig:
    """A model as its config.pbtxt would have it."""
    batched, oip = _batched(model), model.spec.oip
    most = settings.max_batch_size
    if oip is not None and oip.max_batch_size:
        most = min(most, oip.max_batch_size)
    idle = min((oip.idle_lifetime if oip is not None else None) or settings.idle_lifetime, settings.max_idle_lifetime)
    answer = pb.ModelConfig(
        name=model.name,
        platform=f"rnnserve_{model.engine.name}",
        backend="rnnserve",
        max_batch_size=most if batched else 0,
        input=[
            pb.ModelInput(name=spec.name, data_type=_data_type(spec.dtype), dims=_extents(model, axes, batch=False))
            for spec, axes in _inputs(model)
        ],
        output=[
            pb.ModelOutput(name=spec.name, data_type=_data_type(spec.dtype), dims=_extents(model, axes, batch=False))
            for spec, axes in _outputs(model)
        ],
        sequence_batching=pb.ModelSequenceBatching(
            max_sequence_idle_microseconds=int(idle * 1e6),
            oldest=pb.ModelSequenceBatching.StrategyOldest(max_candidate_sequences=min(settings.max_sessions, _INT32)),
            control_input=[_control(each) for each in _controls(model)],
            state=[_state(spec) for spec in model.engine.states if spec.name not in Controls.of(model).hidden],
        ),
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
    )
    numbers = [int(version) for version in versions if version.isascii() and version.isdecimal()]
    if len(numbers) == len(versions):
        answer.version_policy.specific.versions.extend(numbers)
    else:
        answer.version_policy.all.SetInParent()
    answer.parameters["digest"].string_value = model.digest
    return answer


def _inputs(model: LoadedModel) -> list[tuple[TensorSpec, tuple[Axis, ...]]]:
    hidden = Controls.of(model).hidden
    view, timed = _view(model), _timed(model)
    return [
        (spec, view.axes(spec, output=False, timed=timed)) for spec in model.engine.inputs if spec.name not in hidden
    ]


def _outputs(model: LoadedModel) -> list[tuple[TensorSpec, tuple[Axis, ...]]]:
    view, timed = _view(model), _timed(model) and model.spec.default_options.return_sequences
    return [(spec, view.axes(spec, output=True, timed=timed)) for spec in model.engine.outputs]


def _view(model: LoadedModel) -> View:
    return View(model, time_major=model.spec.default_options.time_major)


def _timed(model: LoadedModel) -> bool:
    """Whether tensors have a time axis, where the client has the choice."""
    own = model.spec.oip.axes if model.spec.oip is not None else {}
    return all("time" in own.get(spec.name, ("time",)) for spec in model.engine.inputs)


def _batched(model: LoadedModel) -> bool:
    return model.spec.oip is None or model.spec.oip.max_batch_size != 0


def _extents(model: LoadedModel, axes: Sequence[Axis], *, batch: bool) -> list[int]:
    steps = model.engine.timesteps
    sizes = {"batch": -1, "time": -1 if steps is None else steps, "squeeze": 1}
    return [sizes[axis] if isinstance(axis, str) else axis for axis in axes if batch or axis != "batch"]


def _data_type(dtype: np.dtype[np.generic]) -> pb.DataType.ValueType:
    return pb.DataType.Value(f"TYPE_{DATATYPES[dtype]}")


def _controls(model: LoadedModel) -> tuple[GraphControl, ...]:
    return () if model.spec.graph is None else model.spec.graph.controls


def _control(spec: GraphControl) -> pb.ModelSequenceBatching.ControlInput:
    control = pb.ModelSequenceBatching.Control(kind=_KINDS[spec.kind])
    if spec.kind == "corrid":
        control.data_type = pb.DataType.Value(f"TYPE_{spec.dtype.upper()}")
    else:
        dtype = np.dtype(spec.dtype)
        getattr(control, _VALUES[spec.dtype]).extend(np.array(spec.values).astype(dtype).tolist())
    return pb.ModelSequenceBatching.ControlInput(name=spec.tensor, control=[control])


def _state(spec: StateSpec) -> pb.ModelSequenceBatching.State:
    initial = pb.ModelSequenceBatching.InitialState(
        name=spec.name, data_type=_data_type(spec.dtype), dims=spec.shape, zero_data=_zeros(spec.default)
    )
    return pb.ModelSequenceBatching.State(
        input_name=spec.name,
        output_name=spec.name,
        data_type=_data_type(spec.dtype),
        dims=spec.shape,
        initial_state=[initial],
    )


def _zeros(default: Array | None) -> bool:
    return default is None or not default.any()
