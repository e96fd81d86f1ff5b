"""Clients of others from PyPI, unchanged, against a real server: see `tritonclient_checks` for what NVIDIA's does.

They run in an environment of their own, with the protobuf that they want. `make test` installs that.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from serving import running_server

CHECKS = Path(__file__).with_name("tritonclient_checks.py")
PYTHON = Path(__file__).parents[1] / ".cache" / "tritonclient" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="tritonclient is not installed: make .cache/tritonclient/.ready"
)


def names() -> list[str]:
    """The checks that there are, without importing them: this environment has no tritonclient."""
    functions = [each for each in ast.parse(CHECKS.read_text()).body if isinstance(each, ast.FunctionDef)]
    return [each.name for each in functions if each.decorator_list]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    with running_server() as server:
        done = subprocess.run(
            [PYTHON, CHECKS, server.address],
            env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", names())
def test_tritonclient(outcomes: dict[str, str | None], name: str) -> None:
    """The check of that name."""
    assert outcomes[name] is None, outcomes[name]


def test_kserves_stubs() -> None:
    """Metadata, typed contents both ways, and a sequence: see `kserve_checks`."""
    with running_server() as server:
        done = subprocess.run(
            [PYTHON, CHECKS.with_name("kserve_checks.py"), server.address], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr


def test_the_readmes_lines_run_as_they_stand() -> None:
    """With nothing but the port changed."""
    (block,) = re.findall(r"```py\n(.*?)```", (CHECKS.parents[1] / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    with running_server() as server:
        script = block.replace("localhost:50051", server.address)
        done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
