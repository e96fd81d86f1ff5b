"""What a process holds, second by second, and whether that grows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Holdings:
    """What a process holds at one time.

    Attributes:
        memory: bytes that are its own (private, in RAM).
        files: open descriptors.
        threads: so many.
    """

    memory: int
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
        proc = Path(f"/proc/{pid}")
        return cls(private << 10, len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir())))


def growth(figures: list[int]) -> float:
    """How much more the last third holds than the third before it, in medians. The first third is to warm up."""
    third = len(figures) // 3
    return median(figures[-third:]) - median(figures[third:-third])
