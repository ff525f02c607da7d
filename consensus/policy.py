"""Who may propose what.  Pure."""

from __future__ import annotations

from pyagent_node.base.errors import Conflict, Refused
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import AdmitMember, BurnTicket, Command, RevokeMember

PROPOSERS = ("voter", "learner")
"""Roles that may change what the mesh does; a client only asks."""


def check_proposal(command: Command, *, proposer: PeerId, role: str | None, leader: PeerId) -> None:
    """Raise :class:`Refused` if ``proposer``, in its ``role``, may not propose ``command``.

    Membership is the business of the node that holds the mesh's authority key, the ``leader``.
    """
    if isinstance(command, RevokeMember) and command.peer_id == leader:
        raise Conflict(
            "The node that writes the log cannot be revoked.", code="cannot_revoke_writer"
        )
    if proposer == leader:
        return
    if isinstance(command, AdmitMember | BurnTicket | RevokeMember):
        raise Refused(
            "Only the node that holds the mesh's authority key changes its membership.",
            code="not_authority",
            remedy=f"Do it on {leader}.",
        )
    if role not in PROPOSERS:
        raise Refused(
            f"A node with the role {role or 'of a stranger'!r} may not change the mesh.",
            code="role_not_allowed",
            remedy="Join as a learner to load models.",
            role=role or "",
        )
