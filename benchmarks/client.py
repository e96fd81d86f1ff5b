"""A client that costs little, so that what is measured is the server: streams of bytes on gRPC's completion queue.

`grpc.aio`'s client takes a core for 5,000 messages a second, which servers in C++, and ours, surpass. This one waits
for gRPC on the thread that sends, with neither an event loop nor tasks, as a client in C++ would: twice as many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from grpc._cython import cygrpc

Heard = Callable[[bytes], object]


class Channel:
    """A connection.

    Args:
        address: the server's, host:port.
    """

    def __init__(self, address: str) -> None:
        unlimited = (("grpc.max_receive_message_length", -1),)  # the answer to a chunk of 10,000 steps is 5 MB
        self._channel = cygrpc.Channel(address.encode(), unlimited, None)
        self._streams: list[Stream] = []

    def stream(self, method: str, heard: Heard) -> Stream:
        """Opens a stream, whose messages are told to a function as they come in."""
        self._streams.append(Stream(self._channel, method, heard))
        return self._streams[-1]

    def pump(self, wanted: Callable[[], object]) -> None:
        """Tells what comes in, and sends what waits, for as long as it is wanted."""
        while wanted():
            event = self._channel.next_call_event()
            event.tag(event)

    def close(self) -> None:
        """Ends the connection and its streams."""
        for stream in self._streams:
            stream.cancel()
        self.pump(lambda: any(not stream.ended for stream in self._streams))
        self._channel.close(cygrpc.StatusCode.cancelled, "closed")


class Stream:
    """A bidirectional stream of a channel.

    Attributes:
        ended: nothing more comes.
    """

    def __init__(self, channel: Any, method: str, heard: Heard) -> None:
        self.ended = False
        self._heard = heard
        self._waiting: deque[bytes] = deque()
        self._sending = False
        operations = (
            ((cygrpc.SendInitialMetadataOperation(None, 0),), self._done),
            ((cygrpc.ReceiveInitialMetadataOperation(0),), self._done),
            ((cygrpc.ReceiveStatusOnClientOperation(0),), self._ended),
        )
        self._call = channel.integrated_call(0, method.encode(), None, None, None, None, operations, None)
        self._listen()

    def send(self, message: bytes) -> None:
        """Sends a message, once those before it are on their way."""
        if self._sending:
            self._waiting.append(message)
        else:
            self._sending = True
            self._call.operate((cygrpc.SendMessageOperation(message, 0),), self._sent)

    def cancel(self) -> None:
        """Ends the stream."""
        self._call.cancel(cygrpc.StatusCode.cancelled, "cancelled")

    def _sent(self, event: Any) -> None:
        self._sending = False
        if self._waiting and not self.ended:
            self.send(self._waiting.popleft())

    def _listen(self) -> None:
        self._call.operate((cygrpc.ReceiveMessageOperation(0),), self._received)

    def _received(self, event: Any) -> None:
        message = event.batch_operations[0].message()
        if message is not None:
            self._listen()
            self._heard(message)

    def _done(self, event: Any) -> None:
        """Nothing is to be done."""

    def _ended(self, event: Any) -> None:
        self.ended = True
        status = event.batch_operations[0]
        if status.code() not in (cygrpc.StatusCode.ok, cygrpc.StatusCode.cancelled):
            raise RuntimeError(f"the stream ended: {status.code()}, {status.details()}")
