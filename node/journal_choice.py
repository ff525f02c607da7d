"""Which peers keep the copies of a session's journal.  Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

from pyagent_node.base.mesh import PeerInfo
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.consensus.port import ClusterState
from pyagent_node.native import blake3

_UNKNOWN_RTT_MS: Final = 50.0


def usable_peers(peers: Sequence[PeerInfo], state: ClusterState) -> list[PeerInfo]:
    """Return the peers that may be given something to keep: members in force that are not leaving.

    A public mesh has no list of members; whoever is connected will do.
    """
    found = []
    for peer in peers:
        member = state.members.get(peer.peer_id)
        if member is None or not (
            member.revoked is not None or member.removed_at is not None or member.draining
        ):
            found.append(peer)
    return found


def choose_holders(
    session: SessionId,
    copies: int,
    peers: Sequence[PeerInfo],
    *,
    current: Collection[PeerId],
    shunned: Collection[PeerId],
) -> tuple[PeerId, ...]:
    """Return up to ``copies`` of ``peers``: those that hold it already, then the nearest ones.

    Peers of about the same round trip (within a factor of two) share the sessions among them by
    rendezvous hashing; nodes that only ask (role ``client``) come last, ``shunned`` ones never.
    """

    def order(peer: PeerInfo) -> tuple[bool, bool, int, bytes]:
        rtt = _UNKNOWN_RTT_MS if peer.rtt_ms is None else max(peer.rtt_ms, 1.0)
        draw = blake3(f"{session}/{peer.peer_id}".encode())
        return (
            peer.peer_id not in current,
            peer.role == "client",
            math.frexp(rtt)[1],
            draw,
        )

    able = [peer for peer in peers if peer.peer_id not in shunned]
    return tuple(peer.peer_id for peer in sorted(able, key=order)[:copies])
