"""Logs that are lost or damaged: which a swarm can bear, and how a damaged one comes about."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from pyagent_node.consensus.segments import SEGMENT_HEADER_BYTES, decode_segment, encode_record
from pyagent_node.simulations.disk import SimulatedDisk

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

READ_BYTES = 1 << 30


def may_lose_log(swarm: Swarm, machine: Machine) -> bool:
    """Say whether a majority of the voters keep their logs if this machine loses its own.

    A voter that lost its log counts as lost until the mesh has given it a place under a new Raft
    id: what was agreed on may be known to the others alone until then.
    """
    leader = swarm.leader()
    if leader is None or leader.parts is None:
        return False
    consensus = leader.parts.consensus
    status = consensus.status()
    if status.joint:
        return False
    for each in swarm.machines:
        if each.lost_log and each.parts is not None:
            each.lost_log = each.parts.consensus.node_id not in consensus.members.peers
    voters = set(status.voters)
    lost = {m.peer_id for m in swarm.machines if m.lost_log} | {machine.peer_id}
    return 2 * len(lost & voters) < len(voters)


def corrupt(disk: SimulatedDisk, rng: random.Random) -> str | None:
    """Flip a bit of an old file and return its name; ``None`` when there is none.

    The last record of the last segment is left alone: what is wrong with it looks like a write that
    a crash interrupted, and is cut off.
    """
    files = [(name, _old_bytes(disk, name)) for name in disk.names()]
    files = [(name, size) for name, size in files if size]
    if not files:
        return None
    name, size = rng.choice(files)
    disk.flip(name, rng.randrange(size), rng.randrange(8))
    return name


def _old_bytes(disk: SimulatedDisk, name: str) -> int:
    """Return how many bytes at the beginning of a file a node must find as it wrote them."""
    content = disk.read(name, READ_BYTES)
    if not name.endswith(".log"):
        return len(content)
    segment = decode_segment(content, name, last=True)
    if not segment.batches:
        return min(len(content), SEGMENT_HEADER_BYTES)
    return segment.good - len(encode_record(segment.batches[-1]))
