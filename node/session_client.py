"""The client's part for sessions: list them, move them, write them out, read them in."""

from __future__ import annotations

from urllib.parse import quote

from pyagent_node.base.types import SessionId
from pyagent_node.node.api.schema import ADMIN_PREFIX
from pyagent_node.node.api.session_schema import (
    ImportReply,
    MoveReply,
    MoveRequest,
    SessionsReply,
)
from pyagent_node.node.client_transport import Transport, decode


class SessionClient:
    """Asks the daemon about sessions."""

    def __init__(self, transport: Transport) -> None:
        self._api = transport

    def list(self) -> SessionsReply:
        """Return the sessions that the node knows of."""
        return self._api.get("/sessions", SessionsReply)

    def move(self, session: str, to: str) -> MoveReply:
        """Let the node ``to`` (name or peer id) head a session; its reader goes on reading."""
        request = MoveRequest(session=SessionId(session), to=to)
        return self._api.post("/sessions/move", request, MoveReply)

    def write_out(self, session: str) -> bytes:
        """Return a session as the bytes of a file that :meth:`read_in` takes."""
        path = f"{ADMIN_PREFIX}/sessions/{quote(session, safe='')}/export"
        return self._api.request("GET", path, None)

    def read_in(self, data: bytes) -> ImportReply:
        """Go on with a session that was written out, under a new id."""
        reply = self._api.request("POST", f"{ADMIN_PREFIX}/sessions/import", data)
        return decode(reply, ImportReply)
