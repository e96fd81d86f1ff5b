"""What is measured in the table, and what it must show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import stores
from benchmarks.findings import Finding, at_least, at_most
from benchmarks.report import Line, of_engine, of_memory, of_parts
from benchmarks.rows import EchoRow, Row, ServerRow
from benchmarks.sdk import GroupRow, TasksRow, ThreadsRow
from benchmarks.stores import StoreRow
from benchmarks.triton import OipRow, TritonRow

Lines = Mapping[Row, Line]

ONE = ServerRow()
STREAMS = [ServerRow(streams=n) for n in (4, 16, 64, 256)]
CHUNKS = ServerRow(streams=64, steps=20)
FRAMES_16, FRAMES_64, FRAMES_256 = (ServerRow(lanes=n, depth=4) for n in (16, 64, 256))
DEEP_64, DEEP_256 = (ServerRow(lanes=n, depth=16) for n in (64, 256))
GATEWAYS = ServerRow(streams=4, lanes=64, depth=4)
FRAMES_OF_CHUNKS = ServerRow(lanes=64, steps=20, depth=4)
SERVER = [ONE, *STREAMS, CHUNKS, FRAMES_16, FRAMES_64, DEEP_64, GATEWAYS, FRAMES_256, DEEP_256, FRAMES_OF_CHUNKS]
TASKS = [TasksRow(streams=n) for n in (1, 16, 64, 256)]
SDK = [ThreadsRow(), ThreadsRow(streams=64), *TASKS, GroupRow(lanes=64), GroupRow(lanes=64, steps=20)]
STORES = [*stores.rows(DEEP_64), *stores.rows(FRAMES_64)]
TRITON = [
    *(TritonRow(streams=n, steps=steps) for n, steps in ((1, 1), (16, 1), (64, 1), (256, 1), (64, 20))),
    # With more sequences its streams crash, or, in batches of 8, are slower than its calls and stall at times.
    *(TritonRow(streams=n, streaming=True) for n in (1, 16)),
]

# What perf_analyzer says of rnnserve, beside what it says of Triton. Of 256 sequences calls only: it hangs at its end
# where it has not opened as many streams by then.
OIP = [*(OipRow(streams=n) for n in (1, 16, 64, 256)), *(OipRow(streams=n, streaming=True) for n in (1, 16, 64))]

# Each shape has its parts beside it.
_ENGINE = sorted({row.engine for row in SERVER + SDK}, key=lambda row: (row.steps, row.sessions))
_ECHO = sorted({row.echo for row in SERVER + SDK}, key=lambda row: (row.lanes, row.steps, row.streams, row.depth))
_BARE = [row.bare for row in SERVER]
ROWS: list[Row] = [*_ENGINE, *_ECHO, *_BARE, *SERVER, *STORES, *SDK, *TRITON, *OIP]

Seen = Callable[[Lines], NDArray[Any]]
"""From the lines to a figure of each round; KeyError where a row was not measured."""


def targets() -> list[tuple[Callable[..., Finding], str, float, Seen]]:
    """What the table must show: at least or at most, what, how much, and how it is found."""
    streams = {row.streams: row for row in STREAMS}
    shapes: list[Row] = [ONE, streams[64], streams[256], CHUNKS, FRAMES_64, DEEP_64, GATEWAYS, FRAMES_256, DEEP_256]
    shapes += [FRAMES_OF_CHUNKS]
    shapes += [TasksRow(streams=256), ThreadsRow(streams=64)]
    return [
        *((at_least, f"{row.name}: of the sum of its parts", 0.80, _parts(row)) for row in shapes),
        # By rates, which is what a user sees, and by CPU, which neighbours on the core do not distort. With so many
        # frames under way that the server's core is never idle.
        *(
            (at_least, f"{row.name}: of the engine, by {by}", wanted, seen(row))
            for row, wanted in ((DEEP_256, 0.85), (DEEP_64, 0.65), (FRAMES_OF_CHUNKS, 0.85))
            for by, seen in (("rate", _engine), ("CPU", _engine_cpu))
        ),
        (at_most, "one session: p50 over the echo's", 1.30, _trips(ONE, 0.50, EchoRow())),
        (at_most, "one session: p99 over the echo's", 2.0, _trips(ONE, 0.99, EchoRow())),
        (at_least, "256 tasks over 256 streams", 4.0, _rates(TasksRow(streams=256), streams[256])),
        *(
            (at_least, f"{row.name}: of memory's, by {by}", 0.60 if "step" in row.kept else 0.90, seen(row))
            for row in STORES
            for by, seen in (("rate", _kept), ("CPU", _kept_cpu))
        ),
        *((at_least, f"{n} streams over Triton", 2.0, _triton(streams[n], n)) for n in (16, 64, 256)),
        (at_least, "64 streams, 20 steps, over Triton", 1.5, _triton(CHUNKS, 64, 20)),
        (at_least, "frames of 64 over Triton's 64 sequences", 30.0, _triton(DEEP_64, 64)),
        (at_least, "frames of 256 over Triton's 256 sequences", 30.0, _triton(DEEP_256, 256)),
        (at_most, "one session: p50 over Triton's", 1.0, _trips(ONE, 0.50, *_ways(1, 1))),
    ]


def findings(lines: Lines) -> list[Finding]:
    """The targets whose rows were measured."""
    found = []
    for bound, what, wanted, seen in targets():
        try:
            figures = seen(lines)
        except KeyError:
            continue
        found.append(bound(what, wanted, figures))
    return found


def _parts(row: Row) -> Seen:
    return lambda lines: of_parts(lines, row)


def _engine(row: Row) -> Seen:
    return lambda lines: of_engine(lines, row)


def _engine_cpu(row: Row) -> Seen:
    return lambda lines: lines[row.engine].server_cpu / lines[row].server_cpu


def _rates(row: Row, other: Row) -> Seen:
    return lambda lines: lines[row].steps_per_second / lines[other].steps_per_second


def _trips(row: Row, quantile: float, *others: Row) -> Seen:
    return lambda lines: lines[row].trip(quantile) / np.min([lines[other].trip(quantile) for other in others], 0)


def _kept(row: StoreRow) -> Seen:
    return lambda lines: of_memory(lines, row)


def _kept_cpu(row: StoreRow) -> Seen:
    return lambda lines: lines[row.in_memory].server_cpu / lines[row].server_cpu


def _ways(sequences: int, steps: int) -> list[TritonRow]:
    return [row for row in TRITON if (row.streams, row.steps) == (sequences, steps)]


def _triton(row: Row, sequences: int, steps: int = 1) -> Seen:
    """Over Triton's better way, round by round."""
    ways = _ways(sequences, steps)
    return lambda lines: lines[row].steps_per_second / np.max([lines[way].steps_per_second for way in ways], 0)
