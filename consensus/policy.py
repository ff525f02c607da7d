"""Who may propose what.  Pure.

Whoever may load a model may place work anywhere, so a learner has that much say.  Who belongs to
the mesh, and who votes, is decided where the mesh's authority key is.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyagent_node.base.errors import Conflict, Refused
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    ClaimSession,
    Command,
    DropCheckpoints,
    PreparePlacement,
    PutCheckpoints,
    RemoveMember,
    RevokeMember,
    SetMeshSetting,
    SetVote,
)

PROPOSERS = ("voter", "learner")
"""Roles that may change what the mesh does; a client only asks."""


def check_proposal(
    command: Command, *, proposer: PeerId, role: str | None, authority: PeerId
) -> None:
    """Raise :class:`Refused` if ``proposer``, in its ``role``, may not propose ``command``.

    ``authority`` is the node that holds the mesh's authority key.  Codes: ``not_authority``,
    ``not_head``, ``not_itself``, ``role_not_allowed``; :class:`Conflict` for what would leave the
    mesh without its authority (``cannot_revoke_writer``, ``cannot_remove_authority``).
    """
    _keep_authority(command, authority)
    match command:
        case AdmitMember() | BurnTicket() | RevokeMember():
            _only_authority(proposer, authority)
        case SetVote() | RemoveMember():
            if command.peer_id != proposer:
                _only_authority(proposer, authority)
        case PutCheckpoints():
            _only_heads(proposer, (each.head for each in command.checkpoints))
            _only_roles(proposer, role, authority, (*PROPOSERS, "client"))
        case DropCheckpoints() | ClaimSession():
            _only_heads(proposer, (command.head,))
            _only_roles(proposer, role, authority, (*PROPOSERS, "client"))
        case PreparePlacement():
            if command.by != proposer:
                raise Refused("A node sees to what it has prepared itself.", code="not_itself")
            _only_roles(proposer, role, authority, PROPOSERS)
        case SetMeshSetting():
            _only_roles(proposer, role, authority, ("voter",))
        case _:
            _only_roles(proposer, role, authority, PROPOSERS)


def _keep_authority(command: Command, authority: PeerId) -> None:
    if isinstance(command, RevokeMember) and command.peer_id == authority:
        raise Conflict(
            "The node that holds the mesh's authority key cannot be revoked.",
            code="cannot_revoke_writer",
        )
    if isinstance(command, RemoveMember) and command.peer_id == authority:
        raise Conflict(
            "The node with the mesh's authority key cannot leave: nobody could join any more.",
            code="cannot_remove_authority",
            remedy="To take work and vote from it, drain it and set its vote to never.",
        )


def _only_authority(proposer: PeerId, authority: PeerId) -> None:
    if proposer != authority:
        raise Refused(
            "Only the node that holds the mesh's authority key changes its membership.",
            code="not_authority",
            remedy=f"Do it on {authority}.",
        )


def _only_heads(proposer: PeerId, heads: Iterable[PeerId]) -> None:
    if any(head != proposer for head in heads):
        raise Refused("A node speaks for the sessions that it serves itself.", code="not_head")


def _only_roles(
    proposer: PeerId, role: str | None, authority: PeerId, roles: tuple[str, ...]
) -> None:
    if proposer != authority and role not in roles:
        raise Refused(
            f"A node with the role {role or 'of a stranger'!r} may not change the mesh.",
            code="role_not_allowed",
            remedy=f"Join with one of the roles: {', '.join(roles)}.",
            role=role or "",
        )
