"""Requests of the Open Inference Protocol, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip import service_pb2_grpc
from rnnserve_server.api.oip.tensors import DATATYPES, DTYPES


def request(
    model: str,
    x: np.ndarray | Mapping[str, np.ndarray],
    sequence: int | str = 0,
    *,
    start: bool = False,
    end: bool = False,
    outputs: Sequence[str] = (),
    version: str = "",
    id: str = "",
    **parameters: Any,
) -> pb.ModelInferRequest:
    """As tritonclient makes one, with raw contents. ``parameters`` are ours, without their prefix."""
    made = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for name, array in (x if isinstance(x, Mapping) else {"input": x}).items():
        made.inputs.add(name=name, datatype=DATATYPES[array.dtype], shape=array.shape)
        made.raw_input_contents.append(array.tobytes())
    for name in outputs:
        made.outputs.add(name=name)
    if sequence:
        put(made.parameters["sequence_id"], sequence)
        made.parameters["sequence_start"].bool_param = start
        made.parameters["sequence_end"].bool_param = end
    for name, value in parameters.items():
        put(made.parameters[f"rnnserve_{name}"], value)
    return made


def put(parameter: pb.InferParameter, value: Any) -> None:
    for kind, field in ((bool, "bool_param"), (int, "int64_param"), (str, "string_param"), (float, "double_param")):
        if isinstance(value, kind):
            setattr(parameter, field, value)
            return
    raise TypeError(value)


def arrays(response: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    """The outputs of an answer with raw contents."""
    assert len(response.raw_output_contents) == len(response.outputs)
    return {
        output.name: np.frombuffer(raw, DTYPES[output.datatype]).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def said(message: Any) -> dict[str, Any]:
    """The parameters of a message."""
    found = {}
    for name, parameter in message.parameters.items():
        found[name] = getattr(parameter, parameter.WhichOneof("parameter_choice"))
    return found


class Oip:
    """A stub, in short."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def infer(self, *args: Any, timeout: float = 30.0, **kwargs: Any) -> pb.ModelInferResponse:
        return self.stub.ModelInfer(request(*args, **kwargs), timeout=timeout)

    def y(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """The only output."""
        (output,) = arrays(self.infer(*args, **kwargs)).values()
        return output


def told(error: grpc.RpcError) -> tuple[str, str, str, float | None]:
    """The status, the reason, the message and the seconds after which to try again, of an error."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    after = None
    for detail in rpc_status.from_call(error).details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            after = retry.retry_delay.ToNanoseconds() / 1e9
    return error.code().name, info.reason, error.details(), after
