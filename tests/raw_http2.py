"""HTTP/2 as bytes, for clients that do what no library lets them do."""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import hpack
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAM = "/rnnserve.v1.InferenceService/Stream"
LIST = "/rnnserve.v1.SessionService/ListSessions"

Headers = Sequence[tuple[str, str]]


def headers_of(method: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """The headers of a call."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]


def message(content: bytes, *, length: int | None = None) -> bytes:
    """A message as gRPC frames it; with another length than it has, if one is given."""
    return b"\0" + (len(content) if length is None else length).to_bytes(4, "big") + content


class Wire:
    """A connection that says what it is told to.

    Attributes:
        socket: it.
        frames: what has come, oldest first.
    """

    def __init__(self, address: str, *, greet: bool = True, timeout: float = 10.0) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout)
        self.frames: list[Frame] = []
        self.encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._buffer = b""
        if greet:
            self.send(PREFACE, SettingsFrame(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, *parts: Frame | bytes) -> None:
        """Sends frames, or bytes. What the server does not take any more is for `read` to tell."""
        with suppress(ConnectionError):
            self.socket.sendall(b"".join(part if isinstance(part, bytes) else part.serialize() for part in parts))

    def wait_until_taken(self) -> None:
        """Until all that was sent is in the other end's socket: on a busy machine that may be after `send`."""
        deadline = time.monotonic() + 10
        while int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
            assert time.monotonic() < deadline
            time.sleep(0)

    def call(self, stream: int, headers: Headers, content: bytes | None = b"", *, end: bool = True) -> None:
        """Begins a call, and says one message unless it is None."""
        block = HeadersFrame(stream, self.encoder.encode(headers), flags=["END_HEADERS"])
        if content is None:
            self.send(block)
            return
        self.send(block, DataFrame(stream, message(content), flags=["END_STREAM"] if end else []))

    def read(self) -> Iterator[Frame]:
        """The frames that come, until the server closes the connection or says nothing for the time-out."""
        while True:
            while len(self._buffer) >= 9:
                frame, length = Frame.parse_frame_header(memoryview(self._buffer[:9]))
                if len(self._buffer) < 9 + length:
                    break
                frame.parse_body(memoryview(self._buffer[9 : 9 + length]))
                self._buffer = self._buffer[9 + length :]
                self.frames.append(frame)
                if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                    self.send(SettingsFrame(0, flags=["ACK"]))
                if isinstance(frame, PingFrame) and "ACK" not in frame.flags:
                    self.send(PingFrame(0, frame.opaque_data, flags=["ACK"]))
                yield frame
            try:
                more = self.socket.recv(65536)
            except ConnectionError:
                return
            if not more:
                return
            self._buffer += more

    def status(self, stream: int) -> str:
        """The gRPC status that ends a call: a number; or how else it, or the connection, was ended."""
        for frame in self.read():
            if isinstance(frame, GoAwayFrame) and frame.error_code:
                return f"goaway {frame.error_code}"
            if frame.stream_id != stream:
                continue
            if isinstance(frame, RstStreamFrame):
                return f"reset {frame.error_code}"
            if isinstance(frame, HeadersFrame):
                found = dict(self._decoder.decode(frame.data))
                if "grpc-status" in found:
                    return str(found["grpc-status"])
        return "closed"

    def goaway(self) -> GoAwayFrame | None:
        """The server's good-bye; None: it closes without one."""
        for frame in self.read():
            if isinstance(frame, GoAwayFrame):
                return frame
        return None

    def ended(self) -> bool:
        """Waits until the server closes the connection. False: it does not within the time-out."""
        try:
            for _ in self.read():
                pass
        except TimeoutError:
            return False
        return True


def continued(stream: int, block: bytes, size: int = 16384) -> Iterator[Frame]:
    """A block of headers in as many frames as it takes."""
    pieces = [block[start : start + size] for start in range(0, len(block), size)] or [b""]
    yield HeadersFrame(stream, pieces[0], flags=["END_HEADERS"] if len(pieces) == 1 else [])
    for number, piece in enumerate(pieces[1:], 2):
        yield ContinuationFrame(stream, piece, flags=["END_HEADERS"] if number == len(pieces) else [])
