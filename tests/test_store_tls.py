"""A store over TLS: the real redis-server with a certificate of our own making."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import rnnserve
from redis_server import running_redis
from rnnserve_server.store import StoreMisconfigured, StoreUnavailable, open_store
from serving import running_server


class Tls(NamedTuple):
    """Where a Redis is, and the files that prove it."""

    port: int
    folder: Path

    def url(self, host="localhost", scheme="rediss", **files):
        query = "&".join(f"{name}={self.folder / file}" for name, file in files.items())
        return f"{scheme}://{host}:{self.port}/0" + (f"?{query}" if query else "")


def certificate(folder: Path, name: str, *, alternative: str = "") -> None:
    """A key and a certificate signed by the authority of the folder."""
    run = lambda *words: subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)  # noqa: E731
    run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / f"{name}.ext").write_text(f"subjectAltName={alternative or f'DNS:{name}'}\n")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.ext", "-days", "2")
    run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Iterator[Tls]:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed: apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    authority = [
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=Test CA",
    ]
    subprocess.run(["openssl", "req", *authority, "-days", "2"], cwd=folder, check=True, capture_output=True)
    certificate(folder, "server", alternative="DNS:localhost")
    certificate(folder, "client")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = {"--tls-cert-file": "server.pem", "--tls-key-file": "server.key", "--tls-ca-cert-file": "ca.pem"}
    options = [each for name, file in files.items() for each in (name, str(folder / file))]
    try:
        with running_redis("--tls-port", str(port), "--tls-auth-clients", "optional", *options):
            yield Tls(port, folder)
    except RuntimeError as error:
        if not re.search(r"[Bb]ad directive|not support|argument", str(error)):
            raise
        pytest.skip(f"this redis-server was built without TLS: {error}")


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_sessions_are_kept_over_tls(tls, scheme):
    """With the authority named in the URL, sessions outlive their server as over a plain connection."""
    url = tls.url(scheme=scheme, ssl_ca_certs="ca.pem", ssl_certfile="client.pem", ssl_keyfile="client.key")
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    with running_server(store=url) as server, rnnserve.Client(server.address, timeout=30) as client:
        session = client.session("lstm-4", session_id=f"over-{scheme}")
        outputs = [session.step(each) for each in x[:3]]
        session.detach()
    with running_server(store=url) as server, rnnserve.Client(server.address, timeout=30) as client:
        with client.attach(f"over-{scheme}") as session:
            assert session.next_step == 3
            outputs += [session.step(each) for each in x[3:]]
            session.close()
        with client.session("lstm-4") as alone:
            np.testing.assert_array_equal(outputs, [alone.step(each) for each in x])


async def test_a_certificate_that_is_not_trusted_is_refused(tls):
    """Of an unknown authority, or of another host: nothing is kept there, and the error says what to name."""
    with pytest.raises(StoreMisconfigured, match="ssl_ca_certs"):
        await open_store(tls.url())
    with pytest.raises(StoreMisconfigured, match="right host"):
        await open_store(tls.url("127.0.0.1", ssl_ca_certs="ca.pem"))


async def test_a_plain_connection_to_tls_is_refused(tls):
    with pytest.raises(StoreUnavailable):
        await open_store(tls.url(scheme="redis"), patience=5.0)


async def test_valkeys_own_schemes():
    """``valkey://`` is ``redis://``: the error is that of a place where nothing listens, not of an unknown scheme."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(StoreUnavailable, match=place):
        await open_store(f"valkey://{place}/0", patience=1.0)
