"""The fuzzer of files: a process of its own for each target, begun anew when it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_MOST_FAULTS = 200


@dataclass
class Report:
    """What came of a target's attempts.

    Attributes:
        attempts: how many.
        outcomes: by kind.
        faults: what must not be: the number of the first attempt that ended so, by what it was.
        slowest: seconds of the slowest, and its number.
        seconds: of all.
    """

    attempts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.attempts} attempts in {self.seconds:.0f} s: {dict(self.outcomes)}, the slowest "
            f"{self.slowest[0]:.2f} s (number {self.slowest[1]})",
            *(f"FAULT {fault}\n{text}" for fault, text in self.faults.items()),
        ]
        return "\n".join(lines)


def fuzz_files(name: str, seconds: float, seed: int) -> Report:
    """Runs a target for so long."""
    report, number = Report(), 0
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    while (left := seconds - (time.monotonic() - began)) > 0 and len(report.faults) < _MOST_FAULTS:
        command = [sys.executable, "-m", "fuzz.files.worker", name, str(seed), str(number), str(left)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            said = ""
            for line in child.stdout:
                if line[0] != "{":
                    number, said = int(line), line
                    continue
                said = ""
                outcome = json.loads(line)
                report.attempts += 1
                report.outcomes["fault" if outcome["fault"] else outcome["what"]] += 1
                report.slowest = max(report.slowest, (outcome["seconds"], number))
                if outcome["fault"]:
                    report.faults.setdefault(outcome["what"], f"number {number}\n{outcome['reason']}")
            last = child.stderr.read()[-3000:]
        if child.returncode:
            report.attempts += 1
            report.outcomes["fault"] += 1
            report.faults.setdefault(f"the process ended with status {child.returncode}: {last[-300:]}", f"number {number}\n{last}")
        if not said and child.returncode:
            break
        number += 1
    report.seconds = time.monotonic() - began
    return report
