"""Files made to do harm, in short: `make fuzz-files` makes as many of them as there is time for."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.files.attempt import Target, attempt
from fuzz.files.run import fuzz_files
from fuzz.files.targets import TARGETS
from rnnserve_models.errors import ModelError
from rnnserve_models.spec import read_spec

IN_PROCESS = ("manifest", "network", "weights", "numbered", "blob", "answers", "principals", "tls")
"""What is read without a library that may loop or crash."""

SHORT = settings(
    max_examples=12,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", IN_PROCESS)
@given(chance=st.randoms(use_true_random=False))
@SHORT
def test_a_file_is_read_or_refused_with_a_reason(name: str, chance: Random):
    """Manifests, configs, tensors, exported sessions, stored answers, principals and certificates: whatever they say,
    they are read, or refused with the one error that their reader has, soon, and by a check that was made for it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = attempt(TARGETS[name], chance, watch=False)
    assert not outcome.fault, outcome
    assert "unforeseen" not in outcome.what, outcome


@pytest.mark.parametrize(("name", "attempts"), [("onnx", 40), ("keras", 30), ("torch", 40)])
def test_a_file_that_libraries_read_is_read_or_refused(name: str, attempts: int):
    """Graphs, archives and what is in them, in a process that may die: it opens nothing but its own files, connects to
    nobody, and what takes long, takes much or ends it is refused when it is made apart, as servers do.
    """
    report = fuzz_files(name, 60.0, 5, attempts)
    assert not report.faults, report
    assert report.attempts == attempts
    assert {*report.outcomes} > {"refused"}, report  # and some are loaded: not everything is refused at once


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(TARGETS))
def test_files_for_longer(name: str):
    """The same, for eight seconds each, audited: nothing outside of the folder is opened, made or removed."""
    report = fuzz_files(name, 8.0, 77)
    print(report)
    assert not report.faults, report


def test_the_fuzzer_finds_a_reader_that_fails(tmp_path: Path):
    """Planted faults: an error of another kind, a file written elsewhere, a reader that takes what it must not."""

    def fails(folder: Path) -> None:
        raise KeyError("x")

    def writes(folder: Path) -> None:
        (tmp_path / "escaped").write_text("x")

    def refuses(folder: Path) -> None:
        raise ModelError("no")

    def make(chance: Random) -> dict[str, bytes]:
        return {"x": b"x"}

    assert attempt(Target(make, fails), Random(0)).what.startswith("KeyError")
    assert attempt(Target(make, writes), Random(0)).what.startswith("went outside")
    assert attempt(Target(make, lambda folder: None, forbidden=lambda files: True), Random(0)).fault
    assert attempt(Target(make, refuses), Random(0))[:2] == ("refused", False)


YAML = {
    "a bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 10)}]\n" for k in range(9))
        + "graph: *j\n",
        "unfolds by its aliases",
    ),
    "a long text, many times": (
        "a: &a " + "x" * 50_000 + "\ngraph: [" + "*a, " * 1000 + "]\n",
        "unfolds by its aliases",
    ),
    "in itself": ("cell: &a {class_name: LSTMCell, config: {units: *a}}\ninput_dim: 1\n", "inside one another"),
    "deep": ("[" * 1000, "inside one another"),
    "deep, but not too deep to be read": ("cell: " + "[" * 60 + "]" * 60, "inside one another"),
    "many digits": ("input_dim: 0x" + "f" * 5000, "20000 bits"),
    "more digits than Python reads": ("input_dim: " + "1" * 5000, "is not YAML"),
    "no date": ("description: 2024-13-45\n", "is not YAML"),
    "no truth value": ("description: !!bool x\n", "is not YAML"),
    "no number": ("description: !!int ''\n", "is not YAML"),
    "no time": ("description: !!timestamp x\n", "is not YAML"),
    "Python": ("description: !!python/object/apply:os.system ['touch escaped']\n", "is not YAML"),
    "too large": ("# " + "x" * (1 << 20), "larger than 1048576 bytes"),
}


@pytest.mark.parametrize("kind", list(YAML))
def test_a_manifest_unfolds_within_bounds(kind: str, tmp_path: Path):
    """Aliases, depth and digits that would take all memory or time are refused with what is wrong."""
    text, said = YAML[kind]
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ModelError, match=said):
        read_spec(path)


def test_a_tensor_that_is_not_as_large_as_it_says_is_named(tmp_path: Path):
    """In an ONNX graph."""
    from rnnserve_models.importers.onnx import import_onnx

    model = onnx.load_model(Path(__file__).parent / "vectors" / "onnx" / "script_lstm.onnx")
    tensor = model.graph.initializer[0]
    tensor.dims[0] = 2**40
    with pytest.raises(ModelError, match=f"the tensor '{tensor.name}' is damaged"):
        import_onnx(model.SerializeToString())
