"""Messages with one frame as columns, without a message object.

A stream says the same lanes with tensors of the same shapes again and again: from one frame to the next only the first
steps and the numbers in the tensors change. So what stays is kept as an `Outline`, and to read a frame like one before
is to compare a few runs of bytes. The encoding is protobuf's (https://protobuf.dev/programming-guides/encoding), and
every other parser and writer of it understands, and is understood.

What is not laid out as all writers lay it out (fields in their order, each once, numbers as short as they can be) is
left to protobuf, as is all that is wrong.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from rnnserve.codec import DATA_TYPES, DTYPES, data_type
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.tensor_pb2 import NamedTensor, Tensor

Array: TypeAlias = NDArray[Any]
Buffer: TypeAlias = "bytes | Array"

_FRAMES = b"\x12"  # field 2 of a request or response
_LANES, _FIRST_STEPS = 0x0A, 0x12
_STEPS = bytes((_FIRST_STEPS,))
_MOST_OUTLINES = 256
_BEGINNING = 7  # bytes of a message: the first lane is among them, which tells small frames of a stream from others
_MOST_ALIKE = 4  # outlines of messages that begin alike: large frames of a stream do, whatever their lanes are
_MOST_KEPT = 8 << 20  # bytes that a reader's outlines take
_LANE_KEPT = 40  # bytes that a lane takes, as an element of a tuple
_MOST_BYTES = 4  # of a varint that is a length or an extent
_MOST_AXES = 32
# What has more is no message of everyday, and left to protobuf, which reads it in C.
_MOST_LANE_BYTES = 5 << 16
_MOST_TENSORS = 64
_SWAP = sys.byteorder != "little"


class TensorAt(NamedTuple):
    """A tensor of a frame, and where in the message it is.

    Attributes:
        field: the number of the frame's field: 3 are inputs, 4 outputs, 5 states.
        name: its name.
        dtype: its elements.
        shape: its extents.
        head: the bytes between what comes before and its elements.
        start: where its elements begin in the message.
        stop: where they end.
    """

    field: int
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    head: bytes
    start: int
    stop: int

    def like(self) -> Array:
        """An array of its dtype and shape that takes no memory."""
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)


class Outline:
    """All of a message with one frame but its first steps and the numbers in its tensors.

    Attributes:
        lanes: the frame's lanes, N.
        timesteps: what a result says; 0 for a request.
        tensors: its tensors, in their order.
        kept: what the reader wants to keep with it; None at first.
        nbytes: about as many as it takes.
    """

    __slots__ = ("_at", "_heads", "_size", "_steps", "_stop", "kept", "lanes", "nbytes", "tensors", "timesteps")

    def __init__(
        self, content: bytes, lanes: tuple[int, ...], steps: int, stop: int, timesteps: int, tensors: list[TensorAt]
    ) -> None:
        self._size = len(content)
        self._heads = [content[:steps], *(each.head for each in tensors)]
        self._at = [0, *(each.start - len(each.head) for each in tensors)]
        self._steps = steps
        self._stop = stop
        self.lanes = lanes
        self.timesteps = timesteps
        self.tensors = tensors
        self.kept: Any = None
        self.nbytes = sum(map(len, self._heads)) + _LANE_KEPT * len(lanes)

    def fits(self, content: bytes) -> bool:
        """Whether a message is like this one."""
        return len(content) == self._size and all(map(content.startswith, self._heads, self._at))

    def first_steps(self, content: bytes) -> Array | None:
        """The first steps of a message that fits: uint64 [N], or None if it says none.

        Raises:
            ValueError: there are not N, or they are not numbers.
        """
        said, lanes = content[self._steps : self._stop], len(self.lanes)
        if not said:
            return None
        width = len(said) // lanes
        one = said[:width]
        # Sessions that are stepped together are mostly at the same step.
        if width < 10 and one * lanes == said and (value := _varint(one)) is not None:
            steps = np.empty(lanes, np.uint64)
            steps.fill(value)
            return steps
        try:
            found = pb.StepFrame.FromString(_STEPS + varint(len(said)) + said).first_steps
        except DecodeError as error:
            raise ValueError(str(error)) from error
        if len(found) != lanes:
            raise ValueError(f"expected {lanes} first steps, got {len(found)}")
        return np.array(found[:], np.uint64)

    def arrays(self, content: bytes, field: int) -> dict[str, Array]:
        """The tensors of a field of a message that fits, read-only, by their names.

        Raises:
            ValueError: a bool is neither 0 nor 1.
        """
        found = {}
        for each in self.tensors:
            if each.field == field:
                # A slice, because elements may begin anywhere in a message and engines want them aligned.
                array = np.frombuffer(content[each.start : each.stop], each.dtype).reshape(each.shape)
                if each.dtype.char == "?" and array.size and array.view(np.uint8).max() > 1:
                    raise ValueError(f"{each.name}: expected bool bytes of 0 or 1")
                found[each.name] = array
        return found


class FrameReader:
    """Reads messages of one stream.

    Args:
        timesteps: whether its frames are results, which say their number of time steps.
    """

    def __init__(self, *, timesteps: bool = False) -> None:
        self._timesteps = timesteps
        self._outlines: dict[tuple[int, bytes], list[Outline]] = {}  # by a message's size and beginning, newest first
        self._nbytes = 0  # of _outlines

    def read(self, content: bytes) -> Outline | None:
        """The outline of a message that is nothing but one frame laid out as usual, with tensors and without a mask;
        None for any other message.
        """
        key = len(content), content[:_BEGINNING]
        for known in self._outlines.get(key, ()):
            if known.fits(content):
                return known
        outline = None if _SWAP else outlined(content, timesteps=self._timesteps)
        if outline is not None:
            self._keep(key, outline)
        return outline

    def _keep(self, key: tuple[int, bytes], outline: Outline) -> None:
        """Keeps an outline of messages of a kind: whoever sends ever new ones must not fill the memory with them."""
        if len(self._outlines) >= _MOST_OUTLINES or self._nbytes + outline.nbytes > _MOST_KEPT:
            self._outlines.clear()
            self._nbytes = 0
        if outline.nbytes <= _MOST_KEPT:
            alike = self._outlines.setdefault(key, [])
            alike.insert(0, outline)
            self._nbytes += outline.nbytes
            if len(alike) > _MOST_ALIKE:
                self._nbytes -= alike.pop().nbytes


def outlined(content: bytes, *, timesteps: bool = False) -> Outline | None:
    """As `FrameReader.read`, of one message.

    Args:
        content: the message, a StreamRequest or, with ``timesteps``, a StreamResponse.
        timesteps: whether it has results.
    """
    try:
        return _outlined(content, timesteps)
    except (IndexError, ValueError, DecodeError):  # it ends too early, or is none of ours
        return None


def _outlined(content: bytes, timesteps: bool) -> Outline | None:
    at = _into(content, 0, _FRAMES[0], len(content))
    if content[at] != _LANES:
        return None
    begun, at = at, _length(content, at + 1)[1]
    lanes_stop = at + _length(content, begun + 1)[0]
    if lanes_stop - at > _MOST_LANE_BYTES:
        return None
    lanes = tuple(pb.StepFrame.FromString(content[begun:lanes_stop]).lanes[:])
    if not lanes or lanes_stop > len(content):
        return None
    at = steps = stop = lanes_stop
    if content[at] == _FIRST_STEPS:
        size, steps = _length(content, at + 1)
        at = stop = steps + size
    fixed, count = stop, 0
    tensors: list[TensorAt] = []
    if timesteps:
        if content[at] != 0x18:
            return None
        count, at = _length(content, at + 1)
    while at < len(content):
        field, ends = content[at] >> 3, 0
        if content[at] & 7 != 2 or field not in ((4, 5) if timesteps else (3,)):
            return None
        if tensors and (field < tensors[-1].field or len(tensors) == _MOST_TENSORS):
            return None
        size, at = _length(content, at + 1)
        ends = at + size
        name_size, at = _length(content, _tagged(content, at, 0x0A))
        name = content[at : at + name_size].decode()
        at = _into(content, at + name_size, 0x12, ends)
        number, at = _length(content, _tagged(content, at, 0x08))
        shape: tuple[int, ...] = ()
        if content[at] == 0x12:
            size, at = _length(content, at + 1)
            if size > _MOST_AXES * _MOST_BYTES:
                return None
            shape_stop, extents = at + size, []
            while at < shape_stop:
                extent, at = _length(content, at)
                extents.append(extent)
            shape = tuple(extents)
            if at != shape_stop:
                return None
        start = _into(content, at, 0x1A, ends)
        if number not in DTYPES or len(shape) > _MOST_AXES or any(each.name == name for each in tensors):
            return None
        if ends > len(content) or math.prod(shape) * DTYPES[number].itemsize != ends - start:
            return None
        tensors.append(TensorAt(field, name, DTYPES[number], shape, content[fixed:start], start, ends))
        fixed = at = ends
    if not tensors:
        return None
    return Outline(content, lanes, steps, stop, count, tensors)


def _tagged(content: bytes, at: int, tag: int) -> int:
    """Where what follows a tag begins."""
    if content[at] != tag:
        raise ValueError
    return at + 1


def _into(content: bytes, at: int, tag: int, ends: int) -> int:
    """Where the content of a field begins that reaches as far as what it is part of."""
    size, at = _length(content, _tagged(content, at, tag))
    if at + size != ends:
        raise ValueError
    return at


def _length(content: bytes, at: int) -> tuple[int, int]:
    """A number of at most 28 bits, as short as it can be, and where what follows it begins."""
    value = content[at]
    if value < 128:
        return value, at + 1
    value &= 127
    for shift in range(1, _MOST_BYTES):
        byte = content[at + shift]
        value |= (byte & 127) << 7 * shift
        if 0 < byte < 128:
            return value, at + shift + 1
        if not byte:
            break
    raise ValueError


def _varint(said: bytes) -> int | None:
    """The number that so many bytes are; None if they are not one."""
    value = 0
    for index, byte in enumerate(said):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value if index == len(said) - 1 and (byte or not index) else None
    return None


def varint(value: int) -> bytes:
    """A number from 0 to 2^64 - 1 in protobuf's base 128."""
    if value < 128:
        return bytes((value,))
    said = bytearray()
    while value > 127:
        said.append(value & 127 | 128)
        value >>= 7
    said.append(value)
    return bytes(said)


