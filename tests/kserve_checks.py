"""What KServe's own stubs do with a server: run by `test_tritonclient` in the clients' environment.

python kserve_checks.py ADDRESS. Only the stubs are imported: the rest of the package is a server that wants many more.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import grpc
import numpy as np

spec = importlib.util.find_spec("kserve")
for name in ("kserve", "kserve.protocol", "kserve.protocol.grpc"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(spec.origin).parents[1].joinpath(*name.split(".")))]

from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb  # noqa: E402
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc  # noqa: E402

MODEL, FEATURES, UNITS = "lstm-4", 5, 4


def main(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(pb.ServerLiveRequest()).live
        assert stub.ServerReady(pb.ServerReadyRequest()).ready
        assert stub.ModelReady(pb.ModelReadyRequest(name=MODEL)).ready
        assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "rnnserve"
        model = stub.ModelMetadata(pb.ModelMetadataRequest(name=MODEL))
        assert [(each.name, each.datatype, list(each.shape)) for each in model.inputs] == [
            ("input", "FP32", [-1, -1, FEATURES])
        ]

        x = np.random.default_rng(0).standard_normal((1, 3, FEATURES)).astype(np.float32)

        def infer(array: np.ndarray, **parameters: object) -> np.ndarray:
            request = pb.ModelInferRequest(model_name=MODEL, id="mine")
            tensor = request.inputs.add(name="input", datatype="FP32", shape=array.shape)
            tensor.contents.fp32_contents.extend(array.ravel().tolist())
            for key, value in parameters.items():
                kind = {bool: "bool_param", str: "string_param"}[type(value)]
                setattr(request.parameters[key], kind, value)
            answer = stub.ModelInfer(request)
            assert (answer.model_name, answer.id, answer.outputs[0].datatype) == (MODEL, "mine", "FP32")
            if answer.raw_output_contents:
                return np.frombuffer(answer.raw_output_contents[0], np.float32)
            return np.array(answer.outputs[0].contents.fp32_contents, np.float32)

        whole = infer(x)
        assert whole.shape == (UNITS,)
        assert np.array_equal(infer(x, rnnserve_contents="typed"), whole)
        for k in range(3):
            last = infer(x[:, k : k + 1], sequence_id="k", sequence_start=k == 0, sequence_end=k == 2)
        assert np.array_equal(last, whole)
        try:
            stub.ModelInfer(pb.ModelInferRequest(model_name="nobody"))
            raise AssertionError("there is no such model")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND  # noqa: PT017


if __name__ == "__main__":
    main(sys.argv[1])
