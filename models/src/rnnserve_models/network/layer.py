"""The contract of a layer: its shapes, and one computation written twice, in NumPy and in ONNX.

Tensors are batch-major, [B, T, ...] as in Keras. A *shape* is that of one row, without the batch axis; None in it is a
number of time steps that may be any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from rnnserve_models.errors import ModelError
from rnnserve_models.network.config import Config
from rnnserve_models.onnx_builder import GraphBuilder
from rnnserve_models.spec import StateSpec

Shape = tuple[int | None, ...]
A = TypeVar("A")


class Masked(NamedTuple, Generic[A]):
    """A tensor and its mask: arrays in NumPy, names of values in ONNX.

    Attributes:
        x: [B, ...].
        mask: bool [B, T], True where a step is valid; None where every step is.
    """

    x: A
    mask: A | None = None


class Info(NamedTuple):
    """What is known of a tensor before it comes: the shape of a row, and the element type."""

    shape: Shape
    dtype: np.dtype[Any]


class Layer(ABC):
    """A layer of Keras with its weights, at inference.

    `build` is called once, before `forward` and `emit`, which compute the same.

    Attributes:
        name: as the config has it.
        class_name: Keras's.
        dtype: that it computes in: the dtype policy's ``compute_dtype``.
        inputs: what it was built for.
        outputs: what it gives: for a recurrent layer with ``return_state`` the states come after the output.
        states: what it carries from call to call, in Keras's order; each of one row.
        stateful: whether Keras carries them.
        time_major: whether Keras has time before batch in its sequences. `forward` and `emit` never do.
    """

    states: tuple[StateSpec, ...] = ()
    stateful: bool = False
    time_major: bool = False
    keeps_mask: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        """Reads the config.

        Raises:
            ModelError: it has a wrong value or an unknown key; the message names the layer.
        """
        self.name = config.name
        self.class_name = config.class_name
        self.version = config.version
        self.dtype = config.dtype
        self.inputs: list[Info] = []
        self.outputs: list[Info] = []

    @property
    def weight_count(self) -> int:
        """The number of arrays in Keras's ``get_weights()``."""
        return 0

    @property
    def input_dtypes(self) -> list[np.dtype[Any]]:
        """What each input is converted to."""
        return [self.dtype]

    @property
    def bounds(self) -> list[tuple[int, int] | None]:
        """The least and the greatest value of the elements of each input; None: any."""
        return [None] * len(self.input_dtypes)

    @property
    def roles(self) -> list[int | None]:
        """For each output: None for a result, or the index of the state that it is."""
        return [None]

    @property
    def recorded(self) -> list[bool]:
        """For each state, whether Keras carries it from call to call."""
        return [self.stateful] * len(self.states)

    @property
    def unrolls(self) -> bool:
        """Whether a number of time steps, where known, is written out in the graph."""
        return False

    def input_shape_of(self, weights: Sequence[np.ndarray]) -> Shape | None:
        """The shape of an input that the weights fit; None where they do not say."""
        return None

    def build(self, inputs: Sequence[Info], weights: Sequence[np.ndarray]) -> list[Info]:
        """Takes the weights, of ``get_weights()``, for inputs of given shapes; returns what comes out.

        Raises:
            ModelError: the inputs or the weights do not fit; the message names the layer and what was expected.
        """
        if len(inputs) != len(self.input_dtypes):
            raise self.error(f"takes {len(self.input_dtypes)} input(s), got {len(inputs)}")
        if len(weights) != self.weight_count:
            raise self.error(f"expected {self.weight_count} weights, got {len(weights)}")
        self.inputs = list(inputs)
        self.outputs = self._build([info.shape for info in inputs], weights)
        return self.outputs

    @abstractmethod
    def _build(self, shapes: list[Shape], weights: Sequence[np.ndarray]) -> list[Info]:
        """`build`, once the counts are known to be right."""

    @abstractmethod
    def forward(
        self, inputs: list[Masked[np.ndarray]], states: list[np.ndarray]
    ) -> tuple[list[Masked[np.ndarray]], list[np.ndarray]]:
        """Computes the layer in NumPy.

        Args:
            inputs: each [B, *shape].
            states: the initial states, each [B, *shape]; not written to.

        Returns:
            The outputs, and the states after the last step.
        """

    @abstractmethod
    def emit(
        self, graph: GraphBuilder, inputs: list[Masked[str]], states: list[str]
    ) -> tuple[list[Masked[str]], list[str]]:
        """Adds nodes that compute what `forward` does. The builder's dtype is the layer's."""

    def check(self, inputs: Sequence[np.ndarray]) -> None:  # noqa: B027 - most layers are defined for any value
        """Refuses values that the layer is not defined for, which a graph would not notice.

        Raises:
            InputError: there are such.
        """

    def nest_states(self, flat: Sequence[Any]) -> list[Any]:
        """States, in the order of ``states``, as Keras nests them."""
        return list(flat)

    def error(self, message: str) -> ModelError:
        """What is wrong with the layer, by its name."""
        return ModelError(f"{self.class_name} {self.name!r}: {message}")

    def checked(
        self, index: int, name: str, weights: Sequence[np.ndarray], shape: Sequence[int], dtype: Any = None
    ) -> np.ndarray:
        """The weight at an index, of the layer's dtype unless told.

        Raises:
            ModelError: it has another shape than expected.
        """
        weight = np.asarray(weights[index])
        if weight.shape != tuple(shape):
            raise self.error(f"weight {index} ({name}): expected shape {list(shape)}, got {list(weight.shape)}")
        if weight.dtype.kind not in "biuf":
            raise self.error(f"weight {index} ({name}): expected numbers, got dtype {weight.dtype}")
        return weight.astype(self.dtype if dtype is None else dtype)

    def known(self, shape: Shape, axis: int) -> int:
        """The extent of an axis of an input, which must be fixed."""
        extent = shape[axis] if -len(shape) <= axis < len(shape) else None
        if extent is None:
            raise self.error(f"axis {axis} of its input must be of a fixed size, the shape is {told(shape)}")
        return extent


