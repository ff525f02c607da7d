"""Which chunks are lost: every owner has looked for their bodies long enough, and nobody has them.

So a context comes to rest though some of it is gone for good: what is lost is no longer looked for
in a hurry, is part of no answer, and keeps nobody from giving up the sketches of others.  An owner
that finds a body again, at a node that comes back perhaps, says so by saying it is lost no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from pyagent_node.base.types import PeerId
from pyagent_node.node.context_messages import MAX_IDS
from pyagent_node.node.context_reach import Reach
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.records import ChunkId

MAX_LOST: Final = MAX_IDS
"""Chunks that an owner says are lost: of more than these, those of the least ids."""


class Losses:
    """What this node, and each other one, could not get as an owner for ``seconds``."""

    def __init__(self, reach: Reach, clock: Callable[[], float], *, seconds: float) -> None:
        self._reach, self._clock, self._seconds = reach, clock, seconds
        self._since: dict[ChunkId, float] = {}
        self._said: dict[PeerId, tuple[int, frozenset[ChunkId]]] = {}

    def note(self, failed: Collection[ChunkId]) -> None:
        """Take down what this node owns and could get from nobody when it looked for all."""
        now = self._clock()
        self._since = {chunk: self._since.get(chunk, now) for chunk in failed}

    def own(self) -> frozenset[ChunkId]:
        """Return what this node says is lost."""
        now = self._clock()
        old = sorted(c for c, since in self._since.items() if now - since >= self._seconds)
        return frozenset(old[:MAX_LOST])

    def heard(self, peer: PeerId, epoch: int, chunks: Collection[ChunkId]) -> None:
        """Take down what a peer says, as the owner that it is at ``epoch``."""
        if chunks:
            self._said[peer] = (epoch, frozenset(chunks))
        else:
            self._said.pop(peer, None)

    def among(self, catalog: Catalog) -> frozenset[ChunkId]:
        """Return the chunks of a context that all of their owners say are lost."""
        if not self._since and not self._said:
            return frozenset()
        epoch, own = self._reach.epoch, self.own()
        said = {peer: chunks for peer, (at, chunks) in self._said.items() if at >= epoch}
        said[self._reach.here] = own
        found: set[ChunkId] = set()
        for chunk in frozenset[ChunkId]().union(*said.values()):
            place = catalog.locate(chunk)
            if place is None:
                continue
            owners = self._reach.owners(place[0].chunks[place[1]].bucket)
            if owners and all(chunk in said.get(owner, ()) for owner in owners):
                found.add(chunk)
        return frozenset(found)
