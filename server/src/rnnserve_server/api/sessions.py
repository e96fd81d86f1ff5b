"""rnnserve.v1.SessionService."""

from __future__ import annotations

from typing import Any

import grpc

from rnnserve.codec import decode_named, encode_named
from rnnserve.v1 import session_pb2 as pb
from rnnserve.v1 import session_pb2_grpc
from rnnserve_server.access.caller import caller
from rnnserve_server.api.errors import told
from rnnserve_server.api.messages import create_session, page, page_number, session_message, session_messages
from rnnserve_server.core import Core
from rnnserve_server.states import export_session, fork, get_state, import_session, rewind

Context = grpc.aio.ServicerContext[Any, Any]

_PAGE = 1000


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """See session.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @told
    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        """See SessionService.CreateSession."""
        return pb.CreateSessionResponse(session=session_message(await create_session(self._core, request.config)))

    @told
    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """See SessionService.GetSession."""
        return pb.GetSessionResponse(session=session_message(await self._core.show(_id(request))))

    @told
    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        """See SessionService.ListSessions."""
        core, who = self._core, caller()
        scope = "" if who.sees_all else who.scope
        if core.keeper is not None:
            most = min(max(request.page_size, 0) or _PAGE, _PAGE)
            heads = await core.keeper.page(request.page_token, most + 1, request.model, scope)
            stored, token = page(heads, request.page_size, _PAGE, lambda head: head.cursor)
            shown = [core.sessions.get(each.id) if core.sessions.is_stored(each.id) else each for each in stored]
            return pb.ListSessionsResponse(sessions=await session_messages(shown), next_page_token=token)
        number = page_number(request.page_token)
        after = core.sessions.of(scope, number, request.model) if scope else core.sessions.after(number, request.model)
        sessions, token = page(after, request.page_size, _PAGE, lambda session: str(session.number))
        return pb.ListSessionsResponse(sessions=await session_messages(sessions), next_page_token=token)

    @told
    async def ResetSession(self, request: pb.ResetSessionRequest, context: Context) -> pb.ResetSessionResponse:
        """See SessionService.ResetSession."""
        session = await self._core.reset_session(
            _id(request),
            decode_named(request.states, "states"),
            request.step if request.HasField("step") else None,
        )
        return pb.ResetSessionResponse(session=session_message(session))

    @told
    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        """See SessionService.DeleteSession."""
        await self._core.delete_session(_id(request))
        return pb.DeleteSessionResponse()

    @told
    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        """See SessionService.GetState."""
        session, states = await get_state(self._core, _id(request))
        return pb.GetStateResponse(session=session_message(session), states=encode_named(states))

    @told
    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        """See SessionService.ForkSession."""
        scope = caller().scope
        ids = [scope + each for each in request.session_ids]
        made = await fork(self._core, _id(request), request.count, ids, scope)
        return pb.ForkSessionResponse(sessions=map(session_message, made))

    @told
    async def ExportSession(self, request: pb.ExportSessionRequest, context: Context) -> pb.ExportSessionResponse:
        """See SessionService.ExportSession."""
        return pb.ExportSessionResponse(blob=await export_session(self._core, _id(request)))

    @told
    async def ImportSession(self, request: pb.ImportSessionRequest, context: Context) -> pb.ImportSessionResponse:
        """See SessionService.ImportSession."""
        scope = caller().scope
        session_id = scope + request.session_id if request.session_id else ""
        session = await import_session(self._core, request.blob, session_id, scope)
        return pb.ImportSessionResponse(session=session_message(session))

    @told
    async def RewindSession(self, request: pb.RewindSessionRequest, context: Context) -> pb.RewindSessionResponse:
        """See SessionService.RewindSession."""
        session = await rewind(self._core, _id(request), request.step)
        return pb.RewindSessionResponse(session=session_message(session))


def _id(request: Any) -> str:
    """The id that the server keeps of the session that a request names."""
    return caller().scoped(request.session_id)
