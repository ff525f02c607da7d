"""The ``LogStore`` port and its implementations: a directory of files, and memory.

The contract: when ``append`` or ``compact`` returns, what it was given survives a crash; when it
raises, the log is as before (or, after a failed ``fsync``, refuses everything until it is opened
again, because nobody can know what the disk holds then).  One task at a time calls a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import trio

from pyagent_node.consensus.directory import FileDirectory
from pyagent_node.consensus.segmented import (
    SEGMENT_BYTES,
    SegmentedLog,
    StoredLog,
    newest_hard_state,
    replay,
)
from pyagent_node.consensus.segments import Batch, LogEntry, Snapshot

__all__ = ["FileLog", "LogStore", "MemoryLog", "StoredLog"]


class LogStore(Protocol):
    """A durable log.  ``hard_state`` is a small blob that an engine keeps beside the entries."""

    async def load(self) -> StoredLog:
        """Read everything; call it once, first.

        Raises :class:`CorruptData` (``log_corrupt``) naming the file and the remedy.
        """
        ...

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        """Make entries durable; an index that is there already replaces it and all after it.

        All of it survives a crash or nothing does, so one call is one group commit.  Raises
        :class:`Unavailable` (``disk_full``, ``disk_failed``, ``log_failed``) and, for what does
        not fit a record, :class:`LimitExceeded` (``record_too_large``).
        """
        ...

    async def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """Replace everything by ``snapshot`` and the ``entries`` that follow on it.

        A snapshot is of entry 1 or later.  The hard state stays.  A crash leaves what was before
        or all that was asked for.
        """
        ...

    async def aclose(self) -> None:
        """Release the files; idempotent."""
        ...


class FileLog:
    """A log in a directory of its own: numbered segments and the latest snapshot.

    Blocking calls run in a worker thread that is never abandoned in the middle of a write.
    """

    def __init__(self, directory: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._files = SegmentedLog(FileDirectory(directory), segment_bytes=segment_bytes)

    async def load(self) -> StoredLog:
        """See :meth:`LogStore.load`."""
        return await trio.to_thread.run_sync(self._files.load)

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        """See :meth:`LogStore.append`."""
        await trio.to_thread.run_sync(self._files.append, entries, hard_state)

    async def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """See :meth:`LogStore.compact`."""
        await trio.to_thread.run_sync(self._files.compact, snapshot, entries)

    async def aclose(self) -> None:
        """See :meth:`LogStore.aclose`."""
        self._files.close()
        await trio.lowlevel.checkpoint()


class MemoryLog:
    """A log in memory, for tests and simulations; reopening it finds what was appended."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._batches: list[Batch] = []

    async def load(self) -> StoredLog:
        """See :meth:`LogStore.load`."""
        await trio.lowlevel.checkpoint()
        base = self._snapshot.index if self._snapshot else 0
        hard = newest_hard_state(self._batches)
        return StoredLog(self._snapshot, replay(self._batches, base, "memory"), hard)

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        """See :meth:`LogStore.append`."""
        await trio.lowlevel.checkpoint()
        self._batches.append(Batch(list(entries), hard_state))

    async def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """See :meth:`LogStore.compact`."""
        hard = newest_hard_state(self._batches)
        await trio.lowlevel.checkpoint()
        kept = [entry for entry in entries if entry.index > snapshot.index]
        self._snapshot, self._batches = snapshot, [Batch(kept, hard)]

    async def aclose(self) -> None:
        """See :meth:`LogStore.aclose`."""
        await trio.lowlevel.checkpoint()
