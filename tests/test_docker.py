"""The image, `docker compose up` and a fleet, in a real Docker Engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "docker"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("apt-get") is None, reason="needs root on Debian"),
]


def run(script: str) -> None:
    done = subprocess.run([SCRIPTS / script], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = done.stdout[-20_000:] + done.stderr[-5_000:]
    print(said)
    assert done.returncode == 0, said
    assert re.search(r"docker: [1-9]\d* passed, 0 failed", said), said


def test_docker_compose_up_serves_the_zoo() -> None:
    """The image builds, `docker compose up --wait` serves on the published port, and SIGTERM drains it."""
    run("run.sh")


def test_prometheus_observes_a_fleet() -> None:
    """`docker compose --profile fleet --profile observe` without Grafana: every replica is scraped, every rule loaded,
    and every query of the dashboard answered."""
    run("observe.sh")


def test_a_fleet_is_killed_scaled_and_rolled() -> None:
    """500 sessions stream through `docker compose --profile fleet up` while a replica is killed, the fleet
    is scaled to five and two, and its image is rolled; every output is the oracle's, and none is lost or doubled."""
    run("fleet.sh")
