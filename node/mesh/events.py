"""Peer events for many subscribers: bounded, and coalesced for each peer.

A subscriber that lags sees only what still matters: an ``up`` that is over already is dropped, a
``down`` followed by an ``up`` stays, because the streams in between are gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Literal

import trio

from pyagent_node.base.mesh import PeerEvent
from pyagent_node.base.types import PeerId

Change = Literal["up", "down"]


class EventFeed:
    """One subscription; iterate over it from one task."""

    def __init__(self, present: Iterable[PeerId]) -> None:
        self._pending: dict[PeerId, list[Change]] = {peer: ["up"] for peer in present}
        self._more = trio.Event()

    def put(self, peer: PeerId, change: Change) -> None:
        """Add a change; at most two wait for each peer."""
        waiting = self._pending.setdefault(peer, [])
        if waiting and waiting[-1] == "up" and change == "down":
            waiting.pop()
        elif not waiting or waiting[-1] != change:
            waiting.append(change)
        if not waiting:
            del self._pending[peer]
        self._more.set()

    def __aiter__(self) -> EventFeed:
        return self

    async def __anext__(self) -> PeerEvent:
        await trio.lowlevel.checkpoint()
        while not self._pending:
            self._more = trio.Event()
            await self._more.wait()
        peer = next(iter(self._pending))
        waiting = self._pending[peer]
        change = waiting.pop(0)
        if not waiting:
            del self._pending[peer]
        return PeerEvent(peer, change)


class EventHub:
    """Hands every change to every subscriber."""

    def __init__(self) -> None:
        self._feeds: set[EventFeed] = set()

    def put(self, peer: PeerId, change: Change) -> None:
        """Tell every subscriber."""
        for feed in self._feeds:
            feed.put(peer, change)

    @asynccontextmanager
    async def subscribe(self, present: Iterable[PeerId]) -> AsyncIterator[EventFeed]:
        """Follow changes; begins with an ``up`` for each of ``present``."""
        feed = EventFeed(present)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)
