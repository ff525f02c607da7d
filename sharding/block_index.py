"""The index of the disk tier: which block lies where.  A port, and SQLite behind it.

The segments say by themselves what they hold; the index saves reading them all when a node
starts, and remembers what was given up and how often a block was used.  So it may be stale or lost:
rows that point nowhere are dropped by whoever reads a segment, and what lies beyond the indexed end
of a segment is scanned.  A damaged index is thrown away.

Everything here blocks, and is called by one thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

import msgspec

from pyagent_node.base.errors import InvalidRequest, PyAgentError, Refused, Unavailable
from pyagent_node.base.files import make_private_dir, mapped
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_tree import UnitId
from pyagent_node.sharding.kv_keys import LINK_BYTES, MAX_LAYER, BlockKey

log = logging.getLogger("pyagent_node.sharding.index")

FILE: Final = "index.sqlite"
VERSION: Final = 1
_APPLICATION: Final = 0x50594B56  # "PYKV"
_BUSY_SECONDS: Final = 5.0


class Row(msgspec.Struct, frozen=True, array_like=True):
    """Where a block lies: ``size`` bytes of a record at ``offset`` of a segment."""

    model: Digest
    codec: str
    chain: bytes
    layer: int
    parent: bytes
    number: int
    cost: float
    hits: int
    segment: int
    offset: int
    size: int

    @property
    def key(self) -> BlockKey:
        """The name of the block."""
        return BlockKey(self.model, self.layer, self.chain, self.codec)


class Changes(msgspec.Struct):
    """What one :meth:`BlockIndex.commit` makes so: blocks, ends of segments, and uses.

    ``rows`` are put (or moved), ``gone`` removed.  ``ends`` says up to where segments are indexed,
    ``emptied`` which of them are no more.  ``hits`` counts uses of links.
    """

    rows: dict[BlockKey, Row] = {}
    gone: set[BlockKey] = set()
    ends: dict[int, int] = {}
    emptied: set[int] = set()
    hits: dict[UnitId, int] = {}

    def put(self, row: Row) -> None:
        """Add or move a block."""
        self.gone.discard(row.key)
        self.rows[row.key] = row

    def drop(self, key: BlockKey) -> None:
        """Remove a block."""
        self.rows.pop(key, None)
        self.gone.add(key)

    def remove_segment(self, number: int) -> None:
        """Forget a segment; its blocks were moved or dropped before."""
        self.ends.pop(number, None)
        self.emptied.add(number)

    def __bool__(self) -> bool:
        return bool(self.rows or self.gone or self.ends or self.emptied or self.hits)


class BlockIndex(Protocol):
    """Remembers rows; what was committed is there after a restart, or an earlier state is."""

    def load(self) -> tuple[list[Row], dict[int, int]]:
        """Return all rows, and up to which byte each segment is indexed; call it once, first.

        A damaged index is emptied.  Raises :class:`Unavailable` or :class:`Refused`.
        """
        ...

    def commit(self, changes: Changes) -> None:
        """Make all of ``changes`` so, or raise and change nothing."""
        ...

    def close(self) -> None:
        """Give the file back; idempotent."""
        ...


_PASSING: Final = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    )
)

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS blocks (
  model BLOB NOT NULL, codec TEXT NOT NULL, chain BLOB NOT NULL, layer INTEGER NOT NULL,
  parent BLOB NOT NULL, number INTEGER NOT NULL, cost REAL NOT NULL, hits INTEGER NOT NULL,
  segment INTEGER NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL,
  PRIMARY KEY (model, codec, chain, layer)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segments (number INTEGER PRIMARY KEY, indexed INTEGER NOT NULL);
"""


