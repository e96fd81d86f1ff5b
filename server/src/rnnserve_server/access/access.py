"""Access: who is let in, with which rights and quotas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rnnserve_server.access.authenticators import Authenticator, BearerTokens, ClientCertificates, Shown
from rnnserve_server.access.bucket import Bucket
from rnnserve_server.access.caller import Caller
from rnnserve_server.access.principals import Principals, Role, read_principals
from rnnserve_server.access.watched import Watched
from rnnserve_server.errors import PermissionDenied, Unauthenticated

_USE, _DEPLOY, _ADMIN = frozenset({Role.USE}), frozenset({Role.DEPLOY}), frozenset[Role]()
_LOOK = _USE | _DEPLOY

_NEEDED = {
    "/rnnserve.v1.InferenceService/": _USE,
    "/rnnserve.v1.SessionService/": _USE,
    "/rnnserve.v1.ModelService/ListModels": _LOOK,
    "/rnnserve.v1.ModelService/GetModel": _LOOK,
    "/rnnserve.v1.ModelService/": _DEPLOY,
    "/inference.GRPCInferenceService/ModelInfer": _USE,
    "/inference.GRPCInferenceService/ModelStreamInfer": _USE,
    "/inference.GRPCInferenceService/RepositoryModel": _DEPLOY,
    "/inference.GRPCInferenceService/": _LOOK,
    "/grpc.reflection.": _LOOK,
}

_OPEN_TO_ALL = "/grpc.health.v1.Health/"
"""Probes and balancers have no tokens, and all that they learn is whether the server serves."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Quotas of a principal whose entry does not say; 0: as much as there is. See `Quotas`."""

    sessions: int = 0
    rows_per_second: float = 0.0
    state_bytes: int = 0


class Access:
    """Lets callers in.

    Args:
        path: the file of principals.
        defaults: their quotas where the file does not say.
        authenticators: the ways to show who one is, in the order in which they are asked.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch.

    Raises:
        PrincipalsError: the file is of no use.
    """

    def __init__(
        self,
        path: Path,
        defaults: Defaults,
        authenticators: Sequence[Authenticator] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._defaults = defaults
        self._authenticators = authenticators or (BearerTokens(), ClientCertificates())
        self._clock = clock
        self._wall_clock = wall_clock
        self._buckets: dict[str, Bucket] = {}
        self._file = Watched([path], lambda: read_principals(path), clock=clock)

    def enter(self, method: str, shown: Shown) -> Caller:
        """Who calls.

        Args:
            method: its full name, such as ``/rnnserve.v1.SessionService/GetSession``.
            shown: what the call shows.

        Raises:
            Unauthenticated: it does not show who it is.
            PermissionDenied: it may not do that.
        """
        known = self._file.get()
        name = self._name(shown, known)
        if name is None or name not in known.principals:
            raise Unauthenticated(
                "expected the metadata 'authorization: Bearer <token>'"
                + (", or a certificate of a principal" if shown.certificate else "")
                + "; ask whoever runs the server for a token"
            )
        roles = known.principals[name].roles
        needed = _needed(method)
        if Role.ADMIN not in roles and not roles & needed:
            wanted = " or ".join(sorted(needed | {Role.ADMIN}))
            raise PermissionDenied(
                f"{method}: expected a principal of the role {wanted}, got {name!r} with {', '.join(sorted(roles))}",
                metadata={"expected": wanted, "got": ",".join(sorted(roles))},
            )
        return Caller(name, roles, self._bucket(name))

    def still(self, who: Caller, shown: Shown) -> bool:
        """Whether who was let in with that would be let in with it now, with the same roles."""
        known = self._file.get()
        shown = replace(shown, now=self._wall_clock())
        try:
            name = self._name(shown, known)
        except Unauthenticated:
            return False
        entry = known.principals.get(name or "")
        self._bucket(who.name)  # with the rate that the file has now
        return name == who.name and entry is not None and entry.roles == who.roles

    def shown(self, metadata: Sequence[tuple[str, str | bytes]], certificate: Mapping[str, Iterable[bytes]]) -> Shown:
        """What a call shows of its caller, now."""
        texts = {key: value for key, value in metadata if isinstance(value, str)}
        return Shown(texts, certificate, self._wall_clock())

    def limits(self, name: str) -> Defaults:
        """A principal's quotas. One that is not in the file any more has the settings' own."""
        entry = self._file.get().principals.get(name)
        if entry is None:
            return self._defaults
        quotas, defaults = entry.quotas, self._defaults
        return Defaults(
            defaults.sessions if quotas.sessions is None else quotas.sessions,
            defaults.rows_per_second if quotas.rows_per_second is None else quotas.rows_per_second,
            defaults.state_bytes if quotas.state_bytes is None else quotas.state_bytes,
        )

    def _name(self, shown: Shown, known: Principals) -> str | None:
        for authenticator in self._authenticators:
            if (name := authenticator.authenticate(shown, known)) is not None:
                return name
        return None

    def _bucket(self, name: str) -> Bucket:
        """The bucket of a principal, which all its calls share."""
        rate = self.limits(name).rows_per_second
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(name, rate, self._clock)
        bucket.set_rate(rate)
        return bucket


def open_to_all(method: str) -> bool:
    """Whether a method asks nobody who he is."""
    return method.startswith(_OPEN_TO_ALL)


def _needed(method: str) -> frozenset[Role]:
    """The roles one of which is needed, if it is not admin. A method that nobody has thought of is for admins."""
    return next((roles for prefix, roles in _NEEDED.items() if method.startswith(prefix)), _ADMIN)
