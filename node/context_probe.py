"""Picks the candidates of a question: by this node's own sketches, or with those of other nodes.

Where sketches lie spread, the likeliest groups of windows are looked through, more of them only
while that changes something (``sharding.context.probing``): those that are not here at the nodes
that own them, and if one does not answer, at another owner.  Windows of no other groups are
candidates, not even those whose sketches are here, so that all nodes answer alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.node.context_client import ContextClient
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.context_server import ContextServer
from pyagent_node.sharding.context.port import ContextStore
from pyagent_node.sharding.context.probing import (
    MAX_UNSURE,
    Merged,
    Probe,
    chances,
    picked,
    unsure_of,
)
from pyagent_node.sharding.context.records import ChunkId
from pyagent_node.sharding.context.search import Candidate, chunks_of, every_chunk
from pyagent_node.sharding.context.shares import ALL_GROUPS, GROUPS

log = logging.getLogger("pyagent_node.context")

PROBE_SECONDS: Final = 8.0
"""Longest time for picking candidates; then what there is counts."""


class Picked(NamedTuple):
    """Candidates, how many windows in how many chunks they are of, and whom picking took.

    ``unseen`` chunks may have been left out because nobody who has their sketches answered.
    ``newer`` are nodes that know of chunks that this one does not.
    """

    candidates: list[Candidate]
    windows: int
    chunks: int
    asked: set[PeerId]
    unseen: int
    newer: set[PeerId]


class Prober:
    """``now`` tells Unix seconds."""

    def __init__(
        self,
        client: ContextClient,
        store: ContextStore,
        reach: Reach,
        server: ContextServer,
        *,
        now: Callable[[], float],
    ) -> None:
        self._client, self._store, self._reach, self._server = client, store, reach, server
        self._now = now

    def every(self, info: ContextInfo) -> Picked | None:
        """Return all chunks as candidates, ``None`` where they are too many."""
        records = self._store.catalog(info.id).fresh(info.policy, self._now())
        found = every_chunk(records)
        if found is None:
            return None
        count, lost = sum(record.windows for record in records), self._server.lost(info)
        candidates = [each for each in found if each.id not in lost]
        return Picked(candidates, count, len(found), set(), 0, set())

    async def pick(self, info: ContextInfo, vector: NDArray[np.float32]) -> Picked:
        """Return the candidates of a question's vector."""
        catalog = self._store.catalog(info.id)
        records = catalog.fresh(info.policy, self._now())
        live = {record.source for record in records}
        count, chunks = sum(record.windows for record in records), chunks_of(records)
        merged, asked, said = Merged(), set[PeerId](), dict[ChunkId, PeerId]()
        unsure: dict[ChunkId, None] = {}
        partial: list[list[ChunkId]] = []
        axes = await self._server.axes(info, len(vector))
        here = self._reach.here
        elsewhere = set(self._server.lacking(info, ALL_GROUPS))
        if not elsewhere:  # all sketches are here, those of bare records too
            merged.add((await self._server.likely(info, vector, ALL_GROUPS))[2])
            best = picked(merged.best(), (), catalog, live)[0]
            return Picked(best, count, chunks, asked, 0, set())
        own = self._server.ready(info)
        unsure |= dict.fromkeys(
            chunk for chunk in self._server.lacking(info, own) if self._is_live(chunk, live, info)
        )
        others = [[peer for peer in row if peer != here] for row in self._rows(self._reach.holders)]
        probe = Probe(chances(axes.buckets, vector), others, self._rows(self._reach.owners))

        async def ask(peer: PeerId, wanted: int) -> None:
            try:
                groups, marks, found = await self._client.likely(peer, info.id, vector, wanted)
            except PyAgentError as error:
                log.debug("%s said nothing of its sketches: %s", peer, error)
                return
            asked.add(peer)
            merged.add(found)
            said.update((ChunkId(each.id), peer) for each in found)
            doubtful = unsure_of(
                catalog,
                marks,
                lambda chunk: chunk in elsewhere and self._is_live(chunk, live, info),
            )
            if len(doubtful) <= MAX_UNSURE:
                probe.served(groups)
                unsure.update(dict.fromkeys(doubtful))
            else:
                partial.append(doubtful)

        with trio.move_on_after(PROBE_SECONDS):
            while groups := probe.step():
                still, _, some = await self._server.likely(info, vector, groups)
                merged.add(some)
                probe.served(still & own)
                while wave := probe.wave():
                    async with trio.open_nursery() as nursery:
                        for peer, wanted in wave.items():
                            nursery.start_soon(ask, peer, wanted)
                probe.look(merged.top())
        unseen = 0
        if probe.short:
            rest = min(partial, key=len, default=None)
            if rest is None:
                rest = [chunk for chunk in elsewhere if self._is_live(chunk, live, info)]
            unsure.update(dict.fromkeys(rest[:MAX_UNSURE]))
            unseen = max(0, len(rest) - MAX_UNSURE)
        candidates, strange = picked(merged.best(), unsure, catalog, live)
        newer = {said[chunk] for chunk in strange if chunk in said}
        return Picked(candidates, count, chunks, asked, unseen, newer)

    def fresh_of(self, info: ContextInfo, chunks: Collection[ChunkId]) -> int:
        """Return how many of some chunks are of documents that may be answered from."""
        if not chunks:
            return 0
        records = self._store.catalog(info.id).fresh(info.policy, self._now())
        live = {record.source for record in records}
        return sum(self._is_live(chunk, live, info) for chunk in chunks)

    @staticmethod
    def _rows(of: Callable[[int], Sequence[PeerId]]) -> list[Sequence[PeerId]]:
        return [of(group) for group in range(GROUPS)]

    def _is_live(self, chunk: ChunkId, live: set[str], info: ContextInfo) -> bool:
        place = self._store.catalog(info.id).locate(chunk)
        return place is not None and place[0].source in live
