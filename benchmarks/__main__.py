"""Measures everything, round by round, and writes the tables and the plot.

python -m benchmarks [--rounds 7] [--seconds 0.5] [--only TEXT ...]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks import (
    abandoned,
    crowd,
    fairness,
    findings,
    plot,
    report,
    sessions,
    startup,
    stores,
    table,
    triton,
    work,
)
from benchmarks.processes import BARE, ECHO, RowProcess, Server, serve
from benchmarks.report import Line
from benchmarks.rows import Row

RESULTS = Path(__file__).parent / "results"
SCRIPTS = {"sessions": sessions, "abandoned": abandoned, "fairness": fairness, "crowd": crowd, "startup": startup}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--rounds", type=int, default=7, help="how often each row is measured [7]")
    parser.add_argument("--seconds", type=float, default=0.5, help="for how long each time [0.5]")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        help=f"the rows whose part and name hold one of these, and the scripts named so ({', '.join(SCRIPTS)})",
    )
    arguments = parser.parse_args()
    only = arguments.only or [""]
    rows = [row for row in table.ROWS if any(text in f"{row.part}: {row.name}" for text in only)]
    if not triton.installed():
        rows = [row for row in rows if not isinstance(row, triton.TritonRow)]
    if not stores.installed() and any(row.server.startswith("redis") for row in rows):
        print("without Redis: redis-server is not installed (apt-get install redis-server)", file=sys.stderr)
        rows = [row for row in rows if not row.server.startswith("redis")]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers too
    where = report.machine()
    beside: list[findings.Finding] = []
    for name, script in SCRIPTS.items():
        if any(text in name for text in only):
            print(f"{name} ...", file=sys.stderr)
            beside += script.findings(arguments.rounds, arguments.seconds)
    lines = measured(rows, arguments.rounds, arguments.seconds)
    found = table.findings(lines) + beside

    figures = [report.figures(lines, row) for row in rows]
    run = f"{arguments.rounds} rounds of {arguments.seconds} s a row"
    text = "\n".join((report.markdown(figures), findings.markdown(found), report.described(where, run)))
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "table.md").write_text(text)
    everything = {"where": where, "rows": figures, "findings": [finding.as_dict() for finding in found]}
    (RESULTS / "table.json").write_text(json.dumps(everything, indent=1) + "\n")
    plot.write(lines, RESULTS / "plot.svg")


def measured(rows: list[Row], rounds: int, seconds: float) -> dict[Row, Line]:
    """Every round runs every row once, so that a busy minute of the machine hits them all; and those that are held
    against one another, which do the same work, one after the other, so that a busy second hits them all.
    """
    lines = {row: Line(row) for row in rows}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.write_model(folder / "models")
        starts: dict[str, Callable[[], Server]] = {
            "echo": lambda: Server(*ECHO, log=folder / "echo.log"),
            "bare": lambda: Server(*BARE, log=folder / "bare.log"),
            "rnnserve": lambda: Server(*serve(folder / "models"), log=folder / "rnnserve.log"),
            "triton": lambda: triton.server(folder / "triton"),
            **stores.starts(folder, stack),
        }
        wanted = {row.server for row in rows}
        servers = {name: stack.enter_context(start()) for name, start in starts.items() if name in wanted}
        processes = {row: stack.enter_context(RowProcess(row, servers.get(row.server))) for row in rows}
        for process in processes.values():  # to warm up
            process.measure(seconds)
        for number in range(rounds):
            print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
            for row in _in_turn(rows):
                os.sync()  # no row pays for what the one before has written
                stores.let_go(folder)
                sample, cpu = processes[row].measure(seconds)
                lines[row].samples.append(sample)
                lines[row].cpu.append(cpu)
        print(file=sys.stderr)
    return lines


def _in_turn(rows: list[Row]) -> list[Row]:
    """Rows of as many sessions and steps together, and each one with a store right behind the one without."""
    places = {row: place for place, row in enumerate(rows)}

    def turn(row: Row) -> tuple[int, int, int]:
        beside = row.in_memory if isinstance(row, stores.StoreRow) else row
        return row.steps, row.sessions, places.get(beside, places[row])

    return sorted(rows, key=turn)


if __name__ == "__main__":
    main()
