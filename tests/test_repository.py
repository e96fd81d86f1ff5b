"""The models that a server hosts."""

from __future__ import annotations

import random

import pytest
from structlog.testing import capture_logs

from graphs import directory, lstm, lstm_spec
from rnnserve_models.errors import ModelError
from rnnserve_server.errors import ModelUnavailable, ModelUnknown, VersionUnknown
from rnnserve_server.repository import Repository, _version_key


@pytest.fixture
def folder(tmp_path):
    """Model a in versions 1, 9, 10 and a broken 11; b, wholly broken; and files that are no models."""
    for version in ("1", "9", "10"):
        directory(tmp_path, lstm_spec(), name="a", version=version, graph=lstm())
    directory(tmp_path, "cell: [", name="a", version="11")
    directory(tmp_path, {"engine": "torch"}, name="b", version="1")
    (tmp_path / "a" / "notes.txt").write_text("no version")
    (tmp_path / "README.md").write_text("no model")
    (tmp_path / "empty" / "1").mkdir(parents=True)
    return tmp_path


def test_good_models_are_served_and_bad_ones_remembered(folder):
    """A model that cannot be loaded keeps no other from being served, is logged, and says why when it is asked for."""
    with capture_logs() as logs:
        repository = Repository.load(folder)
    assert [(model.name, model.version) for model in repository] == [("a", "10"), ("a", "9"), ("a", "1")]
    assert [(log["model"], log["version"]) for log in logs if log["event"] == "model not served"] == [
        ("a", "11"),
        ("b", "1"),
    ]
    with pytest.raises(ModelUnavailable, match="is not YAML"):
        repository.get("a", "11")
    with pytest.raises(ModelUnavailable, match="engine: Input should be"):
        repository.get("b")


def test_the_newest_version_that_loads(folder):
    """An empty version means the newest by natural order, of those that could be loaded."""
    repository = Repository.load(folder)
    assert repository.get("a").version == "10"
    assert repository.get("a", "9").version == "9"


def test_what_is_not_there_is_told_apart(folder):
    """Unknown names and unknown versions have reasons of their own, and say what there is."""
    repository = Repository.load(folder)
    with pytest.raises(ModelUnknown, match=r"\['a', 'b'\]") as caught:
        repository.get("c")
    assert caught.value.metadata["got"] == "c"
    with pytest.raises(VersionUnknown, match="has no version '2'") as caught:
        repository.get("a", "2")
    assert caught.value.metadata == {"field": "version", "expected": "11, 10, 9, 1", "got": "2"}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_models_is_an_error(tmp_path, there):
    """A server without any model is a mistake in its settings, which the message names."""
    with pytest.raises(ModelError, match="--models"):
        Repository.load(tmp_path if there else tmp_path / "nowhere")


def test_versions_in_natural_order():
    """Numbers in versions are ordered as numbers, whatever is around them."""
    ordered = ["1", "2", "10", "1.2", "1.10", "6.2.3", "6.2.10", "v1", "v2", "v10"]
    ordered = ["1", "1.2", "1.10", "2", "6.2.3", "6.2.10", "10"]
    names = ["v1", "v2", "v10", "v10.1"]
    for versions in (ordered, names):
        shuffled = random.Random(0).sample(versions, len(versions))
        assert sorted(shuffled, key=_version_key) == versions
    assert sorted(["2024-01-05", "v3", "final", "7"], key=_version_key)


def test_the_digest_changes_with_any_file(tmp_path):
    """A version's digest is another once its description or its graph is."""
    path = directory(tmp_path, lstm_spec(), graph=lstm())
    digests = {Repository.load(tmp_path).get("m").digest}
    digests.add(Repository.load(tmp_path).get("m").digest)
    assert len(digests) == 1
    (path / "graph.onnx").write_bytes(lstm(lengths=True))
    directory(tmp_path, lstm_spec(lengths=True))
    digests.add(Repository.load(tmp_path).get("m").digest)
    with (path / "model.yaml").open("a") as file:
        file.write("# a remark\n")
    digests.add(Repository.load(tmp_path).get("m").digest)
    assert len(digests) == 3
