"""Changes to the file of principals, by the command line."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from rnnserve_server.access.principals import Entry, Principals, PrincipalsError, read_principals, write_principals
from rnnserve_server.access.tokens import new_token


def with_token(path: Path, name: str, roles: Sequence[str] | None, created: datetime, expires: datetime | None) -> str:
    """Gives a principal one more token, and roles if any are said; makes it, and the file, if they are not there.

    Returns:
        The token, which stands nowhere else.

    Raises:
        PrincipalsError: the file, the name or a role is of no use. Nothing changes.
        OSError: the file cannot be written.
    """
    with _locked(path):
        known = read_principals(path) if path.exists() else Principals()
        entry = known.principals.get(name, Entry())
        shown, token = new_token(created, expires)
        changed = entry.model_dump() | {"tokens": [*entry.tokens, token]} | ({"roles": roles} if roles else {})
        try:
            known = Principals.model_validate({"principals": {**known.principals, name: changed}})
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in error.errors())
            raise PrincipalsError(f"{path}: {faults}") from error
        write_principals(path, known)
    return shown


def without(path: Path, which: str) -> None:
    """Takes a token away, by its id, or a principal, by its name.

    Raises:
        PrincipalsError: there is none, or the file is of no use. Nothing changes.
        OSError: the file cannot be written.
    """
    with _locked(path):
        known = read_principals(path)
        if which in known.principals:
            left = {name: entry for name, entry in known.principals.items() if name != which}
        elif any(token.id == which for _, token in known.tokens()):
            left = {
                name: entry.model_copy(update={"tokens": tuple(each for each in entry.tokens if each.id != which)})
                for name, entry in known.principals.items()
            }
        else:
            raise PrincipalsError(f"{path}: expected a token's id or a principal's name that it has, got {which!r}")
        write_principals(path, Principals(principals=left))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Has others who change the file wait. Those who only read it see it before or after."""
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
