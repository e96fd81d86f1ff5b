"""How a caller shows who it is. Another way is another class with the method of `Authenticator`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from rnnserve_server.access.principals import Principals, Token
from rnnserve_server.access.tokens import find_token
from rnnserve_server.errors import Unauthenticated

_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Shown:
    """What a call shows of its caller.

    Attributes:
        metadata: of the call: texts, by keys in small letters.
        certificate: what TLS says of the other side, as gRPC's auth_context has it; empty without TLS. A certificate
            was verified before anything of the call was read.
        now: seconds since the epoch.
    """

    metadata: Mapping[str, str]
    certificate: Mapping[str, Iterable[bytes]]
    now: float


class Authenticator(Protocol):
    """A way to show who one is."""

    def authenticate(self, shown: Shown, known: Principals) -> str | None:
        """The name of the principal who calls.

        Args:
            shown: what the call shows.
            known: the principals, as their file has them now.

        Returns:
            A name in ``known``, or None if the call shows nothing of the kind that this one looks at: then the next one
            is asked.

        Raises:
            Unauthenticated: what it shows is wrong. Nobody else is asked.
        """
        ...


class BearerTokens:
    """The metadata `authorization: Bearer <token>`."""

    def __init__(self) -> None:
        self._known: Principals | None = None
        self._tokens: dict[str, tuple[str, Token]] = {}

    def authenticate(self, shown: Shown, known: Principals) -> str | None:
        """See `Authenticator`."""
        header = shown.metadata.get("authorization")
        if header is None:
            return None
        if known is not self._known:
            self._known, self._tokens = known, {token.id: (name, token) for name, token in known.tokens()}
        if not header[: len(_BEARER)].lower() == _BEARER:
            raise Unauthenticated("expected the metadata 'authorization' to be 'Bearer <token>'")
        found = find_token(header[len(_BEARER) :].strip(), self._tokens)
        if found is None:
            raise Unauthenticated("the token is not known; ask for one that `rnnserve token add` has made")
        name, token = found
        if token.expires is not None and token.expires <= datetime.fromtimestamp(shown.now, UTC):
            raise Unauthenticated(f"the token expired at {token.expires.isoformat()}; ask for another")
        return name


class ClientCertificates:
    """The common name of the certificate that the caller has shown in the TLS handshake."""

    def authenticate(self, shown: Shown, known: Principals) -> str | None:
        """See `Authenticator`."""
        names = [name.decode("utf-8", "replace") for name in shown.certificate.get("x509_common_name", ())]
        if not names:
            return None
        for principal, entry in known.principals.items():
            if names[0] in entry.certificates:
                return principal
        raise Unauthenticated(f"no principal has a certificate with the common name {names[0]!r:.80}")
