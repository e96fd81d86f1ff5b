"""What Prometheus is told by a real server, over HTTP."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

import rnnserve
from redis_server import running_redis
from rnnserve.errors import RequestError, SessionNotFound
from rnnserve_server.api.errors import rejections
from rnnserve_server.commands.scrape import Scrape
from serving import running_server

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "deploy" / "prometheus" / "README.md"
MODEL = {"model": "lstm-4", "version": "1"}


def text(server, accept="text/plain"):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server.metrics_port}/metrics", headers={"Accept": accept}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def scrape(server):
    return Scrape.parse(text(server), 0.0)


def test_metrics_are_what_happened(tmp_path):
    """Every count, and every gauge, is what a client has done: sessions by state, chunks, steps, rows, bytes, streams,
    sessions that came, went and came back, replays and rejections by reason.
    """
    before = rejections["SESSION_UNKNOWN"]
    with running_server(metrics_port=0, store=f"sqlite:///{tmp_path}/s.db") as server:
        with rnnserve.Client(server.address) as client, client.session_group("lstm-4", 8, batch_size=2) as group:
            x = np.zeros(
                (8, 2, 3, client.models("lstm-4")[0].inputs[0].shape[0]) if False else (8, 2, 3, 2), np.float32
            )
            x = np.zeros((8, 2, 3, group.model.inputs[0].shape[0]), np.float32)
            group(x)
            group(x)
            with pytest.raises(SessionNotFound):
                client.attach("nobody")
            seen = scrape(server)
            assert seen.total("rnnserve_sessions", **MODEL, state="idle") == 8
            assert seen.total("rnnserve_sessions", **MODEL, state="busy") == 0
            assert seen.total("rnnserve_state_bytes", **MODEL) == 8 * 2 * 2 * 4 * 4
            assert seen.total("rnnserve_replay_bytes", **MODEL) > 0
            assert seen.total("rnnserve_chunks_total", **MODEL) == 16
            assert seen.total("rnnserve_steps_total", **MODEL) == 48
            assert seen.total("rnnserve_sessions_created_total", **MODEL) == 8
            assert seen.total("rnnserve_streams") == seen.total("rnnserve_streams_opened_total") == 1
            assert seen.total("rnnserve_rejections_total", reason="SESSION_UNKNOWN") == before + 1
            ticks = seen.total("rnnserve_tick_seconds_count", **MODEL)
            assert 2 <= ticks <= 16
            assert seen.total("rnnserve_tick_rows_sum", **MODEL) == 16 * ticks
            assert seen.total("rnnserve_queue_seconds_count", **MODEL) == ticks
            assert 0 < seen.total("rnnserve_engine_seconds_sum") < seen.total("rnnserve_tick_seconds_sum")
            assert seen.total("rnnserve_store_sessions", model="lstm-4", store="sqlite") == 8
            assert seen.total("rnnserve_store_seconds_count", operation="commit") == ticks
            assert seen.total("rnnserve_store_errors_total") == 0

            keeper = server.server.core.keeper
            server.call(lambda: keeper.rest(0.0, lambda group: None))
            seen = scrape(server)
            assert seen.total("rnnserve_sessions_rested_total", **MODEL) == 8
            assert seen.total("rnnserve_sessions", **MODEL) == seen.total("rnnserve_state_bytes", **MODEL) == 0
            client.attach(group.session_ids[0]).detach()
            seen = scrape(server)
            assert seen.total("rnnserve_sessions_fetched_total", **MODEL) == 1
            assert seen.total("rnnserve_sessions_resumed_total", **MODEL) == 1
            assert seen.total("rnnserve_sessions_created_total", **MODEL) == 8
            group(x)
        seen = scrape(server)
        assert seen.total("rnnserve_sessions_ended_total", **MODEL, reason="closed") == 8
        assert seen.total("rnnserve_steps_total", **MODEL) == 72
        assert seen.total("rnnserve_model_info", **MODEL, engine="onnx") == 1
        assert seen.total("process_resident_memory_bytes") > 0


def test_replays_and_taken_sessions_are_counted():
    """A chunk that is answered from memory is a replay, not a step; a session that another server takes is told apart
    from one that was closed.
    """
    import grpc

    from rnnserve.codec import encode_named
    from rnnserve.v1 import inference_pb2 as pb
    from rnnserve.v1.inference_pb2_grpc import InferenceServiceStub

    with (
        running_redis() as redis,
        running_server(metrics_port=0, store=redis.url) as one,
        running_server(metrics_port=0, store=redis.url) as two,
        rnnserve.Client(one.address) as client,
        grpc.insecure_channel(one.address) as channel,
    ):
        session = client.session("lstm-4")
        width = session.model.inputs[0].shape[0]
        request = pb.PredictRequest(
            session_id=session.session_id,
            first_step=0,
            inputs=encode_named({session.model.inputs[0].name: np.ones((1, 1, width), np.float32)}),
        )
        predict = InferenceServiceStub(channel).Predict
        assert predict(request).outputs == predict(request).outputs
        seen = scrape(one)
        assert (seen.total("rnnserve_replays_total", **MODEL), seen.total("rnnserve_steps_total", **MODEL)) == (1, 1)
        with rnnserve.Client(two.address) as other:
            other.attach(session.session_id).step(np.ones(width, np.float32))
        with pytest.raises(grpc.RpcError):
            predict(pb.PredictRequest(session_id=session.session_id, first_step=1, inputs=request.inputs))
        assert scrape(one).total("rnnserve_sessions_ended_total", **MODEL, reason="taken_over") == 1
        assert scrape(two).total("rnnserve_sessions_fetched_total", **MODEL) == 1
        assert scrape(two).total("rnnserve_sessions_created_total", **MODEL) == 0


def test_a_store_that_fails_is_counted():
    """Calls to a store that does not answer are errors by operation, and the scrape is answered all the same."""
    with running_redis() as redis, running_server(metrics_port=0, store=redis.url) as server:
        with rnnserve.Client(server.address, retry_for=0.0) as client:
            session = client.session("lstm-4")
            redis.kill()
            with pytest.raises(RequestError):
                session.step(np.zeros(session.model.inputs[0].shape, np.float32))
        seen = scrape(server)
        assert seen.total("rnnserve_store_errors_total", operation="commit") == 1
        assert seen.total("rnnserve_rejections_total", reason="STORE_DOWN") >= 1
        assert seen.total("rnnserve_sessions_ended_total", **MODEL, reason="store_down") == 1
        redis.start()  # or the server would wait for it in vain while it stops


def test_scrapes_under_load_are_whole():
    """While sessions come, step and go, every scrape parses, in both formats, and its histograms are whole: buckets
    rise, and the last is the count.
    """
    with running_server(metrics_port=0) as server, rnnserve.Client(server.address) as client:
        stop = threading.Event()

        def load():
            while not stop.is_set():
                with client.session_group("lstm-4", 16) as group:
                    for _ in range(5):
                        group.step(np.zeros((16, *group.model.inputs[0].shape), np.float32))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for _ in range(8):
                seen = scrape(server)
                for name in ("tick", "queue", "engine"):
                    counts = [count for _, count in sorted(seen.buckets(f"rnnserve_{name}_seconds", **MODEL).items())]
                    assert counts == sorted(counts)
                    assert counts[-1] == seen.total(f"rnnserve_{name}_seconds_count", **MODEL)
                assert list(open_metrics(text(server, "application/openmetrics-text; version=1.0.0")))
        finally:
            stop.set()
            thread.join()


def test_a_stuck_event_loop_fails_the_scrape(monkeypatch):
    """A server whose event loop does not answer is down for Prometheus, not one that stands still."""
    monkeypatch.setattr("rnnserve_server.metrics._SCRAPE_SECONDS", 0.2)
    with running_server(metrics_port=0) as server:
        held, go_on = threading.Event(), threading.Event()
        server._loop.call_soon_threadsafe(lambda: (held.set(), go_on.wait(30)))
        held.wait(10)
        try:
            with pytest.raises(OSError, match=r"500|end of|closed"):
                text(server)
        finally:
            go_on.set()
        monkeypatch.undo()  # a busy machine may take as long to go on
        assert scrape(server).total("rnnserve_info") == 1


def test_a_port_that_is_taken_is_told():
    """A server whose metrics' port is taken does not start, and says which port it is."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(OSError, match=f"metrics: cannot listen on 127.0.0.1:{port}"),
            running_server(metrics_port=port),
        ):
            pass


