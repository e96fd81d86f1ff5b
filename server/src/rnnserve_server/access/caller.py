"""Who calls, and how the ids that it says become the ids that the server keeps.

A session's id, as the server and its store keep it, begins with the name of the principal whose it is: `alice/x` is the
`x` of alice. So two principals may choose the same id and neither learns of the other's, and an id of somebody else is
one that was never seen. A session of nobody's, made while everybody might do everything, is a bare `x`.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from rnnserve_server.access.bucket import Bucket
from rnnserve_server.access.principals import Role
from rnnserve_server.errors import ServiceError, SessionError

EVERYTHING = frozenset(Role)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        name: the principal's; empty where there are none and everybody may do everything.
        roles: what it may do.
        bucket: lets its rows in; None: all of them.
        scope: what the ids of its sessions begin with.
    """

    name: str = ""
    roles: frozenset[Role] = EVERYTHING
    bucket: Bucket | None = None
    scope: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scope", f"{self.name}/" if self.name else "")

    @property
    def sees_all(self) -> bool:
        """Whether everybody's sessions are its business."""
        return Role.ADMIN in self.roles

    def scoped(self, session_id: str) -> str:
        """The id that the server keeps of the session that the caller names so. Who sees all may name another's in
        full, `alice/x`, and nobody's as `/x`.
        """
        if "/" in session_id and self.sees_all:
            return session_id.removeprefix("/")
        return self.scope + session_id

    def shown(self, session_id: str) -> str:
        """How the caller names the session of which the server keeps that id."""
        if session_id.startswith(self.scope):
            return session_id[len(self.scope) :]
        return session_id if "/" in session_id else f"/{session_id}"

    def told(self, error: ServiceError) -> ServiceError:
        """An error as the caller may see it: with its own name for the session."""
        return type(error)(self.shown(error.session_id)) if self.scope and isinstance(error, SessionError) else error


ANYBODY = Caller()
"""Who calls a server that knows no principals."""

_CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def caller() -> Caller:
    """Who makes the call that is being answered."""
    return _CALLER.get()


def set_caller(who: Caller) -> None:
    """Says who makes the call that this task, and what it starts, answers."""
    _CALLER.set(who)
