"""The work of the benchmarks as a model of Triton's Python backend, as well as we know how to write one.

Triton loads this file as `model.py`. The requests of one call are one run of the same graph that rnnserve runs, a run
for each number of steps among them; states are rows of two arrays, gathered and scattered at once.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.environ["TRITON_PACKAGES"])  # the backend empties PYTHONPATH

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton  # type: ignore[import-not-found]

UNITS = 128
SEQUENCES = 4096


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        graph = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.run = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run
        self.h = np.zeros((1, SEQUENCES, UNITS), np.float32)
        self.c = np.zeros((1, SEQUENCES, UNITS), np.float32)
        self.free = list(range(SEQUENCES))
        self.rows: dict[int, int] = {}  # of each sequence

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [triton.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]  # [1, T, 64]
        rows = [self._row(request) for request in requests]
        responses: list[Any] = [None] * len(requests)
        for steps in {x.shape[1] for x in inputs}:
            which = [n for n, x in enumerate(inputs) if x.shape[1] == steps]
            of = [rows[n] for n in which]
            y, self.h[:, of], self.c[:, of] = self.run(
                ("output", "h_out", "c_out"),
                {
                    "input": np.stack([inputs[n][0] for n in which], axis=1),
                    "lengths": np.full(len(which), steps, np.int32),
                    "h": self.h[:, of],
                    "c": self.c[:, of],
                },
            )  # y: [T, 1, N, 128]
            outputs = np.ascontiguousarray(y.transpose(2, 1, 0, 3))
            for n, output in zip(which, outputs, strict=True):
                responses[n] = triton.InferenceResponse([triton.Tensor("output", output)])
        return responses

    def _row(self, request: Any) -> int:
        sequence = request.correlation_id()
        if request.flags() & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            if sequence not in self.rows:
                self.rows[sequence] = self.free.pop()
            self.h[:, self.rows[sequence]] = self.c[:, self.rows[sequence]] = 0
        row = self.rows[sequence]
        if request.flags() & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
            self.free.append(self.rows.pop(sequence))
        return row
