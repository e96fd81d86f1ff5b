"""TLS with certificates that may change while the server runs."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from rnnserve_server.access.watched import Watched


class TlsError(ValueError):
    """The certificates are of no use: the message names the file and what is wrong."""


def server_credentials(
    certificate: Path, key: Path, client_ca: Path | None = None, *, clock: Callable[[], float] = time.monotonic
) -> grpc.ServerCredentials:
    """What a server shows, and asks for, in a handshake.

    The files are looked at with each handshake, once a second at most, and read again when one has changed. What cannot
    be used, such as a new certificate whose key is not there yet, is left alone: the one before is shown. Connections
    that are open stay as they are.

    Args:
        certificate: PEM, the server's certificate and those that lead to its root.
        key: PEM, its private key.
        client_ca: PEM, roots one of which must have signed the certificate that a client shows; None asks for none.
        clock: monotonic seconds.

    Raises:
        TlsError: the files cannot be used.
    """

    def read() -> grpc.ServerCertificateConfiguration:
        return _read(certificate, key, client_ca)

    watched = Watched([certificate, key, *([client_ca] if client_ca else [])], read, clock=clock)
    return grpc.dynamic_ssl_server_credentials(
        watched.get(), watched.get, require_client_authentication=client_ca is not None
    )


def _read(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    try:
        chain, secret = certificate.read_bytes(), key.read_bytes()
        roots = None if client_ca is None else client_ca.read_bytes()
    except OSError as error:
        raise TlsError(f"{error.filename}: cannot be read: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:  # gRPC would take them, and then refuse every handshake without a word
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise TlsError(f"{certificate} and {key}: are not a certificate and its key in PEM: {error}") from error
    if roots is not None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise TlsError(f"{client_ca}: has no certificates in PEM: {error}") from error
    return grpc.ssl_server_certificate_configuration([(secret, chain)], roots)


def _no_password() -> str:
    raise ValueError("the key wants a password; give it without one")
