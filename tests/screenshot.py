"""Takes the README's picture: the dashboard, as Prometheus serves it, of two servers that share a Redis.

    PYTHONPATH=tests python tests/screenshot.py deploy/prometheus/console.png

Real servers, a real Prometheus, and headless Chromium: apt-get install prometheus redis-server chromium.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time

import numpy as np
from PIL import Image

import rnnserve
from prometheus_server import running_prometheus
from redis_server import running_redis
from serving import running_server
from test_dashboard import drawn

SECONDS = 90


def steps(address: str, model: str, sessions: int, pause: float, stop: threading.Event) -> None:
    """Sessions that step together until told to stop."""
    with rnnserve.Client(address) as client, client.session_group(model, sessions) as group:
        x = np.ones((sessions, *group.model.inputs[0].shape), np.float32)
        while not stop.wait(pause):
            group.step(x)


def travel(one: str, other: str, stop: threading.Event) -> None:
    """Sessions that go from server to server."""
    with rnnserve.Client(one) as here, rnnserve.Client(other) as there:
        ids = [here.session("lstm-4").session_id for _ in range(20)]
        while not stop.wait(3.0):
            here, there = there, here
            for session_id in ids:
                session = here.attach(session_id)
                session.step(np.ones(session.model.inputs[0].shape, np.float32))
                session.detach()


def main(path: str) -> None:
    """Serves, works, and takes the picture."""
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_redis("--appendfsync", "everysec") as redis,
        running_server(metrics_port=0, store=redis.url) as one,
        running_server(metrics_port=0, store=redis.url) as two,
        running_prometheus(*(f"127.0.0.1:{each.server.metrics_port}" for each in (one, two))) as url,
    ):
        work = [
            threading.Thread(target=steps, args=(one.address, "lstm-32-64", 128, 0.1, stop)),
            threading.Thread(target=steps, args=(two.address, "silero-vad", 24, 0.12, stop)),
            threading.Thread(target=steps, args=(two.address, "sunspots-lstm", 64, 0.15, stop)),
            threading.Thread(target=travel, args=(one.address, two.address, stop)),
        ]
        for each in work:
            each.start()
            time.sleep(SECONDS / 20)
        time.sleep(SECONDS - SECONDS / 4)
        drawn(
            f"{url}/consoles/rnnserve.html?seconds={SECONDS}&rate=10s",
            "--window-size=1200,1010",
            f"--screenshot={path}",
            profile=folder,
        )
        stop.set()
        for each in work:
            each.join()
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(64)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
