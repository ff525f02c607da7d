"""A network in memory for the engines: streams that can be cut, no latency, no limits."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.mesh import FrameStream, PeerEvent, PeerInfo, StreamHandler
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame


class End:
    """One end of a stream."""

    def __init__(
        self,
        peer: PeerId,
        send: trio.MemorySendChannel[Frame],
        receive: trio.MemoryReceiveChannel[Frame],
    ) -> None:
        self.peer = peer
        self._send = send
        self._receive = receive
        self.broken = False

    async def send(self, frame: Frame) -> None:
        if self.broken:
            raise Unavailable("cut", code="stream_closed")
        try:
            await self._send.send(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Unavailable("closed", code="stream_closed") from None

    async def receive(self) -> Frame | None:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self.broken:
                raise Unavailable("cut", code="stream_closed") from None
            return None
        except trio.ClosedResourceError:
            raise Unavailable("closed", code="stream_closed") from None

    async def aclose(self) -> None:
        await self._send.aclose()
        await self._receive.aclose()


class Events:
    def __init__(self, channel: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        self._channel = channel

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> PeerEvent:
        return await self._channel.receive()


class Node:
    """A ``Mesh`` of the network."""

    def __init__(self, network: Network, peer_id: str, role: str) -> None:
        self.network = network
        self.peer_id = PeerId(peer_id)
        self.role = role
        self.handlers: dict[str, StreamHandler] = {}
        self.listeners: set[trio.MemorySendChannel[PeerEvent]] = set()

    def peers(self) -> Sequence[PeerInfo]:
        return [
            PeerInfo(n.peer_id, n.peer_id, n.role, (), None, True)
            for n in self.network.nodes.values()
            if n is not self and self.network.linked(self, n)
        ]

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        await trio.lowlevel.checkpoint()
        other = self.network.nodes.get(peer)
        if other is None or protocol not in other.handlers or not self.network.linked(self, other):
            raise Unavailable(f"{peer} cannot be reached.", code="peer_unreachable")
        return self.network.connect(self, other, protocol)

    async def connect(self, address: str) -> PeerId:
        raise AssertionError(address)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[Events]:
        send, receive = trio.open_memory_channel[PeerEvent](math.inf)
        self.listeners.add(send)
        for info in self.peers():
            send.send_nowait(PeerEvent(info.peer_id, "up"))
        try:
            yield Events(receive)
        finally:
            self.listeners.discard(send)

    def stop(self) -> None:
        """Go off the network as a killed process does."""
        self.network.nodes.pop(self.peer_id, None)
        self.network.cut_streams(self)


class Network:
    """All nodes; a cut link breaks the streams over it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.nodes: dict[PeerId, Node] = {}
        self.cuts: set[frozenset[PeerId]] = set()
        self.streams: list[tuple[Node, Node, End, End]] = []

    def node(self, peer_id: str, role: str = "learner") -> Node:
        node = Node(self, peer_id, role)
        self.nodes[node.peer_id] = node
        for other in self.nodes.values():
            if other is not node:
                self._announce(other, node)
        return node

    def _announce(self, to: Node, about: Node) -> None:
        for listener in to.listeners:
            listener.send_nowait(PeerEvent(about.peer_id, "up"))

    def linked(self, a: Node, b: Node) -> bool:
        return frozenset({a.peer_id, b.peer_id}) not in self.cuts

    def connect(self, source: Node, target: Node, protocol: str) -> End:
        there = trio.open_memory_channel[Frame](16)
        back = trio.open_memory_channel[Frame](16)
        near = End(target.peer_id, there[0], back[1])
        far = End(source.peer_id, back[0], there[1])
        self.streams.append((source, target, near, far))
        self.nursery.start_soon(self._serve, target.handlers[protocol], far)
        return near

    async def _serve(self, handler: StreamHandler, stream: End) -> None:
        try:
            await handler(stream)
        finally:
            await stream.aclose()

    def cut(self, a: Node, b: Node) -> None:
        self.cuts.add(frozenset({a.peer_id, b.peer_id}))
        self.cut_streams(a, b)

    def heal(self, a: Node, b: Node) -> None:
        self.cuts.discard(frozenset({a.peer_id, b.peer_id}))
        self._announce(a, b)
        self._announce(b, a)

    def cut_streams(self, a: Node, b: Node | None = None) -> None:
        for stream in list(self.streams):
            source, target, near, far = stream
            if {source, target} >= {a, b or a}:
                self.streams.remove(stream)
                for end in (near, far):
                    end.broken = True
                    end._send.close()


@pytest.fixture
def network(nursery: trio.Nursery) -> Network:
    return Network(nursery)
