"""Models deployed, unloaded and reloaded by a client, on a real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnserve
from serving import ZOO, RunningServer, running_server


def lstm(units: int, **config: Any) -> dict[str, Any]:
    """An LSTM layer as Keras serializes it."""
    return {"class_name": "LSTM", "config": {"name": "lstm", "units": units, "return_sequences": True, **config}}


def weights(units: int, features: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Weights of an LSTM, in the order of Keras's get_weights()."""
    rng = np.random.default_rng(seed)
    shapes = ((features, 4 * units), (units, 4 * units), (4 * units,))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ZOO / "lstm-4", tmp_path / "lstm-4")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[RunningServer]:
    with running_server(models=folder, allow_deploy=True) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[rnnserve.Client]:
    with rnnserve.Client(server.address) as client:
        yield client


X = np.random.default_rng(9).standard_normal((2, 6, 3)).astype(np.float32)


def test_a_server_does_not_let_clients_change_its_models_unless_told(folder: Path) -> None:
    """Deploy, unload and reload are refused by default, and nothing is written."""
    before = sorted(folder.rglob("*"))
    with running_server(models=folder) as server, rnnserve.Client(server.address) as client:
        for change in (
            lambda: client.models.deploy("new", lstm(2), weights(2)),
            lambda: client.models.unload("lstm-4"),
            lambda: client.models.reload("lstm-4"),
        ):
            with pytest.raises(rnnserve.DeployDisabled, match="--allow-deploy"):
                change()
        assert [model.name for model in client.models()] == ["lstm-4"]
    assert sorted(folder.rglob("*")) == before


def test_a_deployed_layer_is_the_local_layer(client: rnnserve.Client) -> None:
    """A layer sent as Keras's config and weights is served, and computes what the local twin computes."""
    from rnnserve_models import layer_from_config

    model = client.models.deploy("mine", lstm(5), weights(5))
    assert (model.name, model.version) == ("mine", "1")
    local = layer_from_config(lstm(5), weights(5), engine="numpy")
    with client.session("mine", batch_size=2) as session:
        parts = [session(X[:, :2]), session(X[:, 2:])]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), local(X), rtol=0, atol=2e-5)


def test_live_sessions_stay_on_their_version(client: rnnserve.Client) -> None:
    """A session goes on with the version it was opened on; one opened later has the new version."""
    client.models.deploy("mine", lstm(5), weights(5))
    old = client.session("mine", batch_size=2)
    first = old(X)
    model = client.models.deploy("mine", lstm(5), weights(5, seed=1))
    assert model.version == "2"
    with client.session("mine", batch_size=2) as new:
        assert new.model.version == "2"
        assert not np.allclose(new(X), first)
    with client.session("mine", batch_size=2, version="1") as again:
        assert np.array_equal(again(X), first)
    assert old.model.version == "1"
    old(X)
    old.close()


def test_unload_and_reload(client: rnnserve.Client, folder: Path) -> None:
    """An unloaded model is not found by new calls, its sessions go on, and a reload brings it back."""
    session = client.session("lstm-4")
    assert client.models.unload("lstm-4") == ["1"]
    assert client.models() == []
    with pytest.raises(rnnserve.ModelNotFound):
        client.session("lstm-4")
    x = np.zeros((1, 1, 5), np.float32)
    session(x)
    assert [model.version for model in client.models.reload("lstm-4")] == ["1"]
    session(x)
    session.close()
    client.session("lstm-4").close()
    with pytest.raises(rnnserve.ModelNotFound):
        client.models.reload("../lstm-4")
    with pytest.raises(rnnserve.ModelNotFound):
        client.models.unload("lstm-4", version="9")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no such class", {"config": {"class_name": "MyCell", "config": {}}}, "MyCell"),
    ("a wrong shape", {"weights": weights(4)}, "kernel"),
    ("a weight missing", {"weights": weights(5)[:2]}, "weights"),
    ("an unknown key", {"config": lstm(5, gates=3)}, "gates"),
    ("a name that leads elsewhere", {"name": "../mine"}, "name"),
    ("a version that leads elsewhere", {"version": "../../1"}, "version"),
]


@pytest.mark.parametrize(("change", "said"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_what_is_no_model_leaves_no_trace(
    client: rnnserve.Client, folder: Path, change: dict[str, Any], said: str
) -> None:
    """What cannot be served is refused with the reason, and neither the folder nor the list of models changes."""
    before = sorted(folder.rglob("*"))
    arguments = {"name": "mine", "config": lstm(5), "weights": weights(5), **change}
    with pytest.raises((rnnserve.ModelInvalid, rnnserve.InvalidRequest), match=said):
        client.models.deploy(**arguments)
    assert sorted(folder.rglob("*")) == before
    assert [model.name for model in client.models()] == ["lstm-4"]


def test_a_version_is_never_replaced(client: rnnserve.Client) -> None:
    """Deploying a version that is there is refused."""
    client.models.deploy("mine", lstm(5), weights(5), version="7")
    with pytest.raises(rnnserve.VersionExists, match="'7'"):
        client.models.deploy("mine", lstm(5), weights(5, seed=1), version="7")
    assert client.models.deploy("mine", lstm(5), weights(5)).version == "8"


def test_a_model_has_a_size_limit(folder: Path) -> None:
    """A model larger than the server accepts is refused before anything is written."""
    with (
        running_server(models=folder, allow_deploy=True, max_model_bytes=1000) as server,
        rnnserve.Client(server.address) as client,
        pytest.raises(rnnserve.TooLarge, match="1000"),
    ):
        client.models.deploy("mine", lstm(50), weights(50))


def test_what_a_file_is_not(client: rnnserve.Client, tmp_path: Path) -> None:
    """A file of an unknown kind, or that is not what its suffix says, is refused with the reason."""
    for name in ("model.pt", "model.onnx", "model.keras", "model.h5", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"not a model")
        with pytest.raises(rnnserve.ModelInvalid, match="model"):
            client.models.deploy_file("mine", path)
    assert [model.name for model in client.models()] == ["lstm-4"]


async def test_the_asyncio_client_deploys(server: RunningServer) -> None:
    """rnnserve.aio.Client changes models as rnnserve.Client does."""
    import rnnserve.aio

    async with rnnserve.aio.Client(server.address) as client:
        model = await client.models.deploy("mine", lstm(5), weights(5))
        assert [each.name for each in await client.models()] == ["lstm-4", "mine"]
        assert await client.models.unload("mine", version=model.version) == ["1"]
        assert [each.version for each in await client.models.reload("mine")] == ["1"]
