"""The disk tier of the block store: segments that grow at their ends, an index, a limit in bytes.

**Nothing here is the only copy of anything**: a block that is lost is computed again.  So appends
are not synced one by one (a segment is, when it is full), and what a crash leaves is found out when
it is used: every read checks the record's label, its digest and the name that was asked for.  What
can never happen is that wrong bytes are returned, that the store does not open, or that more than
``limit`` bytes of segments lie there.

Space comes back by rewriting the segment with the least that still counts.  One lock serialises all
of it, so the methods may be called from any threads; all of them block.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.files import FileLock
from pyagent_node.base.limits import KIB, MIB
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_files import BlockDirectory, RealDirectory
from pyagent_node.sharding.block_index import BlockIndex, Changes, Row, SqliteIndex
from pyagent_node.sharding.block_records import (
    RECORD_BYTES,
    SEGMENT_HEADER_BYTES,
    Label,
    encode_record,
    encode_segment_header,
)
from pyagent_node.sharding.block_segments import (
    Segment,
    Spot,
    open_segment,
    segment_name,
    segment_number,
)
from pyagent_node.sharding.block_tree import Place, UnitId
from pyagent_node.sharding.kv_keys import BlockKey

log = logging.getLogger("pyagent_node.sharding.disk")

MAX_SEGMENT: Final = 64 * MIB
MIN_SEGMENT: Final = 64 * KIB
RESERVE: Final = 256 * MIB
"""Bytes of the disk that are left to others: the replicated log must never starve for a cache."""
FILL: Final = 0.8
"""Share of the room that counting records may take; the rest is what rewriting has to live on."""
_COPY_BYTES: Final = 4 * MIB


class NewBlock(NamedTuple):
    """A block to be written."""

    place: Place
    cost: float
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes of its record."""
        return RECORD_BYTES + len(self.payload)


