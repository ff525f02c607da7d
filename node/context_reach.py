"""Whom to ask for a chunk: its owners by the log, those before them, then anybody who is there.

A read goes on while owners change: the new ones may not have everything yet, and the old ones do
until the new ones say that they have it.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.sharding.context.owners import Table, owner_table, owners_of, sources
from pyagent_node.sharding.context.records import ChunkId

log = logging.getLogger("pyagent_node.context")

REMEMBERED: Final = 3
"""Earlier tables of owners that are asked too."""

Ask = Callable[[PeerId, list[ChunkId]], Awaitable[Collection[ChunkId]]]
"""Asks a peer for chunks and returns those that are settled by its answer."""


class Reach:
    """Owners of buckets as this node sees them."""

    def __init__(self, mesh: Mesh, consensus: Consensus) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._epoch = -1
        self._table: Table = ()
        self._earlier: deque[Table] = deque(maxlen=REMEMBERED)
        self._guess: tuple[frozenset[PeerId], Table] = (frozenset(), ())
        self._found: tuple[tuple[int, frozenset[PeerId]], dict[int, list[PeerId]]] = (
            (-1, frozenset()),
            {},
        )
        """Sources of buckets, as long as owners and those present stay the same."""

    @property
    def here(self) -> PeerId:
        """This node."""
        return self._mesh.peer_id

    @property
    def epoch(self) -> int:
        """How often owners were committed; 0: never yet."""
        return self._consensus.state.bucket_epoch

    def present(self) -> set[PeerId]:
        """Return this node and those connected to it that belong to the mesh and hold things."""
        members = self._consensus.state.members
        found = {self._mesh.peer_id}
        for peer in self._mesh.peers():
            record = members.get(peer.peer_id)
            if peer.role != "client" and (record is None or is_member(record)):
                found.add(peer.peer_id)
        return found

    def table(self) -> Table:
        """Return the owners in force; before any are committed, who they will likely be."""
        state = self._consensus.state
        if state.bucket_epoch != self._epoch:
            if self._table:
                self._earlier.appendleft(self._table)
            self._epoch, self._table = state.bucket_epoch, state.buckets
        if self._table:
            return self._table
        present = frozenset(self.present())
        if self._guess[0] != present:
            self._guess = (present, owner_table(dict.fromkeys(present, 1.0)))
        return self._guess[1]

    def owners(self, bucket: int) -> tuple[PeerId, ...]:
        """Return the owners of a bucket, away or not."""
        return owners_of(self.table(), bucket)

    def owns(self, bucket: int) -> bool:
        """Whether this node is an owner of a bucket."""
        return self._mesh.peer_id in self.owners(bucket)

    def sources(self, bucket: int) -> list[PeerId]:
        """Return who of those present may have what lies in a bucket, the likeliest first."""
        return self._sources(bucket, frozenset(self.present()))

    def holders(self, bucket: int) -> list[PeerId]:
        """Return who of those present owns a bucket, or did before, owners first."""
        present = self.present()
        found = sources(bucket, [self.table(), *self._earlier], ())
        return [peer for peer in found if peer in present]

    def _sources(self, bucket: int, present: frozenset[PeerId]) -> list[PeerId]:
        table, key = self.table(), (self._epoch, present)
        if self._found[0] != key:
            self._found = (key, {})
        known = self._found[1]
        if bucket not in known:
            found = sources(bucket, [table, *self._earlier], present)
            known[bucket] = [peer for peer in found if peer in present]
        return list(known[bucket])

    async def gather(
        self, wanted: Mapping[ChunkId, int], ask: Ask, *, here: bool = True
    ) -> set[ChunkId]:
        """Ask for chunks, given with their buckets, one source after the other.

        As few nodes as will do are asked at a time: all owners of a bucket are equally good.
        Without ``here`` this node itself is not asked.  Returns the chunks that nobody settled.
        """
        known: dict[int, list[PeerId]] = {}
        present = frozenset(self.present() if here else self.present() - {self.here})
        for bucket in set(wanted.values()):
            known[bucket] = self._sources(bucket, present)
        return await self.gather_from(
            {chunk: known[bucket] for chunk, bucket in wanted.items()}, ask, buckets=wanted
        )

    async def gather_from(
        self,
        wanted: Mapping[ChunkId, Sequence[PeerId]],
        ask: Ask,
        *,
        buckets: Mapping[ChunkId, int] | None = None,
    ) -> set[ChunkId]:
        """Ask the given peers, in their order; those that own the bucket in any order."""
        left = {chunk: list(peers) for chunk, peers in wanted.items()}
        while left:
            options = {
                chunk: self._next(buckets[chunk] if buckets else -1, rest)
                for chunk, rest in left.items()
                if rest
            }
            if not options:
                break
            async with trio.open_nursery() as nursery:
                for peer, chunks in cover(options, self.here).items():
                    for chunk in chunks:
                        left[chunk].remove(peer)
                    nursery.start_soon(self._ask, peer, chunks, ask, left)
        return set(left)

    def _next(self, bucket: int, rest: list[PeerId]) -> list[PeerId]:
        """Return who may be asked now: any owner that was not, or else whoever is next."""
        owners = self.owners(bucket)
        return [peer for peer in rest if peer in owners] or rest[:1]

    @staticmethod
    async def _ask(
        peer: PeerId, chunks: list[ChunkId], ask: Ask, left: dict[ChunkId, list[PeerId]]
    ) -> None:
        try:
            settled = await ask(peer, chunks)
        except PyAgentError as error:
            log.debug("%s gave no chunks: %s", peer, error)
            return
        for chunk in settled:
            left.pop(chunk, None)


def cover(
    options: Mapping[ChunkId, Collection[PeerId]], here: PeerId
) -> dict[PeerId, list[ChunkId]]:
    """Give each chunk to one of its peers so that few peers are named: greedily, this node first.

    (The set cover problem; the greedy answer is within a factor of ln n of the best.)
    """
    left = dict(options)
    given: dict[PeerId, list[ChunkId]] = {}
    while left:
        counts = Counter(peer for peers in left.values() for peer in peers)
        best = min(counts, key=lambda peer: (peer != here, -counts[peer], peer))
        given[best] = [chunk for chunk, peers in left.items() if best in peers]
        for chunk in given[best]:
            del left[chunk]
    return given
