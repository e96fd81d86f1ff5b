"""The files in deploy/prometheus and deploy/grafana, held against a real Prometheus that scrapes a real server."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

import rnnserve
from prometheus_server import running_prometheus
from rnnserve.codec import encode_named
from rnnserve.errors import SessionNotFound
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1.inference_pb2_grpc import InferenceServiceStub
from serving import running_server

DEPLOY = Path(__file__).parent.parent / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "rnnserve.json"


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = script(DEPLOY / "grafana" / "check.py")
make_console = script(DEPLOY / "prometheus" / "make_console.py")


def load(address, stop):
    """Sessions that come, step, are sent again, go wrong and go, until told to stop."""
    with rnnserve.Client(address) as client, grpc.insecure_channel(address) as channel:
        predict = InferenceServiceStub(channel).Predict
        with client.session_group("lstm-32-64", 32) as group:
            x = np.ones((32, *group.model.inputs[0].shape), np.float32)
            while not stop.is_set():
                for _ in range(20):
                    group.step(x)
                with client.session("lstm-4") as session:
                    width = session.model.inputs[0].shape
                    for _ in range(2):
                        predict(
                            pb.PredictRequest(
                                session_id=session.session_id,
                                first_step=0,
                                inputs=encode_named({"input": np.ones((1, 1, *width), np.float32)}),
                            )
                        )
                with pytest.raises(SessionNotFound):
                    client.attach("nobody")


def panels():
    return json.loads(DASHBOARD.read_text())["panels"]


def drawn(url, *arguments, profile):
    """What headless Chromium says of a page once it is drawn."""
    command = ["nice", "-n", "19", "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=15000", f"--user-data-dir={profile}/chromium", *arguments, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@pytest.mark.slow
def test_every_query_of_the_dashboard_has_data(tmp_path, capsys):
    """A real Prometheus scrapes a real server under a little load: every query of every panel has samples, and the
    script that says so tells a query without any. The traces of histograms' exemplars are kept.
    """
    with (
        running_server(metrics_port=0, traces="console", store=f"sqlite:///{tmp_path}/s.db") as server,
        running_prometheus(
            f"127.0.0.1:{server.server.metrics_port}", rules=[DEPLOY / "prometheus" / "rules.yml"]
        ) as url,
    ):
        stop = threading.Event()
        thread = threading.Thread(target=load, args=(server.address, stop))
        thread.start()
        try:
            arguments = ["--prometheus", url, "--seconds", "20", "--rate-interval", "10s"]
            deadline = time.monotonic() + 60
            while check.main(arguments) and time.monotonic() < deadline:
                capsys.readouterr()
                stop.wait(1.0)  # until Prometheus has scraped often enough for rates
            capsys.readouterr()
            assert check.main(arguments) == 0, capsys.readouterr().out

            broken = json.loads(DASHBOARD.read_text())
            broken["panels"][1]["targets"][0]["expr"] = "rnnserve_no_such_metric"
            broken["panels"][2]["targets"][0]["expr"] = "rate("
            (tmp_path / "broken.json").write_text(json.dumps(broken))
            capsys.readouterr()
            assert check.main([*arguments, "--dashboard", str(tmp_path / "broken.json")]) == 1
            said = capsys.readouterr().out
            assert "NO DATA" in said
            assert "parse error" in said

            if shutil.which("chromium"):
                page = drawn(f"{url}/consoles/rnnserve.html?seconds=20&rate=10s", "--dump-dom", profile=tmp_path)
                graphs = [panel for panel in panels() if panel["type"] == "timeseries"]
                assert page.count("<svg") >= len(graphs)
                assert "prom_graph_error" not in page
                assert "error executing template" not in page
                values = re.findall(r'<div class="value">(.*?)</div>', page)
                assert len(values) == sum(panel["type"] == "stat" for panel in panels())
                assert all(re.match(r"\d", value) for value in values), values

            values = urllib.parse.urlencode(
                {"query": "rnnserve_tick_seconds_bucket", "start": time.time() - 60, "end": time.time()}
            )
            with urllib.request.urlopen(f"{url}/api/v1/query_exemplars?{values}", timeout=10) as answer:
                exemplars = [each for series in json.load(answer)["data"] for each in series["exemplars"]]
            assert exemplars
            assert all(len(each["labels"]["trace_id"]) == 32 for each in exemplars)

            with urllib.request.urlopen(f"{url}/api/v1/rules", timeout=10) as answer:
                (group,) = json.load(answer)["data"]["groups"]
            assert [rule["health"] for rule in group["rules"]] == ["ok"] * 5
            assert [rule["state"] for rule in group["rules"]] == ["inactive"] * 5
        finally:
            stop.set()
            thread.join()


def test_prometheus_takes_the_configuration():
    """promtool takes the scrape configuration, and each alert fires when it should and only then."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed: apt-get install prometheus")
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(
            ["promtool", *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    tests = yaml.safe_load((RULES.parent / "rules_test.yml").read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert fired == alerts


def test_the_console_is_the_dashboard():
    """The console that Prometheus serves is what its script makes of the dashboard."""
    console = make_console.console(json.loads(DASHBOARD.read_text()))
    assert make_console.CONSOLE.read_text(encoding="utf-8") == console, "run deploy/prometheus/make_console.py"


def lost(document, kept, path=""):
    """What of a document is not in what was kept of it."""
    if isinstance(document, dict) and isinstance(kept, dict):
        for key, value in document.items():
            yield from lost(value, kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"]
    elif isinstance(document, list) and isinstance(kept, list) and len(document) == len(kept):
        for number, (value, other) in enumerate(zip(document, kept, strict=True)):
            yield from lost(value, other, f"{path}[{number}]")
    elif document != kept:
        yield path


def by_grafanas_schema(document):
    """A dashboard as Grafana's own schema reads it: what that does not know is not in it."""
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(document)))


def test_grafana_knows_every_field_of_the_dashboard():
    """By the schema that Grafana publishes; and a field that is written wrong is found, in a panel's options too."""
    document = json.loads(DASHBOARD.read_text())
    assert list(lost(document, by_grafanas_schema(document))) == []
    (first, *_) = [panel for panel in document["panels"] if panel["type"] == "timeseries"]
    first["options"]["legend"]["placment"] = "right"
    first["targets"][0]["exprr"] = "up"
    document["timezon"] = "utc"
    at = f".panels[{document['panels'].index(first)}]"
    wrong = {f"{at}.options.legend.placment", f"{at}.targets[0].exprr", ".timezon"}
    assert set(lost(document, by_grafanas_schema(document))) == wrong


def test_the_dashboard_is_whole():
    """Every panel has a description and a unit, an id of its own and a place that no other has; its data source is the
    provisioned one; it asks for metrics and labels that there are.
    """
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    known = (DEPLOY / "prometheus" / "README.md").read_text()
    taken = set()
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": source["type"], "uid": source["uid"]}
            for name in re.findall(r"rnnserve_\w+", target["expr"]):
                assert f"`{re.sub('_(bucket|sum|count)$', '', name)}`" in known, name
