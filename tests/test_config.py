"""The settings of a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from rnnserve_server.config import ConfigError, Settings, load_settings


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No setting of the machine's own."""
    import os

    for name in [name for name in os.environ if name.startswith("RNNSERVE_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def written(folder, text):
    path = folder / "server.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_then_environment_then_file_then_default(tmp_path, environment):
    """Of a flag, a variable and a key of the file the first that is set wins; each setting by itself."""
    path = written(tmp_path, "port: 1\nhost: file\nmax_lanes: 3\n")
    environment.setenv("RNNSERVE_PORT", "2")
    environment.setenv("RNNSERVE_HOST", "environment")
    settings = load_settings(path, port=4, host=None)
    assert (settings.port, settings.host, settings.max_lanes) == (4, "environment", 3)
    assert settings.slice_steps == Settings.model_fields["slice_steps"].default
    assert load_settings(path).port == 2
    environment.delenv("RNNSERVE_PORT")
    assert load_settings(path).port == 1
    assert load_settings().port == 50051


def test_an_empty_file_says_nothing(tmp_path):
    """A file without keys leaves the defaults."""
    assert load_settings(written(tmp_path, "# nothing\n")).model_dump() == Settings().model_dump()


def test_settings_do_not_change():
    """Settings are read once."""
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 3


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("prot: 1", "prot"),
        ("port: 70000", "port"),
        ("port: -1", "port"),
        ("port: many", "port"),
        ("port: null", "port"),
        ("engine: torch", "engine"),
        ("slice_steps: 0", "slice_steps"),
        ("idle_lifetime: 0", "idle_lifetime"),
        ("max_batch_rows: 1.5", "max_batch_rows"),
        ("log_level: loud", "log_level"),
    ],
)
def test_unknown_keys_and_bad_values_are_named(tmp_path, text, name):
    """A key that is no setting, and a value that a setting cannot have, are refused by name."""
    with pytest.raises(ValidationError) as caught:
        load_settings(written(tmp_path, text))
    assert [fault["loc"] for fault in caught.value.errors()] == [(name,)]


def test_bad_variables_are_named(environment):
    """So is a variable's value."""
    environment.setenv("RNNSERVE_MAX_SESSIONS", "none")
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert [fault["loc"] for fault in caught.value.errors()] == [("max_sessions",)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"port: [", "is not YAML"),
        (b"- port\n", "must be a mapping of settings, got list"),
        (b"hello", "got str"),
        (b"\xff\xfe\xfa", "cannot be read"),
    ],
)
def test_a_file_that_is_of_no_use_is_named(tmp_path, content, said):
    """A file that was asked for is never ignored: it is there and is a mapping, or the server does not start."""
    path = tmp_path / "server.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_every_setting_is_described():
    """Every setting has a sentence for `rnnserve serve --help`."""
    assert all(field.description for field in Settings.model_fields.values())
    assert isinstance(Settings().models, Path)
