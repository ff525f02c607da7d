"""Takes proposals to the leader, and as the leader into the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from pyagent_node.base.errors import PyAgentError, Refused, error_from_info
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.checks import decode_command, encode_command
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.port import MemberRecord
from pyagent_node.consensus.raft_messages import Propose, Refusal, frame
from pyagent_node.consensus.raft_proposals import Proposals
from pyagent_node.consensus.raft_trouble import no_leader, too_few
from pyagent_node.consensus.replica import Record, proposal_too_old, too_old
from pyagent_node.native import RaftDropped, RaftRefused

if TYPE_CHECKING:
    from pyagent_node.consensus.raft_links import Links
    from pyagent_node.consensus.raft_members import Members
    from pyagent_node.consensus.raft_node import RaftNode

log = logging.getLogger("pyagent_node.consensus.raft")

Authorise = Callable[[Command, PeerId, str | None], None]
"""Raises if the peer, in its role, may not propose the command."""


class Courier:
    """Proposals of this node on their way out, those of all nodes on their way into the log."""

    def __init__(self, mesh: Mesh, members: Members, *, role: str, authorise: Authorise) -> None:
        self.proposals = Proposals()
        self._mesh = mesh
        self._members = members
        self._role = role
        self._authorise = authorise

    def role_of(self, peer: PeerId) -> str | None:
        """Return the role of a peer, ``None`` when it is not connected."""
        if peer == self._mesh.peer_id:
            return self._role
        return next((p.role for p in self._mesh.peers() if p.peer_id == peer), None)

    def may_vote(self, peer: PeerId, member: MemberRecord | None) -> bool:
        """Say whether a peer's certificate, or its record in the log, lets it vote."""
        return self.role_of(peer) == "voter" or (member is not None and member.vote == "always")

    def place(self, node: RaftNode, links: Links, patience: int, short: int) -> None:
        """Send what waits here; what could be sent nowhere for ``patience`` ticks is given up.

        Where there has been no leader for so long and there can be none, too few voters being
        there, a new one waits ``short`` ticks only, and one that was sent to the last leader, who
        may have made the change, waits no longer.
        """
        leader = self._members.peer_of(node.leader) if node.leader else None
        lost = node.leaderless > patience and too_few(self._members, links.peers)
        if lost:
            for pending in self.proposals.orphaned(node.tick, patience):
                pending.settle(no_leader(self._members, links.peers, unknown=True))
        if not node.leads:
            for pending in self.proposals.starved(node.tick, short if lost else patience):
                pending.settle(no_leader(self._members, links.peers))
        if leader is None:
            return
        term = (node.leader, node.core.term)
        resend = node.timing.election_ticks // 2 + 1
        for pending in self.proposals.due(term, node.tick, resend):
            message = Propose(pending.request, pending.data, pending.since)
            if node.leads:
                placed = self.lead(node, links, self._mesh.peer_id, message)
            else:
                placed = links.put(leader, [frame(message)])
            if placed:
                pending.placed = term
                pending.placed_at = node.tick
                pending.sent += 1

    def lead(self, node: RaftNode, links: Links, peer: PeerId, offer: Propose) -> bool:
        """Append a proposal; ``False`` if that is not possible just now."""
        if not node.leads:
            return False
        known = node.history.replica.requests
        if self.proposals.leads(offer.request) or offer.request in known:
            return True
        try:
            data = self._checked(node, peer, offer)
            node.core.propose(data)
        except PyAgentError as error:
            self.refuse(node, links, peer, offer.request, error)
            return True
        except RaftDropped:  # too much is uncommitted, or the leadership is being handed over
            return False
        except RaftRefused as error:
            log.error("the core refused a proposal: %s", error)
            trouble = Refused(str(error), code="bad_command")
            self.refuse(node, links, peer, offer.request, trouble)
            return True
        self.proposals.lead(offer.request, peer)
        return True

    def _checked(self, node: RaftNode, peer: PeerId, offer: Propose) -> bytes:
        """Return the record to append; raises why it must not be."""
        if node.disk.problem is not None:
            raise error_from_info(node.disk.problem)
        command = decode_command(offer.command)
        member = node.history.state.members.get(peer)
        if member is not None and member.revoked is not None:
            raise Refused(f"The membership of {peer} was revoked.", code="revoked")
        self.proposals.check_room(peer)
        self._authorise(command, peer, self.role_of(peer))
        if too_old(offer.since, node.history.index):
            error = proposal_too_old()
            error.facts["index"] = node.history.index
            raise error
        return msgspec.msgpack.encode(
            Record(offer.request, peer, encode_command(command), offer.since)
        )

    def refuse(
        self, node: RaftNode, links: Links, peer: PeerId, request: bytes, error: PyAgentError
    ) -> None:
        """Tell the proposer that its proposal was not appended."""
        node.counters.refused_proposals += 1
        if peer == self._mesh.peer_id:
            self.proposals.refuse(request, error.to_info())
        else:
            log.info("a proposal of %s was refused: %s", peer, error)
            links.put(peer, [frame(Refusal(request, error.to_info()))])
