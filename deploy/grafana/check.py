"""Asks a Prometheus every query of a dashboard, and says which have no data. Needs Python and nothing else.

python deploy/grafana/check.py --prometheus http://127.0.0.1:9090
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).parent / "dashboards" / "rnnserve.json"


class Query(NamedTuple):
    """A query of a panel, with its variables filled in."""

    panel: str
    expression: str


class Found(NamedTuple):
    """What came of a query: how many series and samples that are numbers, or why it failed."""

    query: Query
    series: int
    samples: int
    error: str = ""


def queries(dashboard: dict[str, Any], rate_interval: str) -> Iterator[Query]:
    """Every query of a dashboard, for all values of its variables."""
    variables = {each["name"]: each["allValue"] for each in dashboard["templating"]["list"]}
    variables["__rate_interval"] = rate_interval
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(f"${name}", value)
            if "$" in expression:
                raise ValueError(f"{panel['title']}: {expression}: a variable that the dashboard does not have")
            yield Query(f"{panel['id']} {panel['title']}", expression)


def ask(prometheus: str, query: Query, seconds: float) -> Found:
    """Asks for the last so many seconds."""
    now = time.time()
    values = {"query": query.expression, "start": now - seconds, "end": now, "step": max(1.0, seconds / 100)}
    url = f"{prometheus.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(values)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            series = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        return Found(query, 0, 0, json.loads(error.read() or b"{}").get("error", str(error)))
    numbers = [value for each in series for _, value in each["values"] if value != "NaN"]
    return Found(query, len(series), len(numbers))


def check(dashboard: Path, prometheus: str, seconds: float, rate_interval: str) -> list[Found]:
    """Asks all queries of a dashboard."""
    document = json.loads(dashboard.read_text(encoding="utf-8"))
    return [ask(prometheus, query, seconds) for query in queries(document, rate_interval)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every query has data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", required=True, help="its URL")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD)
    parser.add_argument("--seconds", type=float, default=300.0, help="how far to look back")
    parser.add_argument("--rate-interval", default="1m", help="what $__rate_interval stands for")
    given = parser.parse_args(arguments)
    found = check(given.dashboard, given.prometheus, given.seconds, given.rate_interval)
    for each in found:
        what = each.error or (f"{each.series} series, {each.samples} samples" if each.samples else "NO DATA")
        print(f"{each.query.panel:40} {what:30} {each.query.expression}")
    bad = sum(not each.samples for each in found)
    print(f"{len(found) - bad} of {len(found)} queries have data")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
