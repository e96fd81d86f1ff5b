"""The soak, in short. `make soak` runs it for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak.run import FILES, soak
from soak.visits import VISITS


@pytest.mark.slow
@pytest.mark.timeout(400)  # the day that is behind it takes a busy machine two minutes
async def test_a_server_holds_no_more_for_those_who_came_and_went(tmp_path: Path) -> None:
    """Hundreds of visitors of every kind, rude ones too, leave no session, no descriptor and no growing memory."""
    report = await soak(45.0, tmp_path)
    print(report)
    assert report.before is not None
    assert report.after is not None
    assert set(report.visits) == {visit.__name__ for visit in VISITS}
    assert report.sessions == 0
    assert report.after.files - report.before.files <= FILES
    assert report.memory_growth() <= 0.05 * report.before.memory
