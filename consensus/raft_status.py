"""What a Raft engine says of itself.  Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.port import ConsensusStatus, PeerProgress
from pyagent_node.consensus.raft_core import Status
from pyagent_node.consensus.raft_members import Members, voters_of
from pyagent_node.consensus.raft_trouble import no_leader

_Role = Literal["leader", "follower", "candidate", "learner", "client"]
_ROLES: dict[str, _Role] = {
    "leader": "leader",
    "follower": "follower",
    "candidate": "candidate",
    "precandidate": "candidate",
    "learner": "learner",
}


def status_of(
    engine: str,
    core: Status,
    members: Members,
    *,
    client: bool,
    leader: int,
    index: int,
    problem: ErrorInfo | None,
    present: Collection[PeerId],
) -> ConsensusStatus:
    """Return the port's view of a core; ``leader`` is a Raft id, 0 for none, ``index`` applied.

    Without a ``problem`` of its own a node that has no leader says why.
    """
    conf = members.conf
    voters = voters_of(conf)
    known = members.peer_of(leader) if leader else None
    if problem is None and known is None:
        problem = no_leader(members, present).to_info()
    return ConsensusStatus(
        engine=engine,
        role="client" if client else _ROLES[core.role],
        leader=known,
        index=index,
        problem=problem,
        term=core.term,
        commit=core.commit,
        voters=members.peers_of(voters),
        learners=members.peers_of({*conf.learners, *conf.learners_next} - voters),
        joint=conf.joint,
        progress=tuple(
            PeerProgress(peer, node_id in voters, matched, active or node_id == members.me)
            for node_id, matched, active, _ in core.progress
            if (peer := members.peer_of(node_id)) is not None
        ),
    )


def successor(status: ConsensusStatus, me: PeerId) -> PeerId | None:
    """Return who should lead after ``me``, which leads: the active voter that is furthest."""
    others = [p for p in status.progress if p.voter and p.active and p.peer_id != me]
    if status.role != "leader" or not others:
        return None
    return max(others, key=lambda each: (each.matched, each.peer_id)).peer_id
