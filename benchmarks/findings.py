"""What was wanted, and what was seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Finding:
    """A target and the figures seen, one for each round. Their median is what counts."""

    what: str
    seen: tuple[float, ...]
    wanted: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return bool(self.median >= self.wanted if self.at_least else self.median <= self.wanted)

    @property
    def median(self) -> float:
        return float(np.median(self.seen))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"median": self.median, "met": self.met}


def at_least(what: str, wanted: float, seen: ArrayLike, unit: str = "") -> Finding:
    return Finding(what, _floats(seen), wanted, True, unit)


def at_most(what: str, wanted: float, seen: ArrayLike, unit: str = "") -> Finding:
    return Finding(what, _floats(seen), wanted, False, unit)


def markdown(findings: Iterable[Finding]) -> str:
    """The table of targets."""
    lines = ["| must show | wanted | seen: median (min–max) | met |", "|---|--:|--:|---|"]
    for found in findings:
        wanted = f"{'≥' if found.at_least else '≤'} {number(found.wanted)}{found.unit}"
        seen = f"{number(found.median)}{found.unit}"
        if len(found.seen) > 1:
            seen += f" ({number(min(found.seen))}–{number(max(found.seen))})"
        lines.append(f"| {found.what} | {wanted} | {seen} | {'yes' if found.met else '**no**'} |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Two decimals, or three digits where there are more before the point: the rest would be noise."""
    return f"{value:.2f}" if abs(value) < 10 else f"{float(f'{value:.3g}'):,.0f}"


def _floats(seen: ArrayLike) -> tuple[float, ...]:
    return tuple(np.atleast_1d(np.asarray(seen, np.float64)).tolist())
