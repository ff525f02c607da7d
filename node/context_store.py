"""What this node keeps of contexts, in one SQLite file: records, bodies of chunks, last use.

The file is in WAL mode and every write is synced before it counts, so a crash leaves what was
there before a call or after it.  All records are in memory too (as catalogs), and the ids of all
bodies; bodies are read when they are asked for.  SQLite is used in worker threads only, by one
writer and one reader at a time, and its errors are mapped here.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import trio

from pyagent_node.base.errors import CorruptData, LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.files import make_private_dir, map_os_error
from pyagent_node.base.types import ContextId
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    DocumentRecord,
    bare,
    decode_body,
    decode_record,
    encode_body,
    encode_record,
    record_digest,
)
from pyagent_node.sharding.context.shares import Part, Share, decode_part, encode_part

log = logging.getLogger("pyagent_node.context")

T = TypeVar("T")

FILE: Final = "contexts.sqlite"
FORMAT: Final = 1
USE_SECONDS: Final = 60
"""Times of last use are written when they are so much later than what is written."""
BUSY_SECONDS: Final = 10.0

_TABLES: Final = """
PRAGMA auto_vacuum = INCREMENTAL;
CREATE TABLE records (
    context BLOB NOT NULL, source TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (context, source)
) WITHOUT ROWID;
CREATE TABLE bodies (
    id BLOB PRIMARY KEY NOT NULL, context BLOB NOT NULL, size INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE TABLE uses (
    context BLOB NOT NULL, source TEXT NOT NULL, at INTEGER NOT NULL,
    PRIMARY KEY (context, source)
) WITHOUT ROWID;
PRAGMA user_version = 1;
"""
_LATER_TABLES: Final = """
CREATE TABLE IF NOT EXISTS parts (
    id BLOB PRIMARY KEY NOT NULL, context BLOB NOT NULL, data BLOB NOT NULL
);
"""
"""Made in files of earlier versions too, which do not look at them."""


class _Held(NamedTuple):
    context: ContextId
    size: int


class _Loaded(NamedTuple):
    records: list[tuple[DocumentRecord, bytes]]
    bodies: dict[ChunkId, _Held]
    uses: list[tuple[ContextId, str, int]]
    parts: list[tuple[ContextId, ChunkId, Part]]


class SqliteContextStore:
    """Implements ``sharding.context.port.ContextStore``; made by :func:`open_context_store`."""

    def __init__(self, database: _Database, loaded: _Loaded, limit_bytes: int) -> None:
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
                self.catalog(record.context).merge(record, data)
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
                self._held[chunk] = _Held(context, len(data))
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

    async def forget_source(self, context: ContextId, source: str) -> None:
        """See ``ContextStore``."""
        async with self._writing:
            await _in_thread(lambda: self._database.delete_record(context, source))
            self.catalog(context).forget(source)
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
    database = await _in_thread(lambda: _Database(folder))
    try:
        loaded = await _in_thread(lambda: _load(database))
        yield SqliteContextStore(database, loaded, limit_bytes)
    finally:
        with trio.CancelScope(shield=True):
            await _in_thread(database.close)


def _load(database: _Database) -> _Loaded:
    records: list[tuple[DocumentRecord, bytes]] = []
    for context, source, data in database.records():
        try:
            records.append((decode_record(data), data))
        except PyAgentError as error:
            log.error(
                "the record of %r in context %s is given up: %s", source, context.hex(), error
            )
    parts: list[tuple[ContextId, ChunkId, Part]] = []
    for context, chunk, data in database.parts():
        try:
            parts.append((context, chunk, decode_part(data)))
        except PyAgentError as error:
            log.warning("a part of the index is made anew: %s", error)
    return _Loaded(records, dict(database.held()), list(database.uses()), parts)


def _read(database: _Database, ids: Sequence[ChunkId]) -> tuple[list[ChunkBody], list[ChunkId]]:
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


class _Database:
    """The file; every method blocks and maps its errors.  One thread writes at a time."""

    def __init__(self, folder: Path) -> None:
        make_private_dir(folder)
        self._path = folder / FILE
        self._writer: sqlite3.Connection | None = None
        with self._mapped("opening"):
            self._writer = self._connect()
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._writer.executescript(_TABLES)
            elif version != FORMAT:
                raise CorruptData(
                    f"{self._path} has format {version}; this program knows {FORMAT}.",
                    code="context_store_version",
                    remedy="Update this node, or move the file away: what other nodes hold of it is"
                    " copied anew.",
                )
            self._writer.executescript(_LATER_TABLES)
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def records(self) -> list[tuple[bytes, str, bytes]]:
        rows = self._all("SELECT context, source, data FROM records")
        return [(context, str(source), bytes(data)) for context, source, data in rows]

    def held(self) -> list[tuple[ChunkId, _Held]]:
        rows = self._all("SELECT id, context, size FROM bodies")
        return [(ChunkId(chunk), _Held(ContextId(context), size)) for chunk, context, size in rows]

    def uses(self) -> list[tuple[ContextId, str, int]]:
        rows = self._all("SELECT context, source, at FROM uses")
        return [(ContextId(context), source, at) for context, source, at in rows]

    def bodies(self, ids: Sequence[ChunkId]) -> list[tuple[ChunkId, bytes]]:
        found: list[tuple[ChunkId, bytes]] = []
        with self._mapped("reading"), self._reading() as connection:
            for chunk in ids:
                row = connection.execute(
                    "SELECT data FROM bodies WHERE id = ?", (chunk,)
                ).fetchone()
                if row is not None:
                    found.append((chunk, row[0]))
        return found

    def put_records(self, rows: Sequence[tuple[bytes, str, bytes]]) -> None:
        self._write("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", rows)

    def put_bodies(self, rows: Sequence[tuple[bytes, bytes, bytes]]) -> None:
        full = [(chunk, context, len(data), data) for chunk, context, data in rows]
        self._write("INSERT OR REPLACE INTO bodies VALUES (?, ?, ?, ?)", full)

    def parts(self) -> list[tuple[ContextId, ChunkId, bytes]]:
        rows = self._all("SELECT context, id, data FROM parts")
        return [(ContextId(context), ChunkId(chunk), data) for context, chunk, data in rows]

    def put_parts(self, rows: Sequence[tuple[ChunkId, bytes, bytes]]) -> None:
        self._write("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", rows)

    def delete_parts(self, ids: Collection[ChunkId]) -> None:
        self._write("DELETE FROM parts WHERE id = ?", [(chunk,) for chunk in ids])

    def put_uses(self, rows: Sequence[tuple[bytes, str, int]]) -> None:
        self._write("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", rows)

    def delete_bodies(self, ids: Sequence[ChunkId]) -> None:
        self._write("DELETE FROM bodies WHERE id = ?", [(chunk,) for chunk in ids])
        self._shrink()

    def delete_record(self, context: ContextId, source: str) -> None:
        with self._transaction() as connection:
            for table in ("records", "uses"):
                connection.execute(
                    f"DELETE FROM {table} WHERE context = ? AND source = ?",  # noqa: S608 - fixed names
                    (context, source),
                )

    def delete_context(self, context: ContextId) -> None:
        with self._transaction() as connection:
            for table in ("records", "uses", "bodies", "parts"):
                connection.execute(f"DELETE FROM {table} WHERE context = ?", (context,))  # noqa: S608
        self._shrink()

    def _shrink(self) -> None:
        with self._mapped("writing"):
            self._open().execute("PRAGMA incremental_vacuum").fetchall()

    def _all(self, statement: str) -> list[tuple[Any, ...]]:
        with self._mapped("reading"):
            return self._open().execute(statement).fetchall()

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        with self._transaction() as connection:
            connection.executemany(statement, rows)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mapped("writing"):
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, so that reading does not wait for a write."""
        connection = self._connect()
        try:
            yield connection
        finally:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        # Autocommit: transactions begin where the code says so.
        return sqlite3.connect(
            self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )

    def _open(self) -> sqlite3.Connection:
        if self._writer is None:
            raise Unavailable("The store of contexts is closed.", code="context_store_closed")
        return self._writer

    @contextmanager
    def _mapped(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            name = getattr(error, "sqlite_errorname", "")
            full = name == "SQLITE_FULL"
            raise Unavailable(
                f"{doing.capitalize()} {self._path} failed: {error}.",
                code="disk_full" if full else "disk_failed",
                remedy="Free some space, then try again."
                if full
                else "Check the disk and who owns the file.",
            ) from None
        except sqlite3.DatabaseError as error:
            raise CorruptData(
                f"{self._path} is damaged: {error}.",
                code="context_store_corrupt",
                remedy="Move the file away: what other nodes hold of it is copied anew, the rest is"
                " to be added again.",
            ) from None
        except OSError as error:
            raise map_os_error(error, self._path, doing) from error


async def _in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)
