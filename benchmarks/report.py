"""From samples to figures, and to a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.findings import number
from benchmarks.processes import CORES, Cpu
from benchmarks.rows import Row, Sample
from benchmarks.stores import StoreRow

Rounds = NDArray[np.float64]
"""A figure of each round: [rounds]."""

_PACKAGES = ("grpcio", "protobuf", "onnxruntime", "numpy", "uvloop")
_CPU = ("server_cpu_seconds", "client_cpu_seconds")
_RATIOS = ("of_engine", "of_sum_of_parts", "of_bare", "of_memory")
_HEAD = (
    "| | steps/s | round trip p50, p99 | server, client CPU a trip | × engine | × sum of parts | × bare | × memory |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|"
)


@dataclass
class Line:
    """What was measured of a row, round by round."""

    row: Row
    samples: list[Sample] = field(default_factory=list)
    cpu: list[Cpu] = field(default_factory=list)

    @property
    def steps_per_second(self) -> Rounds:
        return self._steps / np.array([sample.seconds for sample in self.samples], np.float64)

    @property
    def server_cpu(self) -> Rounds:
        """Seconds of CPU that a step costs the server."""
        return np.array([cpu.server for cpu in self.cpu]) / self._steps

    @property
    def client_cpu(self) -> Rounds:
        """Seconds of CPU that a step costs the client."""
        return np.array([cpu.client for cpu in self.cpu]) / self._steps

    def trip(self, quantile: float) -> Rounds:
        """A quantile of the seconds that a round trip took."""
        return np.array([np.quantile(sample.trips, quantile) for sample in self.samples])

    @property
    def _steps(self) -> Rounds:
        return np.array([len(sample.trips) * self.row.lanes * self.row.steps for sample in self.samples], np.float64)


def of_engine(lines: Mapping[Row, Line], row: Row) -> Rounds:
    """Steps/s over those of the engine alone at the same batch, round by round. KeyError: it was not measured."""
    return lines[row].steps_per_second / lines[row.engine].steps_per_second


def of_parts(lines: Mapping[Row, Line], row: Row) -> Rounds:
    """CPU that a step costs the echo and the engine over what it costs the server. KeyError: not all were measured."""
    return (lines[row.echo].server_cpu + lines[row.engine].server_cpu) / lines[row].server_cpu


def of_bare(lines: Mapping[Row, Line], row: Row) -> Rounds:
    """CPU that a step costs the bare server over what it costs the server. KeyError: it was not measured."""
    return lines[row.bare].server_cpu / lines[row].server_cpu


def of_memory(lines: Mapping[Row, Line], row: StoreRow) -> Rounds:
    """Steps/s over those of the server without a store, round by round. KeyError: it was not measured."""
    return lines[row].steps_per_second / lines[row.in_memory].steps_per_second


def figures(lines: Mapping[Row, Line], row: Row) -> dict[str, Any]:
    """The figures of a row, one for each round. CPU is that of a step."""
    line = lines[row]
    measured: dict[str, Callable[..., Rounds]] = {}
    if row.server in ("bare", "rnnserve"):
        measured = {"of_engine": of_engine, "of_sum_of_parts": of_parts}
    if row.server == "rnnserve":
        measured["of_bare"] = of_bare
    if isinstance(row, StoreRow):
        measured["of_memory"] = of_memory
    ratios = {}
    for name, ratio in measured.items():
        with suppress(KeyError):
            ratios[name] = ratio(lines, row).tolist()
    if row.server != "triton":  # the processes of its models and its client are not seen
        ratios |= {"server_cpu_seconds": line.server_cpu.tolist(), "client_cpu_seconds": line.client_cpu.tolist()}
    return {
        "part": row.part,
        "name": row.name,
        **asdict(row),
        "steps_per_second": line.steps_per_second.tolist(),
        "p50_seconds": line.trip(0.50).tolist(),
        "p99_seconds": line.trip(0.99).tolist(),
        **ratios,
    }


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


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The table."""
    lines = [_HEAD]
    part = ""
    for row in rows:
        if row["part"] != part:
            part = row["part"]
            lines.append(f"| **{part}** | | | | | | | |")
        p50, p99 = (np.median(row[name]) * 1e3 for name in ("p50_seconds", "p99_seconds"))
        steps = row["lanes"] * row["steps"]
        of_both = _CPU if row["part"] != "engine" else _CPU[:1]  # the engine is its own client
        cpu = [f"{np.median(row[of]) * steps * 1e6:,.0f} µs" for of in of_both if of in row]
        cells = (
            row["name"],
            _spread(row["steps_per_second"]),
            f"{p50:.2f} ms, {p99:.2f} ms",
            ", ".join(cpu),
            *(_spread(row[key]) if key in row else "" for key in _RATIOS),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def described(where: dict[str, Any], run: str) -> str:
    """A sentence on the run and the machine."""
    packages = ", ".join(f"{package} {where[package]}" for package in _PACKAGES)
    cores = (
        "servers and engine on one core, clients on another"
        if where["cores"] > 1
        else "**one core only, which servers, engine and clients share**"
    )
    return (
        f"{run}. {where['cores']} cores ({where['architecture']}), {cores}; load before the run {where['load']:.1f}; "
        f"Python {where['python']}, {packages}.\n"
    )


def _spread(values: list[float]) -> str:
    """Median (minimum–maximum)."""
    return f"{number(float(np.median(values)))} ({number(min(values))}–{number(max(values))})"
