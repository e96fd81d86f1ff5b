"""The fuzzer of files: a process of its own for each target, begun anew when it dies."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz.files.attempt import Outcome, write
from fuzz.files.targets import TARGETS
from fuzz.files.worker import chance_of
from rnnserve_models.errors import ModelError
from rnnserve_models.importers.apart import write_apart

_MOST_FAULTS = 200
_APART_SECONDS = 10.0
_FOUND = Path(__file__).parents[3] / ".cache" / "fuzz-files"


@dataclass
class Report:
    """What came of a target's attempts.

    Attributes:
        attempts: how many.
        outcomes: by kind.
        faults: what must not be: the number of the first attempt that ended so, by what it was.
        unforeseen: refusals by `rnnserve_models.errors.reading`, which are no faults, and had better be foreseen.
        slowest: seconds of the slowest, and its number.
        seconds: of all.
    """

    attempts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    unforeseen: dict[str, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    seconds: float = 0.0

    def take(self, outcome: Outcome, number: int) -> None:
        """Notes what came of an attempt."""
        self.attempts += 1
        kind, _, unforeseen = outcome.what.partition(": ")
        self.outcomes["fault" if outcome.fault else kind] += 1
        self.slowest = max(self.slowest, (outcome.seconds, number))
        if outcome.fault:
            self.faults.setdefault(outcome.what, f"number {number}\n{outcome.reason}")
        elif unforeseen:
            self.unforeseen.setdefault(unforeseen, f"number {number}\n{outcome.reason[:400]}")

    def __str__(self) -> str:
        lines = [
            f"{self.attempts} attempts in {self.seconds:.0f} s: {dict(self.outcomes)}, the slowest "
            f"{self.slowest[0]:.2f} s (number {self.slowest[1]})",
            *(f"FAULT {fault}\n{text}" for fault, text in self.faults.items()),
            *(f"UNFORESEEN {what}\n{text}" for what, text in self.unforeseen.items()),
        ]
        return "\n".join(lines)


def fuzz_files(name: str, seconds: float, seed: int, attempts: int | None = None) -> Report:
    """Runs a target for so long, or so many attempts."""
    report, number = Report(), 0
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    while (
        (left := seconds - (time.monotonic() - began)) > 0 and number != attempts and len(report.faults) < _MOST_FAULTS
    ):
        last = -1 if attempts is None else attempts - 1
        command = [sys.executable, "-m", "fuzz.files.worker", name, str(seed), str(number), str(last), str(left)]
        with (
            tempfile.TemporaryFile("w+") as errors,  # it may say more than a pipe holds
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
        ):
            assert child.stdout is not None
            open_ = False  # whether an attempt has begun and not ended
            for line in child.stdout:
                if line[0] != "{":
                    number, open_ = int(line), True
                    continue
                open_ = False
                outcome = Outcome(**json.loads(line))
                if outcome.fault and outcome.costly and TARGETS[name].apart:
                    outcome = again(name, seed, number)
                report.take(outcome, number)
            child.wait()
            errors.seek(0)
            said = errors.read()[-3000:]
        if child.returncode:
            ended = f"the process ended with status {child.returncode}: {said[-300:]}"
            if not open_:
                raise RuntimeError(f"{name}: {ended}")
            outcome = Outcome(ended, True, 0.0, said)
            report.take(again(name, seed, number) if TARGETS[name].apart else outcome, number)
        number += 1
    report.seconds = time.monotonic() - began
    return report


def guided(name: str, seconds: float, seed: int) -> int:
    """Has Atheris choose the attempts. Returns its status: 0 if it has found nothing; what it has is in .cache."""
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as corpus:
        chance = Random(seed)
        for number in range(64):  # to begin with; what an attempt is made from has to be long enough for all choices
            (Path(corpus) / str(number)).write_bytes(chance.randbytes(chance.choice((64, 200, 500))))
        command = [sys.executable, "-m", "fuzz.files.guided", name, corpus, f"-max_total_time={math.ceil(seconds)}"]
        command += [f"-seed={seed + 1}", "-len_control=0", f"-artifact_prefix={_FOUND}/{name}-"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        _FOUND.mkdir(parents=True, exist_ok=True)
        print(f"{name}:", flush=True)
        return subprocess.run(command, env=environment, check=False).returncode


def again(name: str, seed: int, number: int) -> Outcome:
    """Makes an attempt as servers do: in a process of its own, within bounds."""
    files = TARGETS[name].make(chance_of(name, seed, number))
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as scratch:
        write(files, Path(scratch))
        target = Path(scratch) / "written"
        target.mkdir()
        began = time.monotonic()
        try:
            write_apart(Path(scratch) / next(iter(files)), target, seconds=_APART_SECONDS)
            what, fault, reason = "loaded apart", False, ""
        except ModelError as error:
            what, fault, reason = "refused apart", False, str(error)
        except Exception as error:
            what, fault, reason = f"{type(error).__name__}: {error}", True, ""
        if (seconds := time.monotonic() - began) > 3 * _APART_SECONDS:
            what, fault = f"took {seconds:.0f} s, apart", True
        return Outcome(what, fault, seconds, reason)
