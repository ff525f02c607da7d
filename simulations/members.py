"""The simulated swarm's mesh: its genesis and everybody's certificates.

Membership is the real one: certificates are verified when nodes meet, proposals when they are made,
and whoever was removed or revoked is cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

from pyagent_node.node.certificates import DAY, Certificate, issue
from pyagent_node.node.genesis import Genesis, new_genesis
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.membership import Membership
from pyagent_node.node.profiles import MeshProfile
from pyagent_node.node.swarm_key import PSK_BYTES
from pyagent_node.simulations.pipeline import peer

EPOCH: Final = 1_800_000_000.0
"""Unix seconds on every machine's clock when a run begins."""
ISSUED: Final = int(EPOCH) - DAY
AUTHORITY: Final = NodeKey(b"the authority of a simulated one")
GENESIS: Final[Genesis] = new_genesis(
    "simulated",
    "private",
    authority=AUTHORITY.peer_id,
    writer=peer(0),
    created=ISSUED,
    nonce=bytes(16),
    engine="raft-rs",
)


@cache
def certificate_of(number: int) -> bytes:
    """Return the certificate of node ``number``, a voter."""
    return issue(
        AUTHORITY,
        Certificate(
            GENESIS.mesh_id, peer(number), f"n{number}", "voter", ISSUED, ISSUED + 365 * DAY
        ),
    )


def membership_of(number: int, wall: Callable[[], float]) -> Membership:
    """Return the membership of node ``number``, whose clock is ``wall``; node 0 admits others."""
    profile = MeshProfile(
        GENESIS,
        name=f"n{number}",
        role="voter",
        psk=bytes(PSK_BYTES),
        certificate=certificate_of(number),
        authority_key=None if number else AUTHORITY,
    )
    return Membership(profile, clock=wall)
