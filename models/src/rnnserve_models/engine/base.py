"""The contract of an engine.

An engine is one function over a ragged, time-major batch:

    run(inputs {name: [T, R, ...]}, lengths [R], states {name: [R, ...]})  ->  outputs {name: [T, R, ...]}, states'

Everything that Keras calls an option happens before or after it. Row ``r`` consumes its first ``lengths[r]`` steps;
what its outputs hold behind them is unspecified. An engine keeps nothing between two runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from rnnserve_models.spec import StateSpec, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]


class EngineError(RuntimeError):
    """The engine could not compute a batch. The states that it was given are as they were."""


class Engine(ABC):
    """Computes one model.

    Attributes:
        name: "numpy" or "onnx".
        inputs: the inputs, each with a time axis in `run`.
        outputs: the outputs.
        states: the states, in the order in which Keras lists them.
        whole: a call is computed as it came: not cut in time, padded or compacted, and only together with others of as
            many steps. `run` gets all the steps of every row, and a mask, if there is one, as an input of its own
            named ``mask``, bool [T, R]; T of an output may differ, and is 1 where the output has no time axis.
        reason: why engine "auto" did not take onnx; "" if it did or was not asked.
        timesteps: the number of steps that every call must have; None: any. An input without a time axis has 1.
        bit_identical: a row's results are the same bits whatever the other rows are and however its steps are cut
            into runs.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    bit_identical: bool
    whole: bool = False
    reason: str = ""
    timesteps: int | None = None

    @abstractmethod
    def run(self, inputs: Mapping[str, Array], lengths: Array, states: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
        """Advances every row.

        Args:
            inputs: every input, [T, R, *shape], finite behind a row's length.
            lengths: int64 [R], each from 1 to T; R is at least 1.
            states: every state, [R, *shape]; not modified.

        Returns:
            Every output, [T, R, *shape], and every state after each row's last valid step, [R, *shape].

        Raises:
            EngineError: the batch could not be computed.
        """
