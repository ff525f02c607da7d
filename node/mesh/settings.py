"""What a mesh is opened with, and the counters it keeps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from pyagent_node.base import limits
from pyagent_node.base.types import PeerId
from pyagent_node.node.mesh.authoriser import Authoriser
from pyagent_node.node.shaping import Shape


class MeshKey(Protocol):
    """The node's Ed25519 key, as far as the mesh needs it (``node.identity.NodeKey`` is one)."""

    @property
    def peer_id(self) -> PeerId:
        """The peer id of the key."""
        ...

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        ...


@dataclass(frozen=True, slots=True)
class MeshLimits:
    """Bounds of one mesh; times in seconds, sizes in bytes."""

    max_peers: int = limits.MAX_PEERS
    max_streams_per_peer: int = limits.MAX_STREAMS_PER_PEER
    max_unauthorised: int = 64
    """Inbound connections that are not authorised yet; more are closed at once."""
    max_header: int = limits.MAX_HEADER
    max_tail: int = limits.MAX_TAIL
    handshake_seconds: float = limits.HANDSHAKE_SECONDS
    dial_seconds: float = limits.DIAL_SECONDS
    join_seconds: float = 30.0
    """Longest life of a connection that is only used to join."""
    ping_seconds: float = 5.0
    """Time between two measurements of a round trip; longer with many peers (``ping.pause``)."""
    silence_seconds: float = 20.0
    """A peer that answers no ping for this long is taken for gone."""
    backoff_first: float = 0.5
    backoff_most: float = 60.0
    """Bounds of the wait before dialling again; see ``mesh.book``."""


@dataclass(slots=True)
class MeshMetrics:
    """Counters of one mesh since it was opened."""

    frames_in: int = 0
    frames_out: int = 0
    bytes_in: int = 0
    """Bytes of frames received, on the inside of the encryption."""
    bytes_out: int = 0
    connections_in: int = 0
    """Inbound connections that were authorised."""
    connections_out: int = 0
    """Outbound connections that were authorised."""
    dial_failures: int = 0
    reconnects: int = 0
    """Times that a peer we had lost was connected again."""
    handler_errors: int = 0
    """Streams that ended because their handler raised."""
    streams_failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The same, by protocol and the error's code."""
    refused: Counter[str] = field(default_factory=Counter)
    """Connections and streams refused, by the error's code."""


@dataclass(frozen=True, slots=True, repr=False)
class MeshConfig:
    """How to open a mesh.

    ``listen`` and ``announce`` are multiaddresses (``/ip4/127.0.0.1/tcp/0``); nothing is listened
    on unless it is named here.  ``announce`` is told to peers instead of the addresses listened on
    (a forwarded port).  ``bootstrap`` are addresses ending in ``/p2p/<peer id>`` that are kept
    connected.  ``fingerprint`` names the mesh on the local network when ``mdns`` is on (a hash of
    the mesh id; never a secret).
    """

    key: MeshKey
    membership: Authoriser
    psk: bytes | None = None
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    mdns: bool = False
    fingerprint: str = ""
    limits: MeshLimits = field(default_factory=MeshLimits)
    metrics: MeshMetrics = field(default_factory=MeshMetrics)
    clock: Callable[[], float] = trio.current_time
    rng: random.Random = field(default_factory=random.SystemRandom)
    shape: Shape | None = None
    """What the links of this node are made to be like, for trying things out."""

    def __repr__(self) -> str:
        private = "private" if self.psk else "public"
        return f"MeshConfig({self.key.peer_id}, {private}, listen={self.listen})"
