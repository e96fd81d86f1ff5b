"""What this protocol has to know of a model with every request, found out once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnnserve_models.engine.base import Array
from rnnserve_models.load import LoadedModel
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip.axes import View
from rnnserve_server.api.oip.tensors import shared_memory
from rnnserve_server.errors import InvalidRequest, OptionUnsupported

_SHARED_MEMORY, _CLASSIFICATION = "shared_memory_region", "classification"


@dataclass(frozen=True)
class Controls:
    """The control inputs of a model that this protocol feeds.

    Attributes:
        end: the input that is told of the end of a sequence, or "".
        values: what that is told before the end and at it.
        corrid: the state that holds the id of the sequence, or "".
        hidden: the inputs and states that clients of this protocol do not see.
    """

    end: str = ""
    values: tuple[float, float] = (0, 1)
    corrid: str = ""
    hidden: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: LoadedModel) -> Controls:
        """Those of a model."""
        named = {} if model.spec.graph is None else {each.kind: each for each in model.spec.graph.controls}
        end, corrid = named.get("end"), named.get("corrid")
        return cls(
            "" if end is None else end.tensor,
            (0, 1) if end is None else end.values,
            "" if corrid is None else corrid.tensor,
            frozenset(each.tensor for each in named.values()),
        )


class Face:
    """A model as requests under one setting of ``time_major`` see it.

    Attributes:
        view: its tensors.
        controls: its control inputs.
        inputs: the names of its inputs, without those that the protocol feeds.
        states: the names of its states that are no inputs too, likewise.
        outputs: the number of axes of each output, without batch and time.
    """

    def __init__(self, model: LoadedModel, *, time_major: bool) -> None:
        engine = model.engine
        self.view = View(model, time_major=time_major)
        self.controls = Controls.of(model)
        hidden = self.controls.hidden
        self.inputs = frozenset(spec.name for spec in engine.inputs) - hidden
        self.states = frozenset(spec.name for spec in engine.states) - hidden - self.inputs
        self.outputs = {spec.name: len(spec.shape) for spec in engine.outputs}
        self._dtypes = {spec.name: spec.dtype for spec in engine.states if spec.name not in hidden}
        self._dtypes |= {spec.name: spec.dtype for spec in engine.outputs}

    def check_outputs(self, request: pb.ModelInferRequest, *, typed: bool) -> bool:
        """Finds out now what could not be answered later.

        Returns:
            Whether states are among what is asked for.

        Raises:
            InvalidRequest: an output is unknown, or cannot be typed.
            OptionUnsupported: it is wanted in shared memory, or classified.
        """
        states = False
        for output in request.outputs:
            name = output.name
            states = states or name not in self.outputs
            if name not in self._dtypes:
                raise InvalidRequest(f"outputs.{name[:80]}", f"one of {[*self._dtypes]}", "another name")
            if output.parameters:
                if _SHARED_MEMORY in output.parameters:
                    raise shared_memory(f"outputs.{name}")
                if _CLASSIFICATION in output.parameters and output.parameters[_CLASSIFICATION].int64_param:
                    raise OptionUnsupported(f"outputs.{name}: classification is not offered; ask for the output itself")
        if typed:
            wanted = [output.name for output in request.outputs] or self.outputs
            if any(self._dtypes[name] == np.float16 for name in wanted):
                raise InvalidRequest("parameters.rnnserve_contents", "raw", "typed", "FP16 has no typed contents")
        return states

    def shown(self, name: str, y: Array, *, timed: bool) -> Array:
        """An output of rnnserve.v1, [batch, time, *shape] or without one of these, as the client has it."""
        return self.view.give(name, y, timed=timed, sequences=y.ndim == 2 + self.outputs[name])
