"""Messages of the contract, filled at random by their descriptors: mostly such as pass for real ones at first sight."""

from __future__ import annotations

from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from rnnserve.v1 import inference_pb2, session_pb2, tensor_pb2

_DEPTH = 6
_NUMBERS = (0, 1, 2, 3, 5, 7, 63, 64, 65, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "lstm-4", "1", "2", "input", "output", "cell_0.h", "cell_0.c", "\0", "é" * 40, "x" * 300, "../..", "%n%s")
_IDS = ("", "a", "b", "c", "alice/honest-0", "honest-0", "/honest-0", "x" * 128, "x" * 129, "a/b", ".", "é")
_ITEM_BYTES = {1: 2, 2: 4, 3: 8, 4: 4, 5: 8, 6: 1, 7: 1}
_KINDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def fill(message: Message, chance: Random, depth: int = 0) -> None:
    """Fills a message."""
    if isinstance(message, tensor_pb2.Tensor) and chance.random() < 0.9:
        _fill_tensor(message, chance)
        return
    if isinstance(message, inference_pb2.StepFrame) and chance.random() < 0.97:
        _fill_frame(message, chance)
        return
    for field in message.DESCRIPTOR.fields:
        if chance.random() < (0.35 if depth else 0.7):
            continue
        if field.is_repeated:
            _fill_repeated(message, field, chance, depth)
        elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            child = getattr(message, field.name)
            child.SetInParent()
            if depth < _DEPTH:
                fill(child, chance, depth + 1)
        else:
            setattr(message, field.name, _scalar(field, chance))


def _fill_repeated(message: Message, field: FieldDescriptor, chance: Random, depth: int) -> None:
    values = getattr(message, field.name)
    count = chance.choice((1, 1, 1, 2, 3, 5, 40))
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return
    for _ in range(count if depth < 3 else 1):
        if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
            values.append(_scalar(field, chance))
        elif depth < _DEPTH:
            fill(values.add(), chance, depth + 1)


def _scalar(field: FieldDescriptor, chance: Random) -> Any:
    kind = field.cpp_type
    if field.name in ("lane", "lanes"):
        return chance.choice((0, 1, 2, 3, 4, 5, 6, 7, 100, 65535, 65536, 2**32 - 1))
    if field.name in ("count", "steps", "batch_size"):
        return chance.choice((0, 1, 1, 2, 3, 8, 100, 4097, 10_001, 2**31, 2**32 - 1))
    if kind in _KINDS:
        low, high = _KINDS[kind]
        number = chance.choice(_NUMBERS) if chance.random() < 0.8 else chance.getrandbits(64)
        return max(low, min(high, -number if low and chance.random() < 0.3 else number))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return chance.choice((0, 1, 2, 3, 4, 7, 99))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return chance.choice(_FLOATS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 8, 64, 1000)))
    if field.name in ("session_id", "session_ids"):
        return chance.choice(_IDS)
    if field.name == "model":
        return chance.choice(("lstm-4", "lstm-4", "lstm-4", *_TEXTS))
    return chance.choice(_TEXTS)


def _fill_tensor(tensor: tensor_pb2.Tensor, chance: Random, shape: tuple[int, ...] | None = None) -> None:
    """A tensor whose bytes are as many as its shape says, mostly."""
    tensor.data_type = chance.choice((2, 2, 2, 2, 1, 3, 6, 0, 9))  # type: ignore[assignment]
    if shape is None:
        shape = tuple(chance.choice((0, 1, 1, 2, 3, 5, 5)) for _ in range(chance.randrange(5)))
    tensor.shape.extend(shape)
    size = _ITEM_BYTES.get(tensor.data_type, 4)
    for extent in shape:
        size *= extent
    if chance.random() < 0.1:
        size = chance.choice((0, 1, size + 1, max(0, size - 1)))
    if chance.random() < 0.05:
        tensor.shape.append(chance.choice((-1, 0, 2**31, 2**62, 2**63 - 1)))
    tensor.data = (
        chance.choice((b"\0", b"\x7f", b"\xff"))[:1] * size if chance.random() < 0.5 else chance.randbytes(size)
    )


