"""rnnserve.v1.SessionService."""

from __future__ import annotations

from typing import Any

import grpc

from rnnserve.codec import decode_named
from rnnserve.v1 import session_pb2 as pb
from rnnserve.v1 import session_pb2_grpc
from rnnserve_server.api.errors import told
from rnnserve_server.api.messages import create_session, page, page_number, session_message
from rnnserve_server.core import Core

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
        return pb.GetSessionResponse(session=session_message(await self._core.show(request.session_id)))

    @told
    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        """See SessionService.ListSessions."""
        core = self._core
        if core.keeper is not None:
            most = min(max(request.page_size, 0) or _PAGE, _PAGE)
            heads = await core.keeper.page(request.page_token, most + 1, request.model)
            stored, token = page(heads, request.page_size, _PAGE, lambda head: head.cursor)
            shown = [core.sessions.get(each.id) if each.id in core.sessions else each for each in stored]
            return pb.ListSessionsResponse(sessions=map(session_message, shown), next_page_token=token)
        after = core.sessions.after(page_number(request.page_token), request.model)
        sessions, token = page(after, request.page_size, _PAGE, lambda session: str(session.number))
        return pb.ListSessionsResponse(sessions=map(session_message, sessions), next_page_token=token)

    @told
    async def ResetSession(self, request: pb.ResetSessionRequest, context: Context) -> pb.ResetSessionResponse:
        """See SessionService.ResetSession."""
        session = await self._core.reset_session(
            request.session_id,
            decode_named(request.states, "states"),
            request.step if request.HasField("step") else None,
        )
        return pb.ResetSessionResponse(session=session_message(session))

    @told
    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        """See SessionService.DeleteSession."""
        await self._core.delete_session(request.session_id)
        return pb.DeleteSessionResponse()
