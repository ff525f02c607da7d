"""Vectors of documents that are being added, so that a crash costs seconds and not hours.

Only long documents need it: their windows are embedded for minutes, and nothing of a document is
published before all of it is.  The vectors lie in a file of their own, by a digest of encoder and
text, and are forgotten when the document is there.  Losing the file loses nothing but time, so it
is written without waiting for the disk, and a damaged one is begun anew.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.native import blake3
from pyagent_node.sharding.context.embedder import Vectors

log = logging.getLogger("pyagent_node.context")

T = TypeVar("T")

FILE: Final = "drafts.sqlite"
KEPT_FROM: Final = 256
"""Windows from which on those of a document are kept."""
MAX_ROWS: Final = 1 << 20
"""The most vectors that are kept; with more, the file is begun anew."""
_KEY_BYTES: Final = 16


class Drafts:
    """The file in ``folder``, opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._using = trio.Lock()

    async def known(
        self, encoder: str, texts: Sequence[str], dimensions: int
    ) -> dict[int, NDArray[np.float32]]:
        """Return the vectors that are kept of some texts, by their places."""
        keys = [_key(encoder, text) for text in texts]

        def look(connection: sqlite3.Connection) -> dict[int, NDArray[np.float32]]:
            found: dict[int, NDArray[np.float32]] = {}
            for place, key in enumerate(keys):
                row = connection.execute(
                    "SELECT vector FROM drafts WHERE key = ?", (key,)
                ).fetchone()
                if row is not None and len(row[0]) == 4 * dimensions:
                    vector = np.frombuffer(row[0], "<f4").astype(np.float32)
                    if np.isfinite(vector).all():
                        found[place] = vector
            return found

        return await self._use(look) or {}

    async def keep(self, encoder: str, texts: Sequence[str], vectors: Vectors) -> None:
        """Keep the vectors of some texts."""
        rows = [
            (_key(encoder, text), vector.astype("<f4").tobytes())
            for text, vector in zip(texts, vectors, strict=True)
        ]

        def write(connection: sqlite3.Connection) -> None:
            (count,) = connection.execute("SELECT count(*) FROM drafts").fetchone()
            if count > MAX_ROWS:
                connection.execute("DELETE FROM drafts")
            connection.executemany("INSERT OR REPLACE INTO drafts VALUES (?, ?)", rows)

        await self._use(write)

    async def forget(self, encoder: str, texts: Sequence[str]) -> None:
        """Forget the vectors of some texts: they are published."""
        keys = [(_key(encoder, text),) for text in texts]

        def delete(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM drafts WHERE key = ?", keys)

        await self._use(delete)

    async def _use(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do something with the file; ``None`` if that failed: then it is begun anew."""
        async with self._using:
            try:
                return await trio.to_thread.run_sync(self._run, work)
            except (sqlite3.Error, OSError) as error:
                log.warning("%s is begun anew: %s", self._path, error)
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
                return None

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = sqlite3.connect(self._path)
        try:
            with connection:
                # Without waiting for the disk: what a crash of the machine takes is made again.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS drafts (key BLOB PRIMARY KEY, vector BLOB NOT NULL)"
                )
                return work(connection)
        finally:
            connection.close()


def _key(encoder: str, text: str) -> bytes:
    return blake3(encoder.encode() + b"\0" + text.encode("utf-8", "surrogatepass"))[:_KEY_BYTES]
