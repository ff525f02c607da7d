"""What commands about sessions in progress do to the state.  Pure."""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import Conflict, NotFound
from pyagent_node.base.types import SessionId
from pyagent_node.consensus.cluster import State, refuse_outsider, room
from pyagent_node.consensus.commands import (
    Checkpoint,
    ClaimSession,
    DropCheckpoints,
    PutCheckpoints,
)

MAX_CHECKPOINTS = 2048


def put_checkpoints(state: State, command: PutCheckpoints) -> State:
    """Record or renew checkpoints, all or none, and forget those that expired.

    Of a session that another head claimed, the former head's checkpoints change nothing.
    """
    kept = {
        session: each for session, each in state.checkpoints.items() if each.expires >= command.at
    }
    for checkpoint in command.checkpoints:
        if checkpoint.expires < command.at:
            continue
        known = kept.get(checkpoint.session)
        if known is None:
            refuse_outsider(state, checkpoint.head)
            room("sessions that can be resumed", len(kept), MAX_CHECKPOINTS)
        elif (known.head, known.claim) != (checkpoint.head, checkpoint.claim):
            continue
        kept[checkpoint.session] = checkpoint
    return _with_checkpoints(state, kept)


def drop_checkpoints(state: State, command: DropCheckpoints) -> State:
    """Forget sessions of one head."""
    ended = set(command.sessions)
    rest = {
        session: each
        for session, each in state.checkpoints.items()
        if session not in ended or each.head != command.head
    }
    return _with_checkpoints(state, rest)


def claim(state: State, command: ClaimSession) -> State:
    """Give a session another head; it then has the mesh's ``session_ttl`` to renew it."""
    known = state.checkpoints.get(command.session)
    if known is None or known.expires < command.at:
        raise NotFound(
            f"There is no session {command.session} to resume.",
            code="session_not_found",
            remedy="It ended, or the time in which it could be resumed is over.",
        )
    if known.claim != command.after_claim:
        raise Conflict(
            f"Another node resumed the session {command.session}.",
            code="session_claimed",
            remedy=f"Ask {known.head} for it.",
            head=known.head,
            claim=known.claim,
        )
    refuse_outsider(state, command.head)
    taken = msgspec.structs.replace(
        known,
        head=command.head,
        claim=known.claim + 1,
        expires=max(known.expires, command.at + state.settings["session_ttl"]),
    )
    return _with_checkpoints(state, {**state.checkpoints, command.session: taken})


def _with_checkpoints(state: State, checkpoints: dict[SessionId, Checkpoint]) -> State:
    return msgspec.structs.replace(state, checkpoints=checkpoints)
