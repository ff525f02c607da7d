"""Contexts in simulated nodes: a store that outlives them, and an encoder that knows words only."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.base.limits import MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import ContextId
from pyagent_node.consensus.port import Consensus
from pyagent_node.native import blake3
from pyagent_node.node.context_mesh import ContextService, Pace, open_contexts
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.collecting import Standing
from pyagent_node.sharding.context.defaults import Axes, default_model
from pyagent_node.sharding.context.documents import About, cut, document
from pyagent_node.sharding.context.lexical import term_hash, terms
from pyagent_node.sharding.context.record_codec import (
    decode_record,
    record_digest,
)
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    DocumentRecord,
    Version,
)
from pyagent_node.sharding.context.shares import Part, Share
from pyagent_node.simulations.kv import at_once

ENCODER: Final = "toy words"
DIMENSIONS: Final = 256
STORE_BYTES: Final = 64 * MIB
PACE: Final = Pace(sync=3.0, move=5.0, settle=1.0, collect=5.0, orphan=600.0, lost=15.0)


class MemoryContextStore:
    """Implements ``ContextStore`` in memory; what a call has written survives a crash."""

    def __init__(self, limit_bytes: int = STORE_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._catalogs: dict[ContextId, Catalog] = {}
        self._bodies: dict[ChunkId, ChunkBody] = {}
        self._contexts: dict[ChunkId, ContextId] = {}
        self._shares: dict[ContextId, Share] = {}

    @property
    def used_bytes(self) -> int:
        """See ``ContextStore``."""
        return sum(len(body.text) + len(body.vectors) for body in self._bodies.values())

    def catalog(self, context: ContextId) -> Catalog:
        """See ``ContextStore``."""
        catalog = self._catalogs.get(context)
        if catalog is None:
            catalog = self._catalogs[context] = Catalog(context)
        return catalog

    def known(self) -> Collection[ContextId]:
        """See ``ContextStore``."""
        some = {context for context, catalog in self._catalogs.items() if len(catalog)}
        return some | set(self._contexts.values())

    async def merge(self, records: Sequence[bytes]) -> int:
        """See ``ContextStore``."""
        decoded = [(decode_record(data), bytes(data)) for data in records]
        await trio.lowlevel.checkpoint()
        return sum(self.catalog(record.context).merge(record, data) for record, data in decoded)

    async def put_bodies(self, bodies: Sequence[ChunkBody]) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        if bodies and self.used_bytes >= self.limit_bytes:
            raise LimitExceeded("The simulated store is full.", code="context_store_full")
        for body in bodies:
            self._bodies[body.id] = body
            self._contexts[body.id] = body.context

    async def bodies(self, ids: Sequence[ChunkId]) -> list[ChunkBody]:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        return [self._bodies[chunk] for chunk in dict.fromkeys(ids) if chunk in self._bodies]

    def holds(self, chunk: ChunkId) -> bool:
        """See ``ContextStore``."""
        return chunk in self._bodies

    def held(self) -> Mapping[ChunkId, ContextId]:
        """See ``ContextStore``."""
        return self._contexts

    async def forget(self, ids: Sequence[ChunkId]) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        for chunk in ids:
            self._bodies.pop(chunk, None)
            self._contexts.pop(chunk, None)

    def share(self, context: ContextId) -> Share:
        """See ``ContextStore``."""
        return self._shares.setdefault(context, Share())

    async def put_parts(self, context: ContextId, parts: Mapping[ChunkId, Part]) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        self.share(context).put(parts)

    async def forget_parts(self, context: ContextId, chunks: Collection[ChunkId]) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        self.share(context).drop(chunks)

    async def strip(self, context: ContextId, sources: Sequence[str]) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        for source in sources:
            self.catalog(context).make_bare(source)

    async def adopt(self, context: ContextId, records: Sequence[bytes], floor: int) -> int:
        """See ``ContextStore``."""
        decoded = [(decode_record(data), bytes(data)) for data in records]
        await trio.lowlevel.checkpoint()
        catalog = self.catalog(context)
        news = [
            (record, data)
            for record, data in decoded
            if catalog.adopts(record, record_digest(data), floor)
        ]
        for record, data in news:
            catalog.adopt(record, data)
        return len(news)

    async def stand(
        self, context: ContextId, standing: Standing, gone: Mapping[str, bytes]
    ) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        catalog = self.catalog(context)
        catalog.standing = catalog.standing.joined(standing)
        for source, digest in gone.items():
            known = catalog.get(source)
            if known is not None and known.digest == digest:
                catalog.forget(source)

    async def use(self, context: ContextId, uses: Mapping[str, int]) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        self.catalog(context).use(uses)

    async def drop(self, context: ContextId) -> None:
        """See ``ContextStore``."""
        await trio.lowlevel.checkpoint()
        self._catalogs.pop(context, None)
        self._shares.pop(context, None)
        for chunk in [c for c, each in self._contexts.items() if each == context]:
            del self._bodies[chunk], self._contexts[chunk]


@lru_cache(maxsize=1)
def toy_axes() -> Axes:
    """Return the axes of the toy encoder."""
    return default_model(ENCODER, DIMENSIONS)


def toy_model(encoder: str, dimensions: int, centre: bytes = b"") -> Axes:
    """Return the axes of any encoder: the toy's, around a centre if there is one."""
    return default_model(ENCODER, DIMENSIONS, centre) if centre else toy_axes()


@lru_cache(maxsize=4096)
def _word(number: int) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.PCG64(number))
    return generator.standard_normal(DIMENSIONS).astype(np.float32)


def toy_vector(text: str) -> NDArray[np.float32]:
    """Return the sum of a random vector for each word: alike for texts that share words."""
    total = np.sum([_word(term_hash(term)) for term in terms(text)] or [_word(0)], axis=0)
    return np.asarray(total / np.linalg.norm(total), np.float32)


def toy_document(
    context: ContextId,
    source: str,
    text: str,
    version: Version,
    *,
    now: float = 0.0,
    centre: bytes = b"",
) -> tuple[DocumentRecord, list[ChunkBody]]:
    """Return the record and the bodies of a text; ``centre`` is that of the context."""
    data = text.encode()
    parts = cut(text, source, lambda piece: len(piece.split()))
    vectors = np.array([toy_vector(each) for each in parts.texts()], np.float32)
    about = About(
        context=context,
        source=source,
        version=version,
        digest=blake3(data),
        size=len(data),
        modified=int(now),
        added=int(now),
        encoder=ENCODER,
    )
    return document(
        parts, vectors.reshape(-1, DIMENSIONS), about, toy_model(ENCODER, DIMENSIONS, centre)
    )


def removal(
    context: ContextId, source: str, version: Version, *, now: float = 0.0
) -> DocumentRecord:
    """Return the record that says that a document is there no longer."""
    return DocumentRecord(
        context=context,
        source=source,
        version=version,
        digest=bytes(32),
        size=0,
        modified=int(now),
        added=int(now),
        removed=True,
        encoder=ENCODER,
    )


def open_simulated_contexts(
    mesh: Mesh,
    consensus: Consensus,
    store: MemoryContextStore,
    *,
    rng: random.Random,
    pace: Pace = PACE,
) -> AbstractAsyncContextManager[ContextService]:
    """Hold contexts at a simulated node while the block lasts."""
    return open_contexts(
        mesh,
        consensus,
        store,
        models=toy_model,
        clock=trio.current_time,
        offload=at_once,
        random_bytes=rng.randbytes,
        pace=pace,
    )
