"""Runs every row, round by round, and writes the table.

python -m benchmarks [--rounds 7] [--seconds 0.5] [--only TEXT ...]
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import report, work
from benchmarks.processes import RowProcess, Server
from benchmarks.rows import ROWS

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--rounds", type=int, default=7, help="how often each row is measured [7]")
    parser.add_argument("--seconds", type=float, default=0.5, help="for how long each time [0.5]")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="the rows whose part and name hold one of these")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if any(text in f"{row.part}: {row.name}" for text in arguments.only or [""])]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers too
    where = report.machine()
    lines = [report.Line(row) for row in rows]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.write_model(folder / "models")
        rnnserve = Path(sys.executable).with_name("rnnserve")
        serve = (rnnserve, "serve", "--models", folder / "models", "--port", "0", "--log-format", "json")
        commands = {"echo": (sys.executable, "-m", "benchmarks.echo"), "rnnserve": serve}
        servers = {}
        for name, command in commands.items():
            servers[name] = Server(*command, log=folder / f"{name}.log")
            stack.callback(servers[name].stop)
        processes = [stack.enter_context(RowProcess(row, servers.get(row.server))) for row in rows]
        for process in processes:  # to warm up
            process.measure(arguments.seconds)
        for number in range(arguments.rounds):
            print(f"\rround {number + 1} of {arguments.rounds}", end="", file=sys.stderr, flush=True)
            for line, process in zip(lines, processes, strict=True):
                sample, cpu_seconds = process.measure(arguments.seconds)
                line.samples.append(sample)
                line.cpu_seconds.append(cpu_seconds)
        print(file=sys.stderr)

    results = report.results(lines)
    table = report.markdown(results, where, f"{arguments.rounds} rounds of {arguments.seconds} s a row")
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "table.md").write_text(table)
    (RESULTS / "table.json").write_text(json.dumps({"where": where, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
