"""Principals: who they are, what they show, what they may do and how much of it.

They stand in a YAML file:

    principals:
      alice:
        roles: [use]                      # use, deploy, admin
        tokens:                           # `rnnserve token add alice` writes one
          - {id: 5f0c9a1b, sha256: ..., created: 2026-11-23T14:00:00Z, expires: 2027-11-23T14:00:00Z}
        certificates: [alice.example]     # the common names of certificates that --tls-client-ca has signed
        quotas: {sessions: 100, rows_per_second: 50000, state_bytes: 100000000}
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from rnnserve_models.documents import DocumentError, read_yaml

_MAX_BYTES = 4 << 20  # of some ten thousand tokens

_HEAD = """\
# Who may use the server: see "Security" in README.md. `rnnserve token add NAME` writes here, and keeps no comments.
# A token itself is not in here, only its SHA-256. The server reads this file again when it changes.
"""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
"""A principal's name. It has no slash: one comes behind it in the ids of its sessions."""


class PrincipalsError(ValueError):
    """The file of principals is of no use: the message names it and what is wrong."""


class Role(StrEnum):
    """What a principal may do."""

    USE = "use"
    """Run models, in sessions of its own too."""
    DEPLOY = "deploy"
    """Deploy, unload and reload models, where the server allows it."""
    ADMIN = "admin"
    """Everything, with everybody's sessions."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Quotas(_Document):
    """How much a principal may have; None: what the settings say, 0: as much as there is.

    Attributes:
        sessions: live sessions, those in the store too.
        rows_per_second: rows of time steps a second, of this server.
        state_bytes: bytes of its sessions' states in this server's memory.
    """

    sessions: Annotated[int, Field(ge=0)] | None = None
    rows_per_second: Annotated[float, Field(ge=0)] | None = None
    state_bytes: Annotated[int, Field(ge=0)] | None = None


class Token(_Document):
    """What is kept of a bearer token.

    Attributes:
        id: what finds it; it is no secret.
        sha256: of the whole token, in hexadecimal.
        created: when it was made.
        expires: when it ends, or None.
    """

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None


class Entry(_Document):
    """A principal.

    Attributes:
        roles: what it may do.
        tokens: its bearer tokens.
        certificates: common names of certificates that are its own.
        quotas: how much it may have.
    """

    roles: frozenset[Role] = frozenset({Role.USE})
    tokens: tuple[Token, ...] = ()
    certificates: tuple[str, ...] = ()
    quotas: Quotas = Quotas()


class Principals(_Document):
    """All of them, by name."""

    principals: dict[Name, Entry] = {}

    @model_validator(mode="after")
    def _check_distinct(self) -> Principals:
        for what, found in (
            ("token id", [token.id for _, token in self.tokens()]),
            ("certificate", [name for entry in self.principals.values() for name in entry.certificates]),
        ):
            if twice := {each for each in found if found.count(each) > 1}:
                raise ValueError(f"{what} {min(twice)!r} is there twice")
        return self

    def tokens(self) -> Iterator[tuple[str, Token]]:
        """Every token with the name of whose it is."""
        for name, entry in self.principals.items():
            for token in entry.tokens:
                yield name, token


def read_principals(path: Path) -> Principals:
    """Reads the file.

    Raises:
        PrincipalsError: it cannot be read, or says something else.
    """
    try:
        document = read_yaml(path, most=_MAX_BYTES)
    except DocumentError as error:
        raise PrincipalsError(f"{path}: {error}") from error
    try:
        return Principals.model_validate(document or {})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise PrincipalsError(f"{path}: {faults}") from error


def write_principals(path: Path, principals: Principals) -> None:
    """Writes the file, for its owner only if it is new, so that whoever reads it meanwhile sees it whole.

    Raises:
        OSError: it cannot be written.
    """
    document: dict[str, Any] = principals.model_dump(mode="json", exclude_defaults=True)
    for name, entry in principals.principals.items():
        document["principals"][name]["roles"] = sorted(role.value for role in entry.roles)
    text = _HEAD + yaml.safe_dump(document, sort_keys=False, width=200)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            before = os.stat(path)
            os.chmod(scratch, before.st_mode & 0o777)
            with suppress(PermissionError):
                os.chown(scratch, before.st_uid, before.st_gid)
        os.replace(scratch, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(scratch)
        raise


def now() -> datetime:
    """The time, to the second."""
    return datetime.now(UTC).replace(microsecond=0)
