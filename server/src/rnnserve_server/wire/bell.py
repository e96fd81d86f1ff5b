"""What wakes a thread that waits for a completion queue."""

from __future__ import annotations

import secrets
import time
from typing import Any

import grpc
from grpc._cython import cygrpc

_SECONDS = 10.0  # that gRPC may take to bring a call over the loopback interface


class Bell:
    """Puts an empty event into a completion queue. From any thread.

    gRPC has alarms for this, but not for Python. A batch of no operations does as well: it completes at once. It takes
    a call, so there is one, made through the loopback interface and ended before anybody else knows the port.

    Args:
        queue: the queue, which nobody else uses yet.

    Raises:
        OSError: there is no loopback interface.
    """

    def __init__(self, queue: Any) -> None:
        self._call = _ended_call(queue)

    def ring(self) -> None:
        """Completes an event in the queue, whose tag is `silence`."""
        self._call.start_server_batch((), silence)


def silence(event: object) -> None:
    """Does nothing: the tag of events that are of no interest."""


def _ended_call(queue: Any) -> Any:
    server = cygrpc.Server((("grpc.enable_channelz", 0),), False)
    server.register_completion_queue(queue)
    port = server.add_http2_port(b"127.0.0.1:0")
    if not port:
        raise OSError("127.0.0.1: expected an address to listen on, got an error; is the loopback interface up?")
    server.start()
    secret = f"/bell/{secrets.token_hex(16)}"
    call = None
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        ringing: Any = channel.unary_unary(secret)
        ringing = ringing.future(b"", timeout=_SECONDS)
        while call is None:
            server.request_call(queue, queue, silence)
            event = queue.poll(deadline=time.time() + _SECONDS)
            if event.tag is None:
                raise OSError("127.0.0.1: gRPC cannot be reached through the loopback interface")
            if event.call_details.method == secret.encode():  # whoever else calls is not answered
                call = event.call
        ringing.cancel()
    server.shutdown(queue, server)
    server.cancel_all_calls()
    while queue.poll().tag is not server:
        pass
    server.destroy()
    return call
