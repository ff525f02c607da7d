"""The authorised connections of a node: which peers it has, and which of two connections counts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.base.types import PeerId
from pyagent_node.node.mesh.authoriser import Authoriser, PeerAdmission
from pyagent_node.node.mesh.book import Book
from pyagent_node.node.mesh.connection import Connection
from pyagent_node.node.mesh.events import EventFeed, EventHub
from pyagent_node.node.mesh.settings import MeshMetrics

log = logging.getLogger("pyagent_node.mesh")

RETIRE_SECONDS: Final = 2.0
"""Shortest life of a surplus connection, so that both sides know of the better one."""


class Roster:
    """Peers and their connections, with the events that come of them.

    Two nodes may dial each other at the same time.  Of two connections that different sides
    dialled, both prefer the one dialled by the smaller peer id, and close the other one when
    nobody uses it; of two that the same side dialled, the newer one counts, because that side
    would not have dialled if the older one still worked.
    """

    def __init__(
        self,
        me: PeerId,
        book: Book,
        metrics: MeshMetrics,
        nursery: trio.Nursery,
        *,
        limit: int,
        on_lost: Callable[[PeerId], None],
    ) -> None:
        self._me = me
        self._book = book
        self._metrics = metrics
        self._nursery = nursery
        self._limit = limit
        self._on_lost = on_lost
        self._held: dict[PeerId, list[Connection]] = {}
        self._lost: set[PeerId] = set()
        self._hub = EventHub()

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._held

    def __len__(self) -> int:
        return len(self._held)

    def first(self) -> list[Connection]:
        """Return the connection that counts, for every peer."""
        return [held[0] for held in self._held.values()]

    def all(self) -> list[Connection]:
        """Return every connection."""
        return [connection for held in self._held.values() for connection in held]

    def to(self, peer: PeerId) -> Connection | None:
        """Return a live connection to ``peer``, if there is one."""
        for connection in self._held.get(peer, ()):
            if not connection.link.ended.is_set():
                return connection
        return None

    def check_room(self, peer: PeerId) -> None:
        """Raise :class:`LimitExceeded` (``too_many_peers``) when there is no room for ``peer``."""
        if peer not in self._held and len(self._held) >= self._limit:
            raise LimitExceeded(
                f"The node has {self._limit} peers, which is its limit.",
                code="too_many_peers",
                limit=self._limit,
            )

    def subscribe(self) -> AbstractAsyncContextManager[EventFeed]:
        """Follow peers coming and going."""
        return self._hub.subscribe(list(self._held))

    def add(self, connection: Connection) -> None:
        """Take in an authorised connection."""
        peer = connection.peer
        held = self._held.setdefault(peer, [])
        if connection.outbound:
            self._metrics.connections_out += 1
        else:
            self._metrics.connections_in += 1
        if not held:
            held.append(connection)
            self._metrics.reconnects += peer in self._lost
            self._lost.discard(peer)
            self._book.connected(peer)
            self._hub.put(peer, "up")
            log.info("connected to %s (%s)", peer, connection.name)
            return
        current = held[0]
        if connection.outbound == current.outbound:
            held.insert(0, connection)
            current.link.close("the peer connected anew")
            return
        better = connection.outbound == (self._me < peer)
        held.insert(0 if better else 1, connection)
        self._nursery.start_soon(self._retire, current if better else connection)

    async def _retire(self, surplus: Connection) -> None:
        await trio.sleep(RETIRE_SECONDS)
        while surplus.users and not surplus.link.ended.is_set():
            await surplus.idle.wait()
        surplus.link.close("two connections crossed")

    def remove(self, connection: Connection) -> None:
        """Take out a connection that has ended; does nothing for one that never came in."""
        peer = connection.peer
        held = self._held.get(peer, [])
        if connection not in held:
            return
        held.remove(connection)
        if not held:
            del self._held[peer]
            self._lost.add(peer)
            self._book.lost(peer, trio.current_time())
            self._hub.put(peer, "down")
            log.info("lost %s: %s", peer, connection.link.reason)
            self._on_lost(peer)

    def drop(self, peer: PeerId, reason: str) -> None:
        """Close every connection to ``peer``."""
        for connection in list(self._held.get(peer, ())):
            connection.link.close(reason)


class Doorkeeper:
    """An authoriser that also keeps to the limit on peers."""

    def __init__(self, inner: Authoriser, roster: Roster) -> None:
        self._inner = inner
        self._roster = roster

    def credentials(self) -> bytes:
        """Return what this node shows."""
        return self._inner.credentials()

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        """Judge a peer for which there is room."""
        self._roster.check_room(peer)
        return self._inner.judge(peer, credentials)
