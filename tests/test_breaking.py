"""What CI says of a change of the contract, in clones of every depth."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACT = "proto/rnnserve/v1/inference.proto"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "BUF": str(Path(sys.executable).with_name("buf")),
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{who}_{what}": "test@test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def git(repository: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=repository, env=ENVIRONMENT, check=True, capture_output=True)


def commit(repository: Path, *change: str) -> None:
    """A commit in which the contract has another text in place of one; or in which it is as it was."""
    if change:
        path = repository / CONTRACT
        text = path.read_text()
        assert text.count(change[0])
        path.write_text(text.replace(*change))
    git(repository, "add", ".")
    git(repository, "commit", "--allow-empty", "--message", "one")


def breaking(repository: Path, *commits: str) -> subprocess.CompletedProcess[str]:
    command = [repository / ".ci" / "breaking", *commits]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)


def clone(repository: Path, depth: int) -> Path:
    """As services of CI do; a clone of a path would have the whole history."""
    folder = repository.with_name("clone")
    git(repository, "clone", f"--depth={depth}", repository.as_uri(), str(folder))
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """This contract, in a history of one commit."""
    folder = tmp_path / "origin"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "breaking", folder / ".ci")
    shutil.copytree(ROOT / "proto", folder / "proto")
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder)
    return folder


REMOVED = ("repeated uint64 first_steps = 2;", "reserved 2;")
ADDED = ("string traceparent = 5;", "string traceparent = 5; string more = 6;")


def test_the_first_commit_breaks_nothing(repository: Path) -> None:
    done = breaking(repository)
    assert (done.returncode, "first commit" in done.stdout) == (0, True)


def test_what_is_added_breaks_nothing(repository: Path) -> None:
    commit(repository, *ADDED)
    done = breaking(repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "breaks nothing" in done.stdout


def test_what_is_removed_is_found(repository: Path) -> None:
    """In the commit, in the work tree before it is committed, and behind commits of other things."""
    commit(repository)
    commit(repository, *REMOVED)
    assert '"2" with name "first_steps"' in breaking(repository).stdout
    commit(repository)
    assert breaking(repository).returncode != 0
    assert breaking(repository, "HEAD~1").returncode == 0
    (repository / CONTRACT).write_text((ROOT / CONTRACT).read_text().replace("optional uint64 first_step = 8;", ""))
    assert breaking(repository, "HEAD").returncode != 0


def test_a_clone_of_one_commit_fetches_the_one_before(repository: Path) -> None:
    """So that what is removed is found there too."""
    commit(repository, *REMOVED)
    done = breaking(clone(repository, 1))
    assert '"2" with name "first_steps"' in done.stdout


def test_a_clone_that_cannot_be_compared_does_not_pass(repository: Path) -> None:
    """A contract with which nothing was compared is not one that breaks nothing."""
    commit(repository, *ADDED)
    shallow = clone(repository, 1)
    shutil.rmtree(repository)
    done = breaking(shallow)
    assert done.returncode != 0
    assert "git fetch --unshallow" in done.stderr


def test_a_work_tree_beside_the_first_is_compared(repository: Path) -> None:
    commit(repository, *REMOVED)
    git(repository, "worktree", "add", "--quiet", "../beside")
    assert '"2" with name "first_steps"' in breaking(repository.with_name("beside")).stdout
