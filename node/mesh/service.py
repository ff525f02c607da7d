"""``open_mesh``: the ``Mesh`` port over TCP, Noise and yamux."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import trio

from pyagent_node.base.errors import (
    ConfigError,
    Conflict,
    DeadlineExceeded,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.mesh import FrameStream, PeerEvents, PeerInfo, StreamHandler
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.addresses import check_address, peer_of, without_peer
from pyagent_node.node.mesh import gossip, mdns, ping, sockets
from pyagent_node.node.mesh.authoriser import Authoriser, PeerAdmission
from pyagent_node.node.mesh.book import Book, Source
from pyagent_node.node.mesh.connection import (
    GRACE_SECONDS,
    JOIN,
    MAX_JOIN_HEADER,
    Connection,
)
from pyagent_node.node.mesh.dialling import Dialler
from pyagent_node.node.mesh.events import EventHub
from pyagent_node.node.mesh.handshake import Identity, secure
from pyagent_node.node.mesh.memory import MemoryStream, memory_pair
from pyagent_node.node.mesh.psk import PskCipher
from pyagent_node.node.mesh.settings import MeshConfig
from pyagent_node.node.mesh.streams import ChannelStream
from pyagent_node.node.mesh.wire import Wire
from pyagent_node.node.nurseries import background, deadline

log = logging.getLogger("pyagent_node.mesh")

RETIRE_SECONDS: Final = 2.0
"""Shortest life of a surplus connection, so that both sides know of the better one."""
RECORDS_A_MESSAGE: Final = 8


class _Doorkeeper:
    """The authoriser, and the limit on peers."""

    def __init__(self, inner: Authoriser, mesh: Libp2pMesh) -> None:
        self._inner = inner
        self._mesh = mesh

    def credentials(self) -> bytes:
        return self._inner.credentials()

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        self._mesh.check_room(peer)
        return self._inner.judge(peer, credentials)


class Libp2pMesh:
    """The real :class:`~pyagent_node.base.mesh.Mesh`; get one from :func:`open_mesh`."""

    def __init__(self, config: MeshConfig, nursery: trio.Nursery) -> None:
        self.limits = config.limits
        self.metrics = config.metrics
        self.authoriser: Authoriser = _Doorkeeper(config.membership, self)
        self.handlers: dict[str, StreamHandler] = {}
        self.system: dict[str, Callable[[ChannelStream], Awaitable[None]]] = {
            ping.PROTOCOL: ping.answer_pings,
            gossip.PROTOCOL: self._hear,
        }
        self._config = config
        self._nursery = nursery
        self._identity = Identity(config.key.seed)
        self._connections: dict[PeerId, list[Connection]] = {}
        self._announced: dict[PeerId, list[str]] = {}
        self._lost: set[PeerId] = set()
        self._addresses: list[str] = []
        self._told = trio.Event()
        self._unauthorised = 0
        self._hub = EventHub()
        self._book = Book(
            config.key.peer_id,
            config.rng,
            first=config.limits.backoff_first,
            most=config.limits.backoff_most,
        )
        self._dialler = Dialler(
            self._book,
            self.metrics,
            nursery,
            present=self._present,
            dial_one=self._dial_one,
        )

    # The port ----------------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        """This node's own id."""
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node, each ending in ``/p2p/<peer id>``."""
        return tuple(f"{address}/p2p/{self.peer_id}" for address in self._addresses)

    def peers(self) -> Sequence[PeerInfo]:
        """Return the connected, authorised peers."""
        return [self._info(held[0]) for held in self._connections.values()]

    def _info(self, connection: Connection) -> PeerInfo:
        admission = connection.admission
        name, role = (admission.name, admission.role) if admission else ("", "")
        addresses = self._announced.get(connection.peer) or self._book.addresses(connection.peer)
        return PeerInfo(
            peer_id=connection.peer,
            name=name,
            role=role,
            addresses=tuple(f"{address}/p2p/{connection.peer}" for address in addresses),
            rtt_ms=connection.rtt_ms,
            outbound=connection.outbound,
        )

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve ``protocol``; see :meth:`pyagent_node.base.mesh.Mesh.handle`.

        Raises :class:`Conflict` (``handler_exists``) when it is served already.
        """
        if protocol in self.handlers or protocol in self.system:
            raise Conflict(f"{protocol} has a handler already.", code="handler_exists")
        self.handlers[protocol] = handler

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        """Open a stream; see :meth:`pyagent_node.base.mesh.Mesh.open`.

        Raises also :class:`Unavailable` (``protocol_unsupported``, ``stream_refused``) and
        :class:`LimitExceeded` (``too_many_streams``).
        """
        await trio.lowlevel.checkpoint()
        if peer == self.peer_id:
            return self._open_to_self(protocol)
        seconds = self.limits.dial_seconds + self.limits.handshake_seconds
        message = f"{peer} did not answer within {seconds:g} seconds."
        with deadline(seconds, message, code="peer_timeout", peer=peer):
            connection = await self._dialler.dial(peer)
            try:
                return await connection.open(protocol, system=False)
            except Unavailable as error:
                if error.code != "stream_closed":
                    raise
            # The connection died, or gave way to a better one, while we asked: once more.
            connection = await self._dialler.dial(peer)
            return await connection.open(protocol, system=False)

    async def connect(self, address: str) -> PeerId:
        """Dial an address and authorise the peer, which is then kept connected.

        Raises :class:`InvalidRequest` (``bad_address``), :class:`Unavailable`
        (``peer_unreachable``, ``handshake_failed``), :class:`DeadlineExceeded` and
        :class:`Refused` with the peer's own code (``no_certificate``, ``wrong_mesh``,
        ``wrong_psk``, ``peer_id_mismatch``, ...).
        """
        await trio.lowlevel.checkpoint()
        peer = self._peer_in(address)
        if peer != self.peer_id:
            where = without_peer(address)
            await self._dialler.dial(peer, [where])
            self._book.learn(peer, [where], Source.CONFIGURED, trio.current_time())
            self._book.connected(peer)
        return peer

    def events(self) -> AbstractAsyncContextManager[PeerEvents]:
        """Subscribe to peer events; see :meth:`pyagent_node.base.mesh.Mesh.events`."""
        return self._hub.subscribe(list(self._connections))

    # Beyond the port ---------------------------------------------------------------------------

    async def open_join(self, address: str) -> FrameStream:
        """Open a ``/pyagent/join/1`` stream to a node that need not know us yet.

        The connection is made for this stream alone and ends with it.  Raises as
        :meth:`connect` does, but for the refusals of an authoriser.
        """
        peer = self._peer_in(address)
        connection = await self._dial_one(peer, without_peer(address), joining=True)
        try:
            message = f"{peer} did not answer {JOIN}."
            seconds = self.limits.handshake_seconds
            with deadline(seconds, message, code="peer_timeout"):
                return await connection.open(JOIN, system=False, max_header=MAX_JOIN_HEADER)
        except BaseException:
            connection.link.close()
            raise

    def disconnect(self, peer: PeerId, reason: str) -> None:
        """Close every connection to ``peer`` and do not dial it again by ourselves."""
        self._book.forget(peer)
        for connection in list(self._connections.get(peer, ())):
            connection.link.close(reason)

    def recheck(self) -> None:
        """Judge every connected peer again (a certificate was revoked or has expired)."""
        for held in list(self._connections.values()):
            for connection in list(held):
                try:
                    self._config.membership.judge(connection.peer, connection.credentials)
                except Refused as error:
                    log.warning("disconnecting %s: %s", connection.peer, error)
                    self.metrics.refused[error.code] += 1
                    self.disconnect(connection.peer, error.message)

    def check_room(self, peer: PeerId) -> None:
        """Raise :class:`LimitExceeded` (``too_many_peers``) when there is no room for ``peer``."""
        limit = self.limits.max_peers
        if peer not in self._connections and len(self._connections) >= limit:
            raise LimitExceeded(
                f"The node has {limit} peers, which is its limit.",
                code="too_many_peers",
                limit=limit,
            )

    # Streams to self ---------------------------------------------------------------------------

    def _open_to_self(self, protocol: str) -> MemoryStream:
        handler = self.handlers.get(protocol)
        if handler is None:
            raise Unavailable(f"This node does not serve {protocol}.", code="protocol_unsupported")
        limits = self.limits
        ours, theirs = memory_pair(
            self.peer_id,
            self.peer_id,
            max_header=limits.max_header,
            max_tail=limits.max_tail,
        )
        self._nursery.start_soon(self._serve_self, protocol, handler, theirs)
        return ours

    async def _serve_self(
        self, protocol: str, handler: StreamHandler, stream: MemoryStream
    ) -> None:
        try:
            await handler(stream)
        except Exception:
            self.metrics.handler_errors += 1
            log.exception("the handler of %s failed for this node itself", protocol)
            stream.abort()
        finally:
            await stream.aclose()

    # Connections -------------------------------------------------------------------------------

    def _peer_in(self, address: str) -> PeerId:
        peer = peer_of(check_address(address, peer=True))
        if peer is None:
            raise ConfigError(f"{address} names no peer.", code="bad_address")
        return peer

    def _present(self, peer: PeerId) -> Connection | None:
        for connection in self._connections.get(peer, ()):
            if not connection.link.ended.is_set():
                return connection
        return None

    def _cipher(self) -> PskCipher | None:
        return None if self._config.psk is None else PskCipher(self._config.psk)

    async def _dial_one(self, peer: PeerId, address: str, *, joining: bool = False) -> Connection:
        message = f"{address} did not answer within {self.limits.dial_seconds:g} seconds."
        with deadline(self.limits.dial_seconds, message, code="dial_timeout", address=address):
            wire = await sockets.dial(address, self._cipher())
        connection: Connection = await self._nursery.start(self._run, wire, peer, joining)
        if not joining:
            self._book.connected(peer, address)
        return connection

    async def _inbound(self, stream: trio.SocketStream) -> None:
        """Take a connection; whatever happens on it stays here."""
        if self._unauthorised >= self.limits.max_unauthorised:
            self.metrics.refused["too_many_connections"] += 1
            return
        try:
            wire = sockets.wire_of(stream, self._cipher())
        except OSError as error:  # it was reset before we looked
            log.debug("a connection ended at once: %s", error)
            return
        remote = wire.remote()
        try:
            await self._run(wire, None, False)
        except PyAgentError as error:
            self.metrics.refused[error.code] += 1
            log.info("refused a connection from %s: %s", remote[0], error)

    async def _run(
        self,
        wire: Wire,
        expected: PeerId | None,
        joining: bool,
        task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Secure, authorise and serve one connection until it ends.

        Raises :class:`PyAgentError` only before the connection is up.
        """
        connection: Connection | None = None
        try:
            async with background() as nursery:
                nursery.start_soon(wire.run_writer)
                connection = await self._establish(wire, expected, joining, nursery)
                if not joining:
                    self._up(connection)
                    nursery.start_soon(self._measure, connection)
                    nursery.start_soon(self._tell, connection)
                task_status.started(connection)
                await self._until_over(connection, joining)
        except PyAgentError:
            raise
        except Exception:
            log.exception("the connection to %s failed", connection.peer if connection else "?")
            if connection is None:
                raise Unavailable(
                    "This node failed to make the connection.", code="internal"
                ) from None
        finally:
            wire.close()
            if connection is not None:
                connection.link.close()
                self._down(connection)

    async def _establish(
        self, wire: Wire, expected: PeerId | None, joining: bool, nursery: trio.Nursery
    ) -> Connection:
        limits = self.limits
        inbound = expected is None
        self._unauthorised += inbound
        try:
            with deadline(
                limits.handshake_seconds,
                f"The handshake took more than {limits.handshake_seconds:g} seconds.",
                code="handshake_timeout",
            ):
                private = self._config.psk is not None
                secured = await secure(wire, self._identity, expected=expected, private=private)
                if secured.peer == self.peer_id:
                    raise Refused("A node does not connect to itself.", code="self_connection")
                connection = Connection(self, wire, secured, outbound=not inbound, nursery=nursery)
            if not joining:
                await self._authorise(connection)
            return connection
        finally:
            self._unauthorised -= inbound

    async def _authorise(self, connection: Connection) -> None:
        limits = self.limits
        refusal: PyAgentError = DeadlineExceeded(
            f"The peer was not authorised within {limits.handshake_seconds:g} seconds.",
            code="handshake_timeout",
        )
        try:
            with trio.move_on_after(limits.handshake_seconds):
                await connection.authorise()
                return
            if connection.joining:
                with trio.move_on_after(limits.join_seconds):
                    await connection.link.ended.wait()
        except PyAgentError as error:
            refusal = error
        await connection.part()
        raise refusal

    async def _until_over(self, connection: Connection, joining: bool) -> None:
        if joining:
            with trio.move_on_after(self.limits.join_seconds):
                await connection.idle.wait()
            await connection.part()
            return
        await connection.link.ended.wait()
        with trio.move_on_after(GRACE_SECONDS):
            await connection.served()

    def _up(self, connection: Connection) -> None:
        """Take in an authorised connection; of two to one peer both sides prefer the same."""
        peer = connection.peer
        held = self._connections.setdefault(peer, [])
        if connection.outbound:
            self.metrics.connections_out += 1
        else:
            self.metrics.connections_in += 1
        if not held:
            held.append(connection)
            self.metrics.reconnects += peer in self._lost
            self._lost.discard(peer)
            self._book.connected(peer)
            self._hub.put(peer, "up")
            log.info("connected to %s (%s)", peer, self._info(connection).name)
            return
        current = held[0]
        if connection.outbound == current.outbound:
            held.insert(0, connection)
            current.link.close("the peer connected anew")
            return
        dialled_by_smaller = connection.outbound == (self.peer_id < peer)
        held.insert(0 if dialled_by_smaller else 1, connection)
        self._nursery.start_soon(self._retire, current if dialled_by_smaller else connection)

    async def _retire(self, surplus: Connection) -> None:
        """Close the lesser of two connections to one peer once nobody uses it."""
        await trio.sleep(RETIRE_SECONDS)
        while surplus.users and not surplus.link.ended.is_set():
            await surplus.idle.wait()
        surplus.link.close("two connections crossed")

    def _down(self, connection: Connection) -> None:
        held = self._connections.get(connection.peer, [])
        if connection not in held:
            return
        held.remove(connection)
        if not held:
            del self._connections[connection.peer]
            self._announced.pop(connection.peer, None)
            self._lost.add(connection.peer)
            self._book.lost(connection.peer, trio.current_time())
            self._hub.put(connection.peer, "down")
            log.info("lost %s: %s", connection.peer, connection.link.reason)
            self._dialler.wake()

    # Upkeep ------------------------------------------------------------------------------------

    async def _measure(self, connection: Connection) -> None:
        limits = self.limits
        await ping.measure(
            connection,
            clock=self._config.clock,
            every=limits.ping_seconds,
            silence=limits.silence_seconds,
        )

    async def _tell(self, connection: Connection) -> None:
        """Tell a peer our addresses and those of other members, now and when they change."""
        told: dict[PeerId, list[str]] = {}
        try:
            stream = await connection.open(gossip.PROTOCOL)
            while True:
                changed = self._told
                known = {self.peer_id: self._addresses} | self._announced
                known.pop(connection.peer, None)
                news = [(p, a) for p, a in known.items() if a and told.get(p) != a]
                for at in range(0, len(news), RECORDS_A_MESSAGE):
                    part = news[at : at + RECORDS_A_MESSAGE]
                    records = tuple(gossip.PeerRecord(p, tuple(a)) for p, a in part)
                    await stream.send(Frame(gossip.PEERS.encode(gossip.PeerExchange(records))))
                    told.update(part)
                await changed.wait()
        except PyAgentError as error:
            log.debug("telling %s of peers ended: %s", connection.peer, error)

    async def _hear(self, stream: ChannelStream) -> None:
        """Take in the addresses that a peer tells."""
        while (frame := await stream.receive()) is not None:
            message = gossip.PEERS.decode(frame.header)
            now = trio.current_time()
            for peer, addresses in gossip.usable_records(message, stream.remote, self.peer_id):
                if peer == stream.peer and self._announced.get(peer) != addresses:
                    self._announced[peer] = addresses
                    self._told.set()
                    self._told = trio.Event()
                self._learn(peer, addresses, now)

    def _learn(self, peer: PeerId, addresses: list[str], now: float) -> None:
        if self._book.learn(peer, addresses, Source.HEARD, now):
            if self._present(peer) is not None:
                self._book.connected(peer)
            self._dialler.wake()

    # Life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and begin to dial; called by :func:`open_mesh`."""
        config = self._config
        listeners: list[trio.SocketListener] = []
        try:
            for address in config.listen:
                listeners.append(await sockets.listen(address))
        except BaseException:
            for listener in listeners:
                listener.socket.close()
            raise
        for listener in listeners:
            self._addresses += sockets.listened_addresses(listener)
            self._nursery.start_soon(self._serve_listener, listener)
        if config.announce:
            self._addresses = [check_address(a, peer=False) for a in config.announce]
        now = trio.current_time()
        for address in config.bootstrap:
            peer = self._peer_in(address)
            self._book.learn(peer, [without_peer(address)], Source.CONFIGURED, now)
        self._nursery.start_soon(self._dialler.keep)
        if config.mdns:
            self._nursery.start_soon(
                mdns.discover, config.fingerprint, self.peer_id, list(self._addresses), self._seen
            )

    def _seen(self, peer: PeerId, addresses: list[str]) -> None:
        self._learn(peer, addresses, trio.current_time())

    async def _serve_listener(self, listener: trio.SocketListener) -> None:
        await trio.serve_listeners(self._inbound, [listener], handler_nursery=self._nursery)

    def stop(self) -> None:
        """Say goodbye to every peer; called by :func:`open_mesh`."""
        for held in list(self._connections.values()):
            for connection in list(held):
                connection.link.close("this node leaves the mesh")


@asynccontextmanager
async def open_mesh(config: MeshConfig) -> AsyncIterator[Libp2pMesh]:
    """Take part in a mesh for as long as the block lasts.

    Raises :class:`ConfigError` (``bad_address``, ``cannot_listen``, ``bad_psk``) at the start;
    what peers do afterwards never leaves it.
    """
    if config.psk is not None:
        PskCipher(config.psk)  # a key of the wrong length is a mistake to report now
    async with background() as nursery:
        mesh = Libp2pMesh(config, nursery)
        await mesh.start()
        try:
            yield mesh
        finally:
            mesh.stop()
