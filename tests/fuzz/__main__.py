"""`python -m fuzz`: run it with PYTHONPATH=tests."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fuzz.run import Fuzz, fuzz

_RATIO = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=Fuzz.frames)
    parser.add_argument("--seconds", type=float, default=Fuzz.seconds, help="nothing new is begun after so long")
    parser.add_argument("--seed", type=int, default=Fuzz.seed)
    parser.add_argument("--sessions", type=int, default=Fuzz.sessions, help="of honest clients")
    parser.add_argument("--pace", type=float, default=Fuzz.pace, help="frames a second at most; 0 for no such limit")
    parser.add_argument("--rows-per-second", type=float, default=Fuzz.rows_per_second, help="the fuzzer's quota")
    parser.add_argument(
        "--nice", type=int, default=10, help="of the process that sends them, which has the machine too"
    )
    parser.add_argument("--report", type=Path, help="write the figures here, as JSON")
    options = vars(parser.parse_args())
    file = options.pop("report")
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        report = fuzz(Fuzz(**options), Path(folder))
    if report.ratio > _RATIO:
        report.faults.append(
            f"honest sessions waited {report.ratio:.2f} times as long, {_RATIO:g} at most expected"
            + (
                ", but their own core was busy: measure again"
                if 2 * report.fuzzed["late"] > report.fuzzed["p99"]
                else ""
            )
        )
    print(report)
    if file is not None:
        file.write_text(json.dumps(report.as_dict(), indent=2))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