_short = lru_cache(1024)(varint)  # of lengths, which come again and again


class FrameWriter:
    """Writes frames of one stream, as messages of their own: what it made of lanes and shapes before is kept."""

    def __init__(self) -> None:
        self._lanes: dict[bytes, bytes] = {}
        self._heads: dict[tuple[int, str, str, tuple[int, ...]], bytes] = {}

    def write(
        self, lanes: Array, first_steps: Array | None, timesteps: int, tensors: Iterable[tuple[int, str, Array]]
    ) -> list[Buffer]:
        """A message with one frame, in pieces that are to be put end to end.

        Pieces of several messages end to end are one message with all of their frames. The arrays must not change
        until then.

        Args:
            lanes: int64 [N].
            first_steps: uint64 [N], or None.
            timesteps: what a result says; 0 for a request.
            tensors: the number of the field, the name and the array of each, fields ascending.

        Raises:
            TensorError: the contract has no such dtype.
        """
        said = [self._said_lanes(lanes)]
        if first_steps is not None:
            said.append(_said_steps(first_steps))
        if timesteps:
            said.append(b"\x18" + _short(timesteps))
        parts: list[Buffer] = [b"".join(said)]
        size = len(parts[0])
        for field, name, array in tensors:
            head, elements = self._tensor(field, name, array)
            size += len(head) + elements.nbytes
            parts += (head, elements)
        parts.insert(0, _FRAMES + _short(size))
        return parts

    def _said_lanes(self, lanes: Array) -> bytes:
        key = lanes.tobytes()
        said = self._lanes.get(key)
        if said is None:
            if len(self._lanes) >= _MOST_OUTLINES:
                self._lanes.clear()
            said = self._lanes[key] = pb.StepFrame(lanes=lanes.tolist()).SerializeToString()
        return said

    def _tensor(self, field: int, name: str, array: Array) -> tuple[bytes, Array]:
        """What comes before a tensor's elements, and these."""
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        if _SWAP or array.dtype not in DATA_TYPES:
            array = array.astype(DTYPES[data_type(array.dtype, name)])
        key = (field, name, array.dtype.char, array.shape)
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= _MOST_OUTLINES:
                self._heads.clear()
            head = self._heads[key] = _head(field, name, array)
        return head, array


def _said_steps(first_steps: Array) -> bytes:
    count, content = len(first_steps), first_steps.tobytes()
    if content[:8] * count == content:
        said = varint(int(first_steps[0])) * count
        return _STEPS + _short(len(said)) + said
    return pb.StepFrame(first_steps=first_steps.tolist()).SerializeToString()


def _head(field: int, name: str, array: Array) -> bytes:
    """All of a named tensor, as a field of a frame, that comes before its elements."""
    tensor = Tensor(data_type=DATA_TYPES[array.dtype], shape=array.shape).SerializeToString()
    named = NamedTensor(name=name).SerializeToString()
    tensor += b"\x1a" + varint(array.nbytes)
    named += b"\x12" + varint(len(tensor) + array.nbytes) + tensor
    return bytes((field << 3 | 2,)) + varint(len(named) + array.nbytes) + named
