"""What a stream answers, on its way to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from rnnserve.frames import Buffer
from rnnserve.v1 import inference_pb2 as pb
from rnnserve_server.wire.send import Send

RESPONSE_BYTES = 1 << 20  # a response is sent once it is so large, although more is ready


class Outbox:
    """Responses in pieces: responses end to end are one response with all that is in them.

    What becomes ready while some are being sent goes together, afterwards.

    Args:
        send: what sends a message.
        lost: called when nothing can be sent any more.

    Attributes:
        answers: how many wait to be sent: of chunks, opens and closes.
        nbytes: bytes of all that waits to be sent.
        error: why nothing can be sent any more; None: it can.
        sent: set whenever something was sent, or can be no more.
    """

    def __init__(self, send: Send, lost: Callable[[], object]) -> None:
        self.answers = 0
        self.nbytes = 0
        self.error: Exception | None = None
        self.sent = asyncio.Event()
        self._send = send
        self._lost: Callable[[], object] | None = lost
        self._loop = asyncio.get_running_loop()
        self._responses: list[list[Buffer]] = []
        self._response_bytes = 0  # of the last of them
        self._sending: list[list[Buffer]] = []  # the first of them in gRPC's hands
        self._taken = self._taken_bytes = 0  # of `answers` and `nbytes`, what they hold

    def __len__(self) -> int:
        """Responses that wait or are being sent."""
        return len(self._responses) + len(self._sending)

    def tell(self, response: pb.StreamResponse, answers: int = 0) -> None:
        """Has a response, with so many answers in it, sent in this turn of the event loop."""
        if not self._responses:
            self._loop.call_soon(self.flush)
        content = response.SerializeToString()
        self.add([content], answers, len(content))

    def add(self, parts: Sequence[Buffer], answers: int, nbytes: int) -> None:
        """Puts a response in pieces, with so many answers and about so many bytes in it, to what `flush` sends next."""
        if not self._responses or self._response_bytes > RESPONSE_BYTES:
            self._responses.append([])
            self._response_bytes = 0
        self._responses[-1] += parts
        self._response_bytes += nbytes
        self.nbytes += nbytes
        self.answers += answers

    def flush(self) -> None:
        """Sends what is ready."""
        if self._responses and self._lost is not None and not (self._sending or self.error):
            self._sending, self._responses = self._responses, []
            self._taken, self._taken_bytes = self.answers, self.nbytes
            self._send_first()

    def close(self) -> None:
        """Sends nothing more, and lets go of whom it would tell."""
        self._lost = None

    def _send_first(self) -> None:
        try:
            self._send(b"".join(cast("list[bytes]", self._sending[0])), self._was_sent)
        except Exception as error:  # it cannot be put on the wire
            self._was_sent(error)

    def _was_sent(self, error: Exception | None) -> None:
        if error is not None:
            self._sending, self.error = [], error
            if self._lost is not None:
                self._lost()
        else:
            del self._sending[0]
            if self._sending:
                self._send_first()
                return
            self.answers -= self._taken
            self.nbytes -= self._taken_bytes
            self.flush()
        self.sent.set()
