"""Rollouts: a model goes on by itself, and its session does not notice."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

import rnnserve
from house import FEATURES, AddingEngine, loaded
from rnnserve import aio
from rnnserve.codec import encode_named
from rnnserve.errors import from_rpc_error
from rnnserve.v1 import inference_pb2, inference_pb2_grpc
from rnnserve_models.engine.base import Engine
from rnnserve_models.load import load_model
from rnnserve_models.spec import StateSpec, TensorSpec
from rnnserve_server.repository import Repository
from serving import ZOO, running_server

K = 5
TABLE = np.random.default_rng(3).dirichlet(np.ones(K), K).astype(np.float32)  # [last letter, next letter]


class Speller(Engine):
    """The weights of the next letter, given this one and how many came before. Letters are one-hot, or numbers."""

    name = "spelling"
    bit_identical = True

    def __init__(self, dtype, shape, *, logits=False, outputs=("next",)):
        self.inputs = (TensorSpec("letter", np.dtype(dtype), shape),)
        self.outputs = tuple(TensorSpec(name, np.dtype(np.float32), (K,)) for name in outputs)
        self.states = (StateSpec("count", np.dtype(np.int64), (), (0,)),)
        self.logits = logits

    def run(self, inputs, lengths, states):
        x, count = inputs["letter"], states["count"].copy()
        ys = []
        for t in range(len(x)):
            letter = x[t].argmax(axis=1) if self.inputs[0].shape == (K,) else x[t].reshape(-1).astype(int)
            ys.append(TABLE[(letter + count) % K])
            count += 1
        y = np.log(np.stack(ys)) if self.logits else np.stack(ys)
        return {spec.name: y for spec in self.outputs}, {"count": count}


class Strange(AddingEngine):
    """Two inputs of which only one is like the output."""

    def __init__(self):
        super().__init__()
        self.inputs = (*self.inputs, TensorSpec("other", np.dtype(np.float32), (3,)))


MODELS = {
    "hot": Speller(np.float32, (K,)),
    "number": Speller(np.int32, ()),
    "numbers": Speller(np.float32, (1,)),
    "logits": Speller(np.int64, (), logits=True),
    "two": Speller(np.int64, (), outputs=("next", "same")),
    "tiny": Speller(np.bool_, ()),
    "strange": Strange(),
    "adder": AddingEngine(),
}


@pytest.fixture(scope="module")
def server():
    repository = Repository(ZOO)
    for name, engine in MODELS.items():
        made = loaded(engine, name=name)
        repository.put(name, "1", made)
    for name in ("sunspots-lstm", "lstm-4"):
        repository.put(name, "1", load_model(ZOO / name / "1"))
    with running_server(repository, max_rollout_steps=300, max_message_bytes=1 << 20, inline_seconds=0.0) as running:
        yield running


@pytest.fixture
def client(server):
    with rnnserve.Client(server.address, timeout=30) as made:
        yield made


YEARS = np.random.default_rng(2).uniform(0, 200, (20, 1)).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"return_sequences": True}, {"return_state": True}, {"go_backwards": True}])
def test_a_forecaster_equals_a_loop(client, options):
    """With and without inputs to begin with, a rollout is what a loop over a fork gives, and nothing moved."""
    with client.session("sunspots-lstm", **options) as session, client.session("sunspots-lstm") as plain:
        for year in YEARS[:-2]:
            session.step(year)
            y = plain.step(year)
        outputs, inputs = session.rollout(7)
        expected = [y]
        with plain.fork() as loop:
            for _ in range(7):
                expected += [loop.step(expected[-1])]
        np.testing.assert_array_equal(inputs[0], expected[:-1])
        np.testing.assert_array_equal(outputs[0], expected[1:])
        last = YEARS[None, -2:]
        again = session.rollout(6, last)
        with session.fork() as loop:
            result = loop(last)
            y = result[0] if options.get("return_state") else result
            first = y[0, -1] if options.get("return_sequences") else y[0]
            rolled = loop.rollout(6)
        np.testing.assert_array_equal(again.inputs[0, 0], first)
        for ours, theirs in zip(again, rolled, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert session.next_step == session.info().step == len(YEARS) - 2
        np.testing.assert_array_equal(session.states[0], plain.states[0])


def test_batches_and_time_major(client):
    """Rows go on side by side, each as if alone; with time_major the steps come first."""
    x = np.arange(6, dtype=np.float32).reshape(3, 1, FEATURES)
    with client.session("adder", batch_size=3) as session, client.session("adder", batch_size=3, time_major=True) as tm:
        session(x)
        tm(x.swapaxes(0, 1))
        outputs, inputs = session.rollout(3)
        np.testing.assert_array_equal(outputs, np.stack([2 * x[:, 0], 4 * x[:, 0], 8 * x[:, 0]], axis=1))
        np.testing.assert_array_equal(inputs, np.stack([x[:, 0], 2 * x[:, 0], 4 * x[:, 0]], axis=1))
        np.testing.assert_array_equal(tm.rollout(3).outputs, outputs.swapaxes(0, 1))
        np.testing.assert_array_equal(tm.rollout(2, x.swapaxes(0, 1)).inputs[0], 2 * x[:, 0])


def letters(count, start, choose):
    """What a loop by hand spells: [steps]."""
    spelled = []
    for step in range(count):
        start = choose(TABLE[(start + step) % K])
        spelled.append(start)
    return spelled


@pytest.mark.parametrize("model", ["hot", "number", "numbers", "logits"])
def test_a_speller_takes_the_likeliest(client, model):
    """The class of the largest weight, one-hot or by its number, is the next input."""
    start = {"hot": np.eye(K)[[[2]]], "number": [[2]], "numbers": [[[2]]], "logits": [[2]]}[model]
    with client.session(model) as session:
        outputs, inputs = session.rollout(12, start, rule="argmax")
        chosen = inputs[0].argmax(axis=-1) if model == "hot" else inputs[0].reshape(-1)
        np.testing.assert_array_equal(chosen, letters(12, 2, np.argmax))
        assert (outputs.shape, inputs.dtype) == ((1, 12, K), MODELS[model].inputs[0].dtype)
        if model == "hot":
            assert (np.sort(inputs[0], axis=1) == [0, 0, 0, 0, 1]).all()


def test_a_speller_by_chance(client):
    """Samples follow the weights, are the same for the same seed, and at a low temperature are the likeliest."""
    with client.session("number", batch_size=1000) as one, client.session("logits", batch_size=1000) as other:
        start = np.full((1000, 1), 2)
        first = one.rollout(3, start, rule="sample", seed=7).inputs
        found = np.bincount(first[:, 0], minlength=K) / 1000
        np.testing.assert_allclose(found, TABLE[2], atol=0.06)  # four standard deviations
        np.testing.assert_array_equal(one.rollout(3, start, rule="sample", seed=7).inputs, first)
        assert (one.rollout(3, start, rule="sample").inputs != one.rollout(3, start, rule="sample").inputs).any()
        assert (one.rollout(3, start, rule="sample", seed=8).inputs != first).any()
        np.testing.assert_array_equal(other.rollout(3, start, rule="sample_logits", seed=7).inputs, first)
        cold = one.rollout(3, start, rule="sample", temperature=1e-3, seed=1).inputs
        np.testing.assert_array_equal(cold, [letters(3, 2, np.argmax)] * 1000)
        sharp, flat = (TABLE[2].astype(float) ** (1 / t) for t in (0.5, 2.0))
        for temperature, weights in ((0.5, sharp), (2.0, flat)):
            drawn = one.rollout(1, start, rule="sample", temperature=temperature, seed=3).inputs[:, 0]
            np.testing.assert_allclose(np.bincount(drawn, minlength=K) / 1000, weights / weights.sum(), atol=0.06)


def test_which_output_becomes_which_input(client):
    """With several, names say it; every input needs a source."""
    with client.session("two") as session:
        with pytest.raises(rnnserve.InvalidRequest, match=r"feedback\[0\].output"):
            session.rollout(2, [[0]], rule="argmax")
        result = session.rollout(2, [[0]], rule="argmax", feedback={"letter": "same"})
        np.testing.assert_array_equal(result.outputs["next"], result.outputs["same"])
        for wrong in ({"letter": "none"}, {"none": "next"}, {"letter": "next", "": "next"}):
            with pytest.raises(rnnserve.InvalidRequest, match="feedback"):
                session.rollout(2, [[0]], rule="argmax", feedback=wrong)
    with client.session("strange") as session:
        with pytest.raises(rnnserve.InvalidRequest, match="'other'"):
            session.rollout(2, feedback={"input": "output"})
        with pytest.raises(rnnserve.InvalidRequest, match="choose among classes"):
            session.rollout(2, feedback={"input": "output", "other": "output"})


@pytest.mark.parametrize(
    ("model", "arguments", "match"),
    [
        ("lstm-4", {"x": np.zeros((1, 1, 5))}, "choose among classes"),
        ("lstm-4", {"x": np.zeros((1, 1, 5)), "rule": "argmax"}, r"an input \[K\]"),
        ("tiny", {"x": [[True]], "rule": "argmax"}, "can hold 4"),
        ("adder", {}, "inputs to begin with"),
        ("logits", {"x": [[1]], "rule": "sample"}, "for logits"),
        ("number", {"x": [[1]], "rule": "sample", "temperature": 0.0}, "a positive number"),
        ("number", {"x": [[1]], "rule": "sample", "temperature": float("nan")}, "a positive number"),
        ("number", {"x": [[1]], "rule": "argmax", "temperature": 1.0}, "takes none"),
        ("adder", {"x": np.full((1, 1, FEATURES), np.nan), "rule": "sample_logits"}, "all zero or not finite"),
    ],
)
def test_what_cannot_be_rolled_out(client, model, arguments, match):
    """Shapes, types and numbers that make no sense are an InvalidRequest that says which."""
    with client.session(model) as session, pytest.raises(rnnserve.InvalidRequest, match=match):
        session.rollout(2, **arguments)


def test_bounds(client):
    """Steps, and the bytes of the result, are bounded."""
    with client.session("adder") as session, client.session("adder", batch_size=4000) as large:
        session.step(np.zeros(FEATURES))
        assert session.rollout(300).outputs.shape == (1, 300, FEATURES)
        with pytest.raises(rnnserve.TooLarge, match="300"):
            session.rollout(301)
        with pytest.raises(rnnserve.TooLarge, match="bytes"):
            large.rollout(40, np.ones((4000, 1, FEATURES)))
        with pytest.raises(ValueError, match="rule"):
            session.rollout(1, rule="guess")
        with pytest.raises(ValueError, match="at least 1"):
            session.rollout(0)
        with pytest.raises(rnnserve.InvalidInput, match="rows"):
            large.rollout(1, np.ones((1, 1, FEATURES)))


def test_the_contract(server):
    """What the client never sends is refused too."""
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for fields, reason in (
            ({"session_id": "nobody", "steps": 1}, "SESSION_UNKNOWN"),
            ({"steps": 0}, "INVALID_REQUEST"),
            ({"steps": 1, "feedback": [{"rule": 9}]}, "INVALID_REQUEST"),
            ({"steps": 1, "inputs": encode_named({"input": np.ones((2, 1, 2), np.float32)})}, "INVALID_INPUT"),
            ({"steps": 1, "inputs": encode_named({"other": np.ones((1, 1, 2), np.float32)})}, "INVALID_INPUT"),
        ):
            with rnnserve.Client(server.address) as client, client.session("adder") as session:
                request = inference_pb2.RolloutRequest(**{"session_id": session.session_id, **fields})
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Rollout(request)
                assert from_rpc_error(caught.value).reason == reason


def test_a_rollout_that_nobody_waits_for_stops(server, client):
    """A call that is cancelled runs no further step, and holds nothing up."""
    engine = MODELS["adder"]
    model = server.call(lambda: server.server.core.repository.get("adder"))
    with client.session("adder") as session, grpc.insecure_channel(server.address) as channel:
        session.step(np.ones(FEATURES))
        engine.gate.clear()
        engine.running.clear()
        stub, done = inference_pb2_grpc.InferenceServiceStub(channel), len(engine.calls)
        call = stub.Rollout.future(inference_pb2.RolloutRequest(session_id=session.session_id, steps=300))
        assert engine.running.wait(30)
        call.cancel()
        while not server.call(lambda: all(sink.cancelled for sink in sinks(server, model))):
            pass
        engine.gate.set()
        while server.call(lambda: len(server.server.core.worker(model))):
            pass
        assert len(engine.calls) == done + 1
        session.step(np.ones(FEATURES))


def sinks(server, model):
    """Whoever waits for what is queued for a model."""
    return [sink for work in server.server.core.worker(model)._scheduler._queued.values() for sink, _ in work.sinks]


async def test_the_same_for_asyncio(server):
    """A rollout waits for the steps that were sent before it."""
    async with aio.Client(server.address, timeout=30) as client, client.session("adder") as session:
        steps = [session.step(np.ones(FEATURES)) for _ in range(3)]
        *_, (outputs, inputs) = await asyncio.gather(*steps, session.rollout(2))
        assert (inputs[0, 0, 0], outputs[0, :, 0].tolist()) == (3, [6, 12])
        assert (await session.info()).step == 3
