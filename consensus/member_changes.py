"""What commands about members do to the state.  Pure."""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import Conflict, Refused
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.cluster import (
    Burn,
    State,
    is_member,
    member_of,
    refuse_outsider,
    revoked,
    room,
    unprepared,
)
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    RemoveMember,
    RevokeMember,
    SetDraining,
    SetVote,
)
from pyagent_node.consensus.port import MemberRecord

MAX_MEMBERS = 4096
MAX_BURNT = 16_384
FORGET_BURNT_AFTER = 86_400
"""Seconds past its expiry after which a burnt ticket is forgotten (it can do no harm then)."""


def admit(state: State, command: AdmitMember) -> State:
    """Admit a peer, or take the newer certificate of one that is in already.

    Who left comes back as a new member, and only with a certificate from after that.
    """
    known = state.members.get(command.peer_id)
    if known is None:
        room("members", len(state.members), MAX_MEMBERS)
    elif known.revoked is not None:
        raise revoked(command.peer_id)
    elif known.removed_at is not None:
        if command.issued <= known.removed_at:
            refuse_outsider(state, command.peer_id)
        known = None
    for other in state.members.values():
        if other.name == command.name and other.peer_id != command.peer_id and is_member(other):
            raise Conflict(
                f"Another member is called {command.name!r}.",
                code="member_name_taken",
                remedy="Choose another name (setting `name`).",
                peer_id=other.peer_id,
            )
    fresh = MemberRecord(command.peer_id, command.name, command.role, command.certificate)
    if known is not None:
        fresh = msgspec.structs.replace(fresh, vote=known.vote, draining=known.draining)
    return _with_member(state, fresh)


def revoke(state: State, command: RevokeMember) -> State:
    """Let a peer's certificates count no more, for ever."""
    known = state.members.get(command.peer_id)
    if known is not None and known.revoked is not None:
        return state
    if known is None or known.removed_at is None:
        known = member_of(state, command.peer_id)
    gone = msgspec.structs.replace(known, revoked=command.reason)
    return unprepared(_with_member(state, gone), command.peer_id)


def remove(state: State, command: RemoveMember) -> State:
    """Let a peer go; a second time only moves the date."""
    known = state.members.get(command.peer_id)
    if known is not None and known.revoked is None and known.removed_at is not None:
        at = max(known.removed_at, command.at)
        return _with_member(state, msgspec.structs.replace(known, removed_at=at))
    known = member_of(state, command.peer_id)
    gone = msgspec.structs.replace(known, removed_at=command.at, vote="auto", draining=False)
    return unprepared(_with_member(state, gone), command.peer_id)


def set_vote(state: State, command: SetVote) -> State:
    """Note an operator's word on a member's vote."""
    known = member_of(state, command.peer_id)
    if known.role == "client" and command.vote == "always":
        raise Refused(
            f"{known.name} joined as a client and cannot vote.",
            code="role_not_allowed",
            remedy="Let it join again with a ticket for the role voter or learner.",
            role=known.role,
        )
    return _with_member(state, msgspec.structs.replace(known, vote=command.vote))


def set_draining(state: State, command: SetDraining) -> State:
    """Note that a member gets no new work, or gets some again.

    A preparation that counts on a node to be drained is dropped: it would only have to be undone.
    """
    known = member_of(state, command.peer_id)
    after = _with_member(state, msgspec.structs.replace(known, draining=command.draining))
    return unprepared(after, command.peer_id) if command.draining else after


def burn(state: State, command: BurnTicket) -> State:
    """Spend a ticket; of two peers with the same one the first gets it."""
    known = state.burnt.get(command.ticket_id)
    if known is not None:
        if known.peer_id == command.peer_id:
            return state
        raise Refused(
            "The ticket was used already, by another node.",
            code="ticket_used",
            remedy="A ticket admits one node: ask for another one.",
        )
    horizon = command.at - FORGET_BURNT_AFTER
    kept = {ticket: each for ticket, each in state.burnt.items() if each.expires >= horizon}
    room("burnt tickets", len(kept), MAX_BURNT)
    kept[command.ticket_id] = Burn(command.peer_id, command.expires)
    return msgspec.structs.replace(state, burnt=kept)


def draining(state: State, peer: PeerId) -> bool:
    """Say whether the peer must get no new work."""
    known = state.members.get(peer)
    return known is not None and known.draining


def _with_member(state: State, record: MemberRecord) -> State:
    return msgspec.structs.replace(state, members={**state.members, record.peer_id: record})
