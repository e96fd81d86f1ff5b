"""Networks, served: whole calls, masks, states and options through a real server and the SDK."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import rnnserve
import rnnserve.aio
from network_cases import assert_close, config, rnn, sequential, weights_for
from rnnserve_models import ModelError, layer_from_config
from rnnserve_models.engine.network import NetworkEngine
from rnnserve_models.load import load_model
from rnnserve_models.network.files import save_network
from rnnserve_server.repository import Repository
from serving import running_server

TABLE = config("Embedding", input_dim=7, output_dim=4, mask_zero=True)
DENSE = config("Dense", units=2, activation="softmax")
NETWORKS = {
    "both-ways": sequential(config("Bidirectional", layer=rnn("LSTM", return_sequences=True)), DENSE),
    "summary": sequential(rnn("LSTM", return_sequences=True, stateful=True), rnn("GRU", stateful=True), DENSE),
    "words": sequential(TABLE, rnn("GRU", return_sequences=True, stateful=True)),
    "vector": sequential(
        config("Dense", units=3),
        config("RepeatVector", n=5),
        rnn("GRU", return_sequences=True),
        batch_shape=[None, 4],
    ),
    "layer": rnn("GRU", return_state=True, go_backwards=True),
    "keras2": rnn("LSTM", return_sequences=True, time_major=True, activation="hard_sigmoid"),
    "fixed": sequential(
        rnn("LSTM", return_sequences=True), config("Flatten"), DENSE, batch_shape=[None, 5, 4]
    ),
}  # fmt: skip
X = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("f")
IDS = np.random.default_rng(0).integers(0, 7, (3, 5)).astype(np.int32)


def weights_of(name):
    document = NETWORKS[name]
    if name == "fixed":
        return [*weights_for(rnn("LSTM"), 4), np.full((15, 2), 0.25, "f"), np.zeros(2, "f")]
    return weights_for(document, 4)


def twin(name):
    return layer_from_config(NETWORKS[name], weights_of(name), engine="numpy")


def write(folder, name, document=None, weights=None, extra=""):
    directory = folder / name / "1"
    directory.mkdir(parents=True)
    save_network(directory, document or NETWORKS[name], weights_of(name) if weights is None else weights)
    (directory / "model.yaml").write_text(f"network: network.json\nweights: weights.safetensors\n{extra}")
    return directory


@pytest.fixture(scope="module", params=["numpy", "onnx"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for name in NETWORKS:
        write(folder, name, extra=f"engine: {request.param}\n")
    with running_server(Repository.load(folder)) as server:
        yield server


@pytest.fixture
def client(server):
    with rnnserve.Client(server.address) as client:
        yield client


def test_whole_calls(client):
    """A call gives what the layer gives, with a mask too; a Bidirectional layer sees all of it."""
    mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    layer = client.RNN("both-ways", return_sequences=True)
    assert_close(layer(X), twin("both-ways")(X), 2e-5)
    assert_close(layer(X, mask=mask), twin("both-ways")(X, mask), 2e-5)
    x = np.random.default_rng(1).normal(size=(2, 300, 4)).astype("f")  # longer than a slice
    assert_close(layer(x), twin("both-ways")(x), 2e-5)
    assert_close(client.RNN("fixed")(X), twin("fixed")(X), 2e-5)
    assert_close(client.RNN("layer")(X), twin("layer")(X)[0], 2e-5)
    with pytest.raises(rnnserve.OptionUnsupported, match="return_sequences"):
        client.RNN("layer", return_sequences=True)(X)


def test_states_and_time_major(client):
    """return_state and time_major are the client's; hard_sigmoid is that of the Keras that wrote the config."""
    output, h, c = client.RNN("keras2", return_sequences=True, return_state=True, time_major=True)(X)
    document = {**NETWORKS["keras2"], "config": {**NETWORKS["keras2"]["config"], "return_state": True}}
    expected = layer_from_config(document, weights_of("keras2"), engine="numpy")(X)
    assert_close([output, h, c], expected, 2e-5)
    assert_close(
        client.RNN("keras2", return_sequences=True)(X.swapaxes(0, 1)), np.asarray(expected[0]).swapaxes(0, 1), 2e-5
    )


def test_sessions_remember(client):
    """A session gives what the stateful model gives, call by call; its states are the recurrent layers'."""
    for name, x in (("summary", X), ("words", IDS)):
        local = twin(name)
        with client.session(name, batch_size=3) as session:
            for part in (x[:, :2], x[:, 2:3], x):
                assert_close(session(part), local(part), 2e-5)
    model = client.model("summary")
    assert [state.name for state in model.states] == ["lstm.h", "lstm.c", "gru.h"]
    assert [state.path for state in model.states] == [(0, 0), (0, 1), (1, 0)]
    assert not model.default_options.return_sequences
    assert client.model("words").default_options.return_sequences


def test_an_input_without_time(client):
    """A vector is an input of one step."""
    assert_close(client.RNN("vector", return_sequences=True)(X[:, :1]), twin("vector")(X[:, 0]), 2e-5)
    with pytest.raises(rnnserve.InvalidInput, match=r"inputs\.input"):
        client.RNN("vector", return_sequences=True)(X)


def test_ids_out_of_the_table(client):
    """An id that is not in the table is the fault of its own chunk."""
    with client.session("words") as session, client.session("words") as other:
        with pytest.raises(rnnserve.InvalidInput, match=r"inputs.input: expected -7 to 6, got 1 to 9"):
            session(np.array([[1, 9]], np.int32))
        other(np.array([[1, 2]], np.int32))


async def test_sessions_of_different_lengths_at_once(server):
    """Concurrent sessions with and without masks, of many lengths, all get their own results."""
    rng = np.random.default_rng(2)
    local = layer_from_config(NETWORKS["both-ways"], weights_of("both-ways"), engine="numpy")
    async with rnnserve.aio.Client(server.address) as client:

        async def one(index):
            x = rng.normal(size=(1 + index % 2, 1 + index % 5, 4)).astype("f")
            mask = rng.random(x.shape[:2]) < 0.7 if index % 3 else None
            async with client.session("both-ways", batch_size=len(x)) as session:
                assert_close(await session(x, mask=mask), local(x, mask), 2e-5)

        await asyncio.gather(*map(one, range(40)))


def test_digest_and_refusals(tmp_path):
    """The digest covers config and weights; a directory that is no network is refused by file and layer."""
    directory = write(tmp_path, "layer")
    before = load_model(directory)
    assert isinstance(before.engine, NetworkEngine)
    assert (before.engine.name, before.engine.reason) == ("onnx", "")
    save_network(directory, NETWORKS["layer"], [weight * 2 for weight in weights_of("layer")])
    assert load_model(directory).digest != before.digest
    save_network(directory, NETWORKS["layer"], weights_of("layer")[:2])
    with pytest.raises(ModelError, match=r"network.json: GRU 'gru': expected 3 weights, got 2"):
        load_model(directory)
    (directory / "network.json").write_text("{")
    with pytest.raises(ModelError, match=r"network.json: cannot be read as JSON"):
        load_model(directory)
    (directory / "network.json").unlink()
    with pytest.raises(ModelError, match=r"network.json: the file is missing"):
        load_model(directory)
    with pytest.raises(ModelError, match="nothing says what the inputs are like"):
        load_model(write(tmp_path, "shapeless", config("Activation", activation="relu"), []))
