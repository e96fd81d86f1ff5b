"""Messages of one stream that are like the one before but for a detail: what a reader that keeps an outline of what it
has read may take for the same. Bytes, because no writer of protobuf makes most of them.
"""

from __future__ import annotations

from random import Random

import numpy as np
from google.protobuf.message import DecodeError

from rnnserve.frames import varint
from rnnserve.v1 import inference_pb2, tensor_pb2

LANES = (0, 1, 2, 3, 4, 5, 126, 127, 128, 129, 300)
"""Those that are opened: numbers of one byte, and of two."""

_FEATURES = 5
_HUGE = 2**62


class Likenesses:
    """What a client says on one stream, message by message.

    Args:
        chance: decides.
    """

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self._lanes = tuple(chance.sample(LANES, chance.choice((1, 2, 3, 8))))
        self._timesteps = chance.choice((1, 1, 1, 3, 40))
        self._says_steps = chance.random() < 0.6
        self._step = 0

    def opening(self) -> bytes:
        """The first message."""
        request = inference_pb2.StreamRequest()
        for lane in LANES:
            request.opens.add(lane=lane).create.model = "lstm-4"
        return request.SerializeToString()

    def closing(self) -> bytes:
        """The last one: sessions that are left would soon be as many as there may be."""
        closes = [inference_pb2.LaneClose(lane=lane, delete_session=True) for lane in LANES]
        return inference_pb2.StreamRequest(closes=closes).SerializeToString()

    def next(self) -> bytes:
        """Another message: a frame that is right as often as not, or one that differs by something."""
        ways = (
            self._other_head,
            self._overlong,
            self._other_lanes,
            self._bools,
            self._steps_that_are_none,
            self._other_steps,
            self._other_size,
            self._more,
            self._huge,
            self._closed_and_opened,
        )
        if self._chance.random() < 0.5:
            return self._right()
        return self._chance.choice(ways)()

    def _right(self) -> bytes:
        content = _message(self._lanes, self._steps(), *self._inputs())
        self._step += self._timesteps
        return content

    def _steps(self, lanes: int | None = None) -> bytes:
        """First steps as they should be, which they are not any more when a frame before was refused."""
        return varint(self._step) * (lanes or len(self._lanes)) if self._says_steps else b""

    def _inputs(self) -> tuple[bytes, bytes]:
        """A tensor's head, as `_tensor` makes it, and its elements."""
        shape = (len(self._lanes), 1, self._timesteps, _FEATURES)
        seed = self._chance.randrange(1000)
        data = np.random.default_rng(seed).standard_normal(shape, np.float32).tobytes()
        return _tensor(tensor_pb2.DATA_TYPE_FLOAT32, shape), data

    def _other_head(self) -> bytes:
        """A byte of what is said before the elements is another: a tag, a length, a lane, a step, a name, an extent."""
        head, data = self._inputs()
        content = bytearray(_message(self._lanes, self._steps(), head, data))
        for _ in range(self._chance.choice((1, 1, 2))):
            at = self._chance.randrange(len(content) - len(data))
            byte = content[at]
            content[at] = self._chance.choice((byte ^ 0x80, (byte + 1) % 256, (byte - 1) % 256, 0, 127, 255, byte ^ 8))
        return bytes(content)

    def _overlong(self) -> bytes:
        """A number of two bytes where one would do: as long as before by what is left out at its end, or longer."""
        head, data = self._inputs()
        content = _message(self._lanes, self._steps(), head, data)
        at = self._chance.randrange(len(content) - len(data))
        longer = content[:at] + bytes((content[at] | 0x80, 0)) + content[at + 1 :]
        return longer[: self._chance.choice((len(content), len(longer)))]

    def _other_lanes(self) -> bytes:
        """As many lanes, of as many bytes: others, some of them not open, some twice."""
        lanes = [
            self._chance.choice((*range(8), 125, 126, 127) if lane < 128 else (128, 129, 300, 301, 16383))
            for lane in self._lanes
        ]
        return _message(tuple(lanes), self._steps(), *self._inputs())

    def _bools(self) -> bytes:
        """Elements of another type that take as many bytes; bools that are neither 0 nor 1."""
        _, data = self._inputs()
        kind = self._chance.choice((tensor_pb2.DATA_TYPE_BOOL, tensor_pb2.DATA_TYPE_UINT8))
        shape = (len(self._lanes), 1, self._timesteps, 4 * _FEATURES)
        said = bytearray(len(data))
        said[self._chance.randrange(len(said))] = self._chance.choice((0, 1, 2, 255))
        return _message(self._lanes, self._steps(), _tensor(kind, shape), bytes(said))

    def _steps_that_are_none(self) -> bytes:
        """First steps of as many bytes that are no numbers, or not so many."""
        size = len(self._lanes) * self._chance.choice((1, 2, 9, 10))
        said = self._chance.choice((b"\xff" * size, b"\x80" * size, self._chance.randbytes(size), b"\0" * (size - 1)))
        return _message(self._lanes, said, *self._inputs())

    def _other_steps(self) -> bytes:
        """First steps ahead, behind, beyond all, or of too few or too many lanes."""
        lanes = len(self._lanes)
        match self._chance.randrange(4):
            case 0:
                said = varint(self._chance.choice((0, 1, 2**32, 2**63, 2**64 - 1))) * lanes
            case 1:
                said = b"".join(varint(self._chance.choice((self._step, 0, 300))) for _ in range(lanes))
            case 2:
                said = self._steps(lanes + 1)
            case _:
                said = b"" if self._says_steps else varint(self._step) * lanes
        return _message(self._lanes, said, *self._inputs())

    def _other_size(self) -> bytes:
        """A few bytes more or less at the end."""
        content = _message(self._lanes, self._steps(), *self._inputs())
        if self._chance.random() < 0.5:
            return content[: -self._chance.choice((1, 4, 20))]
        return content + self._chance.randbytes(self._chance.choice((1, 4, 20)))

    def _more(self) -> bytes:
        """The same with what is not of everyday: a second frame, a mask, a trace, a field that nobody knows."""
        content = _message(self._lanes, self._steps(), *self._inputs())
        request = inference_pb2.StreamRequest.FromString(content)
        match self._chance.randrange(4):
            case 0:
                return content + content
            case 1:
                mask = request.frames[0].mask
                mask.data_type = tensor_pb2.DATA_TYPE_BOOL
                mask.shape.extend((len(self._lanes), 1, self._timesteps))
                mask.data = self._chance.choice((b"\1", b"\0", b"\2")) * (len(self._lanes) * self._timesteps)
            case 2:
                request.frames[0].traceparent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
            case _:
                return b"\x78\x00" + content
        return request.SerializeToString()

    def _huge(self) -> bytes:
        """What takes few bytes to say and long to look at: many lanes, axes whose product has no end, many tensors."""
        head, data = self._inputs()
        match self._chance.randrange(3):
            case 0:
                lanes = range(2000) if self._chance.random() < 0.5 else (1,) * 2000
                return _message(tuple(lanes), b"", head, data)
            case 1:
                axes = (self._chance.choice((0, 1, _HUGE)),) * self._chance.choice((33, 65, 400))
                return _message(self._lanes, b"", _tensor(tensor_pb2.DATA_TYPE_FLOAT32, axes), data)
            case _:
                one = _named(_tensor(tensor_pb2.DATA_TYPE_UINT8, (1,)), b"\0", name="{:03}")
                many = b"".join(one.replace(b"{:03}", f"{each:05}".encode()) for each in range(300))
                return _field(0x12, _field(0x0A, b"".join(map(varint, self._lanes))) + many)

    def _closed_and_opened(self) -> bytes:
        """The lanes' sessions end, and others take their places: the next frame is theirs. Or it is nobody's."""
        request = inference_pb2.StreamRequest()
        if self._chance.random() < 0.6:
            for lane in self._lanes:
                request.closes.add(lane=lane, delete_session=self._chance.random() < 0.8)
        else:
            self._step = 0
            for lane in self._lanes:
                request.opens.add(lane=lane).create.model = "lstm-4"
        return request.SerializeToString()


def asked(content: bytes, most: int = 65536) -> int | None:
    """Of how many chunks an answer must come: as protobuf reads a message. None if the stream must be ended."""
    try:
        request = inference_pb2.StreamRequest.FromString(content)
    except DecodeError:
        return None
    sizes = [len(frame.lanes) for frame in request.frames]
    return sum(sizes) if all(0 < size <= most for size in sizes) else None


def _field(tag: int, content: bytes) -> bytes:
    return bytes((tag,)) + varint(len(content)) + content


def _tensor(kind: int, shape: tuple[int, ...]) -> bytes:
    """All of a tensor but its elements."""
    return b"\x08" + varint(kind) + _field(0x12, b"".join(map(varint, shape)))


def _named(tensor: bytes, data: bytes, name: str = "input") -> bytes:
    return _field(0x1A, _field(0x0A, name.encode()) + _field(0x12, tensor + _field(0x1A, data)))


def _message(lanes: tuple[int, ...], steps: bytes, tensor: bytes, data: bytes) -> bytes:
    """A message as clients write it, with what its parts say. It ends with the elements."""
    said = _field(0x0A, b"".join(map(varint, lanes)))
    if steps:
        said += _field(0x12, steps)
    return _field(0x12, said + _named(tensor, data))
