"""TLS: who is let in by a certificate, and certificates that change while the server runs."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from datetime import timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

import rnnserve
from certificates import Authority
from house import Clock
from rnnserve_server.access.tls import TlsError, server_credentials
from rnnserve_server.access.watched import Watched
from rnnserve_server.cli import app
from rnnserve_server.config import Settings
from serving import running_server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def served(authority: Authority, tmp_path: Path):
    """A server with TLS, whose certificate is in files of its own."""
    cert, key = place(authority.issue("first"), tmp_path)
    with running_server(tls_cert=cert, tls_key=key) as server:
        yield server


def place(issued: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """Puts a certificate and its key where the server has them, as whoever rotates them does."""
    placed = folder / "server.crt", folder / "server.key"
    for source, target in zip(issued, placed, strict=True):
        shutil.copy(source, f"{target}.new")
        os.replace(f"{target}.new", target)
    return placed


def shown(address: str, root: Path) -> int:
    """The serial number of the certificate that a server shows to a new connection."""
    context = ssl.create_default_context(cafile=str(root))
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), 10) as bare,
        context.wrap_socket(bare, server_hostname=host) as tls,
    ):
        return int(tls.getpeercert()["serialNumber"], 16)


def test_a_client_with_the_root_steps_a_session(served, authority):
    """TLS end to end, in both twins of the client."""
    with rnnserve.Client(served.address, tls=authority.root) as client, client.session("lstm-4") as session:
        assert np.isfinite(session.step(np.zeros(5, np.float32))).all()


async def test_the_asyncio_client_has_it_too(served, authority):
    async with rnnserve.aio.Client(served.address, tls=rnnserve.TLS(authority.root)) as client:
        assert await client.health()


@pytest.mark.parametrize("tls", [None, True])
def test_a_client_that_does_not_trust_the_server_is_not_connected(served, tls):
    """Neither in clear nor by the system's roots."""
    with rnnserve.Client(served.address, tls=tls, retry_for=0) as client, pytest.raises(rnnserve.Unavailable):
        client.model("lstm-4", timeout=10)


def test_a_server_with_an_expired_certificate_is_not_believed(authority, tmp_path):
    cert, key = authority.issue("late", lasts=timedelta(seconds=-1))
    with (
        running_server(tls_cert=cert, tls_key=key) as server,
        rnnserve.Client(server.address, tls=authority.root, retry_for=0) as client,
        pytest.raises(rnnserve.Unavailable, match=r"(?i)certificate"),
    ):
        client.model("lstm-4", timeout=10)


def test_a_rotated_certificate_is_shown_without_a_restart(served, authority, tmp_path):
    """New connections see the new one; a session that is stepped over an old one goes on."""
    before = shown(served.address, authority.root)
    with rnnserve.Client(served.address, tls=authority.root) as client, client.session("lstm-4") as session:
        session.step(np.zeros(5, np.float32))
        place(authority.issue("second"), tmp_path)
        while shown(served.address, authority.root) == before:  # the files are looked at once a second
            pass
        session.step(np.zeros(5, np.float32))
        assert session.next_step == 2


def test_mutual_tls_lets_in_whom_the_root_has_signed(authority, tmp_path):
    """No certificate, one of another root and an expired one are all refused before any call."""
    cert, key = authority.issue("server")
    strange = Authority(tmp_path, "strange root")
    good = rnnserve.TLS(authority.root, *authority.issue("good"))
    bad = [
        rnnserve.TLS(authority.root),
        rnnserve.TLS(authority.root, *strange.issue("good")),
        rnnserve.TLS(authority.root, *authority.issue("old", lasts=timedelta(seconds=-1))),
    ]
    with running_server(tls_cert=cert, tls_key=key, tls_client_ca=authority.root) as server:
        with rnnserve.Client(server.address, tls=good) as client:
            assert client.model("lstm-4").name == "lstm-4"
        for tls in bad:
            with rnnserve.Client(server.address, tls=tls, retry_for=0) as client:  # noqa: SIM117
                with pytest.raises(rnnserve.Unavailable):
                    client.model("lstm-4", timeout=10)


def test_the_health_command_knows_tls(served, authority):
    """A container's health check needs no token, but the root."""
    for flags, code in ((["--tls-ca", str(authority.root)], 0), ([], 1)):
        assert CliRunner().invoke(app, ["health", "--address", served.address, *flags]).exit_code == code


def test_files_are_looked_at_once_a_second_and_what_is_wrong_changes_nothing(tmp_path):
    """Half of a rotation, which is a certificate with another's key, is not taken; the whole of it is."""
    clock, path = Clock(), tmp_path / "file"
    path.write_text("1")
    reads = []

    def read() -> int:
        reads.append(path.read_text())
        return int(reads[-1])

    watched = Watched([path], read, clock=clock)
    for content, later, expected in [("22", 0.5, 1), ("22", 0.6, 22), ("x", 2, 22), ("x", 2, 22), ("333", 2, 333)]:
        path.write_text(content)
        os.utime(path, ns=(len(reads) + 1, int(clock.now * 1e9)))
        clock.now += later
        assert watched.get() == expected
    path.unlink()
    clock.now += 2
    assert watched.get() == 333


def test_a_certificate_with_anothers_key_is_told_at_the_start(authority, tmp_path):
    cert, _ = authority.issue("one")
    _, key = authority.issue("two")
    with pytest.raises(TlsError, match=r"one\.crt and .*two\.key"):
        server_credentials(cert, key)
    with pytest.raises(TlsError, match="no certificates in PEM"):
        server_credentials(*authority.issue("three"), key)
    with pytest.raises(TlsError, match="cannot be read"):
        server_credentials(tmp_path / "missing", key)


@pytest.mark.parametrize("wrong", [{"tls_cert": "c"}, {"tls_key": "k"}, {"tls_client_ca": "ca"}])
def test_settings_come_together(wrong):
    with pytest.raises(ValueError, match="expected"):
        Settings(**wrong)


def test_a_client_says_one_of_credentials_and_tls(authority):
    with pytest.raises(ValueError, match="one of them"):
        rnnserve.Client("localhost:1", tls=True, credentials=grpc.ssl_channel_credentials())
    with pytest.raises(ValueError, match="both or none"):
        rnnserve.TLS(cert="x")
