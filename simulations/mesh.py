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
from collections.abc import AsyncIterator, Callable, Sequence, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.limits import HANDSHAKE_SECONDS
from pyagent_node.base.mesh import FrameStream, PeerEvents, PeerInfo, StreamHandler
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.addresses import check_address, peer_of
from pyagent_node.node.mesh.authoriser import Authoriser, PeerAdmission
from pyagent_node.node.mesh.events import EventHub
from pyagent_node.node.mesh.memory import MemoryStream, memory_pair
from pyagent_node.node.mesh.settings import MeshLimits, MeshMetrics
from pyagent_node.node.nurseries import background
from pyagent_node.simulations.trace import HERE

log = logging.getLogger("pyagent_node.simulations.mesh")

JOIN: Final = "/pyagent/join/1"
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


class SimulatedMesh:
    """One node; implements :class:`~pyagent_node.base.mesh.Mesh`."""

    def __init__(
        self,
        network: SimulatedNetwork,
        peer_id: PeerId,
        address: str,
        authoriser: Authoriser,
        nursery: trio.Nursery,
    ) -> None:
        self.authoriser = authoriser
        self.metrics = MeshMetrics()
        self._network = network
        self._peer_id = peer_id
        self._address = address
        self._nursery = nursery
        self._handlers: dict[str, StreamHandler] = {}
        self._peers: dict[PeerId, tuple[PeerAdmission, bool]] = {}
        self._known: set[PeerId] = set()
        self._infos: list[PeerInfo] | None = None
        """What :meth:`peers` said last, while nothing has changed."""
        self._hearing: set[PeerId] = set()
        """Strangers that are being connected because somebody told of them."""
        self._streams: dict[PeerId, list[MemoryStream]] = {}
        self._most_streams = 0
        self._serving: set[trio.CancelScope] = set()
        self._hub = EventHub()

    @property
    def peer_id(self) -> PeerId:
        """This node's own id."""
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where other nodes of the network can dial this one."""
        return (self._address,)

    def most_streams(self) -> int:
        """Return the greatest number of streams with one peer that this node ever held open."""
        return self._most_streams

    @property
    def connected(self) -> Set[PeerId]:
        """The ids of the connected peers."""
        return self._peers.keys()

    def knows(self, peer: PeerId) -> bool:
        """Say whether this node was ever connected to ``peer``, or heard of it."""
        return peer in self._known

    def peers(self) -> Sequence[PeerInfo]:
        """Return the connected, authorised peers."""
        if self._infos is None:
            self._infos = self._look_at_peers()
        return list(self._infos)

    def forget_infos(self) -> None:
        """Something of a peer, or of a link, is not what it was."""
        self._infos = None

    def _look_at_peers(self) -> list[PeerInfo]:
        return [
            PeerInfo(
                peer_id=peer,
                name=admission.name,
                role=admission.role,
                addresses=self._network.find(self._peer_id, peer).addresses,
                rtt_ms=2000.0 * self._network.latency(self._peer_id, peer),
                outbound=outbound,
            )
            for peer, (admission, outbound) in self._peers.items()
        ]

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve ``protocol``; raises :class:`Conflict` (``handler_exists``)."""
        if protocol in self._handlers:
            raise Conflict(f"{protocol} has a handler already.", code="handler_exists")
        self._handlers[protocol] = handler

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        """Open a stream; see :meth:`pyagent_node.base.mesh.Mesh.open`."""
        await trio.lowlevel.checkpoint()
        if peer == self._peer_id:
            return self._open_on(self, protocol, latency=0.0)
        other = await self._reach(peer)
        return self._open_on(other, protocol, latency=self._network.latency(self._peer_id, peer))

    async def _reach(self, peer: PeerId) -> SimulatedMesh:
        other = self._network.find(self._peer_id, peer)
        await self._network.flowing(self._peer_id, peer)
        if peer not in self._peers:
            if peer not in self._known:
                raise Unavailable(
                    f"{peer} is not connected, and no address of it is known.",
                    code="peer_unreachable",
                )
            await self.connect(other.addresses[0])
        await trio.sleep(2 * self._network.latency(self._peer_id, peer))
        return self._network.find(self._peer_id, peer)

    def _open_on(self, other: SimulatedMesh, protocol: str, *, latency: float) -> MemoryStream:
        handler = other._handlers.get(protocol)
        if handler is None:
            raise Unavailable(
                f"{other.peer_id} does not serve {protocol}.", code="protocol_unsupported"
            )
        held = [s for s in self._streams.get(other.peer_id, ()) if not s.over]
        limits = self._network.limits
        if other is not self and len(held) >= limits.max_streams_per_peer:
            raise LimitExceeded(
                f"This node holds {len(held)} streams to {other.peer_id}, which is the limit.",
                code="too_many_streams",
                limit=limits.max_streams_per_peer,
            )
        ours, theirs = memory_pair(
            self._peer_id,
            other.peer_id,
            latency=latency,
            max_header=limits.max_header,
            max_tail=limits.max_tail,
        )
        self._network.dress(ours, self._peer_id, other.peer_id, protocol)
        self._streams[other.peer_id] = [*held, ours]
        self._most_streams = max(self._most_streams, len(held) + 1)
        self._nursery.start_soon(other._serve, protocol, handler, theirs)
        return ours

    async def _serve(self, protocol: str, handler: StreamHandler, stream: MemoryStream) -> None:
        HERE.set(self._peer_id)  # the opener's task started this one
        with trio.CancelScope() as scope:
            self._serving.add(scope)
            try:
                await handler(stream)
            except PyAgentError as error:
                self.metrics.handler_errors += 1
                log.debug("a %s stream of %s ended with %s", protocol, stream.peer, error.code)
                stream.abort()
            except Exception:
                self.metrics.handler_errors += 1
                log.exception("the handler of %s failed for %s", protocol, stream.peer)
                stream.abort()
            finally:
                self._serving.discard(scope)
                await stream.aclose()

    async def connect(self, address: str) -> PeerId:
        """Dial an address of the network; see :meth:`pyagent_node.base.mesh.Mesh.connect`."""
        await trio.lowlevel.checkpoint()
        peer = PeerId(peer_of(check_address(address, peer=True)) or "")
        if peer == self._peer_id or peer in self._peers:
            return peer
        other = self._at(address)
        await self._network.flowing(self._peer_id, peer)
        await trio.sleep(6 * self._network.latency(self._peer_id, peer))
        other = self._at(other.addresses[0])
        if peer in self._peers:
            return peer
        theirs, ours = other._judge(self), self._judge(other)
        other._gain(self, theirs, outbound=False)
        self._gain(other, ours, outbound=True)
        self._tell_of(other)
        other._tell_of(self)
        return peer

    def _tell_of(self, other: SimulatedMesh) -> None:
        """Let ``other`` connect to the peers that it has never heard of."""
        for stranger in self._known - other._known - other._hearing - {other.peer_id}:
            other._hearing.add(stranger)
            self._nursery.start_soon(other._hear_of, stranger)

    def _at(self, address: str) -> SimulatedMesh:
        peer = PeerId(peer_of(address) or "")
        other = self._network.find(self._peer_id, peer)
        if address not in other.addresses:
            raise Unavailable(f"{address} cannot be reached.", code="peer_unreachable")
        return other

    def _judge(self, other: SimulatedMesh) -> PeerAdmission:
        try:
            limit = self._network.limits.max_peers
            if len(self._peers) >= limit:
                raise LimitExceeded(f"The node has {limit} peers.", code="too_many_peers")
            return self.authoriser.judge(other.peer_id, other.authoriser.credentials())
        except PyAgentError as error:
            self.metrics.refused[error.code] += 1
            raise

    def _gain(self, other: SimulatedMesh, admission: PeerAdmission, *, outbound: bool) -> None:
        self.metrics.reconnects += other.peer_id in self._known
        self._known.add(other.peer_id)
        self._peers[other.peer_id] = (admission, outbound)
        self.forget_infos()
        self._hub.put(other.peer_id, "up")

    async def _hear_of(self, stranger: PeerId) -> None:
        """Connect to a peer that another one told of, as members do."""
        try:
            if stranger not in self._peers:
                await self.connect(self._network.find(self._peer_id, stranger).addresses[0])
        except PyAgentError as error:
            log.debug("%s stays away from %s: %s", self._peer_id, stranger, error)
        finally:
            self._hearing.discard(stranger)

    async def open_join(self, address: str) -> FrameStream:
        """Open a ``/pyagent/join/1`` stream to a node that need not know us yet."""
        await trio.lowlevel.checkpoint()
        other = self._at(check_address(address, peer=True))
        latency = self._network.latency(self._peer_id, other.peer_id)
        await trio.sleep(6 * latency)
        return self._open_on(self._at(address), JOIN, latency=latency)

    def events(self) -> AbstractAsyncContextManager[PeerEvents]:
        """Subscribe to peer events; see :meth:`pyagent_node.base.mesh.Mesh.events`."""
        return self._hub.subscribe(list(self._peers))

    def disconnect(self, peer: PeerId, reason: str) -> None:
        """Part from ``peer`` for good; it may come back by itself."""
        other = self._network.find(self._peer_id, peer)
        self._known.discard(peer)
        self.lose(peer, reason)
        other.lose(self._peer_id, reason)

    def recheck(self) -> None:
        """Judge every connected peer again, and part from who is refused, as the real adapter."""
        for peer in list(self._peers):
            other = self._network.find(self._peer_id, peer)
            try:
                self.authoriser.judge(peer, other.authoriser.credentials())
            except Refused as error:
                self.metrics.refused[error.code] += 1
                self.disconnect(peer, error.message)

    def lose(self, peer: PeerId, reason: str) -> None:
        """The connection to ``peer`` is gone."""
        for stream in self._streams.pop(peer, []):
            stream.cut(reason)
        if self._peers.pop(peer, None) is not None:
            self.forget_infos()
            self._hub.put(peer, "down")

    def hold(self, peer: PeerId, *, outgoing: bool, held: bool) -> None:
        """Stall one direction of every stream opened to ``peer``, or let it flow again."""
        for stream in self._streams.get(peer, []):
            if outgoing:
                stream.hold_outgoing(held)
            else:
                stream.hold_incoming(held)

    def stop(self) -> None:
        """End every handler of this node."""
        for scope in list(self._serving):
            scope.cancel()
        for peer in list(self._peers):
            self.lose(peer, "this node has stopped")


@asynccontextmanager
async def open_network(
    *, latency: float = 0.0, limits: MeshLimits | None = None
) -> AsyncIterator[SimulatedNetwork]:
    """Run a simulated network; ``latency`` is one way, in seconds of trio's clock."""
    async with background() as nursery:
        yield SimulatedNetwork(nursery, latency=latency, limits=limits or MeshLimits())
