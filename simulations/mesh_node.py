"""One node of the simulated network: the ``Mesh`` port in memory.

It keeps the promises and the limits of the real adapter (one conformance suite runs over both).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import (
    Conflict,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.mesh import FrameStream, PeerEvents, PeerInfo, StreamHandler
from pyagent_node.base.types import PeerId
from pyagent_node.node.addresses import check_address, peer_of
from pyagent_node.node.mesh.authoriser import Authoriser, PeerAdmission
from pyagent_node.node.mesh.events import EventHub
from pyagent_node.node.mesh.memory import MemoryStream, memory_pair
from pyagent_node.node.mesh.settings import MeshMetrics
from pyagent_node.simulations.trace import HERE

if TYPE_CHECKING:
    from pyagent_node.simulations.mesh import SimulatedNetwork

log = logging.getLogger("pyagent_node.simulations.mesh")

JOIN: Final = "/pyagent/join/1"


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
