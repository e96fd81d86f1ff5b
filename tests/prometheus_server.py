"""A real Prometheus for the tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CONSOLES = Path(__file__).parent.parent / "deploy" / "prometheus" / "consoles"


@contextmanager
def running_prometheus(*targets: str, rules: Sequence[Path] = ()) -> Iterator[str]:
    """A Prometheus that scrapes servers every two seconds, for as long as the block runs: its URL. Skips the test where
    there is none.
    """
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="prometheus") as folder:
        config = Path(folder, "prometheus.yml")
        config.write_text(
            "global: {scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 2s}\n"
            f"rule_files: [{', '.join(map(str, rules))}]\n"
            "scrape_configs:\n"
            "  - job_name: rnnserve\n"
            "    static_configs:\n"
            f"      - targets: [{', '.join(f'{target!r}' for target in targets)}]\n"
        )
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]
        command += [f"--web.console.templates={CONSOLES}", f"--web.console.libraries={folder}"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if "Server is ready" in line:
                    break
            else:
                raise RuntimeError("prometheus did not start:\n" + "".join(said))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.communicate(timeout=30)
