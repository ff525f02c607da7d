"""The files of a log: numbered segments, one snapshot, and the order in which they change.

A **generation** is a snapshot and the segments that continue it.  The first segment of a
generation names the snapshot in its header and is written whole, under a temporary name, synced and
renamed: that rename is the moment at which a compaction (or a snapshot from a leader) takes
effect, so a crash leaves the old generation or the new one, never a mixture.  Further segments of
the generation follow as the last one reaches :data:`SEGMENT_BYTES`; each begins with the engine's
hard state, so the newest segment always has it.

Everything here blocks; :class:`~pyagent_node.consensus.log.FileLog` runs it in a thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Final

import msgspec

from pyagent_node.base.errors import NotFound, PyAgentError, Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.consensus.directory import LogDirectory, LogFile
from pyagent_node.consensus.segments import (
    SEGMENT_HEADER_BYTES,
    Batch,
    LogEntry,
    Segment,
    Snapshot,
    corrupt,
    decode_segment,
    decode_snapshot_file,
    encode_record,
    encode_segment_header,
    encode_snapshot_file,
)

log = logging.getLogger("pyagent_node.consensus.log")

SEGMENT_BYTES: Final = 4 * MIB
"""A segment that would grow beyond this is followed by another one."""
MAX_LOG_FILE: Final = 256 * MIB
"""Largest file that is read back; rotation and compaction keep real ones far below."""
RECORD_BYTES: Final = MIB
"""A compaction writes the entries it keeps in records of about this size."""

DIGITS: Final = 20
SEGMENT = ".log"
SNAPSHOT = ".snapshot"
SNAPSHOT_V1 = ".snap"
"""The first layout named a snapshot by its index, not by the segment that continues it."""


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


def newest_hard_state(batches: Sequence[Batch]) -> bytes | None:
    """Return the hard state that was written last."""
    return next((b.hard_state for b in reversed(batches) if b.hard_state is not None), None)


class SegmentedLog:
    """The blocking half of a log store, over any :class:`LogDirectory`; see the module."""

    def __init__(self, directory: LogDirectory, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._file: LogFile | None = None
        self._number = 0
        self._start = 0
        self._base = 0
        self._good = 0
        self._hard_state: bytes | None = None
        self._failed = False

    def load(self) -> StoredLog:
        """Read everything and get ready to append; see ``LogStore.load``."""
        names = self._directory.names()
        numbers = _numbers(names, SEGMENT)
        if not numbers:
            if _numbers(names, SNAPSHOT) or _numbers(names, SNAPSHOT_V1):
                raise corrupt(self._directory.label(), 0, "a snapshot is left but no segment is")
            self._begin(1, 1, 0, [])
            return StoredLog(None, [], None)
        last = numbers[-1]
        content = self._directory.read(_segment(last), MAX_LOG_FILE)
        newest = decode_segment(content, self._directory.label(_segment(last)), last=True)
        start = newest.start or last
        snapshot = self._read_snapshot(newest)
        segments = [self._read(number, newest.base, start) for number in range(start, last)]
        segments.append(newest)
        batches = [batch for segment in segments for batch in segment.batches]
        entries = replay(batches, newest.base, self._directory.label())
        self._hard_state = newest_hard_state(batches)
        torn = len(content) - newest.good
        if torn:
            log.warning(
                "%s ended in %d bytes of an unfinished write; they were cut off",
                self._directory.label(_segment(last)),
                torn,
            )
        # Written anew, because what was just read may be in memory only: after a sync that
        # failed, a system may forget that it never wrote those bytes (and say so to nobody).
        if newest.start:
            self._create(_segment(last), content[: newest.good])
            self._open(last, start, newest.base, newest.good)
        else:
            self._number = last
            self._replace(snapshot, entries)
        self._remove_others(names)
        return StoredLog(snapshot, entries, self._hard_state, torn)

    def _read(self, number: int, base: int, start: int) -> Segment:
        name = _segment(number)
        label = self._directory.label(name)
        try:
            content = self._directory.read(name, MAX_LOG_FILE)
        except NotFound:
            raise corrupt(label, 0, "it is missing") from None
        segment = decode_segment(content, label, last=False)
        if (segment.base, segment.start) != (base, start):
            raise corrupt(label, 0, "it belongs to another snapshot than the newest segment")
        return segment

    def _read_snapshot(self, newest: Segment) -> Snapshot | None:
        if newest.base == 0:
            return None
        name = _snapshot(newest.start)
        if not newest.start:
            name = f"{newest.base:0{DIGITS}d}{SNAPSHOT_V1}"
        label = self._directory.label(name)
        try:
            snapshot = decode_snapshot_file(self._directory.read(name, MAX_LOG_FILE), label)
        except NotFound:
            raise corrupt(label, 0, "the snapshot that the log continues is missing") from None
        if snapshot.index != newest.base:
            raise corrupt(label, 0, f"it is of entry {snapshot.index}, not {newest.base}")
        return snapshot

    def append(self, entries: Sequence[LogEntry], hard_state: bytes | None) -> None:
        """Make entries durable, in one record with one sync; see ``LogStore.append``."""
        file = self._usable()
        record = encode_record(Batch(list(entries), hard_state))
        if self._good + len(record) > self._segment_bytes and self._good > SEGMENT_HEADER_BYTES:
            self._rotate(record, hard_state)
        else:
            self._write(file, record)
        if hard_state is not None:
            self._hard_state = hard_state

    def _write(self, file: LogFile, record: bytes) -> None:
        try:
            file.write(record)
        except PyAgentError:
            self._undo(file)
            raise
        try:
            file.sync()
        except PyAgentError:
            self._failed = True
            raise
        self._good += len(record)

    def _undo(self, file: LogFile) -> None:
        """Cut a half-written record off again, or give the log up."""
        try:
            file.truncate(self._good)
            file.sync()
        except PyAgentError:
            self._failed = True

    def _usable(self) -> LogFile:
        if self._failed or self._file is None:
            path = self._directory.label()
            raise Unavailable(
                f"The log {path} cannot be written since an earlier failure of the disk.",
                code="log_failed",
                remedy="Check the disk, then restart the node.",
                path=path,
            )
        return self._file

    def _rotate(self, record: bytes, hard_state: bytes | None) -> None:
        records = [record]
        if hard_state is None and self._hard_state is not None:
            records.insert(0, encode_record(Batch([], self._hard_state)))
        self._begin(self._number + 1, self._start, self._base, records)

    def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """Begin a generation with ``snapshot``; see ``LogStore.compact``."""
        self._usable()
        assert snapshot.index > 0
        self._replace(snapshot, [entry for entry in entries if entry.index > snapshot.index])
        self._remove_others(self._directory.names())

    def _replace(self, snapshot: Snapshot | None, kept: Sequence[LogEntry]) -> None:
        records = [encode_record(batch) for batch in _batches(kept)]
        if self._hard_state is not None:
            records.insert(0, encode_record(Batch([], self._hard_state)))
        number = self._number + 1
        if snapshot is not None:
            self._directory.create(_snapshot(number), encode_snapshot_file(snapshot))
        self._begin(number, number, snapshot.index if snapshot else 0, records)

    def close(self) -> None:
        """Give the open segment back; idempotent."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _begin(self, number: int, start: int, base: int, records: list[bytes]) -> None:
        """Write a new segment and append to it from now on."""
        content = b"".join([encode_segment_header(base, start), *records])
        self._create(_segment(number), content)
        self._open(number, start, base, len(content))

    def _create(self, name: str, content: bytes) -> None:
        before = self._directory.exists(name)
        try:
            self._directory.create(name, content)
        except PyAgentError:
            # An old file of that name that is still there has the same records; a new one may
            # or may not survive a crash.
            self._failed = self._failed or (not before and self._directory.exists(name))
            raise

    def _open(self, number: int, start: int, base: int, good: int) -> None:
        self.close()
        self._file = self._directory.open_end(_segment(number))
        self._number, self._start, self._base, self._good = number, start, base, good

    def _remove_others(self, names: Sequence[str]) -> None:
        """Remove what earlier generations and unfinished compactions left."""
        snapshot = _snapshot(self._start)
        with contextlib.suppress(PyAgentError):
            gone = [_segment(n) for n in _numbers(names, SEGMENT) if n < self._start]
            gone += [n for n in names if n.endswith((SNAPSHOT, SNAPSHOT_V1)) and n != snapshot]
            for name in gone:
                self._directory.remove(name)
            if gone:
                self._directory.sync()


def _segment(number: int) -> str:
    return f"{number:0{DIGITS}d}{SEGMENT}"


def _snapshot(number: int) -> str:
    return f"{number:0{DIGITS}d}{SNAPSHOT}"


def _numbers(names: Sequence[str], suffix: str) -> list[int]:
    stems = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return sorted(int(s) for s in stems if len(s) == DIGITS and s.isascii() and s.isdigit())


def _batches(entries: Sequence[LogEntry]) -> list[Batch]:
    """Return the entries in batches of about :data:`RECORD_BYTES`."""
    batches: list[Batch] = []
    size = RECORD_BYTES
    for entry in entries:
        if size >= RECORD_BYTES:
            batches.append(Batch([], None))
            size = 0
        batches[-1].entries.append(entry)
        size += len(entry.data)
    return batches
