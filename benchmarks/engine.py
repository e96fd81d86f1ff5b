"""The model's graph under onnxruntime with one thread, as it is called in a bare loop."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks import work
from rnnserve_models.export import export_cell


class Engine:
    """The graph, and the states that it is fed back.

    Args:
        lanes: N, rows of a run.
        steps: T, time steps of a run.
    """

    def __init__(self, lanes: int, steps: int) -> None:
        graph, spec = export_cell(work.cell(), work.FEATURES)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._run = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run
        self._states = [state.input for state in spec.states]
        self._fetches = ["output", *(state.output for state in spec.states)]
        self._feeds = {"lengths": np.full(lanes, steps, np.int32)}
        self._feeds |= {name: np.zeros((1, lanes, work.UNITS), np.float32) for name in self._states}

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Inputs [T, N, features] to outputs [T, N, units]; the states go on from where they were."""
        self._feeds["input"] = np.ascontiguousarray(x)
        output, *states = self._run(self._fetches, self._feeds)
        self._feeds.update(zip(self._states, states, strict=True))
        return output
