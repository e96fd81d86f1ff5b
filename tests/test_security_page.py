"""The page on security says nothing that is not so: the tests that it names are there, and the settings."""

from __future__ import annotations

import re
from pathlib import Path

from rnnserve_server.config import Settings

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "server" / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_is_there():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in TESTS.glob("test_*.py")}
    defined = {name for source in sources.values() for name in re.findall(r"def (test_\w+)\(", source)}
    named = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", PAGE)
    assert len(named) > 20
    for module, test in named:
        assert module in sources or module in defined, module
        assert not test or f"def {test}(" in sources[module], test


def test_every_limit_that_the_page_names_is_a_setting():
    table = PAGE.partition("## Limits")[2].partition("## ")[0]
    named = set(
        re.findall(
            r"`([a-z_]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "`" in line and "|" in line)
        )
    )
    assert len(named) > 20
    assert named <= set(Settings.model_fields)
