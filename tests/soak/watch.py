"""What a process holds, second by second, and whether that grows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Holdings:
    """What a process holds at one time.

    Attributes:
        memory: bytes of its own, in RAM: anonymous pages. Not those of files, libraries mostly: they count as private
            or as shared by what other processes run. And those that it was forked with count from the beginning, not
            from when it first writes to them.
        files: open descriptors.
        threads: so many.
    """

    memory: int
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        memory = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:"))
        proc = Path(f"/proc/{pid}")
        return cls(memory << 10, len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir())))


def growth(figures: list[int]) -> float:
    """How much more the last third holds than the third before it, in medians. The first third is to warm up."""
    third = len(figures) // 3
    return median(figures[-third:]) - median(figures[third:-third])
