"""Questions to a context that lies on several nodes: only owners of candidates are asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import DeadlineExceeded, PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.node.context_client import SCORE_SECONDS, ContextClient
from pyagent_node.node.context_messages import Wanted
from pyagent_node.node.context_probe import Prober
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.context_server import ContextServer
from pyagent_node.node.kv_vault import Offload
from pyagent_node.sharding.context.index import Way, words_weight
from pyagent_node.sharding.context.port import Answer, ContextStore
from pyagent_node.sharding.context.records import ChunkBody, ChunkId
from pyagent_node.sharding.context.search import (
    Scored,
    check_question,
    found,
    question_terms,
    rank,
    rarities,
    score_all,
)

log = logging.getLogger("pyagent_node.context")

SEARCH_SECONDS: Final = 20.0
"""Longest time for an answer."""
SCORED_AT_ONCE: Final = 512
"""Chunks that a node is asked about at a time."""
SPARE: Final = 2
"""So many times the chunks that are wanted are fetched: some say the same, some may be gone."""


class ContextSearch:
    """Asks for an answer what it takes; ``clock`` gives Unix seconds."""

    def __init__(
        self,
        client: ContextClient,
        store: ContextStore,
        reach: Reach,
        *,
        server: ContextServer,
        clock: Callable[[], float],
        offload: Offload,
    ) -> None:
        self.questions = 0
        self.asked = 0
        """Nodes asked, over all questions."""
        self.probed = 0
        """Those of them that were asked for sketches."""
        self.missing = 0
        """Candidates that could be had from nobody."""
        self.on_stale: Callable[[PeerId], None] = lambda _peer: None
        """Told of a peer that knows a newer version of something."""
        self._client = client
        self._store = store
        self._reach = reach
        self.prober = Prober(client, store, reach, server, now=clock)
        self._server = server
        self._offload = offload

    async def search(
        self,
        context: ContextInfo,
        question: str,
        vector: NDArray[np.float32],
        *,
        count: int,
        way: Way,
    ) -> Answer:
        """See ``ContextMesh``; raises :class:`DeadlineExceeded` (``context_search_slow``)."""
        check_question(question, count)
        try:
            with trio.fail_after(SEARCH_SECONDS):
                return await self._search(context, question, vector, count, way)
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"The owners of what the question needs did not answer in {SEARCH_SECONDS:.0f} s.",
                code="context_search_slow",
                remedy="Ask again; 'pyagent-node status' shows who is away.",
            ) from None

    async def _search(
        self,
        context: ContextInfo,
        question: str,
        vector: NDArray[np.float32],
        count: int,
        way: Way,
    ) -> Answer:
        catalog = self._store.catalog(context.id)
        all_of_them = self.prober.every(context) if way == "words" else None
        found_by = all_of_them or await self.prober.pick(context, vector)
        picked = found_by.candidates
        for peer in found_by.newer:
            self.on_stale(peer)
        places = {each.id: each for each in picked}
        terms = question_terms(question)
        scored: dict[ChunkId, Scored] = {}
        owners: dict[ChunkId, PeerId] = {}
        asked: set[PeerId] = set(found_by.asked)

        async def ask(peer: PeerId, chunks: list[ChunkId]) -> Collection[ChunkId]:
            asked.add(peer)
            settled: list[ChunkId] = []
            for at in range(0, len(chunks), SCORED_AT_ONCE):
                batch = chunks[at : at + SCORED_AT_ONCE]
                wanted = [Wanted(chunk, places[chunk].windows) for chunk in batch]
                if peer == self._reach.here:
                    some, stale = await self._score_here(vector, terms, wanted), set[ChunkId]()
                else:
                    try:
                        some, stale = await self._client.scores(
                            peer, context.id, vector, terms, wanted
                        )
                    except PyAgentError as error:
                        if not settled:
                            raise
                        log.debug("%s scored no more chunks: %s", peer, error)
                        break  # others are asked for the rest only
                for each in some:
                    scored[each.id] = each
                    owners[each.id] = peer
                if stale:
                    self.on_stale(peer)
                settled += [each.id for each in some] + list(stale)
            return settled

        buckets = {each.id: each.bucket for each in picked}
        missing = len(await self._reach.gather(buckets, ask)) + found_by.unseen
        ranked = rank(scored.values(), count=SPARE * count, way=way, words=words_weight(question))
        bodies = await self._texts([each.id for each in ranked], owners, buckets, asked)
        self.questions += 1
        self.asked += len(asked)
        self.missing += missing
        self.probed += len(found_by.asked)
        nodes = {peer for row in self._reach.table() for peer in row}
        return Answer(
            hits=found(ranked, bodies, catalog.locate, count=count, owners=owners),
            windows=found_by.windows,
            candidates=sum(len(each.windows) for each in picked),
            candidate_chunks=len(picked),
            chunks=found_by.chunks,
            lost=self.prober.fresh_of(context, self._server.lost(context)),
            nodes=max(1, len(nodes)),
            nodes_asked=len(asked),
            missing=missing,
            probed=len(found_by.asked),
            rarities=rarities(question, scored.values()),
        )

    async def _score_here(
        self, vector: NDArray[np.float32], terms: tuple[int, ...], wanted: Sequence[Wanted]
    ) -> list[Scored]:
        places = {ChunkId(each.id): each.windows for each in wanted}
        bodies = await self._store.bodies(list(places))
        return await self._offload(lambda: score_all(bodies, places, vector, terms))

    async def _texts(
        self,
        chunks: list[ChunkId],
        owners: dict[ChunkId, PeerId],
        buckets: dict[ChunkId, int],
        asked: set[PeerId],
    ) -> dict[ChunkId, ChunkBody]:
        """Return bodies: from who scored them, or if that one is gone by now, from another."""
        bodies: dict[ChunkId, ChunkBody] = {}

        async def ask(peer: PeerId, some: list[ChunkId]) -> Collection[ChunkId]:
            asked.add(peer)
            for body in await self.read(peer, some, SCORE_SECONDS):
                bodies[body.id] = body
            return bodies.keys()

        await self._reach.gather_from({chunk: [owners[chunk]] for chunk in chunks}, ask)
        left = {chunk: buckets[chunk] for chunk in chunks if chunk not in bodies}
        if left:
            await self._reach.gather(left, ask)
        return bodies

    async def read(self, peer: PeerId, chunks: list[ChunkId], seconds: float) -> list[ChunkBody]:
        """Return the bodies that one node has, this one or a peer."""
        if peer == self._reach.here:
            return await self._store.bodies(chunks)
        return await self._client.bodies(peer, chunks, seconds)
