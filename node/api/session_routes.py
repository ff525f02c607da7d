"""The admin API's routes about sessions: list them, move them, write them out, read them in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import msgspec
from fastapi import APIRouter, Request, Response

from pyagent_node.base.types import SessionId
from pyagent_node.node.api.errors import decode_body
from pyagent_node.node.api.exchange import Reply
from pyagent_node.node.api.session_schema import (
    ImportReply,
    MoveReply,
    MoveRequest,
    SessionsReply,
)

_MOVE = msgspec.json.Decoder(MoveRequest)


class SessionServices(Protocol):
    """What operators can ask of sessions.  Raises errors of ``pyagent_node.base.errors`` only."""

    async def list(self) -> SessionsReply:
        """Return the sessions that this node knows of."""
        ...

    async def move(self, request: MoveRequest) -> MoveReply:
        """Let another node head a session; its reader here goes on reading."""
        ...

    async def write_out(self, session: SessionId) -> dict[str, str]:
        """Return a session of this node as a JSON object that :meth:`read_in` takes."""
        ...

    async def read_in(self, data: bytes) -> ImportReply:
        """Go on with a session that was written out, under a new id."""
        ...


def session_router(
    sessions: SessionServices, reply: Callable[[Callable[[], Awaitable[object]]], Reply]
) -> APIRouter:
    """Return the routes, to be mounted in the admin API; ``reply`` answers with a result."""
    router = APIRouter()

    @router.get("/sessions")
    async def rows() -> Response:
        return reply(sessions.list)

    @router.post("/sessions/move")
    async def move(request: Request) -> Response:
        return reply(partial(sessions.move, decode_body(await request.body(), _MOVE)))

    @router.get("/sessions/{session}/export")
    async def write_out(session: str) -> Response:
        return reply(partial(sessions.write_out, SessionId(session)))

    @router.post("/sessions/import")
    async def read_in(request: Request) -> Response:
        return reply(partial(sessions.read_in, await request.body()))

    return router
