"""Bearer tokens: `rnns_<id>_<secret>`.

The id finds the token and is no secret. The secret has 256 random bits, so one pass of SHA-256 keeps it: nobody can try
out what a slow hash, such as passwords need, would make slower.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from datetime import datetime

from rnnserve_server.access.principals import Token

_TOKEN = re.compile(r"rnns_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_NOBODYS = "0" * 64


def new_token(created: datetime, expires: datetime | None = None) -> tuple[str, Token]:
    """A token, and what is kept of it."""
    identity = secrets.token_hex(4)
    token = f"rnns_{identity}_{secrets.token_urlsafe(32)}"
    return token, Token(id=identity, sha256=_digest(token), created=created, expires=expires)


def find_token(shown: str, known: Mapping[str, tuple[str, Token]]) -> tuple[str, Token] | None:
    """Whose token it is, and what is kept of it; None: nobody's. Takes as long for a wrong secret as for the right one.

    Args:
        shown: what a caller showed.
        known: name and token, by the token's id.
    """
    found = _TOKEN.fullmatch(shown)
    name, token = known.get(found[1], ("", None)) if found else ("", None)
    right = hmac.compare_digest(_digest(shown), _NOBODYS if token is None else token.sha256)
    return (name, token) if right and token is not None else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
