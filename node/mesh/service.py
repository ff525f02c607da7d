"""``open_mesh``: the ``Mesh`` port over TCP, Noise and yamux."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from pyagent_node.base.errors import (
    ConfigError,
    Conflict,
    DeadlineExceeded,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.mesh import FrameStream, PeerEvents, PeerInfo, StreamHandler
from pyagent_node.base.types import PeerId
from pyagent_node.node.addresses import check_address, peer_of, without_peer
from pyagent_node.node.mesh import gossip, ping, sockets
from pyagent_node.node.mesh.authoriser import Authoriser
from pyagent_node.node.mesh.book import Book, Source
from pyagent_node.node.mesh.connection import (
    GRACE_SECONDS,
    JOIN,
    MAX_JOIN_HEADER,
    Connection,
)
from pyagent_node.node.mesh.dialling import Dialler
from pyagent_node.node.mesh.gossip import Gossip
from pyagent_node.node.mesh.handshake import Identity, secure
from pyagent_node.node.mesh.loopback import Loopback
from pyagent_node.node.mesh.psk import PskCipher
from pyagent_node.node.mesh.roster import Doorkeeper, Roster
from pyagent_node.node.mesh.settings import MeshConfig
from pyagent_node.node.mesh.streams import ChannelStream
from pyagent_node.node.mesh.wire import Wire
from pyagent_node.node.nurseries import background, deadline

log = logging.getLogger("pyagent_node.mesh")


class Libp2pMesh:
    """The real :class:`~pyagent_node.base.mesh.Mesh`; get one from :func:`open_mesh`."""

    def __init__(self, config: MeshConfig, nursery: trio.Nursery) -> None:
        me = config.key.peer_id
        limits = config.limits
        self.limits = limits
        self.metrics = config.metrics
        self._config = config
        self._nursery = nursery
        self._identity = Identity(config.key.seed)
        self._make_wire = sockets.shaped(config.shape, config.rng)
        self._book = Book(me, config.rng, first=limits.backoff_first, most=limits.backoff_most)
        self._roster = Roster(
            me, self._book, self.metrics, nursery, limit=limits.max_peers, on_lost=self._on_lost
        )
        self._gossip = Gossip(me, self._learn)
        self._dialler = Dialler(
            self._book,
            self.metrics,
            nursery,
            present=self._roster.to,
            dial_one=self._dial_one,
        )
        self._loopback = Loopback(me, limits, self.metrics, nursery)
        self._unauthorised = 0
        self.authoriser: Authoriser = Doorkeeper(config.membership, self._roster)
        self.handlers: dict[str, StreamHandler] = {}
        self.system: dict[str, Callable[[ChannelStream], Awaitable[None]]] = {
            ping.PROTOCOL: ping.answer_pings,
            gossip.PROTOCOL: self._gossip.hear,
        }

    # The port ----------------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        """This node's own id."""
        return self._identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node, each ending in ``/p2p/<peer id>``."""
        return tuple(f"{address}/p2p/{self.peer_id}" for address in self._gossip.own)

    def peers(self) -> Sequence[PeerInfo]:
        """Return the connected, authorised peers."""
        return [self._info(connection) for connection in self._roster.first()]

    def _info(self, connection: Connection) -> PeerInfo:
        peer = connection.peer
        addresses = self._gossip.announced(peer) or self._book.addresses(peer)
        return PeerInfo(
            peer_id=peer,
            name=connection.name,
            role=connection.admission.role if connection.admission else "",
            addresses=tuple(f"{address}/p2p/{peer}" for address in addresses),
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
            return self._loopback.open(protocol, self.handlers.get(protocol))
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
        return self._roster.subscribe()

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
        self._roster.drop(peer, reason)

    def recheck(self) -> None:
        """Judge every connected peer again (a certificate was revoked or has expired)."""
        for connection in self._roster.all():
            try:
                self._config.membership.judge(connection.peer, connection.credentials)
            except Refused as error:
                log.warning("disconnecting %s: %s", connection.peer, error)
                self.metrics.refused[error.code] += 1
                self.disconnect(connection.peer, error.message)

    # Connections -------------------------------------------------------------------------------

    def _peer_in(self, address: str) -> PeerId:
        peer = peer_of(check_address(address, peer=True))
        if peer is None:
            raise ConfigError(f"{address} names no peer.", code="bad_address")
        return peer

    def _cipher(self) -> PskCipher | None:
        return None if self._config.psk is None else PskCipher(self._config.psk)

    async def _dial_one(self, peer: PeerId, address: str, *, joining: bool = False) -> Connection:
        message = f"{address} did not answer within {self.limits.dial_seconds:g} seconds."
        with deadline(self.limits.dial_seconds, message, code="dial_timeout", address=address):
            wire = await sockets.dial(address, self._cipher(), self._make_wire)
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
            wire = sockets.wire_of(stream, self._cipher(), self._make_wire)
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
                    self._roster.add(connection)
                    nursery.start_soon(self._measure, connection)
                    nursery.start_soon(self._gossip.tell, connection)
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
                self._roster.remove(connection)

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

    # Upkeep ------------------------------------------------------------------------------------

    async def _measure(self, connection: Connection) -> None:
        limits = self.limits
        await ping.measure(
            connection,
            clock=self._config.clock,
            every=lambda: ping.pause(limits.ping_seconds, len(self._roster)),
            silence=limits.silence_seconds,
        )

    def _learn(self, peer: PeerId, addresses: list[str]) -> None:
        if self._book.learn(peer, addresses, Source.HEARD, trio.current_time()):
            if peer in self._roster:
                self._book.connected(peer)
            self._dialler.wake()

    def _on_lost(self, peer: PeerId) -> None:
        self._gossip.forget(peer)
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
            self._gossip.own += sockets.listened_addresses(listener)
            self._nursery.start_soon(self._serve_listener, listener)
        if config.announce:
            self._gossip.own = [check_address(a, peer=False) for a in config.announce]
        now = trio.current_time()
        for address in config.bootstrap:
            peer = self._peer_in(address)
            self._book.learn(peer, [without_peer(address)], Source.CONFIGURED, now)
        self._nursery.start_soon(self._dialler.keep)
        if config.mdns:
            from pyagent_node.node.mesh import mdns  # noqa: PLC0415 - zeroconf is 5 MB

            self._nursery.start_soon(
                mdns.discover, config.fingerprint, self.peer_id, self._gossip.own, self._learn
            )

    async def _serve_listener(self, listener: trio.SocketListener) -> None:
        try:
            await trio.serve_listeners(self._inbound, [listener], handler_nursery=self._nursery)
        except OSError:
            log.exception("a listening socket failed; no more connections are taken on it")

    async def stop(self) -> None:
        """Part from every peer in order and in bounded time; called by :func:`open_mesh`."""
        async with trio.open_nursery() as nursery:
            for connection in self._roster.all():
                nursery.start_soon(connection.part, "this node leaves the mesh")


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
            with trio.CancelScope(shield=True):
                await mesh.stop()
