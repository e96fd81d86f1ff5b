"""What sessions that are stored do to one another: many are at work, and somebody comes and goes.

python -m benchmarks.crowd
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks import stores, work
from benchmarks.findings import Finding, at_least, at_most, markdown
from benchmarks.processes import RowProcess, Server, serve
from benchmarks.rows import Row, Sample, ServerRow
from benchmarks.sdk import VisitsRow

CROWD = ServerRow(streams=10, lanes=64)
STORES = ("sqlite, step", "redis, step")


def findings(rounds: int, seconds: float) -> list[Finding]:
    """What is stored of 640 sessions has grown to its full size after some seconds, so rounds last two at least."""
    seconds = max(seconds, 2.0)
    kept = [each for each in STORES if stores.installed() or not each.startswith("redis")]
    rates: dict[str, list[float]] = {each: [] for each in kept}
    waits: dict[str, list[float]] = {each: [] for each in kept}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.write_model(folder / "models")
        starts = {"memory": lambda: Server(*serve(folder / "models"), log=folder / "memory.log")}
        starts |= stores.starts(folder, stack)
        servers = {each: stack.enter_context(starts[each]()) for each in ("memory", *kept)}
        rows: tuple[Row, Row] = (CROWD, VisitsRow())
        processes = {
            each: [stack.enter_context(RowProcess(row, server)) for row in rows] for each, server in servers.items()
        }
        for number in range(rounds + 1):
            seen: dict[str, Sample] = {}
            for each, those in processes.items():
                os.sync()
                stores.let_go(folder)
                for process in those:
                    process.begin(seconds)
                seen[each], _ = [process.end()[0] for process in those]
            memory = seen["memory"]
            for each in kept if number else ():  # the first warms up
                rates[each].append(_rate(seen[each]) / _rate(memory))
                waits[each].append(float(np.quantile(seen[each].trips, 0.99) / np.median(memory.trips)))
    what = "640 sessions in ten frames, beside one that comes and goes"
    return [
        *(at_least(f"{what}: {each}: of memory's rate", 0.50, rates[each]) for each in kept),
        *(at_most(f"{what}: {each}: p99 over memory's p50", 10.0, waits[each]) for each in kept),
    ]


def _rate(sample: Sample) -> float:
    """Round trips a second."""
    return len(sample.trips) / sample.seconds


if __name__ == "__main__":
    print(markdown(findings(3, 2.0)))
