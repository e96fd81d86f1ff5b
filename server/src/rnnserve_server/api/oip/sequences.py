"""Sequences are sessions: which session is whose sequence, how one begins, and how one is told that it is not live."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache

from rnnserve_models.engine.base import Array
from rnnserve_models.load import LoadedModel
from rnnserve_server.access.caller import caller
from rnnserve_server.api.oip.asked import Asked
from rnnserve_server.core import Core
from rnnserve_server.errors import (
    InvalidRequest,
    SequenceNotLive,
    ServiceError,
    SessionAged,
    SessionAway,
    SessionClosed,
    SessionError,
    SessionExists,
    SessionExpired,
    SessionTakenOver,
    SessionUnknown,
)
from rnnserve_server.sessions import Session

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,100}")
_TRIES = 3  # to begin a sequence that others begin too

_ENDED: dict[type[SessionError], str] = {
    SessionClosed: "it has ended, with its last request or because somebody deleted it",
    SessionExpired: "it had no request for longer than its idle lifetime and expired",
    SessionAged: "it came to the end of its lifetime",
    SessionTakenOver: "another server has taken it over",
}


@lru_cache(65536)
def session_id(model: str, sequence: int | str) -> str:
    """The id of a sequence's session. An id that is no session's is represented by its digest.

    Sequences of one id of several models are several sequences, and so are those of a number and its text.
    """
    kind = "i" if isinstance(sequence, int) else "s"
    if _PLAIN.fullmatch(model) and len(model) < 24 and _PLAIN.fullmatch(str(sequence)):
        return f"seq:{model}:{kind}:{sequence}"
    named = hashlib.blake2b(f"{len(model)}:{model}:{kind}:{sequence}".encode(errors="surrogatepass"), digest_size=16)
    return f"seq:{kind}:{named.hexdigest()}"


class Sequences:
    """The sequences of a server."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._since = core.clock()

    def named(self, model: str, sequence: int | str) -> str:
        """The id of the session of the caller's own sequence: nobody else's has it."""
        return caller().scope + session_id(model, sequence)

    async def find(self, model: str, asked: Asked, version: str) -> Session:
        """The session of a sequence that must be live.

        Raises:
            SequenceNotLive: it is not, and why.
            InvalidRequest: it has another version or other options than are asked for.
            ServiceError: it is stored and cannot be had.
        """
        assert asked.sequence is not None
        core, named = self._core, self.named(model, asked.sequence)
        try:
            session = core.sessions.get(named) if core.keeper is None else await core.session(named)
        except SessionError as error:
            core.repository.get(model, version)  # the model is the first thing to be wrong
            raise self.told(model, asked, error) from error
        group = session.group
        if version and version != group.model.version:
            expected = f"{group.model.version!r}, with which the sequence began, or none"
            raise InvalidRequest("model_version", expected, repr(version))
        for option, value in asked.options.items():
            if getattr(group.options, option) != value:
                raise InvalidRequest(
                    f"parameters.rnnserve_{option}", f"{not value}, with which the sequence began", str(value)
                )
        return session

    def live(self, model: str, asked: Asked) -> Session | None:
        """The session of a sequence, if it is in memory."""
        assert asked.sequence is not None
        named = self.named(model, asked.sequence)
        return self._core.sessions.get(named) if named in self._core.sessions else None

    async def begin(
        self,
        model: LoadedModel,
        asked: Asked,
        batch_size: int,
        options: Mapping[str, bool],
        initial_states: Mapping[str, Array],
    ) -> Session:
        """A new session for a sequence; what the sequence was before has ended.

        Args:
            model: its model.
            asked: what is asked for.
            batch_size: rows of every request.
            options: the layer options.
            initial_states: every state, [batch_size, *shape]; empty for the model's default.

        Raises:
            SessionExists: it is live, and the settings do not restart such ones.
            ServiceError: there is no room, or the store cannot be reached.
        """
        assert asked.sequence is not None
        core, named = self._core, self.named(model.name, asked.sequence)
        own = model.spec.oip.idle_lifetime if model.spec.oip is not None else None
        for attempt in range(_TRIES):
            try:
                group, slots, full = await core.create_sessions(
                    model.name,
                    model.version,
                    batch_size,
                    options,
                    initial_states=dict(initial_states) or None,
                    idle_lifetime=own if asked.idle_lifetime is None else asked.idle_lifetime,
                    lifetime=asked.lifetime,
                    session_ids=[named],
                    scope=caller().scope,
                )
                if full is not None:
                    raise full
                if not (await core.keep(group, slots)).all():
                    raise SessionExists(named)
                return core.sessions.at(group, int(slots[0]))
            except SessionExists:
                if core.settings.sequence_restart == "refuse" or attempt + 1 == _TRIES:
                    raise
                await self._finish(named)
        raise AssertionError("unreachable")

    async def _finish(self, named: str) -> None:
        """Ends what a sequence was before, behind the requests that came before."""
        core = self._core
        try:
            session = await core.session(named, sure=True)
            async with core.turn(session):
                core.sessions.delete(named)
        except (SessionUnknown, SessionClosed, SessionExpired, SessionAged, SessionTakenOver, SessionAway):
            return  # it has ended by itself, or left memory and come back: then that one is in the way, and is next
        await core.settle()

    def told(self, model: str, asked: Asked, error: SessionError) -> ServiceError:
        """Why a sequence is not live, as its client is to hear it."""
        core = self._core
        if isinstance(error, SessionAway) or asked.sequence is None:
            return error
        ended = _ENDED.get(type(error))
        if ended is None:
            up = f"it is unknown to this server, which is up for {core.clock() - self._since:.0f} s"
            ended = f"{up} and has no such sequence in its store"
            if core.keeper is None:
                ended = f"{up} and keeps no sequences from before: it was not started, or the server was restarted"
        shown = caller().told(error)
        assert isinstance(shown, SessionError)
        return SequenceNotLive(model, asked.sequence, shown, ended)
