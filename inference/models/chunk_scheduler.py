"""Decides which peer is asked for which chunk.  Pure: no I/O, no clock.

Chunks that few peers hold come first.  A chunk is asked for once; when a peer has nothing else to
do it *steals*: it asks again for the chunk that has been under way longest, so that one slow peer
does not hold up the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from pyagent_node.base.types import PeerId
from pyagent_node.inference.models.chunks import ChunkSet

MAX_COPIES: Final = 2
"""Peers that are asked for the same chunk at the same time."""


class ChunkScheduler:
    """The state of one transfer."""

    def __init__(self, wanted: Iterable[int]) -> None:
        self._missing = dict.fromkeys(wanted)
        self._held: dict[PeerId, ChunkSet] = {}
        self._queues: dict[PeerId, deque[int]] = {}
        self._under_way: dict[int, list[PeerId]] = {}

    @property
    def missing(self) -> int:
        """How many chunks have not arrived."""
        return len(self._missing)

    def peer_has(self, peer: PeerId, have: ChunkSet) -> bool:
        """Take note of what a peer holds; whether that is something that is missing."""
        self._held[peer] = have
        held = [index for index in self._missing if index in have]
        rarity = {i: sum(i in other for other in self._held.values()) for i in held}
        self._queues[peer] = deque(sorted(held, key=lambda index: (rarity[index], index)))
        return bool(held)

    def next(self, peer: PeerId) -> int | None:
        """Return the chunk to ask ``peer`` for now, or ``None``."""
        queue = self._queues.get(peer)
        if queue is None:
            return None
        while queue:
            index = queue.popleft()
            if index in self._missing and index not in self._under_way:
                self._under_way[index] = [peer]
                return index
        for index, askers in self._under_way.items():
            if peer not in askers and len(askers) < MAX_COPIES and index in self._held[peer]:
                askers.append(peer)
                return index
        return None

    def arrived(self, index: int) -> bool:
        """A chunk came and was kept; ``False`` when it had come before."""
        self._under_way.pop(index, None)
        if index not in self._missing:
            return False
        del self._missing[index]
        return True

    def refused(self, peer: PeerId, index: int) -> None:
        """A peer does not hold a chunk after all."""
        held = self._held.get(peer)
        if held is not None and index in held:
            held.discard(index)
        self._give_back(peer, index)

    def drop(self, peer: PeerId) -> None:
        """A peer is gone: what it was asked for may be asked of others."""
        self._held.pop(peer, None)
        self._queues.pop(peer, None)
        for index in [i for i, askers in self._under_way.items() if peer in askers]:
            self._give_back(peer, index)

    def _give_back(self, peer: PeerId, index: int) -> None:
        askers = self._under_way.get(index)
        if askers is None or peer not in askers:
            return
        askers.remove(peer)
        if askers:
            return
        del self._under_way[index]
        for other, held in self._held.items():
            if index in held:
                self._queues[other].appendleft(index)
