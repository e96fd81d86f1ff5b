"""`python -m torture`: run it with PYTHONPATH=tests."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from torture.run import Torture, empty_store, torture


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1200.0, help="nothing new is begun after so long")
    parser.add_argument("--kills", type=int, default=270, help="every fourth is a SIGTERM")
    parser.add_argument("--steps", type=int, default=1_100_000, help="of all sessions together")
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--calls", type=int, default=12, help="of the sessions, those that are driven by unary calls")
    parser.add_argument("--sdk", type=int, default=0, help="of the sessions, those that are driven by the SDK")
    parser.add_argument("--links", type=int, default=4, help="streams")
    parser.add_argument("--abreast", type=int, default=1, help="sessions of a stream that go in step, in wide frames")
    parser.add_argument("--shared", type=int, default=1, help="streams that step each session at once")
    parser.add_argument("--hands", type=int, default=0, help="who look at sessions, fork them and take some back")
    parser.add_argument("--mischief", type=float, default=0.1, help="how likely a chunk is sent twice, or wrong")
    parser.add_argument("--ahead", type=int, default=3, help="chunks that a session is ahead of its answers")
    parser.add_argument(
        "--cut", type=int, default=2_000_000, help="bytes, in the mean, after which a connection is cut"
    )
    parser.add_argument("--longest", type=int, default=200, help="time steps of a chunk at most")
    parser.add_argument("--replicas", type=int, default=1, help="servers on one store")
    parser.add_argument("--store", choices=["sqlite", "redis"], action="append", help="both, unless it is said")
    parser.add_argument("--fault", default="", help="plant a fault of torture.faults, which must be found")
    parser.add_argument("--report", type=Path, help="write the figures here, as JSON")
    # What is sent ahead is sent again after each kill: with more of it, a busy machine does little else.
    options = vars(parser.parse_args())
    stores, file = options.pop("store") or ["sqlite", "redis"], options.pop("report")
    reports = []
    for kind in stores:
        with tempfile.TemporaryDirectory(prefix="torture") as name, empty_store(kind, Path(name)) as url:
            reports.append(asyncio.run(torture(Torture(**options), url, Path(name))))
            print(reports[-1], flush=True)
    if file is not None:
        file.write_text(json.dumps([report.as_dict() for report in reports], indent=2))
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
