"""What this node keeps of contexts, in one SQLite file: records, bodies of chunks, last use.

Every write is synced before it counts (``context_database``).  All records are in memory too (as
catalogs), and the ids of all bodies; bodies are read when they are asked for.  SQLite is used in
worker threads only, by one writer and one reader at a time.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import trio

from pyagent_node.base.errors import CorruptData, LimitExceeded, PyAgentError
from pyagent_node.base.types import ContextId
from pyagent_node.node.context_database import Database, Held
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.collecting import Standing
from pyagent_node.sharding.context.record_codec import (
    bare,
    decode_body,
    decode_record,
    encode_body,
    encode_record,
    record_digest,
)
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    DocumentRecord,
)
from pyagent_node.sharding.context.shares import Part, Share, decode_part, encode_part

log = logging.getLogger("pyagent_node.context")

T = TypeVar("T")

USE_SECONDS: Final = 60
"""Times of last use are written when they are so much later than what is written."""


class _Loaded(NamedTuple):
    records: list[tuple[DocumentRecord, bytes]]
    bodies: dict[ChunkId, Held]
    uses: list[tuple[ContextId, str, int]]
    parts: list[tuple[ContextId, ChunkId, Part]]
    standings: list[tuple[ContextId, Standing]]


class SqliteContextStore:
    """Implements ``sharding.context.port.ContextStore``; made by :func:`open_context_store`."""

    def __init__(self, database: Database, loaded: _Loaded, limit_bytes: int) -> None:
        self._database = database
        self._limit = limit_bytes
        self._catalogs: dict[ContextId, Catalog] = {}
        self._held = loaded.bodies
        self._contexts = {chunk: held.context for chunk, held in loaded.bodies.items()}
        self._used = sum(held.size for held in loaded.bodies.values())
        self._written_uses: dict[tuple[ContextId, str], int] = {}
        self._writing = trio.Lock()
        self._shares: dict[ContextId, Share] = {}
        for context, chunk, part in loaded.parts:
            self.share(context).put({chunk: part})
        for record, data in loaded.records:
            self.catalog(record.context).merge(record, data)
        for context, source, at in loaded.uses:
            self.catalog(context).use({source: at})
            self._written_uses[context, source] = at
        for context, standing in loaded.standings:
            self.catalog(context).standing = standing

    @property
    def used_bytes(self) -> int:
        """See ``ContextStore``."""
        return self._used

    @property
    def limit_bytes(self) -> int:
        """See ``ContextStore``."""
        return self._limit

    def catalog(self, context: ContextId) -> Catalog:
        """See ``ContextStore``."""
        found = self._catalogs.get(context)
        if found is None:
            found = self._catalogs[context] = Catalog(context)
        return found

    def known(self) -> Collection[ContextId]:
        """See ``ContextStore``."""
        some = {context for context, catalog in self._catalogs.items() if len(catalog)}
        return some | {held.context for held in self._held.values()}

    def holds(self, chunk: ChunkId) -> bool:
        """See ``ContextStore``."""
        return chunk in self._held

    def held(self) -> Mapping[ChunkId, ContextId]:
        """See ``ContextStore``."""
        return self._contexts

    async def merge(self, records: Sequence[bytes]) -> int:
        """See ``ContextStore``."""
        encoded = [bytes(data) for data in records]
        decoded = await _in_thread(lambda: [decode_record(data) for data in encoded])
        async with self._writing:
            news: dict[tuple[ContextId, str], tuple[DocumentRecord, bytes]] = {}
            for record, data in zip(decoded, encoded, strict=True):
                key, digest = (record.context, record.source), record_digest(data)
                best = news.get(key)
                if best is not None and (best[0].version, record_digest(best[1])) >= (
                    record.version,
                    digest,
                ):
                    continue
                if self.catalog(record.context).newer(record, digest):
                    news[key] = (record, data)
            rows = [(context, source, data) for (context, source), (_, data) in news.items()]
            if rows:
                await _in_thread(lambda: self._database.put_records(rows))
            for record, data in news.values():
                self.catalog(record.context).adopt(record, data)
            return len(news)

    async def put_bodies(self, bodies: Sequence[ChunkBody]) -> None:
        """See ``ContextStore``."""
        wanted = {body.id: body for body in bodies}
        async with self._writing:
            rows = await _in_thread(
                lambda: [
                    (chunk, body.context, encode_body(body))
                    for chunk, body in wanted.items()
                    if chunk not in self._held
                ]
            )
            size = sum(len(data) for _, _, data in rows)
            if self._used + size > self._limit:
                raise LimitExceeded(
                    f"This node keeps at most {self._limit} bytes of contexts, and has"
                    f" {self._used}.",
                    code="context_store_full",
                    remedy="Remove a context, or raise the setting context_disk_bytes.",
                    limit=self._limit,
                    used=self._used,
                )
            if not rows:
                return
            await _in_thread(lambda: self._database.put_bodies(rows))
            self._used += size
            for chunk, context, data in rows:
                self._held[chunk] = Held(context, len(data))
                self._contexts[chunk] = context

    async def bodies(self, ids: Sequence[ChunkId]) -> list[ChunkBody]:
        """See ``ContextStore``."""
        wanted = [chunk for chunk in dict.fromkeys(ids) if chunk in self._held]
        if not wanted:
            return []
        found, damaged = await _in_thread(lambda: _read(self._database, wanted))
        if damaged:
            log.warning("%d damaged chunks of contexts are given up", len(damaged))
            await self.forget(damaged)
        return found

    async def forget(self, ids: Sequence[ChunkId]) -> None:
        """See ``ContextStore``."""
        async with self._writing:
            gone = [chunk for chunk in dict.fromkeys(ids) if chunk in self._held]
            if gone:
                await _in_thread(lambda: self._database.delete_bodies(gone))
                self._gone(gone)

    def share(self, context: ContextId) -> Share:
        """See ``ContextStore``."""
        return self._shares.setdefault(context, Share())

    async def put_parts(self, context: ContextId, parts: Mapping[ChunkId, Part]) -> None:
        """See ``ContextStore``."""
        async with self._writing:
            rows = [(chunk, context, encode_part(part)) for chunk, part in parts.items()]
            await _in_thread(lambda: self._database.put_parts(rows))
            self.share(context).put(parts)

    async def forget_parts(self, context: ContextId, chunks: Collection[ChunkId]) -> None:
        """See ``ContextStore``."""
        async with self._writing:
            await _in_thread(lambda: self._database.delete_parts(chunks))
            self.share(context).drop(chunks)

    async def strip(self, context: ContextId, sources: Sequence[str]) -> None:
        """See ``ContextStore``."""
        async with self._writing:
            catalog = self.catalog(context)
            found = [known for source in sources if (known := catalog.get(source)) is not None]
            rows = await _in_thread(
                lambda: [
                    (context, known.record.source, encode_record(bare(known.record, known.digest)))
                    for known in found
                ]
            )
            await _in_thread(lambda: self._database.put_records(rows))
            for known in found:
                catalog.make_bare(known.record.source)

    async def adopt(self, context: ContextId, records: Sequence[bytes], floor: int) -> int:
        """See ``ContextStore``."""
        encoded = [bytes(data) for data in records]
        decoded = await _in_thread(lambda: [decode_record(data) for data in encoded])
        async with self._writing:
            catalog = self.catalog(context)
            news = [
                (record, data)
                for record, data in zip(decoded, encoded, strict=True)
                if catalog.adopts(record, record_digest(data), floor)
            ]
            rows = [(context, record.source, data) for record, data in news]
            await _in_thread(lambda: self._database.put_records(rows))
            for record, data in news:
                catalog.adopt(record, data)
            return len(news)

    async def stand(
        self, context: ContextId, standing: Standing, gone: Mapping[str, bytes]
    ) -> None:
        """See ``ContextStore``."""
        async with self._writing:
            catalog = self.catalog(context)
            sources = [
                source
                for source, digest in gone.items()
                if (known := catalog.get(source)) is not None and known.digest == digest
            ]
            joined = catalog.standing.joined(standing)
            await _in_thread(lambda: self._database.put_standing(context, joined, sources))
            catalog.standing = joined
            for source in sources:
                catalog.forget(source)
                self._written_uses.pop((context, source), None)

    async def use(self, context: ContextId, uses: Mapping[str, int]) -> None:
        """See ``ContextStore``; a time that is hardly later than the written one is not written."""
        self.catalog(context).use(uses)
        due = [
            (context, source, at)
            for source, at in self.catalog(context).uses.items()
            if source in uses and at >= self._written_uses.get((context, source), 0) + USE_SECONDS
        ]
        if not due:
            return
        async with self._writing:
            await _in_thread(lambda: self._database.put_uses(due))
            self._written_uses |= {(held, source): at for held, source, at in due}

    async def drop(self, context: ContextId) -> None:
        """See ``ContextStore``."""
        async with self._writing:
            await _in_thread(lambda: self._database.delete_context(context))
            self._catalogs.pop(context, None)
            self._shares.pop(context, None)
            self._gone([chunk for chunk, held in self._held.items() if held.context == context])
            for key in [key for key in self._written_uses if key[0] == context]:
                del self._written_uses[key]

    def _gone(self, ids: Sequence[ChunkId]) -> None:
        for chunk in ids:
            self._used -= self._held.pop(chunk).size
            del self._contexts[chunk]


@asynccontextmanager
async def open_context_store(
    folder: Path, *, limit_bytes: int
) -> AsyncIterator[SqliteContextStore]:
    """Open the store in ``folder``, which is made if it is not there.

    Raises :class:`CorruptData` (``context_store_corrupt``), naming the file, and errors of the
    disk.
    """
    database = await _in_thread(lambda: Database(folder))
    try:
        loaded = await _in_thread(lambda: _load(database))
        yield SqliteContextStore(database, loaded, limit_bytes)
    finally:
        with trio.CancelScope(shield=True):
            await _in_thread(database.close)


def _load(database: Database) -> _Loaded:
    records: list[tuple[DocumentRecord, bytes]] = []
    for context, source, data in database.records():
        try:
            records.append((decode_record(data), data))
        except PyAgentError as error:
            log.error(
                "the record of %r in context %s is given up: %s", source, context.hex(), error
            )
            # What is lacking now must not pass for removed: this node begins anew with the context.
            gone = [source] if isinstance(error, CorruptData) else []
            database.put_standing(context, Standing(), gone)
    parts: list[tuple[ContextId, ChunkId, Part]] = []
    for context, chunk, data in database.parts():
        try:
            parts.append((context, chunk, decode_part(data)))
        except PyAgentError as error:
            log.warning("a part of the index is made anew: %s", error)
    return _Loaded(
        records, dict(database.held()), list(database.uses()), parts, database.standings()
    )


def _read(database: Database, ids: Sequence[ChunkId]) -> tuple[list[ChunkBody], list[ChunkId]]:
    found: list[ChunkBody] = []
    damaged: list[ChunkId] = []
    for chunk, data in database.bodies(ids):
        try:
            body = decode_body(data)
            if body.id != chunk:
                raise CorruptData("It is another chunk.", code="bad_context_body")
            found.append(body)
        except PyAgentError:
            damaged.append(chunk)
    return found, damaged


async def _in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)
