"""What leaves a Raft node: messages of its core on their way to the streams, and all it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pyagent_node.consensus.raft_messages import pieces
from pyagent_node.consensus.raft_pace import heartbeat_due

if TYPE_CHECKING:
    from pyagent_node.consensus.raft_links import Links, Sent
    from pyagent_node.consensus.raft_node import RaftNode


def send(node: RaftNode, links: Links, to: int, kind: str, data: bytes) -> None:
    """Queue a Raft message for the node with the id ``to``; the core is told when it gets lost."""
    learners = node.members.conf.learners
    if kind == "heartbeat" and to in learners:
        beat = node.tick // node.timing.heartbeat_ticks
        if not heartbeat_due(to, len(learners), beat):
            return
    peer = node.members.peer_of(to)
    sent: Sent | None = None
    if kind == "snapshot":

        def report(ok: bool) -> None:
            node.snapshots_sent.append((to, ok))
            node.poke()

        sent = report
    if peer is not None and links.put(peer, pieces(to, data), sent):
        return
    node.lost.add(to)
    if sent is not None:
        sent(False)


def counted(node: RaftNode, links: Links) -> dict[str, int]:
    """Return what the parts of an engine count; see ``Consensus.counters``."""
    streams = msgspec.structs.asdict(links.counters)
    core = msgspec.structs.asdict(node.counters)
    core |= msgspec.structs.asdict(node.applier.counters)
    core["writes"] = node.disk.writes
    refused = sum(each["refused_messages"] for each in (streams, core))
    return {**streams, **core, "refused_messages": refused}
