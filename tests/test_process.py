"""What the process asks of its surroundings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rnnserve_server.process import Ebb, inline_seconds

FLOOD = """
from pathlib import Path
import numpy as np
from rnnserve_server.process import Ebb, keep_freed_memory

keep_freed_memory()
ebb = Ebb()

def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

flood = [np.ones(1 << 15) for _ in range(400)]  # 100 MiB in arrays of 256 KiB
rest = np.ones(1 << 10)  # above them in the heap
ebb.look(100 << 20)
full = memory()
del flood
kept = memory()
assert ebb.look(0)
print(full - kept, kept - memory())
"""


def test_memory_goes_back_after_a_flood() -> None:
    """What glibc was told to keep for the next message is given back when much of what was held is gone."""
    ran = subprocess.run([sys.executable, "-c", FLOOD], capture_output=True, text=True, timeout=60, check=True)
    kept, given = map(int, ran.stdout.split())
    assert kept < 20 << 20
    assert given > 80 << 20


def test_it_is_not_done_for_little() -> None:
    """Neither a small part of much nor all of little is worth the time, but what follows at the next look after it was
    done is; what was looked at is not looked at again.
    """
    ebb = Ebb(least=100)
    assert [ebb.look(held) for held in (90, 0, 1000, 800, 700, 690, 689, 650, 600, 0, 0)] == [
        False, False, False, False, True, True, False, False, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("package", ["rnnserve_models", "rnnserve_server"])
def test_onnxruntime_is_told_not_to_report(package: str) -> None:
    """Before any module of a package of ours can load it: it would send its maker what models it runs."""
    program = f"import os, sys, {package}; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    ran = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "False"]


def test_on_one_core_more_is_run_by_the_event_loop(monkeypatch) -> None:
    """What the setting says holds; without it, longer runs stay where they are if there is no core to hand them to."""
    for cores, expected in (({0}, 0.02), ({0, 1}, 0.0005)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        assert inline_seconds(None) == expected
        assert inline_seconds(0.0) == 0.0
