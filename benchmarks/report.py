"""From samples to a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.processes import CORES
from benchmarks.rows import Row, Sample

_PACKAGES = ("grpcio", "protobuf", "onnxruntime", "numpy", "uvloop")
_HEAD = (
    "| | steps/s: median (min–max) | round trip p50, p99 | server CPU a round trip | × engine | × sum of parts |\n"
    "|---|--:|--:|--:|--:|--:|"
)


@dataclass
class Line:
    """What was measured of a row, round by round."""

    row: Row
    samples: list[Sample] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def steps_per_second(self) -> np.ndarray:
        """[rounds]."""
        return np.array([len(s.trips) * self.row.lanes * self.row.steps / s.seconds for s in self.samples])

    @property
    def trips(self) -> np.ndarray:
        """Seconds of every round trip of every round."""
        return np.concatenate([sample.trips for sample in self.samples])


def results(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The figures of every row. Ratios are taken within a round, and then their median over the rounds."""
    engine = {line.row.work: line.steps_per_second for line in lines if line.row.part == "engine"}
    echo = {line.row.wire: line.steps_per_second for line in lines if line.row.part == "gRPC"}

    def figures(line: Line) -> dict[str, Any]:
        rates, alone, bare = line.steps_per_second, engine.get(line.row.work), echo.get(line.row.wire)
        parts = 1 / (1 / alone + 1 / bare) if alone is not None and bare is not None else None
        compared = line.row.part not in ("engine", "gRPC")
        return {
            "part": line.row.part,
            **asdict(line.row),
            "steps_per_second": rates.tolist(),
            "round_trip_seconds": dict(zip(("p50", "p99"), np.quantile(line.trips, (0.5, 0.99)).tolist(), strict=True)),
            "server_cpu_seconds_per_round_trip": sum(line.cpu_seconds) / len(line.trips) if line.row.server else None,
            "of_engine": np.median(rates / alone).item() if compared and alone is not None else None,
            "of_sum_of_parts": np.median(rates / parts).item() if compared and parts is not None else None,
        }

    return [figures(line) for line in lines]


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(CORES),
        "load": os.getloadavg()[0],
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def markdown(rows: Sequence[dict[str, Any]], where: dict[str, Any], run: str) -> str:
    """The table."""
    lines = [_HEAD]
    part = ""
    for row in rows:
        if row["part"] != part:
            part = row["part"]
            lines.append(f"| **{part}** | | | | | |")
        rate, trip, cpu = row["steps_per_second"], row["round_trip_seconds"], row["server_cpu_seconds_per_round_trip"]
        cells = (
            row["name"],
            f"{_round(np.median(rate))} ({_round(min(rate))}–{_round(max(rate))})",
            f"{trip['p50'] * 1e3:.2f} ms, {trip['p99'] * 1e3:.2f} ms",
            "" if cpu is None else f"{cpu * 1e6:,.0f} µs",
            *("" if row[key] is None else f"{row[key]:.2f}" for key in ("of_engine", "of_sum_of_parts")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    packages = ", ".join(f"{package} {where[package]}" for package in _PACKAGES)
    cores = (
        "servers and engine on one core, clients on another"
        if where["cores"] > 1
        else "**one core only, which servers, engine and clients share**"
    )
    lines += [
        "",
        f"{run}. {where['cores']} cores ({where['architecture']}), {cores}; load before the run {where['load']:.1f}; "
        f"Python {where['python']}, {packages}.",
    ]
    return "\n".join(lines) + "\n"


def _round(rate: float | np.floating[Any]) -> str:
    """Three digits: more would be noise."""
    return f"{float(f'{rate:.3g}'):,.0f}"
