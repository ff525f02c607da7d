"""Who is behind a Raft id, and whose messages count.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.raft_messages import Hello
from pyagent_node.native import RaftConf

MAX_HEARD = 1024
"""Peers whose last word is remembered."""
ANSWERS: Final = 0
"""Trust in a node without a vote: its answers and questions count."""
LATER_ANSWERS: Final = 1
"""The same, and that there is a later term."""
ALL: Final = 2
"""Trust in a voter."""


def members_of(conf: RaftConf) -> frozenset[int]:
    """Return every Raft id in a configuration."""
    return frozenset((*conf.voters, *conf.learners, *conf.voters_outgoing, *conf.learners_next))


def voters_of(conf: RaftConf) -> frozenset[int]:
    """Return every Raft id whose vote counts."""
    return frozenset((*conf.voters, *conf.voters_outgoing))


class Members:
    """The configuration with the peers in it, and what peers said of themselves.

    ``peers`` is replicated: it comes with configuration entries and snapshots.  ``heard`` is what
    the peers that this node met said last.
    """

    def __init__(self, me: int, peer: PeerId) -> None:
        self.me = me
        self.peer = peer
        self.conf = RaftConf()
        self.peers: dict[int, PeerId] = {}
        self.heard: dict[PeerId, Hello] = {}
        self._by_id: dict[int, PeerId] = {}

    def install(self, conf: RaftConf, peers: dict[int, PeerId]) -> None:
        """Take a snapshot's word."""
        self.conf = conf
        self.peers = dict(peers)

    def change(self, conf: RaftConf, newcomers: dict[int, PeerId]) -> None:
        """Take a committed change; who is in no part of it any more is forgotten."""
        self.conf = conf
        known = {**self.peers, **newcomers}
        self.peers = {each: known[each] for each in sorted(members_of(conf)) if each in known}

    def hear(self, peer: PeerId, hello: Hello) -> None:
        """Note what a peer says of itself."""
        before = self.heard.pop(peer, None)
        if before is not None and before.raft_id != hello.raft_id:
            self._by_id.pop(before.raft_id, None)
        self.heard[peer] = hello
        self._by_id[hello.raft_id] = peer
        if len(self.heard) > MAX_HEARD:
            oldest = next(iter(self.heard))
            self._by_id.pop(self.heard.pop(oldest).raft_id, None)

    def peer_of(self, node_id: int) -> PeerId | None:
        """Return the peer behind a Raft id, ``None`` when nobody said."""
        if node_id == self.me:
            return self.peer
        return self.peers.get(node_id) or self._by_id.get(node_id)

    def id_of(self, peer: PeerId) -> int:
        """Return the present Raft id of a peer.

        Raises :class:`Unavailable` (``peer_unreachable``) for one that was never heard of.
        """
        if peer == self.peer:
            return self.me
        hello = self.heard.get(peer)
        if hello is not None:
            return hello.raft_id
        for node_id, known in self.peers.items():
            if known == peer:
                return node_id
        raise Unavailable(
            f"{peer} cannot be given the log: it was never connected to this node.",
            code="peer_unreachable",
            remedy="Start it, and try again when it shows among the peers.",
            peer_id=peer,
        )

    def peers_of(self, ids: Iterable[int]) -> tuple[PeerId, ...]:
        """Return the peers behind Raft ids, each once, sorted."""
        return tuple(sorted({p for each in ids if (p := self.peer_of(each)) is not None}))

    def reborn(self) -> dict[int, int]:
        """Return the ids of members that lost their logs, with the ids that they have now."""
        found = {}
        for node_id in sorted(members_of(self.conf)):
            peer = self.peers.get(node_id)
            hello = self.heard.get(peer) if peer is not None else None
            if hello is not None and hello.raft_id != node_id:
                found[node_id] = hello.raft_id
        return found

    def trust(
        self,
        peer: PeerId,
        hello: Hello,
        *,
        leader: int,
        lonely: bool,
        may_vote: Callable[[PeerId], bool],
    ) -> int | None:
        """Say how much Raft messages of ``peer`` count; ``None``: not at all.

        Everything (:data:`ALL`) that the voters of the configuration say, the leader that is
        followed, and one that a voter names.  Learners only answer (:data:`ANSWERS`): they cannot
        lead, stand for election or end a term.  A node that is in no configuration, or that has
        seen no leader for long (its configuration may be an old one), also listens to whoever
        claims to vote and may, or is named by such a one; ``may_vote`` tells by certificates.
        """
        sender, members, voters = hello.raft_id, members_of(self.conf), voters_of(self.conf)
        if sender in voters or sender == leader:
            return ALL
        lost = lonely or self.me not in members
        if lost and hello.voter and may_vote(peer):
            return ALL
        for other, said in self.heard.items():
            witness = said.raft_id in voters or (lost and said.voter and may_vote(other))
            if witness and said.leader == sender and other != peer:
                return ALL
        return ANSWERS if sender in members else None
