"""Whether 20,000 sessions that nobody comes back to leave the server's memory within their lifetime.

python -m benchmarks.abandoned
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks import work
from benchmarks.echo import METHOD, SERVICE
from benchmarks.findings import Finding, at_most, markdown
from benchmarks.processes import RowProcess, Server, serve
from benchmarks.rows import Measure, Row, Sample
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.session_pb2 import ListSessionsRequest, SessionConfig
from rnnserve.v1.session_pb2_grpc import SessionServiceStub

SESSIONS, LANES = 20_000, 1_000  # in all, of a frame
LIFETIME = 5  # seconds without use
_LOOK_SECONDS = 0.25
_PATIENCE = 30.0
_SETTLE_SECONDS = 2.0
_ENDS = 65_536  # that a server remembers
_BACK = 1.05  # of the baseline


@dataclass(frozen=True)
class AbandonRow(Row):
    """Opens sessions, steps each once, and breaks the connection off. A measurement's time is their lifetime."""

    part = "rnnserve"
    server = "rnnserve"

    @property
    def name(self) -> str:
        return "sessions abandoned"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        config = SessionConfig(model=work.MODEL)
        x = encode_named({"input": work.numbers(LANES, 1, 1, work.FEATURES)})

        def requests() -> Iterator[pb.StreamRequest]:
            for first in range(0, SESSIONS, LANES):
                lanes = range(first, first + LANES)
                opens = [pb.LaneOpen(lane=lane, create=config) for lane in lanes]
                frame = pb.StepFrame(lanes=lanes, first_steps=[0] * LANES, inputs=x)
                yield pb.StreamRequest(opens=opens, frames=[frame])

        async def measure(seconds: float) -> Sample:
            config.idle_lifetime.FromSeconds(int(seconds))
            async with grpc.aio.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
                call: Any = channel.stream_stream(
                    f"/{SERVICE}/{METHOD}",
                    request_serializer=pb.StreamRequest.SerializeToString,
                    response_deserializer=pb.StreamResponse.FromString,
                )()
                for request in requests():
                    await call.write(request)
                answered = 0
                while answered < SESSIONS:
                    response = await call.read()
                    if response.errors:
                        raise RuntimeError(response.errors[0])
                    answered += sum(len(frame.lanes) for frame in response.frames)
                call.cancel()
            return Sample(1.0, [1.0])

        return measure


def findings(rounds: int, seconds: float) -> list[Finding]:
    """A server's memory, before and after, once it remembers of as many sessions that they ended as it ever does."""
    peaks, backs, over = [], [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.write_model(folder / "models")
        server = stack.enter_context(Server(*serve(folder / "models"), log=folder / "log"))
        row = stack.enter_context(RowProcess(AbandonRow(), server))
        sessions = SessionServiceStub(stack.enter_context(grpc.insecure_channel(server.address)))
        for _ in range(_ENDS // SESSIONS + 1):
            row.measure(1)
        while sessions.ListSessions(ListSessionsRequest(page_size=1)).sessions:
            time.sleep(_LOOK_SECONDS)
        for _ in range(2):
            time.sleep(_SETTLE_SECONDS)
            baseline = server.memory
            row.measure(LIFETIME)
            abandoned, peak = time.monotonic(), server.memory
            if peak < _BACK * baseline:
                raise RuntimeError(f"{SESSIONS} sessions took {peak - baseline} bytes only; the baseline is {baseline}")
            while (now := server.memory) > _BACK * baseline and time.monotonic() < abandoned + _PATIENCE:
                time.sleep(_LOOK_SECONDS)
            backs.append(time.monotonic() - abandoned)
            peaks.append((peak - baseline) / 2**20)
            over.append(now / baseline)
    told = f"{SESSIONS:,} sessions abandoned (at most {max(peaks):.0f} MiB more)"
    return [
        at_most(f"{told}: memory afterwards over the baseline", _BACK, over),
        at_most(f"{told}: back there after their {LIFETIME} s and at most 2 more", LIFETIME + 2, backs, " s"),
    ]


if __name__ == "__main__":
    print(markdown(findings(1, 0.0)))