class Map(Layer):
    """A layer of one input and one output that carries nothing: `call` in NumPy, `express` in ONNX.

    Both get the input converted to the layer's dtype.
    """

    @abstractmethod
    def call(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """x [B, *shape] to y [B, *shape]."""

    @abstractmethod
    def express(self, graph: GraphBuilder, x: str, mask: str | None) -> str:
        """`call`, in ONNX."""

    def forward(
        self, inputs: list[Masked[np.ndarray]], states: list[np.ndarray]
    ) -> tuple[list[Masked[np.ndarray]], list[np.ndarray]]:
        """See `Layer.forward`."""
        ((x, mask),) = inputs
        x = x.astype(self.input_dtypes[0], copy=False)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            y = self.call(x, mask).astype(self.outputs[0].dtype, copy=False)
        return [Masked(y, self.call_mask(x, mask))], []

    def emit(
        self, graph: GraphBuilder, inputs: list[Masked[str]], states: list[str]
    ) -> tuple[list[Masked[str]], list[str]]:
        """See `Layer.emit`."""
        ((x, mask),) = inputs
        if self.inputs[0].dtype != self.input_dtypes[0]:
            x = graph.cast(x, self.input_dtypes[0])
        return [Masked(self.express(graph, x, mask), self.express_mask(graph, x, mask))], []

    def call_mask(self, x: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
        """The mask of the output."""
        return mask if self.keeps_mask else None

    def express_mask(self, graph: GraphBuilder, x: str, mask: str | None) -> str | None:
        """`call_mask`, in ONNX."""
        return mask if self.keeps_mask else None


def told(shape: Sequence[int | None]) -> str:
    """A shape in a message, with the batch axis that it has in Keras."""
    return "[" + ", ".join(["batch", *("time" if extent is None else str(extent) for extent in shape)]) + "]"
