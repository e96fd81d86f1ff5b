"""What a layer, a session and a group show without asking the server, the same in both clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from rnnserve._layer import Layer
from rnnserve._live import Live
from rnnserve._notices import Notice
from rnnserve.models import Model
from rnnserve.nest import Nest
from rnnserve.options import LayerOptions


class LayerFace:
    """The description of a layer. The models, sizes and shapes need a layer that is built (RuntimeError)."""

    _layer: Layer

    @property
    def models(self) -> list[Model]:
        """The models, lowest first."""
        return self._layer.models

    @property
    def options(self) -> LayerOptions:
        """The options of the layer."""
        return self._layer.options

    @property
    def batch_size(self) -> int | None:
        """The batch size of a stateful layer, from its first call on."""
        return self._layer.batch_size

    @property
    def states(self) -> list[Nest] | None:
        """The states that a stateful layer recorded last; None for the model's default."""
        return self._layer.states

    @property
    def state_size(self) -> list[Nest]:
        """The size of each state, nested as Keras nests it."""
        return self._layer.state_size

    @property
    def output_size(self) -> Any:
        """The size of the output at one step."""
        return self._layer.output_size

    def get_initial_state(self, batch_size: int) -> list[Nest]:
        """Zeros [batch_size, ...] for each state, nested as Keras nests them."""
        return self._layer.get_initial_state(batch_size)

    def compute_output_shape(self, shape: Any) -> Any:
        """The shape of the result for an input of that shape; with return_state a list with the states' shapes."""
        return self._layer.compute_output_shape(shape)


class LiveFace(ABC):
    """The description of what is live."""

    @property
    @abstractmethod
    def _live(self) -> Live: ...

    @property
    def model(self) -> Model:
        """The model."""
        return self._live.signature.model

    @property
    def options(self) -> LayerOptions:
        """The options of the layer, as the server holds them."""
        return self._live.signature.options

    @property
    def batch_size(self) -> int:
        """The number of rows in every step of a session."""
        return self._live.signature.batch_size or 1


class SessionFace(LiveFace):
    """The description of a session."""

    @property
    def session_id(self) -> str:
        """The session's id on the server."""
        return self._live.session_ids[0]

    @property
    def next_step(self) -> int:
        """The number of time steps consumed, those on their way included: where the next call starts."""
        return self._live.next_steps[0]

    @property
    def notice(self) -> Notice | None:
        """What the server told of the session last without being asked: that it is about to end, or has; or None."""
        return self._live.notices[0]


class GroupFace(LiveFace):
    """The description of a group."""

    def __len__(self) -> int:
        return len(self._live.session_ids)

    @property
    def session_ids(self) -> list[str]:
        """The sessions' ids on the server, in the order of the leading axis."""
        return list(self._live.session_ids)

    @property
    def next_steps(self) -> list[int]:
        """Where each session's next call starts."""
        return self._live.next_steps

    @property
    def notices(self) -> list[Notice | None]:
        """What the server told of each session last without being asked, or None."""
        return self._live.notices