def test_off_is_off(tmp_path):
    """Without any setting nobody watches: no observer, no port, and none of the libraries is loaded."""
    import subprocess
    import sys

    with running_server() as server:
        assert server.server.core.observer is None
        assert server.server.core.tracing is None
        assert server.server.metrics_port == 0
    program = (
        "import sys, rnnserve_server.server, rnnserve_server.cli\n"
        "from rnnserve_server.config import Settings\n"
        "from rnnserve_server.watch import Watch\n"
        "Watch(Settings())\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('prometheus_client', 'opentelemetry')])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60).strip() == "[]"


def documented():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (kind, sorted(re.findall(r"`(\w+)`", labels)), about) for name, kind, labels, about in rows}


def test_the_table_of_metrics_is_what_a_server_tells(tmp_path):
    """deploy/prometheus/README.md lists every metric of ours with its kind, labels and help, and no other; names are as
    Prometheus wants them.
    """
    told = {}
    with running_server(metrics_port=0, store=f"sqlite:///{tmp_path}/s.db") as server:
        with rnnserve.Client(server.address) as client, client.session("lstm-4") as session:
            session.step(np.zeros(session.model.inputs[0].shape, np.float32))
        for family in text_string_to_metric_families(text(server)):
            if family.name.startswith("rnnserve_"):
                labels = {label for sample in family.samples for label in sample.labels} - {"le"}
                name = family.name + ("_total" if family.type == "counter" else "")
                assert family.samples, name
                told[name] = (family.type, sorted(labels), family.documentation)
    assert documented() == told
    for name, (kind, _, _) in told.items():
        assert re.fullmatch(r"rnnserve(_[a-z]+)+", name)
        assert name.endswith("_total") == (kind == "counter")
        assert kind != "histogram" or name.endswith(("_seconds", "_rows"))
