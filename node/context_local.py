"""Contexts of this node alone: the ``ContextMesh`` port over its own store, without any peer."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.contexts import (
    CONTEXT_ID_BYTES,
    ContextInfo,
    check_context_name,
    check_policy,
)
from pyagent_node.base.errors import Conflict, NotFound
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.defaults import default_model
from pyagent_node.sharding.context.index import Way, words_weight
from pyagent_node.sharding.context.port import Answer, ContextStore
from pyagent_node.sharding.context.record_codec import (
    encode_record,
)
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    DocumentRecord,
)
from pyagent_node.sharding.context.search import (
    candidates,
    chunks_of,
    every_chunk,
    found,
    question_terms,
    rank,
    rarities,
    score_all,
)
from pyagent_node.sharding.context.shares import Share


class LocalContexts:
    """Implements ``ContextMesh``; the contexts themselves are known while it lives only.

    ``clock`` tells Unix seconds.
    """

    def __init__(
        self,
        peer_id: PeerId,
        store: ContextStore,
        *,
        clock: Callable[[], float],
        contexts: Iterable[ContextInfo] = (),
    ) -> None:
        self.peer_id = peer_id
        self._store, self._clock = store, clock
        self._contexts = {info.name: info for info in contexts}

    def contexts(self) -> tuple[ContextInfo, ...]:
        """See ``ContextMesh``."""
        return tuple(self._contexts[name] for name in sorted(self._contexts))

    def find(self, name: str) -> ContextInfo:
        """See ``ContextMesh``."""
        info = self._contexts.get(check_context_name(name))
        if info is None:
            raise no_context(name)
        return info

    async def create(
        self, name: str, policy: ContextPolicy, *, encoder: str, centre: bytes = b""
    ) -> ContextInfo:
        """See ``ContextMesh``."""
        check_policy(policy)
        if check_context_name(name) in self._contexts:
            raise Conflict(f"There is a context {name!r} already.", code="context_exists")
        context = ContextId(secrets.token_bytes(CONTEXT_ID_BYTES))
        info = ContextInfo(name, context, policy, encoder, int(self._clock()), centre=centre)
        self._contexts[name] = info
        return info

    async def drop(self, name: str) -> None:
        """See ``ContextMesh``."""
        info = self.find(name)
        del self._contexts[name]
        await self._store.drop(info.id)

    def catalog(self, context: ContextId) -> Catalog:
        """See ``ContextMesh``."""
        return self._store.catalog(context)

    def share(self, context: ContextId) -> Share:
        """See ``ContextMesh``."""
        return self._store.share(context)

    def lost(self, context: ContextInfo) -> frozenset[ChunkId]:
        """See ``ContextMesh``."""
        return frozenset()

    @property
    def owners(self) -> int:
        """See ``ContextMesh``."""
        return 1

    @property
    def index_bytes(self) -> int:
        """See ``ContextMesh``: there is nowhere else."""
        return 1 << 62

    def held_up(self, context: ContextId) -> tuple[PeerId, ...]:
        """See ``ContextMesh``: there is nobody to wait for."""
        return ()

    async def publish(self, record: DocumentRecord, bodies: Sequence[ChunkBody]) -> None:
        """See ``ContextMesh``."""
        await self._store.put_bodies(bodies)
        await self._store.merge([encode_record(record)])

    async def fetch(self, ids: Sequence[ChunkId]) -> list[ChunkBody]:
        """See ``ContextMesh``."""
        return await self._store.bodies(ids)

    async def search(
        self,
        context: ContextInfo,
        question: str,
        vector: NDArray[np.float32],
        *,
        count: int = 8,
        way: Way = "both",
    ) -> Answer:
        """See ``ContextMesh``."""
        catalog = self._store.catalog(context.id)
        now = self._clock()
        table = await trio.to_thread.run_sync(
            lambda: catalog.table(
                default_model(context.encoder, len(vector), context.centre).model,
                context.policy,
                now,
            )
        )
        fresh = catalog.fresh(context.policy, now)
        every = every_chunk(fresh) if way == "words" else None
        if every is not None:
            picked = every
        else:
            picked = await trio.to_thread.run_sync(candidates, table, vector)
        bodies = {body.id: body for body in await self._store.bodies([c.id for c in picked])}
        words = question_terms(question)

        def ordered() -> Answer:
            windows = {each.id: each.windows for each in picked}
            said = score_all(bodies.values(), windows, vector, words)
            ranked = rank(said, count=2 * count, way=way, words=words_weight(question))
            owners = dict.fromkeys(bodies, self.peer_id)
            return Answer(
                hits=found(ranked, bodies, catalog.locate, count=count, owners=owners),
                windows=len(table.sketches),
                candidates=sum(len(each.windows) for each in picked),
                candidate_chunks=len(picked),
                chunks=chunks_of(fresh),
                nodes_asked=min(1, len(picked)),
                missing=len(picked) - len(said),
                rarities=rarities(question, said),
            )

        return await trio.to_thread.run_sync(ordered)

    async def used(self, context: ContextId, sources: Sequence[str], now: int) -> None:
        """See ``ContextMesh``."""
        await self._store.use(context, dict.fromkeys(sources, now))


def no_context(name: str) -> NotFound:
    """Return the error for a context that is not there."""
    return NotFound(
        f"There is no context {name[:80]!r}.",
        code="context_not_found",
        remedy="`pyagent-node context list` shows those that there are.",
    )
