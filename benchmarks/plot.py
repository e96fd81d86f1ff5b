"""Throughput and p99 against the number of sessions, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.report import Line
from benchmarks.rows import EngineRow, Row, ServerRow
from benchmarks.sdk import TasksRow
from benchmarks.triton import TritonRow

Series = dict[int, tuple[float, float]]
"""Steps a second and seconds of p99, by number of sessions."""

_SERIES: dict[str, tuple[str, Callable[[Row], bool]]] = {
    "engine alone": ("#9e9e9e", lambda row: isinstance(row, EngineRow)),
    "one stream, a lane each": ("#1b6ca8", lambda row: isinstance(row, ServerRow) and row.streams == 1),
    "asyncio SDK, a task each": ("#2a9d8f", lambda row: isinstance(row, TasksRow)),
    "a stream each": ("#e07a1f", lambda row: isinstance(row, ServerRow) and row.lanes == 1),
    "Triton, a sequence each": ("#b03060", lambda row: isinstance(row, TritonRow)),
}
# Small and the same for the same figures: text stays text, and neither time nor random names are written.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "rnnserve", "font.size": 9, "path.simplify": True}

_LABEL_DECADES = 0.12  # the height of a label


def write(lines: Mapping[Row, Line], path: Path) -> None:
    """Draws the rows of one step a message."""
    series = {name: _series(lines, belongs) for name, (_, belongs) in _SERIES.items()}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _panel(left, "steps a second", {name: {n: rate for n, (rate, _) in of.items()} for name, of in series.items()})
        p99 = {name: {n: p99 * 1e3 for n, (_, p99) in of.items()} for name, of in series.items()}
        _panel(right, "p99 of a round trip, ms", p99)
        figure.savefig(path, metadata={"Date": None})


def _series(lines: Mapping[Row, Line], belongs: Callable[[Row], bool]) -> Series:
    """The rows that belong; of several with as many sessions, the fastest."""
    found: Series = {}
    for row, line in lines.items():
        if row.steps == 1 and belongs(row):
            rate, p99 = float(np.median(line.steps_per_second)), float(np.median(line.trip(0.99)))
            if rate > found.get(row.sessions, (0.0, 0.0))[0]:
                found[row.sessions] = rate, p99
    return dict(sorted(found.items()))


def _panel(axes: Axes, title: str, series: Mapping[str, Mapping[int, float]]) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    drawn = {name: values for name, values in series.items() if values}
    lowest = -np.inf
    for name, values in sorted(drawn.items(), key=lambda item: list(item[1].values())[-1]):
        color = _SERIES[name][0]
        axes.plot(*zip(*values.items(), strict=True), color=color, marker="o", markersize=4)
        sessions, value = list(values.items())[-1]
        lowest = max(np.log10(value), lowest + _LABEL_DECADES)  # so that no label covers the one below it
        axes.text(sessions * 1.25, 10**lowest, name, color=color, verticalalignment="center")
    axes.xaxis.set_major_locator(FixedLocator([1, 4, 16, 64, 256]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sessions")
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
