"""What NVIDIA's client does with a server: run by `test_tritonclient` in the client's own environment.

python tritonclient_checks.py ADDRESS  ->  a line of JSON for each check: its name, and why it failed or null
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import traceback
from functools import partial

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from tritonclient.utils import InferenceServerException

MODEL, FEATURES, UNITS = "lstm-4", 5, 4
SEQUENCES, LENGTH = 64, 12
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def given(x, client=grpcclient, name="input"):
    tensor = client.InferInput(name, list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return [tensor]


def walk(seed, steps=LENGTH):
    """[steps, 1, 1, FEATURES], a request of one step each."""
    return np.random.default_rng(seed).standard_normal((steps, 1, 1, FEATURES)).astype(np.float32)


def flags(k, steps=LENGTH):
    return {"sequence_start": k == 0, "sequence_end": k == steps - 1}


def solo(client, seed, sequence):
    """The outputs of a sequence that is alone: [steps, UNITS]."""
    steps = enumerate(walk(seed))
    ys = [client.infer(MODEL, given(x), sequence_id=sequence, **flags(k)).as_numpy("output")[0] for k, x in steps]
    return np.stack(ys)


class Heard:
    """What a stream answers."""

    def __init__(self):
        self.queue = queue.Queue()

    def __call__(self, result, error):
        self.queue.put((result, error))

    def get(self):
        return self.queue.get(timeout=30)


@check
def liveness_and_readiness(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("nobody")


@check
def server_and_model_metadata(client):
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "rnnserve"
    assert "sequence(string_id)" in server["extensions"]
    model = client.get_model_metadata(MODEL)
    assert [(each.name, each.datatype, list(each.shape)) for each in model.inputs] == [
        ("input", "FP32", [-1, -1, FEATURES])
    ]
    assert [(each.name, list(each.shape)) for each in model.outputs] == [("output", [-1, UNITS])]
    assert list(model.versions) == ["1"]


@check
def model_config_with_sequence_batching(client):
    config = client.get_model_config(MODEL).config
    assert config.name == MODEL
    assert config.max_batch_size > 0
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    assert config.sequence_batching.WhichOneof("strategy_choice") == "oldest"
    assert [list(each.dims) for each in config.input] == [[-1, FEATURES]]
    as_json = client.get_model_config(MODEL, as_json=True)["config"]
    assert as_json["input"][0]["data_type"] == "TYPE_FP32"


@check
def repository_index(client):
    index = {each.name: each.state for each in client.get_model_repository_index().models}
    assert index[MODEL] == "READY"


@check
def unary_sequences_with_integer_and_string_ids(client):
    x = walk(1)
    for sequence in (4711, "4711", 2**40, "a-name"):
        y = solo(client, 1, sequence)
        whole = client.infer(MODEL, given(np.moveaxis(x[:, 0], 0, 1)))  # all steps in one request
        assert np.array_equal(y[-1], whole.as_numpy("output")[0])
        assert not np.array_equal(y[0], y[1])


@check
def streamed_sequences_with_integer_and_string_ids(client):
    heard = Heard()
    client.start_stream(heard)
    for sequence in (11, "eleven"):
        for k, x in enumerate(walk(2)):
            client.async_stream_infer(MODEL, given(x), sequence_id=sequence, request_id=str(k), **flags(k))
    answers = [heard.get() for _ in range(2 * LENGTH)]
    client.stop_stream()
    assert all(error is None for _, error in answers)
    assert [result.get_response().id for result, _ in answers] == [str(k) for k in range(LENGTH)] * 2
    ys = np.stack([result.as_numpy("output")[0] for result, _ in answers])
    expected = solo(client, 2, 12)
    assert np.array_equal(ys, np.concatenate([expected, expected]))
    for result, _ in answers:
        assert result.get_response().parameters["triton_final_response"].bool_param


@check
def async_calls(client):
    heard = Heard()
    for sequence in range(1, 9):
        client.async_infer(MODEL, given(walk(3)[0]), heard, sequence_id=sequence, sequence_start=True)
    answers = [heard.get() for _ in range(8)]
    assert all(error is None for _, error in answers)
    for sequence in range(1, 9):
        client.infer(MODEL, given(walk(3)[1]), sequence_id=sequence, sequence_end=True)


@check
def sixty_four_sequences_interleaved_equal_solo_runs(client):
    expected = np.stack([solo(client, 100 + n, 900 + n) for n in range(SEQUENCES)])
    heard = Heard()
    client.start_stream(heard)
    walks = [walk(100 + n) for n in range(SEQUENCES)]
    for k in range(LENGTH):
        for n in np.random.default_rng(k).permutation(SEQUENCES).tolist():
            client.async_stream_infer(
                MODEL, given(walks[n][k]), sequence_id=1000 + n, request_id=f"{n} {k}", **flags(k)
            )
    ys = np.zeros((SEQUENCES, LENGTH, UNITS), np.float32)
    for _ in range(SEQUENCES * LENGTH):
        result, error = heard.get()
        assert error is None, error
        n, k = map(int, result.get_response().id.split())
        ys[n, k] = result.as_numpy("output")[0]
    client.stop_stream()
    assert np.array_equal(ys, expected)


@check
def asyncio_unary_and_streaming(client, address):
    async def run():
        async with aioclient.InferenceServerClient(address) as own:

            async def unary(n):
                ys = []
                for k, x in enumerate(walk(200 + n)):
                    answer = await own.infer(MODEL, given(x, aioclient), sequence_id=2000 + n, **flags(k))
                    ys.append(answer.as_numpy("output")[0])
                return np.stack(ys)

            async def requests(n):
                for k, x in enumerate(walk(200 + n)):
                    yield {
                        "model_name": MODEL,
                        "inputs": given(x, aioclient),
                        "sequence_id": f"streamed-{n}",
                        **flags(k),
                    }

            async def streamed(n):
                ys = []
                async for result, error in own.stream_infer(requests(n)):
                    assert error is None, error
                    ys.append(result.as_numpy("output")[0])
                return np.stack(ys)

            return await asyncio.gather(*(unary(n) for n in range(SEQUENCES))), await asyncio.gather(
                *(streamed(n) for n in range(8))
            )

    by_calls, by_streams = asyncio.run(run())
    for n, ys in enumerate(by_calls):
        assert np.array_equal(ys, solo(client, 200 + n, 3000 + n)) if n < 8 else ys.shape == (LENGTH, UNITS)
    assert np.array_equal(np.stack(by_streams), np.stack(by_calls[:8]))


@check
def parameters_of_ours(client):
    x = walk(5)
    call = partial(client.infer, MODEL, sequence_id="exactly-once", parameters={"rnnserve_step": 0})
    first, again = (call(given(x[0]), sequence_start=True) for _ in range(2))
    assert np.array_equal(first.as_numpy("output"), again.as_numpy("output"))
    assert again.get_response().parameters["rnnserve_replayed"].bool_param
    state = np.full((1, UNITS), 0.5, np.float32)
    wanted = [grpcclient.InferRequestedOutput(name) for name in ("output", "h", "c")]
    names = [each.input_name for each in client.get_model_config(MODEL).config.sequence_batching.state]
    assert len(names) == 2
    wanted = [grpcclient.InferRequestedOutput(name) for name in ("output", *names)]
    inputs = given(x[0]) + [each for name in names for each in given(state, name=name)]
    answer = client.infer(MODEL, inputs, outputs=wanted, sequence_id="with-states", sequence_start=True)
    assert np.array_equal(answer.as_numpy(names[0]), answer.as_numpy("output"))
    assert not np.array_equal(answer.as_numpy("output"), first.as_numpy("output"))
    y = client.infer(MODEL, given(x[:, 0, 0][None]), parameters={"rnnserve_return_sequences": True})
    assert y.as_numpy("output").shape == (1, LENGTH, UNITS)


@check
def errors_are_decoded(client):
    def failure(*arguments, **more):
        try:
            client.infer(*arguments, **more)
        except InferenceServerException as error:
            return error.status(), error.message()
        raise AssertionError("it was answered")

    x = walk(6)[0]
    status, message = failure("nobody", given(x))
    assert status == "StatusCode.NOT_FOUND", status
    assert "unknown model: no model 'nobody'" in message, message
    status, message = failure(MODEL, given(x), sequence_id=77)
    assert status == "StatusCode.INVALID_ARGUMENT", status
    assert "must specify the START flag on the first request of the sequence" in message, message
    status, message = failure(MODEL, given(np.zeros((1, 1, 3), np.float32)))
    assert status == "StatusCode.INVALID_ARGUMENT", status
    assert "shape" in message, message
    status, message = failure(MODEL, given(x), outputs=[grpcclient.InferRequestedOutput("nothing")])
    assert status == "StatusCode.INVALID_ARGUMENT", status
    try:
        client.register_system_shared_memory("region", "/region", 64)
        raise AssertionError("there is no shared memory")
    except InferenceServerException as error:
        assert error.status() == "StatusCode.UNIMPLEMENTED"  # noqa: PT017
    heard = Heard()
    client.start_stream(heard)
    client.async_stream_infer(MODEL, given(x), sequence_id=78)
    client.async_stream_infer(MODEL, given(x), sequence_id=79, sequence_start=True, sequence_end=True)
    result, error = heard.get()
    assert result is None
    assert "sequence 78" in error.message()
    result, error = heard.get()
    assert error is None
    client.stop_stream()


@check
def a_client_timeout_is_a_deadline(client):
    call = partial(client.infer, MODEL, given(walk(7)[0]), sequence_id=88)
    call(sequence_start=True, parameters={"rnnserve_step": 0})
    try:
        call(parameters={"rnnserve_step": 1}, client_timeout=0.0001)
    except InferenceServerException as error:
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED"  # noqa: PT017
    answer = call(parameters={"rnnserve_step": 1}, sequence_end=True)
    assert answer.get_response().parameters["rnnserve_step"].uint64_param == 2


@check
def statistics(client):
    before = client.get_inference_statistics(MODEL).model_stats[0]
    solo(client, 8, 99)
    after = client.get_inference_statistics(MODEL).model_stats[0]
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert getattr(after.inference_stats, part).count - getattr(before.inference_stats, part).count == LENGTH
    assert after.inference_count - before.inference_count == LENGTH
    assert sum(each.compute_infer.count for each in after.batch_stats) == after.execution_count


def main(address):
    with grpcclient.InferenceServerClient(address) as client:
        for name, function in CHECKS.items():
            failed = None
            try:
                function(client, address) if "address" in function.__code__.co_varnames[:2] else function(client)
            except Exception:
                failed = traceback.format_exc()
            print(json.dumps([name, failed]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