def _fill_frame(frame: inference_pb2.StepFrame, chance: Random) -> None:
    """A frame that a lane of lstm-4 would take, but for a detail."""
    lanes = [chance.randrange(8) for _ in range(chance.choice((1, 1, 2, 3)))]
    if chance.random() < 0.9:
        lanes = list(dict.fromkeys(lanes))
    frame.lanes.extend(lanes)
    if chance.random() < 0.5:  # one that is right
        steps = chance.choice((1, 1, 2, 40))
        tensor = frame.inputs.add(name="input").tensor
        tensor.data_type = tensor_pb2.DATA_TYPE_FLOAT32
        tensor.shape.extend((len(lanes), 1, steps, 5))
        tensor.data = chance.randbytes(len(lanes) * steps * 20)
        return
    if chance.random() < 0.3:
        frame.first_steps.extend(chance.choice(_NUMBERS) for _ in range(len(lanes) - (chance.random() < 0.1)))
    named = frame.inputs.add(name=chance.choice(("input", "input", "input", "input", "", "x")))
    steps = chance.choice((1, 1, 1, 2, 7, 0))
    _fill_tensor(named.tensor, chance, (len(lanes), chance.choice((1, 1, 1, 2)), steps, chance.choice((5, 5, 5, 4))))
    if chance.random() < 0.1:
        _fill_tensor(frame.mask, chance, (len(lanes), 1, steps))


def stream_request(chance: Random, frames: int, *, first: bool = False) -> inference_pb2.StreamRequest:
    """A message of a stream: opens now and then, so many frames, closes now and then. The first opens half of the lanes
    for new sessions.
    """
    request = inference_pb2.StreamRequest()
    if first:
        for lane in range(0, 8, 2):
            request.opens.add(lane=lane).create.model = "lstm-4"
    if chance.random() < 0.3:
        for _ in range(chance.choice((1, 2, 4))):
            opening = request.opens.add(lane=chance.randrange(8))
            if chance.random() < 0.7:
                opening.create.model = "lstm-4"
                opening.create.session_id = chance.choice(_IDS)
            else:
                fill(opening, chance, 1)
    for _ in range(frames):
        fill(request.frames.add(), chance, 1)
    if chance.random() < 0.1:
        request.closes.add(lane=chance.randrange(8), delete_session=chance.random() < 0.7)
    if first and chance.random() < 0.9:  # or there would soon be as many sessions as there may
        request.closes.extend(inference_pb2.LaneClose(lane=lane, delete_session=True) for lane in range(0, 8, 2))
    return request


UNARY: tuple[tuple[str, type[Message]], ...] = (
    ("/rnnserve.v1.InferenceService/Predict", inference_pb2.PredictRequest),
    ("/rnnserve.v1.InferenceService/Rollout", inference_pb2.RolloutRequest),
    ("/rnnserve.v1.SessionService/CreateSession", session_pb2.CreateSessionRequest),
    ("/rnnserve.v1.SessionService/GetSession", session_pb2.GetSessionRequest),
    ("/rnnserve.v1.SessionService/ListSessions", session_pb2.ListSessionsRequest),
    ("/rnnserve.v1.SessionService/ResetSession", session_pb2.ResetSessionRequest),
    ("/rnnserve.v1.SessionService/DeleteSession", session_pb2.DeleteSessionRequest),
    ("/rnnserve.v1.SessionService/GetState", session_pb2.GetStateRequest),
    ("/rnnserve.v1.SessionService/ForkSession", session_pb2.ForkSessionRequest),
    ("/rnnserve.v1.SessionService/ExportSession", session_pb2.ExportSessionRequest),
    ("/rnnserve.v1.SessionService/ImportSession", session_pb2.ImportSessionRequest),
    ("/rnnserve.v1.SessionService/RewindSession", session_pb2.RewindSessionRequest),
)
"""Calls without a stream, and what they are asked with."""


def unary_request(chance: Random) -> tuple[str, bytes]:
    """A call without a stream: its method and its message, which may be none."""
    method, kind = chance.choice(UNARY)
    message = kind()
    fill(message, chance)
    content = message.SerializeToString()
    if chance.random() < 0.15:
        return method, mutated(content, chance)
    return method, content


def mutated(content: bytes, chance: Random) -> bytes:
    """Bytes with some of them changed, left out or doubled."""
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 2, 8))):
        at = chance.randrange(len(changed))
        match chance.randrange(3):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                changed = changed[:at] + changed[at : at + 4] + changed[at:]
            case _:
                del changed[at : at + chance.randrange(1, 9)]
                changed = changed or bytearray(1)
    return bytes(changed)
