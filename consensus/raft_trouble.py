"""Why nothing can be decided, told to whoever asked for a decision.  Pure."""

from __future__ import annotations

from collections.abc import Collection

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.raft_members import Members


def too_few(members: Members, present: Collection[PeerId]) -> bool:
    """Whether fewer voters than are needed can be reached, of a node that has the log."""
    voters = members.peers_of(members.conf.voters)
    here = sum(1 for peer in voters if peer in present or peer == members.peer)
    return members.me in members.peers and here < len(voters) // 2 + 1


def no_leader(
    members: Members, present: Collection[PeerId], *, unknown: bool = False
) -> Unavailable:
    """Return the error of a node without a leader, of which ``present`` peers are connected.

    ``unknown`` says that a change was sent to one before, who may have made it.
    """
    if members.me not in members.peers:
        return Unavailable(
            "This node has not been given the mesh's log yet.",
            code="no_leader",
            remedy="Connect it to the mesh's voters; the leader sends the log by itself.",
        )
    voters = members.peers_of(members.conf.voters)
    missing = [peer for peer in voters if peer not in present and peer != members.peer]
    needed = len(voters) // 2 + 1
    here = len(voters) - len(missing)
    why = (
        f"{here} of {len(voters)} voters can be reached and {needed} are needed"
        if here < needed
        else "the voters are electing a leader"
    )
    doubt = " The change may have happened; look before repeating it." if unknown else ""
    return Unavailable(
        f"Nothing can be decided at present: {why}.{doubt}",
        code="no_leader",
        remedy=(
            f"Start or reconnect {', '.join(missing[:3])}; what runs goes on meanwhile."
            if missing
            else "Try again in a few seconds."
        ),
        voters=len(voters),
        reachable=here,
        needed=needed,
        missing=max(0, needed - here),
    )
