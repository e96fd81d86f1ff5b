"""TLS and tokens, as the clients take them."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import grpc

Token: TypeAlias = str | Callable[[], str]
"""A bearer token, or what gives the one to show now."""


@dataclass(frozen=True)
class TLS:
    """How to know the server, and how to be known by it.

    Attributes:
        ca: a file of roots, in PEM, one of which has signed the server's certificate; None for the system's.
        cert: a file with the certificate to show, and its chain, in PEM; None to show none.
        key: a file with its private key, in PEM.
        server_name: the name in the server's certificate, if it is not the target's.

    Raises:
        ValueError: there is a certificate without a key, or a key without a certificate.
    """

    ca: str | PathLike[str] | None = None
    cert: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: cert and key: expected both or none")

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC has them. Reads the files.

        Raises:
            OSError: a file cannot be read.
        """
        ca = self.ca or ssl.get_default_verify_paths().cafile
        read = [None if path is None else Path(path).read_bytes() for path in (ca, self.key, self.cert)]
        return grpc.ssl_channel_credentials(*read)

    def options(self) -> tuple[tuple[str, Any], ...]:
        """The options of the channel."""
        return (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()


Tls: TypeAlias = bool | str | PathLike[str] | TLS | None
"""True: with the system's roots; a path: with the roots in that file; False and None: no TLS."""


def tls_of(tls: Tls) -> TLS | None:
    """What the argument of a client means."""
    if isinstance(tls, TLS):
        return tls
    if isinstance(tls, bool) or tls is None:
        return TLS() if tls else None
    return TLS(tls)


def check_token(target: str, token: Token | None, tls: Tls, credentials: object) -> None:
    """Raises ValueError if a token would travel in clear to another machine without anybody having said so."""
    if token is None or tls is not None or credentials is not None:
        return
    host = target.rpartition("/")[2]
    if target.startswith("unix:") or host.startswith(("localhost:", "127.", "[::1]")) or host in ("localhost", "::1"):
        return
    raise ValueError(
        f"token: {target} would be sent it in clear; give tls=True, or tls=False if what is between is to be trusted"
    )
