"""What 100,000 open and idle sessions cost, and whether they slow down the others.

python -m benchmarks.sessions
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc

from benchmarks import work
from benchmarks.echo import METHOD, SERVICE
from benchmarks.findings import Finding, at_least, at_most, markdown
from benchmarks.processes import RowProcess, Server, serve
from benchmarks.rows import Measure, Row, Sample, ServerRow
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.session_pb2 import SessionConfig

IDLE = 100_000
LANES, OPENS = 50_000, 1_000  # of a stream, of a message
STATE_BYTES = 2 * work.UNITS * 4  # h and c in float32
ACTIVE = (ServerRow(streams=64), ServerRow(lanes=64, depth=4))


@dataclass(frozen=True)
class OpenRow(Row):
    """Opens the idle sessions, on lanes that stay open. Measured once; its round trip is all of it."""

    part = "rnnserve"
    server = "rnnserve"

    @property
    def name(self) -> str:
        return f"{IDLE} sessions opened"

    async def open(self, address: str, stack: AsyncExitStack) -> Measure:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        config = SessionConfig(model=work.MODEL)

        def opens() -> Iterator[pb.StreamRequest]:
            for first in range(0, LANES, OPENS):
                lanes = range(first, first + OPENS)
                yield pb.StreamRequest(opens=[pb.LaneOpen(lane=lane, create=config) for lane in lanes])

        async def measure(seconds: float) -> Sample:
            started = perf_counter()
            for _ in range(IDLE // LANES):
                call: Any = channel.stream_stream(
                    f"/{SERVICE}/{METHOD}",
                    request_serializer=pb.StreamRequest.SerializeToString,
                    response_deserializer=pb.StreamResponse.FromString,
                )()
                stack.callback(call.cancel)
                for request in opens():
                    await call.write(request)
                opened = 0
                while opened < LANES:
                    response = await call.read()
                    if response.errors:
                        raise RuntimeError(response.errors[0])
                    opened += len(response.opened)
            took = perf_counter() - started
            return Sample(took, [took])

        return measure


def findings(rounds: int, seconds: float) -> list[Finding]:
    """Two servers take turns, one of them with the idle sessions."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.write_model(folder / "models")
        command = serve(folder / "models", "--max-sessions", str(2 * IDLE))
        few, many = (stack.enter_context(Server(*command, log=folder / name)) for name in ("few", "many"))
        processes = {
            (row, server): stack.enter_context(RowProcess(row, server)) for row in ACTIVE for server in (few, many)
        }
        for process in processes.values():  # to warm up
            process.measure(seconds)
        before = many.memory
        sample, _ = stack.enter_context(RowProcess(OpenRow(), many)).measure(0)
        extra = (many.memory - before) / IDLE - STATE_BYTES

        rates: dict[tuple[ServerRow, Server], list[float]] = {key: [] for key in processes}
        for _ in range(rounds):
            for key, process in processes.items():
                active, _ = process.measure(seconds)
                rates[key].append(len(active.trips) / active.seconds)
    ratios = {
        row: [with_idle / without for with_idle, without in zip(rates[row, many], rates[row, few], strict=True)]
        for row in ACTIVE
    }
    return [
        at_most(f"{IDLE:,} idle sessions: bytes each beside the state", 600, extra),
        at_least(f"{IDLE:,} sessions opened in bulk, a second", 20_000, IDLE / sample.seconds),
        *(at_least(f"{row.name}: rate beside {IDLE:,} idle sessions", 0.90, ratio) for row, ratio in ratios.items()),
    ]


if __name__ == "__main__":
    print(markdown(findings(7, 0.5)))
