"""What a running daemon finds when it examines itself: its part of ``doctor``.

What can be seen from outside (disk, memory, clock, files) the command line looks at itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from pyagent_node.node.api.schema import Check, PlacementView
from pyagent_node.node.certificates import read_certificate
from pyagent_node.node.runtime import Node

SLOW_RTT_MS: Final = 150.0
"""Above this round trip a layer pipeline answers slowly."""
SOON: Final = 7 * 86_400.0
"""A certificate with less life than this is worth a word (it renews itself long before)."""


async def examine(node: Node) -> list[Check]:
    """Return the findings, the good ones included."""
    placements = await node.models.placements()
    return [
        _listening(node),
        *_peers(node),
        _agreement(node),
        _certificate(node),
        *_placements(placements),
    ]


def _listening(node: Node) -> Check:
    addresses = node.mesh.addresses
    if addresses:
        return Check(name="listening", result="ok", detail=", ".join(addresses[:4]))
    return Check(
        name="listening",
        result="warning",
        detail="This node listens for no peers; it can only dial others.",
        remedy="Set `listen`, for instance to /ip4/0.0.0.0/tcp/4810.",
    )


def _peers(node: Node) -> Iterator[Check]:
    peers = node.mesh.peers()
    known = [
        m
        for m in node.consensus.state.members.values()
        if m.revoked is None and m.peer_id != node.mesh.peer_id
    ]
    connected = {peer.peer_id for peer in peers}
    away = [m.name for m in known if m.peer_id not in connected]
    if away:
        yield Check(
            name="peers",
            result="warning",
            detail=f"{len(peers)} connected; not connected: {', '.join(sorted(away)[:8])}.",
            remedy="Check that their daemons run and that a firewall lets their ports through.",
        )
    else:
        yield Check(name="peers", result="ok", detail=f"{len(peers)} connected.")
    for peer in peers:
        if peer.rtt_ms is not None and peer.rtt_ms > SLOW_RTT_MS:
            yield Check(
                name=f"round trip to {peer.name}",
                result="warning",
                detail=f"{peer.rtt_ms:.0f} ms.",
                remedy="Every token crosses this link once a rank: prefer nearer nodes.",
            )


def _agreement(node: Node) -> Check:
    status = node.consensus.status()
    if status.leader is None:
        return Check(
            name="agreement",
            result="failed",
            detail="No leader is known; models can be asked, but nothing can be changed.",
            remedy=f"Start the node that writes the log ({_writer(node)}).",
        )
    return Check(
        name="agreement", result="ok", detail=f"{status.role}, {status.index} entries applied."
    )


def _writer(node: Node) -> str:
    writer = node.membership.profile.genesis.writer
    member = node.consensus.state.members.get(writer)
    return member.name if member is not None else writer


def _certificate(node: Node) -> Check:
    encoded = node.membership.profile.certificate
    if not encoded:
        return Check(name="certificate", result="ok", detail="A public mesh needs none.")
    left = read_certificate(encoded).expires - time.time()
    if left < SOON:
        return Check(
            name="certificate",
            result="failed" if left <= 0 else "warning",
            detail="It has expired." if left <= 0 else f"It expires in {left / 3600:.0f} hours.",
            remedy="It renews itself when the node that admits is reachable, and the clock right.",
        )
    return Check(name="certificate", result="ok", detail=f"Valid for {left / 86_400:.0f} days.")


def _placements(placements: tuple[PlacementView, ...]) -> Iterator[Check]:
    for placement in placements:
        bad = [rank for rank in placement.ranks if rank.state != "ready"]
        if not bad:
            yield Check(
                name=f"model {placement.name}",
                result="ok",
                detail=f"{len(placement.ranks)} ranks ready.",
            )
        for rank in bad:
            yield Check(
                name=f"model {placement.name}, rank {rank.rank}",
                result="warning" if rank.state == "loading" else "failed",
                detail=f"{rank.state} on {rank.name}: {rank.detail or 'no details'}",
                remedy="Wait a moment; if it stays so, load the model anew on other nodes.",
            )
