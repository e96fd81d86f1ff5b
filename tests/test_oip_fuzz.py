"""Requests of the Open Inference Protocol that nobody would send."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from house import FEATURES, AddingEngine, loaded
from oip import arrays, request
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip.infer import Inference
from rnnserve_server.config import Settings
from rnnserve_server.core import Core
from rnnserve_server.errors import InternalError, ServiceError
from rnnserve_server.repository import Repository

integers = st.one_of(st.integers(-2, 4), st.sampled_from([-(1 << 63), (1 << 63) - 1, 1 << 40]))
names = st.sampled_from(["input", "sum", "mask", "output", "", "x" * 300, "\x00"])
parameters = st.one_of(
    st.builds(pb.InferParameter, bool_param=st.booleans()),
    st.builds(pb.InferParameter, int64_param=integers),
    st.builds(pb.InferParameter, uint64_param=st.sampled_from([0, 1, 7, (1 << 64) - 1])),
    st.builds(pb.InferParameter, string_param=st.sampled_from(["", "a", "typed", "/" * 200])),
    st.builds(pb.InferParameter, double_param=st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf")])),
    st.just(pb.InferParameter()),
)
keys = st.sampled_from(
    [
        *("sequence_id", "sequence_start", "sequence_end", "timeout", "priority", "anything"),
        *("rnnserve_step", "rnnserve_contents", "rnnserve_lifetime", "rnnserve_idle_lifetime", "rnnserve_nothing"),
        *("rnnserve_return_state", "rnnserve_time_major", "rnnserve_go_backwards", "rnnserve_stateful"),
    ]
)
contents = st.builds(
    pb.InferTensorContents,
    fp32_contents=st.lists(st.floats(width=32), max_size=4),
    uint_contents=st.lists(st.integers(0, 300), max_size=2),
    bytes_contents=st.lists(st.binary(max_size=2), max_size=1),
)
tensors = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=names,
    datatype=st.sampled_from(["FP32", "FP32", "FP32", "BOOL", "UINT8", "FP16", "BYTES", ""]),
    shape=st.one_of(st.lists(integers, max_size=5), st.just([1, 1, FEATURES]), st.just([1, FEATURES])),
    contents=st.one_of(st.none(), contents),
)
requests = st.builds(
    pb.ModelInferRequest,
    model_name=st.sampled_from(["adder", "adder", "adder", "nobody", ""]),
    model_version=st.sampled_from(["", "1", "2"]),
    parameters=st.dictionaries(keys, parameters, max_size=5),
    inputs=st.lists(tensors, max_size=3),
    outputs=st.lists(st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=names), max_size=2),
    raw_input_contents=st.lists(st.one_of(st.binary(max_size=4), st.just(bytes(8)), st.just(b"")), max_size=3),
)


@settings(max_examples=60)
@given(st.lists(requests, min_size=1, max_size=4))
def test_no_request_breaks_anything(asked: list[pb.ModelInferRequest]) -> None:
    """Each is answered or refused with a reason, and a sequence beside it never notices."""

    async def run() -> None:
        repository = Repository(Path())
        repository.put("adder", "1", loaded(AddingEngine()))
        core = Core(Settings(inline_seconds=1.0, max_batch_size=64), repository)
        inference = Inference(core)
        beside = request("adder", np.ones((1, 1, FEATURES), np.float32), "beside", start=True)
        assert arrays(await inference.answer(beside, None))["output"][0, 0] == 1
        for number, each in enumerate(asked, 2):
            try:
                await inference.answer(each, None)
            except ServiceError as error:
                assert not isinstance(error, InternalError)  # noqa: PT017
            beside = request("adder", np.ones((1, 1, FEATURES), np.float32), "beside")
            assert arrays(await inference.answer(beside, None))["output"][0, 0] == number
        assert not core.meter.waiting
        await core.close()

    asyncio.run(run())