class SqliteIndex:
    """An index in a SQLite file (write-ahead log, this process alone)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE
        self._db: sqlite3.Connection | None = None

    def load(self) -> tuple[list[Row], dict[int, int]]:
        """See :meth:`BlockIndex.load`."""
        make_private_dir(self._folder)
        try:
            return self._load()
        except (sqlite3.DatabaseError, msgspec.ValidationError, InvalidRequest) as error:
            self.close()
            if _passing(error):
                raise _map(error, self._path) from error
            log.warning("%s is damaged (%s); it is made anew from the segments", self._path, error)
            self._discard()
        try:
            return self._load()
        except (sqlite3.DatabaseError, msgspec.ValidationError, InvalidRequest) as error:
            self.close()
            raise _map(error, self._path) from error

    def _load(self) -> tuple[list[Row], dict[int, int]]:
        with mapped(self._path, "opening"):
            db = sqlite3.connect(
                self._path,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        self._db = db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # no shared memory that a full disk can spoil
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if (version, application) != (VERSION, _APPLICATION):
            if version or application:
                raise sqlite3.DatabaseError(f"it is of version {version}, not {VERSION}")
            db.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION};"
                f" PRAGMA application_id = {_APPLICATION}; COMMIT;"
            )
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))
        rows = _rows(db.execute("SELECT * FROM blocks"))
        ends = dict(db.execute("SELECT number, indexed FROM segments").fetchall())
        return rows, msgspec.convert(ends, dict[int, int])

    def commit(self, changes: Changes) -> None:
        """See :meth:`BlockIndex.commit`."""
        db = self._db
        if db is None:
            raise Unavailable(f"The index {self._path} is closed.", code="disk_failed")
        try:
            with _transaction(db):
                db.executemany(
                    "DELETE FROM blocks WHERE model = ? AND codec = ? AND chain = ? AND layer = ?",
                    [(bytes.fromhex(k.model), k.codec, k.chain, k.layer) for k in changes.gone],
                )
                db.executemany(
                    "INSERT INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO"
                    " UPDATE SET segment = excluded.segment, offset = excluded.offset,"
                    " size = excluded.size, hits = max(hits, excluded.hits)",
                    [_values(row) for row in changes.rows.values()],
                )
                db.executemany(
                    "UPDATE blocks SET hits = ? WHERE model = ? AND codec = ? AND chain = ?",
                    [
                        (hits, bytes.fromhex(model), codec, chain)
                        for (model, codec, chain), hits in changes.hits.items()
                    ],
                )
                db.executemany(
                    "INSERT OR REPLACE INTO segments VALUES (?, ?)", changes.ends.items()
                )
                db.executemany(
                    "DELETE FROM segments WHERE number = ?", [(n,) for n in changes.emptied]
                )
        except sqlite3.Error as error:
            raise _map(error, self._path) from error

    def close(self) -> None:
        """See :meth:`BlockIndex.close`."""
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _discard(self) -> None:
        with mapped(self._path, "removing"):
            for suffix in ("", "-wal", "-shm", "-journal"):
                self._path.with_name(FILE + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back by itself
            db.execute("ROLLBACK")
        raise


def _rows(found: Iterable[tuple[object, ...]]) -> list[Row]:
    """Return checked rows; names that many of them share are kept in memory once."""
    once: dict[object, object] = {}
    names: dict[object, str] = {}
    tuples: list[tuple[object, ...]] = []
    for model, codec, chain, layer, parent, *rest in found:
        if model not in names:
            names[model] = model.hex() if isinstance(model, bytes) else ""
        tuples.append(
            (
                names[model],
                once.setdefault(codec, codec),
                once.setdefault(chain, chain),
                layer,
                once.setdefault(parent, parent),
                *rest,
            )
        )
    rows = msgspec.convert(tuples, list[Row])
    for model, codec in {(row.model, row.codec) for row in rows}:
        BlockKey(model, 0, bytes(LINK_BYTES), codec).check()
    for row in rows:
        if (
            min(row.layer, row.number, row.hits, row.segment, row.offset, row.size) < 0
            or row.layer > MAX_LAYER
            or len(row.chain) != LINK_BYTES
        ):
            raise InvalidRequest("A row of the index cannot be.", code="bad_block")
    return rows


def _values(row: Row) -> tuple[object, ...]:
    model, *rest = msgspec.structs.astuple(row)
    return (bytes.fromhex(model), *rest)


def _passing(error: Exception) -> bool:
    """Say whether an error speaks of the disk or of another process, not of what is stored."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING


def _map(error: Exception, path: Path) -> PyAgentError:
    text = f"The index {path} cannot be used: {error}."
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return Unavailable(
                text, code="disk_full", remedy="Free some space, then try again.", path=str(path)
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
            return Refused(
                text,
                code="file_not_permitted",
                remedy="Check who owns it and whether the file system is writable.",
                path=str(path),
            )
        case _:
            return Unavailable(text, code="disk_failed", remedy="Check the disk.", path=str(path))
