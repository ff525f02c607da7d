"""The ``Mesh`` port in memory, on trio's clock: latency, cut links, crashed nodes, no sockets.

It keeps the promises and the limits of the real adapter (one conformance suite runs over both) and
is deterministic under ``trio.testing.MockClock``: nothing in it draws a random number.

>>> async with open_network(latency=0.02) as network:                     # doctest: +SKIP
...     a, b = network.node(key_a.peer_id), network.node(key_b.peer_id)
...     await a.connect(b.addresses[0])
...     network.cut(a.peer_id, b.peer_id)
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.limits import HANDSHAKE_SECONDS
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.mesh.authoriser import Authoriser, PeerAdmission
from pyagent_node.node.mesh.memory import MemoryStream
from pyagent_node.node.mesh.settings import MeshLimits
from pyagent_node.node.nurseries import background
from pyagent_node.simulations.mesh_node import SimulatedMesh

__all__ = ["Everyone", "Meddler", "Meter", "SimulatedMesh", "SimulatedNetwork", "open_network"]

log = logging.getLogger("pyagent_node.simulations.mesh")

CUT: Final = "the simulated link was cut"

Pair = frozenset[PeerId]


class Meter(Protocol):
    """Counts frames as they are sent; see ``simulations.traffic``."""

    def frame(self, sender: PeerId, receiver: PeerId, protocol: str, frame: Frame) -> None:
        """Count one frame."""
        ...


Meddler = Callable[[PeerId, PeerId, str, Frame], Sequence[Frame]]
"""Given sender, receiver, protocol and a frame, says what arrives instead."""


class Everyone:
    """An authoriser that admits every peer under a name and a role given for it."""

    def __init__(self, admissions: dict[PeerId, PeerAdmission]) -> None:
        self._admissions = admissions

    def credentials(self) -> bytes:
        """Return nothing: nobody asks for more."""
        return b""

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        """Admit ``peer``."""
        return self._admissions.get(peer, PeerAdmission(peer[-8:], "voter"))


class SimulatedNetwork:
    """The nodes and the links between them; get one from :func:`open_network`."""

    def __init__(self, nursery: trio.Nursery, *, latency: float, limits: MeshLimits) -> None:
        self.limits = limits
        self._nursery = nursery
        self._latency = latency
        self._latencies: dict[Pair, float] = {}
        self._cut: set[Pair] = set()
        self._held: set[tuple[PeerId, PeerId]] = set()
        self._released = trio.Event()
        self.lateness: dict[PeerId, Callable[[], float]] = {}
        """Draws how much later than the latency a frame to or from a node is, in seconds."""
        self.meddler: Meddler | None = None
        """Sees, and may lose, repeat or change, every frame of the streams opened from now on."""
        self.meter: Meter | None = None
        """Counts every frame that is sent on the streams opened from now on."""
        self._nodes: dict[PeerId, SimulatedMesh] = {}
        self._admissions: dict[PeerId, PeerAdmission] = {}
        self._count = 0

    def node(
        self,
        peer_id: PeerId,
        *,
        name: str = "",
        role: str = "voter",
        authoriser: Authoriser | None = None,
    ) -> SimulatedMesh:
        """Add a node, or bring back a crashed one under the same id; it knows nobody yet."""
        if peer_id in self._nodes:
            raise Conflict(f"{peer_id} is running already.", code="node_exists")
        self._admissions[peer_id] = PeerAdmission(name or peer_id[-8:], role)
        self._count += 1
        address = f"/ip4/10.0.{self._count // 256}.{self._count % 256}/tcp/4810/p2p/{peer_id}"
        mesh = SimulatedMesh(
            self, peer_id, address, authoriser or Everyone(self._admissions), self._nursery
        )
        self._nodes[peer_id] = mesh
        return mesh

    async def connect_all(self) -> None:
        """Connect every node with every other one that it can reach."""
        for a in list(self._nodes.values()):
            for b in list(self._nodes.values()):
                if a.peer_id < b.peer_id and self.reachable(a.peer_id, b.peer_id):
                    await a.connect(b.addresses[0])

    def set_latency(self, a: PeerId, b: PeerId, seconds: float) -> None:
        """Set the one-way latency between two nodes for the streams opened from now on."""
        self._latencies[frozenset((a, b))] = seconds
        for mesh in (self._nodes.get(a), self._nodes.get(b)):
            if mesh is not None:
                mesh.forget_infos()

    def latency(self, a: PeerId, b: PeerId) -> float:
        """Return the one-way latency between two nodes, in seconds."""
        return self._latencies.get(frozenset((a, b)), self._latency)

    def cut(self, a: PeerId, b: PeerId) -> None:
        """Cut the link: streams break, both sides see the other go, and nothing gets through."""
        self._cut.add(frozenset((a, b)))
        self._separate(a, b, CUT)

    def heal(self, a: PeerId, b: PeerId) -> None:
        """Mend the link; two nodes that were connected before connect again by themselves."""
        self._cut.discard(frozenset((a, b)))
        first, second = self._nodes.get(a), self._nodes.get(b)
        if first and second and (first.knows(b) or second.knows(a)):
            self._nursery.start_soon(self._reconnect, first, second)

    def hold(self, sender: PeerId, receiver: PeerId) -> None:
        """Stall one direction: what is sent does not arrive, and nobody is told.

        Streams stay open and connections up, as on a network that silently drops packets.
        """
        self._held.add((sender, receiver))
        self._hold(sender, receiver, True)

    def release(self, sender: PeerId, receiver: PeerId) -> None:
        """End a stall: what was under way arrives, in order."""
        self._held.discard((sender, receiver))
        self._hold(sender, receiver, False)
        self._released.set()
        self._released = trio.Event()

    def _hold(self, sender: PeerId, receiver: PeerId, held: bool) -> None:
        for one, other, outgoing in ((sender, receiver, True), (receiver, sender, False)):
            if one in self._nodes:
                self._nodes[one].hold(other, outgoing=outgoing, held=held)

    def held(self, sender: PeerId, receiver: PeerId) -> bool:
        """Say whether what ``sender`` sends to ``receiver`` is stalled."""
        return (sender, receiver) in self._held

    def dress(self, stream: MemoryStream, opener: PeerId, other: PeerId, protocol: str) -> None:
        """Subject a new stream to what holds for the link."""
        stream.hold_outgoing(self.held(opener, other))
        stream.hold_incoming(self.held(other, opener))
        stream.delay(lambda: self._late(opener, other))
        if self.meddler is not None or self.meter is not None:
            tap = _tap(self.meter, self.meddler)
            stream.meddle(
                partial(tap, opener, other, protocol), partial(tap, other, opener, protocol)
            )

    def _late(self, a: PeerId, b: PeerId) -> float:
        lateness = self.lateness
        return sum(lateness[peer]() for peer in (a, b) if peer in lateness) if lateness else 0.0

    async def flowing(self, a: PeerId, b: PeerId) -> None:
        """Wait while either direction is stalled, as a handshake does.

        Raises :class:`DeadlineExceeded` (``dial_timeout``) when that takes too long.
        """
        with trio.move_on_after(HANDSHAKE_SECONDS) as patience:
            while self.held(a, b) or self.held(b, a):
                await self._released.wait()
        if patience.cancelled_caught:
            raise DeadlineExceeded(f"{b} does not answer.", code="dial_timeout")

    def isolate(self, peer: PeerId) -> None:
        """Cut every link of a node."""
        for other in list(self._nodes):
            if other != peer:
                self.cut(peer, other)

    def rejoin(self, peer: PeerId) -> None:
        """Heal every link of a node, also those to nodes that do not run now."""
        for pair in [pair for pair in self._cut if peer in pair]:
            self.heal(*pair)

    def crash(self, peer: PeerId) -> None:
        """Stop a node at once: its handlers are cancelled, its peers see it go."""
        mesh = self._nodes.pop(peer)
        for other in list(self._nodes):
            self._separate(peer, other, "the simulated node crashed")
        mesh.stop()

    def runs(self, peer: PeerId) -> bool:
        """Say whether a node runs."""
        return peer in self._nodes

    def reachable(self, a: PeerId, b: PeerId) -> bool:
        """Say whether both nodes run and the link between them is whole."""
        return a in self._nodes and b in self._nodes and frozenset((a, b)) not in self._cut

    def find(self, a: PeerId, b: PeerId) -> SimulatedMesh:
        """Return ``b`` as seen from ``a``; raises :class:`Unavailable` (``peer_unreachable``)."""
        if not self.reachable(a, b):
            raise Unavailable(
                f"{b} cannot be reached.", code="peer_unreachable", refused=b not in self._nodes
            )
        return self._nodes[b]

    def _separate(self, a: PeerId, b: PeerId, reason: str) -> None:
        for one, other in ((a, b), (b, a)):
            if one in self._nodes:
                self._nodes[one].lose(other, reason)

    async def _reconnect(self, a: SimulatedMesh, b: SimulatedMesh) -> None:
        try:
            await a.connect(b.addresses[0])
        except PyAgentError as error:
            log.debug("%s and %s stay apart: %s", a.peer_id, b.peer_id, error)


def _tap(meter: Meter | None, meddler: Meddler | None) -> Meddler:
    """Return what counts each frame under way and lets it be meddled with."""

    def tap(sender: PeerId, receiver: PeerId, protocol: str, frame: Frame) -> Sequence[Frame]:
        if meter is not None:
            meter.frame(sender, receiver, protocol, frame)
        return (frame,) if meddler is None else meddler(sender, receiver, protocol, frame)

    return tap


@asynccontextmanager
async def open_network(
    *, latency: float = 0.0, limits: MeshLimits | None = None
) -> AsyncIterator[SimulatedNetwork]:
    """Run a simulated network; ``latency`` is one way, in seconds of trio's clock."""
    async with background() as nursery:
        yield SimulatedNetwork(nursery, latency=latency, limits=limits or MeshLimits())