class BlockDisk:
    """Blocks in a directory; see the module.  :meth:`open` comes first."""

    def __init__(
        self,
        directory: BlockDirectory,
        index: BlockIndex,
        *,
        limit: int,
        reserve: int = RESERVE,
        lock: FileLock | None = None,
    ) -> None:
        self.limit = limit
        self.segment_bytes = min(limit // 4, max(MIN_SEGMENT, min(MAX_SEGMENT, limit // 16)))
        self.trouble: PyAgentError | None = None
        """What went wrong beside an operation that did its own part; for the caller to take."""
        self._directory = directory
        self._index = index
        self._reserve = reserve
        self._lock = lock
        self._mutex = threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._where: dict[BlockKey, int] = {}
        self._changes = Changes()
        self._lost: list[BlockKey] = []
        self._next = 1
        self._file_bytes = 0

    @property
    def room(self) -> int:
        """Bytes of records that may count: what the store has to stay below by giving blocks up."""
        return int(FILL * max(0, self.limit - self.segment_bytes))

    @property
    def file_bytes(self) -> int:
        """Bytes of all segments."""
        return self._file_bytes

    def label(self) -> str:
        """Return what to call the place in a message."""
        return self._directory.label()

    def open(self) -> list[Row]:
        """Read the index, check it against the segments, and return what is there.

        Raises :class:`Conflict` (``in_use``) while another process has the directory, and
        :class:`Refused` or :class:`Unavailable` for a disk that cannot be used.
        """
        with self._mutex:
            if self._lock is not None:
                self._lock.acquire()
            try:
                return self._open()
            except BaseException:
                self._close()
                raise

    def _open(self) -> list[Row]:
        names = self._directory.names()
        rows, ends = self._index.load()
        numbers = sorted(n for n in map(segment_number, names) if n is not None)
        self._next = max([0, *numbers, *ends]) + 1
        by_segment: dict[int, list[Row]] = {}
        for row in rows:
            by_segment.setdefault(row.segment, []).append(row)
        for number in by_segment.keys() | ends.keys():
            if number not in numbers:
                for row in by_segment.get(number, ()):
                    self._changes.drop(row.key)
                self._changes.remove_segment(number)
        found: dict[BlockKey, Row] = {}
        for number in numbers:
            for row in self._open_segment(number, by_segment.get(number, ()), ends.get(number)):
                if row.key in found:  # a rewriting was cut short: two copies, the later one counts
                    self._segments[found[row.key].segment].drop(row.key)
                    self._changes.put(row)
                found[row.key] = row
                self._where[row.key] = number
        self._commit()
        return list(found.values())

    def _open_segment(self, number: int, rows: Iterable[Row], indexed: int | None) -> list[Row]:
        file = self._directory.open(segment_name(number))
        segment = open_segment(number, file)
        if segment is None:
            file.close()
            log.warning("segment %d of KV blocks has no header; it is removed", number)
            for row in rows:
                self._changes.drop(row.key)
            self._changes.remove_segment(number)
            self._directory.remove(segment_name(number))
            return []
        self._segments[number] = segment
        size = file.size()
        kept: list[Row] = []
        for row in rows:
            if row.model == segment.model and row.offset + row.size <= size:
                segment.place(row.key, Spot(row.offset, row.size))
                kept.append(row)
            else:
                self._changes.drop(row.key)
        start = max(SEGMENT_HEADER_BYTES, indexed or 0)
        if start > size:
            segment.end, segment.sealed = size, True  # the disk has lost the end of it
        else:
            for label, spot in segment.scan(start):
                if label.key not in segment.spots:
                    segment.place(label.key, spot)
                    kept.append(self._put(label, spot, number))
            self._changes.ends[number] = segment.end
        self._file_bytes += file.size()
        return kept

    def _put(self, label: Label, spot: Spot, segment: int) -> Row:
        key = label.key
        row = Row(
            key.model,
            key.codec,
            key.chain,
            key.layer,
            label.parent,
            label.number,
            label.cost,
            1,
            segment,
            *spot,
        )
        self._changes.put(row)
        return row

    def read(self, key: BlockKey) -> bytes | None:
        """Return a payload; ``None`` when it is not there, or was and is damaged (then forgotten).

        Raises :class:`Unavailable` when the disk fails.
        """
        with self._mutex:
            number = self._where.get(key)
            if number is None:
                return None
            segment = self._segments[number]
            found = segment.read(key, segment.spots[key])
            if found is None:
                self._lose(segment, key)
                return None
            return found[1]

    def append(self, blocks: Sequence[NewBlock]) -> None:
        """Write blocks; those that are there already are left as they are.

        Raises :class:`LimitExceeded` (``cache_full``) when there is no room within the limit,
        :class:`Unavailable` or :class:`Refused` when the disk does not take them.  Blocks written
        before the error are there: ask :meth:`has`.
        """
        with self._mutex:
            models = dict.fromkeys(block.place.key.model for block in blocks)
            try:
                for model in models:
                    mine = [
                        block
                        for block in blocks
                        if block.place.key.model == model and block.place.key not in self._where
                    ]
                    self._append_records(
                        model,
                        [encode_record(*b.place, b.cost, b.payload) for b in mine],
                    )
            finally:
                self._commit()

    def has(self, key: BlockKey) -> bool:
        """Say whether a block is there."""
        return key in self._where

    def _append_records(self, model: Digest, records: Sequence[tuple[Label, bytes]]) -> None:
        need = sum(len(data) for _, data in records)
        if not need:
            return
        self._make_room(need + SEGMENT_HEADER_BYTES)
        free = self._directory.free()
        if free - need < self._reserve:
            raise Unavailable(
                f"The disk of {self.label()} has {free} bytes free, of which {self._reserve} are"
                " left to others.",
                code="disk_full",
                remedy="Free some space, or lower kv.disk_bytes.",
                free=free,
            )
        self._write(self._active(model, need), records)

    def _write(self, segment: Segment, records: Sequence[tuple[Label, bytes]]) -> None:
        data = b"".join(record for _, record in records)
        try:
            segment.file.append(data)
        except PyAgentError:
            self._undo(segment)
            raise
        for label, record in records:
            spot = Spot(segment.end, len(record))
            segment.place(label.key, spot)
            self._where[label.key] = segment.number
            self._put(label, spot, segment.number)
            segment.end += len(record)
        self._file_bytes += len(data)
        self._changes.ends[segment.number] = segment.end

    def _undo(self, segment: Segment) -> None:
        """Cut a half-written record off, or leave the segment as it is for good."""
        try:
            segment.file.truncate(segment.end)
        except PyAgentError:
            segment.sealed = True
            with contextlib.suppress(PyAgentError):
                self._file_bytes += segment.file.size() - segment.end
                segment.end = segment.file.size()

    def _active(self, model: Digest, need: int) -> Segment:
        """Return the segment of a model to append to."""
        for segment in self._segments.values():
            if segment.model == model and not segment.sealed:
                empty = segment.end == SEGMENT_HEADER_BYTES
                if empty or segment.end + need <= self.segment_bytes:
                    return segment
                self._seal(segment)
        number, self._next = self._next, self._next + 1
        header = encode_segment_header(model)
        self._directory.create(segment_name(number), header)
        segment = Segment(
            number, model, self._directory.open(segment_name(number)), SEGMENT_HEADER_BYTES
        )
        self._segments[number] = segment
        self._file_bytes += len(header)
        self._changes.ends[number] = segment.end
        return segment

    def _seal(self, segment: Segment) -> None:
        segment.sealed = True
        with self._beside():
            segment.file.sync()

    def _make_room(self, need: int) -> None:
        """Rewrite segments until ``need`` more bytes fit; see :meth:`append`."""
        goal = self.limit - self.segment_bytes - need
        while self._file_bytes > goal:
            victim = min(
                (s for s in self._segments.values() if s.live + SEGMENT_HEADER_BYTES < s.end),
                key=lambda s: (s.live / s.end, s.number),
                default=None,
            )
            if victim is None:
                raise LimitExceeded(
                    f"The KV blocks in {self.label()} fill their {self.limit} bytes.",
                    code="cache_full",
                    remedy="Raise kv.disk_bytes, or give some models' blocks up.",
                    limit=self.limit,
                )
            self._rewrite(victim)

    def _rewrite(self, victim: Segment) -> None:
        """Copy what counts of a segment to the end of another one, and remove it."""
        victim.sealed = True
        # Without room for both at once (the limit was lowered) the old one goes first.
        tight = self._file_bytes + victim.live > self.limit - SEGMENT_HEADER_BYTES
        copies: list[tuple[Label, bytes]] = []
        size = 0
        for key, spot in list(victim.spots.items()):
            found = victim.read(key, spot)
            if found is None:
                self._lose(victim, key)
                continue
            label, payload = found
            copies.append(encode_record(key, label.parent, label.number, label.cost, payload))
            size += spot.size
            if size >= _COPY_BYTES and not tight:
                self._move(victim, copies, size)
                copies, size = [], 0
        if tight:
            for label, _ in copies:
                self._lose(victim, label.key)
            self._remove(victim)
            if copies:
                self._write(self._active(victim.model, size), copies)
                self._lost = [key for key in self._lost if key not in self._where]
            return
        if copies:
            self._move(victim, copies, size)
        self._commit()
        self._remove(victim)

    def _move(self, victim: Segment, copies: Sequence[tuple[Label, bytes]], size: int) -> None:
        self._write(self._active(victim.model, size), copies)
        for label, _ in copies:
            victim.drop(label.key)

    def _remove(self, segment: Segment) -> None:
        """Remove the file of a segment in which nothing counts."""
        size = segment.file.size()
        segment.file.close()
        del self._segments[segment.number]
        # Should this fail, the file goes on to count, and the next start finds nothing in it.
        self._directory.remove(segment_name(segment.number))
        self._file_bytes -= size
        self._changes.remove_segment(segment.number)

    def _lose(self, segment: Segment, key: BlockKey) -> None:
        segment.drop(key)
        del self._where[key]
        self._changes.drop(key)
        self._lost.append(key)

    def take_lost(self) -> list[BlockKey]:
        """Return, once, the blocks that were found damaged or had to go with their segment."""
        with self._mutex:
            lost, self._lost = self._lost, []
            return lost

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Give blocks up; their bytes come back as segments are rewritten."""
        with self._mutex:
            for key in keys:
                number = self._where.pop(key, None)
                if number is not None:
                    self._segments[number].drop(key)
                    self._changes.drop(key)
            for segment in [s for s in self._segments.values() if s.sealed and not s.spots]:
                with self._beside():
                    self._remove(segment)
            self._commit()

    def note_hits(self, hits: dict[UnitId, int]) -> None:
        """Remember how often links were used, for the choice of what goes after a restart."""
        with self._mutex:
            self._changes.hits.update(hits)
            self._commit()

    def drop_model(self, model: Digest) -> None:
        """Remove every block of a model, and its files.

        Raises :class:`Unavailable` or :class:`Refused` when a file cannot be removed.
        """
        with self._mutex:
            try:
                for segment in [s for s in self._segments.values() if s.model == model]:
                    for key in list(segment.spots):
                        segment.drop(key)
                        del self._where[key]
                        self._changes.drop(key)
                    segment.sealed = True
                    self._remove(segment)
            finally:
                self._commit()

    def shrink(self) -> None:
        """Bring the files below the limit, should it have been lowered."""
        with self._mutex:
            try:
                self._make_room(0)
            finally:
                self._commit()

    def close(self) -> None:
        """Write the index and give everything back; idempotent."""
        with self._mutex:
            for segment in self._segments.values():
                if not segment.sealed:
                    with self._beside():
                        segment.file.sync()
            self._commit()
            self._close()

    def _close(self) -> None:
        for segment in self._segments.values():
            segment.file.close()
        self._segments.clear()
        self._where.clear()
        self._index.close()
        self._file_bytes = 0
        if self._lock is not None:
            self._lock.release()

    def _commit(self) -> None:
        """Bring the index up to date; what it does not take now, it is given the next time."""
        if self._changes:
            with self._beside():
                self._index.commit(self._changes)
                self._changes = Changes()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Keep an error of ours for :attr:`trouble`."""
        try:
            yield
        except PyAgentError as error:
            self.trouble = error


def open_real_disk(folder: Path, limit: int, *, reserve: int = RESERVE) -> BlockDisk:
    """Return the disk tier in a directory, which :meth:`BlockDisk.open` then opens."""
    lock = FileLock(folder / "lock", f"The store of KV blocks {folder}")
    return BlockDisk(
        RealDirectory(folder), SqliteIndex(folder), limit=limit, reserve=reserve, lock=lock
    )
