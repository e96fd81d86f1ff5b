"""A real HAProxy with the configuration of deploy/, before replicas that a test names."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from torture.servers import free_port

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy" / "haproxy.cfg"


@contextlib.contextmanager
def running_haproxy(folder: Path, replicas: Sequence[str]) -> Iterator[str]:
    """The address of HAProxy as it is deployed, but for its port and for the replicas, which are not looked up."""
    if not shutil.which("haproxy"):
        pytest.skip("haproxy is not installed: apt-get install haproxy")
    port = free_port()
    config = CONFIG.read_text().replace("bind :50051", f"bind 127.0.0.1:{port}")
    servers = "\n".join(f"    server replica{n} {each}" for n, each in enumerate(replicas))
    config, count = re.subn(r"^    server-template .*$", servers, config, flags=re.MULTILINE)
    assert count == 1
    config = config.replace(" resolvers dns init-addr none", "")
    path = folder / "haproxy.cfg"
    path.write_text(config + "\n")
    with (folder / "haproxy.log").open("w") as log:
        process = subprocess.Popen(["haproxy", "-db", "-f", str(path)], stdout=log, stderr=log)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()
