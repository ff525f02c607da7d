"""What the mesh tests share: authorisers, nodes of both kinds, raw attackers."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from pyagent_node.base.errors import Refused
from pyagent_node.base.limits import MAX_HEADER
from pyagent_node.base.mesh import FrameStream, PeerEvents
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.addresses import peer_of
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh.authoriser import PeerAdmission
from pyagent_node.node.mesh.channels import Channel, Link
from pyagent_node.node.mesh.handshake import Identity, secure
from pyagent_node.node.mesh.negotiation import propose
from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh
from pyagent_node.node.mesh.settings import MeshConfig, MeshLimits, MeshMetrics
from pyagent_node.node.mesh.streams import ChannelStream
from pyagent_node.node.mesh.wire import StreamCipher, Wire
from pyagent_node.node.nurseries import background
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network

from .waiting import eventually

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PSK = b"p" * 32
AnyMesh = Libp2pMesh | SimulatedMesh


class Guard:
    """An authoriser that shows ``shows`` and takes whoever shows something in ``takes``."""

    def __init__(
        self, shows: bytes = b"member", takes: tuple[bytes, ...] = (b"member",), name: str = ""
    ) -> None:
        self.shows = shows
        self.takes = takes
        self.code = "no_certificate"
        self.name = name

    def credentials(self) -> bytes:
        return self.shows

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        if credentials not in self.takes:
            raise Refused(f"{peer[-6:]} has no certificate.", code=self.code, remedy="Join first.")
        return PeerAdmission(self.name or f"node-{peer[-4:]}", "voter")


class Nodes:
    """Starts nodes of one kind, each in a task; they know nobody until they are connected."""

    def __init__(
        self, kind: str, nursery: trio.Nursery, network: SimulatedNetwork | None = None
    ) -> None:
        self.kind = kind
        self._nursery = nursery
        self._network = network
        self._running: dict[PeerId, tuple[trio.CancelScope, trio.Event]] = {}

    async def start(
        self,
        guard: Guard | None = None,
        *,
        key: NodeKey | None = None,
        limits: MeshLimits | None = None,
        **config: Any,
    ) -> AnyMesh:
        key = key or NodeKey.generate()
        guard = guard or Guard()
        if self._network is not None:
            return self._network.node(key.peer_id, authoriser=guard)
        settings = MeshConfig(
            key=key,
            membership=guard,
            listen=(LOOPBACK,),
            psk=PSK if self.kind == "libp2p-psk" else None,
            limits=limits or MeshLimits(),
            metrics=MeshMetrics(),
        )
        mesh: AnyMesh = await self._nursery.start(
            self._run, dataclasses.replace(settings, **config)
        )
        return mesh

    async def _run(self, settings: MeshConfig, task_status: trio.TaskStatus[Libp2pMesh]) -> None:
        with trio.CancelScope() as scope:
            stopped = trio.Event()
            self._running[settings.key.peer_id] = scope, stopped
            try:
                async with open_mesh(settings) as mesh:
                    task_status.started(mesh)
                    await trio.sleep_forever()
            finally:
                stopped.set()

    async def stop(self, mesh: AnyMesh) -> None:
        """Stop a node and wait until it is gone."""
        if self._network is not None:
            self._network.crash(mesh.peer_id)
            return
        scope, stopped = self._running.pop(mesh.peer_id)
        scope.cancel()
        with trio.fail_after(5):
            await stopped.wait()

    async def real(self, guard: Guard | None = None, **config: Any) -> Libp2pMesh:
        """Start a node that must be a real one."""
        mesh = await self.start(guard, **config)
        assert isinstance(mesh, Libp2pMesh)
        return mesh

    async def pair(self) -> tuple[AnyMesh, AnyMesh]:
        """Start two nodes and connect the second to the first."""
        a, b = await self.start(), await self.start()
        await b.connect(a.addresses[0])
        await up(a, b.peer_id)
        return a, b


@asynccontextmanager
async def nodes_of(kind: str) -> AsyncIterator[Nodes]:
    async with trio.open_nursery() as nursery:
        if kind == "simulated":
            async with open_network() as network:
                yield Nodes(kind, nursery, network)
        else:
            yield Nodes(kind, nursery)
        nursery.cancel_scope.cancel()


async def next_event(events: PeerEvents) -> tuple[str, PeerId]:
    with trio.fail_after(20):
        event = await anext(aiter(events))
    return event.change, event.peer_id


async def up(mesh: AnyMesh, *peers: PeerId) -> None:
    """Wait until ``mesh`` has all of ``peers``."""
    missing = set(peers)
    async with mesh.events() as events:
        while missing:
            change, peer = await next_event(events)
            if change == "up":
                missing.discard(peer)


async def down(mesh: AnyMesh, peer: PeerId) -> None:
    """Wait until ``mesh`` has lost ``peer``."""
    await eventually(lambda: all(info.peer_id != peer for info in mesh.peers()))


async def echo(stream: FrameStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


def tcp(address: str) -> tuple[str, int]:
    """Return host and port of a multiaddress."""
    parts = address.split("/")
    return parts[2], int(parts[4])


async def raw(address: str) -> trio.SocketStream:
    """Connect to a node like a stranger on the network."""
    return await trio.open_tcp_stream(*tcp(address))


async def drain(stream: trio.SocketStream) -> bytes:
    """Return everything until the other side closes."""
    data = b""
    with trio.fail_after(20):
        try:
            async for part in stream:
                data += part
        except trio.BrokenResourceError:
            pass
    return data


@asynccontextmanager
async def attacker(
    address: str,
    *,
    identity: Identity | None = None,
    cipher: StreamCipher | None = None,
    on_accept: Callable[[Channel], None] | None = None,
) -> AsyncIterator[Link]:
    """Secure a connection as any libp2p node could, and go on without manners."""
    sock = socket.create_connection(tcp(address))
    wire = Wire(sock, cipher)
    try:
        async with background() as nursery:
            nursery.start_soon(wire.run_writer)
            secured = await secure(
                wire,
                identity or Identity(NodeKey.generate().seed),
                expected=peer_of(address),
                private=cipher is not None,
            )
            link = Link(
                wire, secured, initiator=True, on_accept=on_accept or (lambda channel: None)
            )
            nursery.start_soon(link.run)
            yield link
            link.close()
    finally:
        wire.close()


Serve = Callable[[FrameStream], Awaitable[None]]


async def frames(link: Link, protocol: str, mesh: Libp2pMesh) -> ChannelStream:
    """Open a stream of frames as an attacker."""
    channel = link.open()
    await propose(channel, protocol)
    return ChannelStream(channel, mesh.metrics, max_header=MAX_HEADER, max_tail=MAX_HEADER)


async def serves(mesh: Libp2pMesh, nodes: Nodes) -> None:
    """Check that ``mesh`` still serves an honest peer."""
    if "/test/alive/1" not in mesh.handlers:
        mesh.handle("/test/alive/1", echo)
    honest = await nodes.start()
    await honest.connect(mesh.addresses[0])
    stream = await honest.open(mesh.peer_id, "/test/alive/1")
    await stream.send(Frame(b"alive"))
    assert await stream.receive() == Frame(b"alive", b"")
    await nodes.stop(honest)
