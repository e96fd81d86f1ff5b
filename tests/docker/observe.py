"""Asks a running Prometheus for what the profile `observe` promises:

    python tests/docker/observe.py localhost:50051 http://localhost:9090 [REPLICAS]

Needs nothing but the installed client. Sessions stream meanwhile, so that there is something to see. Prints a line for
each check, and ends with status 1 if one failed.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import json
import re
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np

import rnnserve
from rnnserve.codec import encode_named
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.inference_pb2_grpc import InferenceServiceStub

DEPLOY = Path(__file__).parents[2] / "deploy"
SECONDS = 60.0  # in which each thing must come to be so
LOOK_BACK = "30"  # seconds


def load(address: str, stop: threading.Event) -> None:
    """Sessions that come, step, are sent again, are refused and go, until told to stop."""
    x = np.ones((32, 1, 5), np.float32)
    with rnnserve.Client(address, streams=6) as client, grpc.insecure_channel(address) as channel:
        predict = InferenceServiceStub(channel).Predict
        groups = [client.session_group("lstm-4", 32) for _ in range(6)]
        while not stop.wait(0.05):
            for group in groups:
                group.step(x[:, 0])
            session = client.session("lstm-4")
            session.step(x[0, 0])
            session.detach()  # a call by another way may take it to another replica
            again = pb.PredictRequest(
                session_id=session.session_id, first_step=1, inputs=encode_named({"input": x[:1]})
            )
            for _ in range(2):
                predict(again, metadata=(("x-session-id", session.session_id),))
            client.attach(session.session_id).close()
            with contextlib.suppress(rnnserve.errors.SessionNotFound):
                client.attach("nobody")


def get(prometheus: str, path: str) -> Any:
    with urllib.request.urlopen(f"{prometheus}{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def until(fact: Callable[[], Any]) -> None:
    """Waits until a fact, which tells what is missing, tells of nothing."""
    end = time.monotonic() + SECONDS
    while missing := fact():
        assert time.monotonic() < end, missing
        time.sleep(1)


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(address: str, prometheus: str, replicas: int) -> int:
    def every_replica_is_scraped() -> None:
        def missing() -> str:
            targets = list(get(prometheus, "/api/v1/targets")["activeTargets"])
            up = [each["scrapeUrl"] for each in targets if each["health"] == "up"]
            errors = [each["lastError"] for each in targets if each["health"] != "up"]
            return "" if len(up) == len(targets) == replicas else f"{len(up)} of {replicas} are up: {targets} {errors}"

        until(missing)

    def every_rule_is_loaded() -> None:
        written = re.findall(r"- alert: (\w+)", (DEPLOY / "prometheus" / "rules.yml").read_text())
        assert written

        def missing() -> str:
            rules = [rule for group in get(prometheus, "/api/v1/rules")["groups"] for rule in group["rules"]]
            well = [rule["name"] for rule in rules if rule["health"] == "ok"]
            return "" if sorted(well) == sorted(written) == sorted(rule["name"] for rule in rules) else str(rules)

        until(missing)

    def sessions_are_spread_and_counted() -> None:
        def missing() -> str:
            found = get(prometheus, "/api/v1/query?query=sum(rnnserve_sessions)%20by%20(instance)")["result"]
            counts = {each["metric"]["instance"]: float(each["value"][1]) for each in found}
            well = len(counts) == replicas and sum(count > 0 for count in counts.values()) > 1
            return "" if well and sum(counts.values()) >= 6 * 32 else str(counts)

        until(missing)

    def every_query_of_the_dashboard_has_data() -> None:
        check = script(DEPLOY / "grafana" / "check.py")

        def missing() -> list[str]:
            found = check.check(check.DASHBOARD, prometheus, float(LOOK_BACK), f"{LOOK_BACK}s")
            assert found
            return [f"{each.query.panel}: {each.error or 'no data'}" for each in found if not each.samples]

        until(missing)

    def the_console_is_drawn() -> None:
        with urllib.request.urlopen(f"{prometheus}/consoles/rnnserve.html", timeout=20) as answer:
            page = html.unescape(answer.read().decode())
        assert "error executing template" not in page, page[-2000:]
        panels = json.loads((DEPLOY / "grafana" / "dashboards" / "rnnserve.json").read_text())["panels"]
        lacking = [each["title"] for each in panels if each["type"] != "heatmap" and each["title"] not in page]
        assert not lacking, lacking

    stop = threading.Event()
    thread = threading.Thread(target=load, args=(address, stop))
    thread.start()
    failed = 0
    try:
        for check in (
            every_replica_is_scraped,
            every_rule_is_loaded,
            sessions_are_spread_and_counted,
            every_query_of_the_dashboard_has_data,
            the_console_is_drawn,
        ):
            name = check.__name__.replace("_", " ")
            try:
                check()
            except Exception:
                traceback.print_exc()
                failed += 1
                print(f"FAILED   {name}", flush=True)
            else:
                print(f"passed   {name}", flush=True)
    finally:
        stop.set()
        thread.join()
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: observe.py HOST:PORT PROMETHEUS_URL [REPLICAS]")
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 3))
