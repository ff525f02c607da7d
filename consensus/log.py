"""The ``LogStore`` port and its implementations: a directory of files, and memory.

The contract: when ``append`` or ``compact`` returns, what it was given survives a crash; when it
raises, the log is as before (or, after a failed ``fsync``, refuses everything until it is opened
again, because nobody can know what the disk holds then).  One task at a time calls a store.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.files import (
    make_private_dir,
    map_os_error,
    mapped,
    read_limited,
    sync_dir,
    sync_file,
    write_atomic,
)
from pyagent_node.base.limits import MIB
from pyagent_node.consensus.segments import (
    Batch,
    LogEntry,
    Snapshot,
    corrupt,
    decode_segment,
    decode_snapshot_file,
    encode_record,
    encode_segment_header,
    encode_snapshot_file,
)

log = logging.getLogger("pyagent_node.consensus.log")

MAX_LOG_FILE = 256 * MIB
"""Largest file that is read back; compaction keeps real ones far below."""


class StoredLog(msgspec.Struct, frozen=True):
    """What a store holds: entries follow on the snapshot without a gap.

    ``torn_bytes`` is what was cut off the end: the remains of a write that a crash interrupted.
    """

    snapshot: Snapshot | None
    entries: list[LogEntry]
    hard_state: bytes | None
    torn_bytes: int = 0

    @property
    def last_index(self) -> int:
        """Index of the last entry, or of the snapshot, or 0."""
        if self.entries:
            return self.entries[-1].index
        return self.snapshot.index if self.snapshot else 0


class LogStore(Protocol):
    """A durable log.  ``hard_state`` is a small blob that an engine keeps beside the entries."""

    async def load(self) -> StoredLog:
        """Read everything; call it once, first.

        Raises :class:`CorruptData` (``log_corrupt``) naming the file and the remedy.
        """
        ...

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        """Make entries durable; an index that is there already replaces it and all after it.

        Raises :class:`Unavailable` (``disk_full``, ``disk_failed``, ``log_failed``).
        """
        ...

    async def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """Replace everything by ``snapshot`` and the ``entries`` that follow on it."""
        ...

    async def aclose(self) -> None:
        """Release the files; idempotent."""
        ...


def replay(batches: Sequence[Batch], snapshot_index: int, name: str) -> list[LogEntry]:
    """Return the entries above ``snapshot_index`` that ``batches`` leave, in order.

    Raises :class:`CorruptData` (``log_corrupt``) at a gap.
    """
    entries: list[LogEntry] = []
    for batch in batches:
        for entry in batch.entries:
            if entry.index <= snapshot_index:
                continue
            place = entry.index - snapshot_index - 1
            if place > len(entries):
                raise corrupt(name, 0, f"entry {snapshot_index + len(entries) + 1} is missing")
            del entries[place:]
            entries.append(entry)
    return entries


class FileLog:
    """A log in a directory of its own: numbered segments and the latest snapshot.

    Blocking calls run in a worker thread that is never abandoned in the middle of a write.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = None
        self._path = directory
        self._good = 0
        self._sequence = 0
        self._hard_state: bytes | None = None
        self._failed = False

    async def load(self) -> StoredLog:
        """See :meth:`LogStore.load`."""
        return await trio.to_thread.run_sync(self._load)

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        """See :meth:`LogStore.append`."""
        record = encode_record(Batch(list(entries), hard_state))
        await trio.to_thread.run_sync(self._append, record)
        if hard_state is not None:
            self._hard_state = hard_state

    async def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """See :meth:`LogStore.compact`."""
        batch = Batch([e for e in entries if e.index > snapshot.index], self._hard_state)
        await trio.to_thread.run_sync(partial(self._compact, snapshot, batch))

    async def aclose(self) -> None:
        """See :meth:`LogStore.aclose`."""
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _files(self, suffix: str) -> list[Path]:
        return sorted(p for p in self._directory.glob(f"*{suffix}") if p.stem.isdigit())

    def _load(self) -> StoredLog:
        with mapped(self._directory, "opening"):
            make_private_dir(self._directory)
            for leftover in self._directory.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        snapshot = self._load_snapshot()
        base = snapshot.index if snapshot else 0
        paths = self._files(".log")
        segments = []
        torn = 0
        for path in paths:
            data = read_limited(path, MAX_LOG_FILE)
            segment = decode_segment(data, str(path), last=path == paths[-1])
            segments.append(segment)
            torn = len(data) - segment.good
        if any(segment.base > base for segment in segments):
            raise corrupt(str(self._directory), 0, "the snapshot that the log continues is missing")
        if any(segment.base == base for segment in segments):
            segments = [segment for segment in segments if segment.base == base]
        elif not segments:
            self._start_segment(base, Batch([], None))
        batches = [batch for segment in segments for batch in segment.batches]
        entries = replay(batches, base, str(self._directory))
        for batch in batches:
            if batch.hard_state is not None:
                self._hard_state = batch.hard_state
        if paths:
            self._open(paths[-1], segments[-1].good, torn)
        return StoredLog(snapshot, entries, self._hard_state, torn)

    def _load_snapshot(self) -> Snapshot | None:
        paths = self._files(".snap")
        if not paths:
            return None
        return decode_snapshot_file(read_limited(paths[-1], MAX_LOG_FILE), str(paths[-1]))

    def _open(self, path: Path, good: int, torn: int) -> None:
        with mapped(path, "opening"):
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
            if torn:
                log.warning(
                    "%s ended in %d bytes of an unfinished write; they were cut off", path, torn
                )
                os.ftruncate(self._fd, good)
                sync_file(self._fd)
        self._path, self._good, self._sequence = path, good, int(path.stem)

    def _append(self, record: bytes) -> None:
        fd = self._usable()
        try:
            _write_all(fd, record)
        except OSError as error:
            self._undo(fd)
            raise map_os_error(error, self._path, "writing") from error
        try:
            sync_file(fd)
        except OSError as error:
            self._failed = True
            raise map_os_error(error, self._path, "syncing") from error
        self._good += len(record)

    def _undo(self, fd: int) -> None:
        """Cut a half-written record off again, or give the log up."""
        try:
            os.ftruncate(fd, self._good)
            sync_file(fd)
        except OSError:
            self._failed = True

    def _usable(self) -> int:
        if self._failed or self._fd is None:
            raise Unavailable(
                f"The log {self._path} cannot be written since an earlier failure of the disk.",
                code="log_failed",
                remedy="Check the disk, then restart the node.",
                path=str(self._path),
            )
        return self._fd

    def _compact(self, snapshot: Snapshot, batch: Batch) -> None:
        self._usable()
        old = self._files(".log") + self._files(".snap")
        path = self._directory / f"{snapshot.index:020d}.snap"
        write_atomic(path, encode_snapshot_file(snapshot))
        self._start_segment(snapshot.index, batch)
        with contextlib.suppress(OSError):
            for leftover in old:
                if leftover not in (path, self._path):
                    leftover.unlink()
            sync_dir(self._directory)

    def _start_segment(self, base: int, batch: Batch) -> None:
        path = self._directory / f"{self._sequence + 1:020d}.log"
        content = encode_segment_header(base)
        if batch.entries or batch.hard_state is not None:
            content += encode_record(batch)
        write_atomic(path, content)
        self._close()
        self._open(path, len(content), 0)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class MemoryLog:
    """A log in memory, for tests and simulations; reopening it finds what was appended."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._batches: list[Batch] = []

    async def load(self) -> StoredLog:
        """See :meth:`LogStore.load`."""
        await trio.lowlevel.checkpoint()
        base = self._snapshot.index if self._snapshot else 0
        hard = next((b.hard_state for b in reversed(self._batches) if b.hard_state), None)
        return StoredLog(self._snapshot, replay(self._batches, base, "memory"), hard)

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        """See :meth:`LogStore.append`."""
        await trio.lowlevel.checkpoint()
        self._batches.append(Batch(list(entries), hard_state))

    async def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """See :meth:`LogStore.compact`."""
        hard = next((b.hard_state for b in reversed(self._batches) if b.hard_state), None)
        await trio.lowlevel.checkpoint()
        kept = [entry for entry in entries if entry.index > snapshot.index]
        self._snapshot, self._batches = snapshot, [Batch(kept, hard)]

    async def aclose(self) -> None:
        """See :meth:`LogStore.aclose`."""
        await trio.lowlevel.checkpoint()
