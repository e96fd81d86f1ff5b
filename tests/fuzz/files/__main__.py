"""`python -m fuzz.files`: run it with PYTHONPATH=tests."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fuzz.files.run import Report, fuzz_files, guided
from fuzz.files.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.files", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=sorted(TARGETS))
    parser.add_argument(
        "--guided", action="store_true", help="by the code that they reach: needs requirements/fuzz.txt"
    )
    parser.add_argument("--report", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    if options.guided:
        # Atheris does not see into the libraries that read these, nor can they be stopped.
        names = options.only or [name for name in TARGETS if name not in ("onnx", "hdf5")]
        return max(guided(name, options.seconds, options.seed) for name in names)
    reports: dict[str, Report] = {}
    for name in options.only or TARGETS:
        reports[name] = fuzz_files(name, options.seconds, options.seed)
        print(f"{name}: {reports[name]}", flush=True)
    if options.report is not None:
        options.report.write_text(json.dumps({name: vars(report) for name, report in reports.items()}, indent=2))
    return 1 if any(report.faults for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
