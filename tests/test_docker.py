"""The image and `docker compose up`, in a real Docker Engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "docker" / "run.sh"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("apt-get") is None, reason="needs root on Debian")
def test_docker_compose_up_serves_the_zoo() -> None:
    """The image builds, `docker compose up --wait` serves on the published port, and SIGTERM drains it."""
    done = subprocess.run([RUN], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = done.stdout[-20_000:] + done.stderr[-5_000:]
    print(said)
    assert done.returncode == 0, said
    assert re.search(r"docker: [1-9]\d* passed, 0 failed", said), said
