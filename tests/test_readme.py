"""The README's client lines, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving import running_server
from speech import sample, silero_model

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readmes_python_runs_as_it_stands(
    block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Python block of the README runs against the zoo, with nothing but the port changed, and prints."""
    assert "localhost:50051" in block
    silero_model()
    sample("speech.wav")
    sample("sunspots.csv")
    monkeypatch.chdir(ROOT)
    with running_server() as server:
        exec(block.replace("localhost:50051", server.address), {})
    assert capsys.readouterr().out
