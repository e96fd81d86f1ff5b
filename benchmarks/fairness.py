"""What sessions do to one another on one server.

python -m benchmarks.fairness
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks import work
from benchmarks.findings import Finding, at_least, at_most, markdown
from benchmarks.processes import RowProcess, Server, serve
from benchmarks.rows import MixedRow, Sample, ServerRow

ONES = ServerRow(streams=63)
CHUNK = ServerRow(steps=10_000)
MIXED = MixedRow(streams=32, others=ServerRow(streams=32, steps=20))
ALL_SHORT, ALL_LONG = ServerRow(streams=64), ServerRow(streams=64, steps=20)


def findings(rounds: int, seconds: float) -> list[Finding]:
    """A chunk of 10,000 steps takes the most part of a second, so rounds last two at least."""
    seconds = max(seconds, 2.0)
    p99, short, long = [], [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.write_model(folder / "models")
        server = stack.enter_context(Server(*serve(folder / "models"), log=folder / "log"))
        rows = (ONES, CHUNK, MIXED, ALL_SHORT, ALL_LONG)
        processes = {row: stack.enter_context(RowProcess(row, server)) for row in rows}

        def beside(*these: ServerRow) -> list[Sample]:
            for row in these:
                processes[row].begin(seconds)
            return [processes[row].end()[0] for row in these]

        for number in range(rounds + 1):
            (alone,), (among, _) = beside(ONES), beside(ONES, CHUNK)
            (all_short,), (all_long,), (mixed,) = beside(ALL_SHORT), beside(ALL_LONG), beside(MIXED)
            assert mixed.beside is not None
            if number:  # the first warms up
                p99.append(_p99(among) / _p99(alone))
                short.append(_rate(mixed) / (_rate(all_short) / 2))
                long.append(_rate(mixed.beside) / (_rate(all_long) / 2))
    return [
        at_most("63 one-step sessions: p99 beside a chunk of 10,000 steps over that without", 3.0, p99),
        at_least("32 one-step clients beside 32 of 20 steps: of their share", 0.8, short),
        at_least("32 20-step clients beside 32 of one step: of their share", 0.8, long),
    ]


def _p99(sample: Sample) -> float:
    return float(np.quantile(sample.trips, 0.99))


def _rate(sample: Sample) -> float:
    """Round trips a second."""
    return len(sample.trips) / sample.seconds


if __name__ == "__main__":
    print(markdown(findings(3, 2.0)))
