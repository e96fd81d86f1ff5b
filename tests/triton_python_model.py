"""An ONNX graph with states as a model of Triton's Python backend, whose wheel has no backend for ONNX.

Triton loads this file as `model.py`. What Triton does around an ONNX graph is done here as its documentation says it:
states begin as `initial_state` has them with each START, and go in again as they came out. Control inputs are tensors
that Triton's own sequence batcher made.
"""

import json
import os
import sys

sys.path.insert(0, os.environ["TRITON_PACKAGES"])  # the backend empties PYTHONPATH

from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"], args["model_version"])
        self.session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.states = json.loads((folder / "states.json").read_text())  # input, output, default
        self.batched = json.loads(args["model_config"])["max_batch_size"] > 0
        self.given = [each["name"] for each in json.loads(args["model_config"])["input"]]
        self.asked = [each["name"] for each in json.loads(args["model_config"])["output"]]
        self.kept = {}

    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        feeds = {}
        for node in self.session.get_inputs():
            tensor = triton.get_input_tensor_by_name(request, node.name)
            if tensor is not None:
                feeds[node.name] = tensor.as_numpy()
        sequence = request.correlation_id()
        if request.flags() & triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            rows = len(feeds[self.given[0]])
            self.kept[sequence] = {}
            for name, _, default in self.states:
                value = np.array(default, np.float32)
                self.kept[sequence][name] = np.repeat(value[None], rows, 0) if self.batched else value
        states = self.kept[sequence]
        names = [*self.asked, *(output for _, output, _ in self.states)]
        results = dict(zip(names, self.session.run(names, {**feeds, **states}), strict=True))
        self.kept[sequence] = {name: results[output] for name, output, _ in self.states}
        return triton.InferenceResponse([triton.Tensor(name, results[name]) for name in self.asked])
