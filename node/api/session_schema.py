"""The messages of the admin API about sessions.  As ``schema``: plain values only."""

from __future__ import annotations

from typing import Literal

import msgspec

from pyagent_node.base.types import Digest, PeerId, SessionId


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A session that the mesh knows.

    ``session`` is its id, which is all that reading it takes: only its head and the nodes that
    serve it know it.  ``public`` is the name under which the log knows it.  ``part`` is this
    node's: its ``head``, a ``rank`` of it, or none (``away``).  The counts are 0 for the last.
    ``holders`` are the names of the nodes that keep its journal.
    """

    session: SessionId | None
    public: SessionId
    part: Literal["head", "rank", "away"]
    model: str
    head: PeerId
    head_name: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_second: float = 0.0
    suspended: bool = False
    holders: tuple[str, ...] = ()


class SessionsReply(msgspec.Struct, frozen=True):
    """The sessions that this node knows of."""

    sessions: tuple[SessionRow, ...]


class MoveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Let another node (name or peer id) head a session of this one."""

    session: SessionId
    to: str


class MoveReply(msgspec.Struct, frozen=True, kw_only=True):
    """The session is headed there now; it had so many tokens then."""

    session: SessionId
    peer_id: PeerId
    name: str
    tokens: int


class ImportReply(msgspec.Struct, frozen=True, kw_only=True):
    """A session that goes on here, under a new id, with the tokens that came with it."""

    session: SessionId
    model: Digest
    name: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
