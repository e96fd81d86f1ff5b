"""HDF5 files of others, read in a process of their own.

The HDF5 library is not made for hostile files: a few changed bytes can make it loop forever or crash. `read_hdf5` has
it run in a child process with bounds on time and memory, so that the worst a file can do is to be refused. This file is
also that child's program, which is why it imports so little at its top.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from safetensors.numpy import load_file, save_file

SECONDS = 60.0
"""How long a file may take, and a second more for every 10 MB of it."""

MAX_BYTES = 4 << 30
"""Of all arrays together."""

MAX_RATIO = 200
"""How many times larger than the file its arrays may be: float32 weights are never compressed that well."""

MAX_TEXT = 32 << 20
MAX_OBJECTS = 200_000
MAX_DEPTH = 64

_SLACK = 1 << 20
_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)


class Hdf5(NamedTuple):
    """What is in a file, by paths such as ``model_weights/lstm/kernel:0``.

    Attributes:
        arrays: of float16, float32 and float64, in the machine's byte order.
        refused: what else is there, with the reason why it was not read.
        groups: all groups but the root.
        texts: attributes of the root that are texts.
        names: the attribute ``weight_names`` of each group that has it, put together where Keras split it.
    """

    arrays: dict[str, np.ndarray]
    refused: dict[str, str]
    groups: set[str]
    texts: dict[str, str]
    names: dict[str, list[str]]


class Hdf5Error(ValueError):
    """A file cannot be read: the message says why, and not of which file."""


def read_hdf5(path: Path, *, leave: tuple[str, ...] = ()) -> Hdf5:
    """Reads a file in a child process.

    Links are not followed, and storage outside of the file is not read: they are among what is ``refused``.

    Args:
        path: the file.
        leave: groups of the root whose content is not wanted.

    Raises:
        Hdf5Error: it is damaged, too large, or takes too long.
    """
    seconds = SECONDS + path.stat().st_size / 1e7
    with tempfile.TemporaryDirectory(prefix="rnnserve-hdf5-") as folder:
        # -P: what lies beside this file must not be imported in place of packages.
        command = (sys.executable, "-P", __file__, str(path.resolve()), folder, str(math.ceil(seconds)), *leave)
        try:
            child = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=seconds,
                check=False,
                # One thread, whose stack is all of the memory that NumPy takes in advance.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired as error:
            raise Hdf5Error(f"is damaged: the HDF5 library was not done with it after {seconds:.0f} s") from error
        if child.returncode:
            last = (child.stderr.strip().splitlines() or [f"the HDF5 library ended with status {child.returncode}"])[-1]
            raise Hdf5Error(f"is damaged or not HDF5: {last}")
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        if "error" in report:
            raise Hdf5Error(report["error"])
        arrays = load_file(Path(folder) / "arrays.safetensors")
    order = report["order"]
    return Hdf5(
        {name: arrays[str(index)] for index, name in enumerate(order)},
        report["refused"],
        set(report["groups"]),
        report["texts"],
        report["names"],
    )


class _Reader:
    """The child's work."""

    def __init__(self, size: int, leave: tuple[str, ...]) -> None:
        self.left = min(MAX_BYTES, MAX_RATIO * size + _SLACK)
        self.leave = leave
        self.arrays: dict[str, np.ndarray] = {}
        self.refused: dict[str, str] = {}
        self.groups: list[str] = []
        self.texts: dict[str, str] = {}
        self.names: dict[str, list[str]] = {}

    def read(self, file: h5py.File) -> None:
        for name in file.attrs:
            value = file.attrs[name]
            if isinstance(value, bytes | str):
                self.texts[name] = _text(value)
        waiting: list[tuple[str, h5py.Group]] = [("", file)]
        seen: set[int] = set()
        count = 0
        while waiting:
            where, group = waiting.pop()
            for name in group:
                count += 1
                path = f"{where}{name}"
                if count > MAX_OBJECTS or path.count("/") > MAX_DEPTH:
                    raise Hdf5Error(f"has more than {MAX_OBJECTS} objects, or more than {MAX_DEPTH} inside one another")
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    self.refused[path] = "is a link to elsewhere, which is not followed"
                    continue
                try:
                    found = group[name]
                except _ERRORS as error:
                    self.refused[path] = f"is damaged: {error}"
                    continue
                if isinstance(found, h5py.Dataset):
                    self.take(path, found)
                elif isinstance(found, h5py.Group):
                    address = h5py.h5o.get_info(found.id).addr
                    if address in seen:
                        self.refused[path] = "is a link to a group seen before, which is not followed"
                        continue
                    seen.add(address)
                    self.groups.append(path)
                    if path not in self.leave:
                        self.name(path, found)
                        waiting.append((f"{path}/", found))

    def take(self, path: str, dataset: h5py.Dataset) -> None:
        """Reads an array, or says why not."""
        if dataset.external or dataset.is_virtual:
            self.refused[path] = "is kept in another file, which is not read"
        elif dataset.dtype not in (np.float16, np.float32, np.float64):
            self.refused[path] = f"expected float16, float32 or float64, got {dataset.dtype}"
        elif dataset.shape is None:
            self.refused[path] = "expected an array, got nothing"
        else:
            self.left -= math.prod(dataset.shape) * dataset.dtype.itemsize
            if self.left < 0:
                raise Hdf5Error(
                    f"{path}: the arrays are larger than the file can hold: "
                    f"at most {MAX_BYTES} bytes, and {MAX_RATIO} times the file, are read"
                )
            try:
                self.arrays[path] = np.ascontiguousarray(dataset[()], dataset.dtype.newbyteorder("=")).reshape(
                    dataset.shape
                )
            except _ERRORS as error:
                self.refused[path] = f"is damaged: {error}"

    def name(self, path: str, group: h5py.Group) -> None:
        """Puts ``weight_names`` together."""
        names = [str(part) for key in _keys(group.attrs) for part in _texts(group.attrs[key])]
        if names or "weight_names" in group.attrs:
            self.names[path] = names


def _keys(attributes: Any) -> Iterator[str]:
    """``weight_names``, or ``weight_names0``, ``weight_names1`` and so on."""
    if "weight_names" in attributes:
        yield "weight_names"
        return
    index = 0
    while f"weight_names{index}" in attributes:
        yield f"weight_names{index}"
        index += 1


def _texts(value: Any) -> list[str]:
    return [_text(part) for part in np.asarray(value).ravel().tolist()]


def _text(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    if len(text) > MAX_TEXT:
        raise Hdf5Error(f"has a text of {len(text)} characters; at most {MAX_TEXT} are read")
    return text


def _child(path: Path, folder: Path, seconds: int, leave: tuple[str, ...]) -> None:
    size = path.stat().st_size
    try:
        import resource
    except ImportError:  # Windows has no such bounds; the parent watches the time
        pass
    else:
        memory = (2 << 30) + 3 * min(MAX_BYTES, MAX_RATIO * size)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = _Reader(size, leave)
    report: dict[str, Any]
    try:
        with h5py.File(path, "r") as file:
            reader.read(file)
    except Hdf5Error as error:
        report = {"error": str(error)}
    except _ERRORS as error:
        report = {"error": f"is damaged or not HDF5: {error}"}
    else:
        save_file({str(i): array for i, array in enumerate(reader.arrays.values())}, folder / "arrays.safetensors")
        report = {
            "order": list(reader.arrays),
            "refused": reader.refused,
            "groups": reader.groups,
            "texts": reader.texts,
            "names": reader.names,
        }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), tuple(sys.argv[4:]))
