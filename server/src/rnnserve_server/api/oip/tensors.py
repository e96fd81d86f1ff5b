"""Tensors of the Open Inference Protocol to NumPy arrays and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.errors import InvalidInput, InvalidRequest, OptionUnsupported

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The element types that a model here may have."""

DATATYPES = {dtype: name for name, dtype in DTYPES.items()}

_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_MAX_RANK = 32
_SHARED_MEMORY = "shared_memory_region"


def decode_inputs(request: pb.ModelInferRequest) -> dict[str, Array]:
    """The tensors of a request by their names, read-only; raw ones share the request's bytes.

    Raises:
        InvalidInput: a tensor breaks a rule of the protocol; the message says which.
        OptionUnsupported: it is in shared memory.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            "raw_input_contents", f"{len(request.inputs)}, as many as inputs, or none", str(len(raw)),
            "a tensor has either raw or typed contents, and all of a request have the same",
        )  # fmt: skip
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        name, field = tensor.name, f"inputs.{tensor.name}"
        if name in arrays:
            raise InvalidInput(field, "distinct names", f"{name!r} twice")
        if tensor.parameters and _SHARED_MEMORY in tensor.parameters:
            raise shared_memory(field)
        dtype = DTYPES.get(tensor.datatype)
        if dtype is None:
            raise InvalidInput(field, f"a datatype among {', '.join(DTYPES)}", repr(tensor.datatype[:80]))
        shape = tuple(tensor.shape[:])
        if len(shape) > _MAX_RANK or (shape and min(shape) < 0):
            raise InvalidInput(field, f"at most {_MAX_RANK} extents of 0 or more", f"shape {list(shape[:8])}")
        if raw:
            if tensor.HasField("contents"):
                raise InvalidInput(field, "raw or typed contents", "both")
            arrays[name] = _raw(field, dtype, shape, raw[index])
        else:
            arrays[name] = _typed(field, tensor, dtype, shape)
    return arrays


def _raw(field: str, dtype: np.dtype[np.generic], shape: tuple[int, ...], data: bytes) -> Array:
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise InvalidInput(field, f"{needed} bytes of {DATATYPES[dtype]} for shape {list(shape)}", f"{len(data)} bytes")
    if dtype == np.bool_:
        bits = np.frombuffer(data, np.uint8)
        if bits.size and bits.max() > 1:
            raise InvalidInput(field, "bool bytes of 0 or 1", f"a byte of {int(bits.max())}")
        return _shaped(field, bits.view(np.bool_), shape)
    return _shaped(field, np.frombuffer(data, dtype), shape)


def _typed(
    field: str, tensor: pb.ModelInferRequest.InferInputTensor, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> Array:
    contents = _CONTENTS.get(tensor.datatype)
    if contents is None:
        raise InvalidInput(field, f"raw contents, for {tensor.datatype} has no typed ones", "none")
    filled = [each.name for each, _ in tensor.contents.ListFields()]
    if any(name != contents for name in filled):
        raise InvalidInput(field, f"the elements of {tensor.datatype} in contents.{contents}", f"contents.{filled[0]}")
    values = getattr(tensor.contents, contents)
    if len(values) != math.prod(shape):
        raise InvalidInput(field, f"{math.prod(shape)} elements for shape {list(shape)}", f"{len(values)}")
    wide = np.asarray(values[:], np.int64 if dtype == np.uint8 else dtype)
    if dtype == np.uint8 and wide.size and wide.max() > np.iinfo(np.uint8).max:
        raise InvalidInput(field, "elements of 0 to 255", str(int(wide.max())))
    array = _shaped(field, wide.astype(dtype, copy=False), shape)
    array.flags.writeable = False
    return array


def _shaped(field: str, values: Array, shape: tuple[int, ...]) -> Array:
    try:
        return values.reshape(shape)
    except (ValueError, OverflowError) as error:  # an empty tensor whose other extents are beyond NumPy's
        raise InvalidInput(field, "extents that fit in memory", f"shape {list(shape[:8])}") from error


def encode_outputs(
    response: pb.ModelInferResponse, arrays: Sequence[tuple[str, Array]], *, typed: bool = False
) -> None:
    """Puts outputs into an answer: raw, or typed if that is asked for.

    Raises:
        InvalidRequest: a FP16 output is asked for typed.
    """
    for name, array in arrays:
        datatype = DATATYPES[array.dtype]
        tensor = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if not typed:
            response.raw_output_contents.append(array.tobytes())
        elif datatype in _CONTENTS:
            getattr(tensor.contents, _CONTENTS[datatype]).extend(array.ravel().tolist())
        else:
            raise InvalidRequest("rnnserve_contents", "raw contents", "typed", f"{datatype} has no typed ones")


def shared_memory(field: str) -> OptionUnsupported:
    """What to say to a tensor in shared memory."""
    return OptionUnsupported(
        f"{field}: shared memory is not offered (the server's metadata does not list it); send the contents",
        metadata={"field": field},
    )
