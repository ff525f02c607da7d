"""The replicated state itself, and what its changes have in common.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import Conflict, LimitExceeded, NotFound, Refused
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank, SessionId
from pyagent_node.consensus.commands import Checkpoint, ModelRecord
from pyagent_node.consensus.port import MemberRecord
from pyagent_node.consensus.settings import effective_settings


class Burn(msgspec.Struct, frozen=True):
    """Who redeemed a ticket, and when the ticket itself expires (Unix seconds)."""

    peer_id: PeerId
    expires: int


class State(msgspec.Struct, frozen=True):
    """The state after ``index`` entries; implements ``ClusterState``.

    ``last_epoch`` is the highest epoch ever given; epochs are never given twice.
    ``changed_settings`` holds the settings that somebody set.
    """

    index: int = 0
    members: Mapping[PeerId, MemberRecord] = {}
    burnt: Mapping[str, Burn] = {}
    models: Mapping[Digest, ModelRecord] = {}
    placements: Mapping[Digest, Placement] = {}
    last_epoch: int = 0
    checkpoints: Mapping[SessionId, Checkpoint] = {}
    buckets: tuple[tuple[PeerId, ...], ...] = ()
    bucket_epoch: int = 0
    changed_settings: Mapping[str, int] = {}
    prepared: Mapping[Digest, Prepared] = {}
    contexts: Mapping[str, ContextInfo] = {}

    @property
    def burnt_tickets(self) -> Mapping[str, PeerId]:
        """Ticket ids that were redeemed, with who did."""
        return {ticket: burn.peer_id for ticket, burn in self.burnt.items()}

    @property
    def settings(self) -> Mapping[str, int]:
        """Every mesh setting with its value, defaults included."""
        return effective_settings(self.changed_settings)


def is_member(record: MemberRecord) -> bool:
    """Say whether a peer that was admitted once is in the mesh still."""
    return record.revoked is None and record.removed_at is None


def member_of(state: State, peer: PeerId) -> MemberRecord:
    """Return a member's record.

    Raises :class:`NotFound` (``member_not_found``) and :class:`Refused` (``revoked``, ``removed``).
    """
    known = state.members.get(peer)
    if known is None:
        raise NotFound(f"{peer} is not a member.", code="member_not_found")
    refuse_outsider(state, peer)
    return known


def refuse_outsider(state: State, peer: PeerId) -> None:
    """Raise :class:`Refused` (``revoked``, ``removed``) if the peer was a member and is no more.

    A peer that never was one may pass: in a public mesh anybody takes part.
    """
    known = state.members.get(peer)
    if known is not None and known.revoked is not None:
        raise revoked(peer)
    if known is not None and known.removed_at is not None:
        raise Refused(
            f"{peer} left the mesh.",
            code="removed",
            remedy="Let it join again with a new ticket.",
            peer_id=peer,
        )


def refuse_outsiders(state: State, peers: Iterable[PeerId]) -> None:
    """Raise what :func:`refuse_outsider` raises for the first peer that is one."""
    for peer in peers:
        refuse_outsider(state, peer)


def holders(ranks: Iterable[Rank]) -> frozenset[PeerId]:
    """Return every node that holds layers of these ranks, or could take them over."""
    return frozenset(
        peer for rank in ranks for peer in (rank.peer_id, *rank.standbys, *rank.spares)
    )


def unprepared(state: State, peer: PeerId) -> State:
    """Return the state without the preparations that count on ``peer``, or that it sees to."""
    rest = {
        model: each
        for model, each in state.prepared.items()
        if peer != each.by and peer not in holders(each.ranks)
    }
    if len(rest) == len(state.prepared):
        return state
    return msgspec.structs.replace(state, prepared=rest)


def revoked(peer: PeerId) -> Refused:
    """Return the refusal of a peer whose membership was revoked."""
    return Refused(
        f"The membership of {peer} was revoked.",
        code="revoked",
        remedy="A revoked node needs a new identity and a new invitation.",
        peer_id=peer,
    )


def room(what: str, count: int, limit: int) -> None:
    """Raise :class:`LimitExceeded` (``state_full``) unless ``count`` is below ``limit``."""
    if count >= limit:
        raise LimitExceeded(
            f"The mesh holds {limit} {what}, which is the most it can.",
            code="state_full",
            limit=limit,
        )


def stale_epoch(what: str, seen: int, epoch: int) -> Conflict:
    """Return the refusal of a change to something that somebody else changed meanwhile."""
    return Conflict(
        f"The {what} changed: its epoch is {epoch}, not {seen}.",
        code="stale_epoch",
        remedy="Look at it again and repeat the change if it still makes sense.",
        epoch=epoch,
    )
