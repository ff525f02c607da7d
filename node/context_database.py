"""The SQLite file in which a node keeps what it has of contexts; see ``context_store``.  Blocks.

It is in WAL mode and every write is synced before it counts, so a crash leaves what was there
before a call or after it.  Errors of SQLite are mapped here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from pyagent_node.base.errors import CorruptData, Unavailable
from pyagent_node.base.files import make_private_dir, map_os_error
from pyagent_node.base.types import ContextId
from pyagent_node.sharding.context.collecting import Standing
from pyagent_node.sharding.context.records import ChunkId

FILE: Final = "contexts.sqlite"
FORMAT: Final = 1
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
CREATE TABLE IF NOT EXISTS standings (
    context BLOB PRIMARY KEY NOT NULL, covered INTEGER NOT NULL, settled INTEGER NOT NULL
);
"""
"""Made in files of earlier versions too, which do not look at them."""


class Held(NamedTuple):
    """A body that is kept: whose it is, and its bytes."""

    context: ContextId
    size: int


class Database:
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
        """Close the file; nothing can be done with it afterwards."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def records(self) -> list[tuple[bytes, str, bytes]]:
        """Return context, source and bytes of all records."""
        rows = self._all("SELECT context, source, data FROM records")
        return [(context, str(source), bytes(data)) for context, source, data in rows]

    def held(self) -> list[tuple[ChunkId, Held]]:
        """Return the ids of all bodies, their contexts and sizes."""
        rows = self._all("SELECT id, context, size FROM bodies")
        return [(ChunkId(chunk), Held(ContextId(context), size)) for chunk, context, size in rows]

    def uses(self) -> list[tuple[ContextId, str, int]]:
        """Return when each source was last used (Unix seconds)."""
        rows = self._all("SELECT context, source, at FROM uses")
        return [(ContextId(context), source, at) for context, source, at in rows]

    def bodies(self, ids: Sequence[ChunkId]) -> list[tuple[ChunkId, bytes]]:
        """Return those of some bodies that are there, as bytes."""
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
        """Keep records (context, source, bytes) instead of those that were there."""
        self._write("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", rows)

    def put_bodies(self, rows: Sequence[tuple[bytes, bytes, bytes]]) -> None:
        """Keep bodies (id, context, bytes)."""
        full = [(chunk, context, len(data), data) for chunk, context, data in rows]
        self._write("INSERT OR REPLACE INTO bodies VALUES (?, ?, ?, ?)", full)

    def parts(self) -> list[tuple[ContextId, ChunkId, bytes]]:
        """Return the parts of sketches: context, chunk, bytes."""
        rows = self._all("SELECT context, id, data FROM parts")
        return [(ContextId(context), ChunkId(chunk), data) for context, chunk, data in rows]

    def put_parts(self, rows: Sequence[tuple[ChunkId, bytes, bytes]]) -> None:
        """Keep parts (chunk, context, bytes)."""
        self._write("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", rows)

    def delete_parts(self, ids: Collection[ChunkId]) -> None:
        """Give parts up."""
        self._write("DELETE FROM parts WHERE id = ?", [(chunk,) for chunk in ids])

    def put_uses(self, rows: Sequence[tuple[bytes, str, int]]) -> None:
        """Keep times of last use."""
        self._write("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", rows)

    def delete_bodies(self, ids: Sequence[ChunkId]) -> None:
        """Give bodies up, and their room on the disk."""
        self._write("DELETE FROM bodies WHERE id = ?", [(chunk,) for chunk in ids])
        self._shrink()

    def standings(self) -> list[tuple[ContextId, Standing]]:
        """Return how far this node is with each context."""
        rows = self._all("SELECT context, covered, settled FROM standings")
        return [
            (ContextId(context), Standing(covered, settled)) for context, covered, settled in rows
        ]

    def put_standing(self, context: bytes, standing: Standing, gone: Iterable[str]) -> None:
        """Keep how far this node is with a context, and forget some records of it, at once."""
        rows = [(context, source) for source in gone]
        with self._transaction() as connection:
            connection.executemany("DELETE FROM records WHERE context = ? AND source = ?", rows)
            connection.executemany("DELETE FROM uses WHERE context = ? AND source = ?", rows)
            connection.execute(
                "INSERT OR REPLACE INTO standings VALUES (?, ?, ?)", (context, *standing)
            )

    def delete_context(self, context: ContextId) -> None:
        """Forget all of a context."""
        with self._transaction() as connection:
            for table in ("records", "uses", "bodies", "parts", "standings"):
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
