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
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.files import FileLock
from pyagent_node.base.limits import KIB, MIB
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_files import BlockDirectory, RealDirectory
from pyagent_node.sharding.block_index import BlockIndex, Changes, Row, SqliteIndex
from pyagent_node.sharding.block_ledger import NewBlock
from pyagent_node.sharding.block_records import (
    SEGMENT_HEADER_BYTES,
    Label,
    encode_record,
)
from pyagent_node.sharding.block_segments import Segment, SegmentSet
from pyagent_node.sharding.block_tree import UnitId
from pyagent_node.sharding.kv_keys import BlockKey

MAX_SEGMENT: Final = 64 * MIB
MIN_SEGMENT: Final = 64 * KIB
RESERVE: Final = 256 * MIB
"""Bytes of the disk that are left to others: the replicated log must never starve for a cache."""
FILL: Final = 0.8
"""Share of the room that counting records may take; the rest is what rewriting has to live on."""
_COPY_BYTES: Final = 4 * MIB


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
        self._directory = directory
        self._index = index
        self._reserve = reserve
        self._lock = lock
        self._mutex = threading.Lock()
        self._set = SegmentSet(directory, self.segment_bytes)

    @property
    def room(self) -> int:
        """Bytes of records that may count: what the store has to stay below by giving blocks up."""
        return int(FILL * max(0, self.limit - self.segment_bytes))

    @property
    def file_bytes(self) -> int:
        """Bytes of all segments."""
        return self._set.file_bytes

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
                rows = self._set.open(*self._index.load())
                self._commit()
                return rows
            except BaseException:
                self._close()
                raise

    def read(self, key: BlockKey) -> bytes | None:
        """Return a payload; ``None`` when it is not there, or was and is damaged (then forgotten).

        Raises :class:`Unavailable` when the disk fails.
        """
        with self._mutex:
            number = self._set.where.get(key)
            if number is None:
                return None
            segment = self._set.segments[number]
            found = segment.read(key, segment.spots[key])
            if found is None:
                self._set.lose(key)
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
                        if block.place.key.model == model and block.place.key not in self._set.where
                    ]
                    self._append_records(
                        model,
                        [encode_record(*b.place, b.cost, b.payload) for b in mine],
                    )
            finally:
                self._commit()

    def has(self, key: BlockKey) -> bool:
        """Say whether a block is there."""
        return key in self._set.where

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
        self._set.write(self._set.active(model, need), records)

    def _make_room(self, need: int) -> None:
        """Rewrite segments until ``need`` more bytes fit; see :meth:`append`."""
        goal = self.limit - self.segment_bytes - need
        while self._set.file_bytes > goal:
            victim = min(
                (s for s in self._set.segments.values() if s.live + SEGMENT_HEADER_BYTES < s.end),
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
        tight = self._set.file_bytes + victim.live > self.limit - SEGMENT_HEADER_BYTES
        copies: list[tuple[Label, bytes]] = []
        size = 0
        for key, spot in list(victim.spots.items()):
            found = victim.read(key, spot)
            if found is None:
                self._set.lose(key)
                continue
            label, payload = found
            copies.append(encode_record(key, label.parent, label.number, label.cost, payload))
            size += spot.size
            if size >= _COPY_BYTES and not tight:
                self._move(victim, copies, size)
                copies, size = [], 0
        if tight:
            for label, _ in copies:
                self._set.lose(label.key)
            self._set.remove(victim)
            if copies:
                self._set.write(self._set.active(victim.model, size), copies)
                self._set.lost = [key for key in self._set.lost if key not in self._set.where]
            return
        if copies:
            self._move(victim, copies, size)
        self._commit()
        self._set.remove(victim)

    def _move(self, victim: Segment, copies: Sequence[tuple[Label, bytes]], size: int) -> None:
        self._set.write(self._set.active(victim.model, size), copies)
        for label, _ in copies:
            victim.drop(label.key)

    def take_trouble(self) -> PyAgentError | None:
        """Return, once, what went wrong beside an operation that did its own part."""
        with self._mutex:
            trouble, self._set.trouble = self._set.trouble, None
            return trouble

    def take_lost(self) -> list[BlockKey]:
        """Return, once, the blocks that were found damaged or had to go with their segment."""
        with self._mutex:
            lost, self._set.lost = self._set.lost, []
            return lost

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Give blocks up; their bytes come back as segments are rewritten."""
        with self._mutex:
            for key in keys:
                if key in self._set.where:
                    self._set.drop(key)
            for segment in [s for s in self._set.segments.values() if s.sealed and not s.spots]:
                with self._beside():
                    self._set.remove(segment)
            self._commit()

    def note_hits(self, hits: dict[UnitId, int]) -> None:
        """Remember how often links were used, for the choice of what goes after a restart."""
        with self._mutex:
            self._set.changes.hits.update(hits)
            self._commit()

    def drop_model(self, model: Digest) -> None:
        """Remove every block of a model, and its files.

        Raises :class:`Unavailable` or :class:`Refused` when a file cannot be removed.
        """
        with self._mutex:
            try:
                for segment in [s for s in self._set.segments.values() if s.model == model]:
                    for key in list(segment.spots):
                        self._set.drop(key)
                    segment.sealed = True
                    self._set.remove(segment)
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
            for segment in self._set.segments.values():
                if not segment.sealed:
                    self._set.sync(segment)
            self._commit()
            self._close()

    def _close(self) -> None:
        self._set.close()
        self._index.close()
        if self._lock is not None:
            self._lock.release()

    def _commit(self) -> None:
        """Bring the index up to date; what it does not take now, it is given the next time."""
        if self._set.changes:
            with self._beside():
                self._index.commit(self._set.changes)
                self._set.changes = Changes()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Keep an error of ours for :attr:`trouble`."""
        try:
            yield
        except PyAgentError as error:
            self._set.trouble = error


def open_real_disk(folder: Path, limit: int, *, reserve: int = RESERVE) -> BlockDisk:
    """Return the disk tier in a directory, which :meth:`BlockDisk.open` then opens."""
    lock = FileLock(folder / "lock", f"The store of KV blocks {folder}")
    return BlockDisk(
        RealDirectory(folder), SqliteIndex(folder), limit=limit, reserve=reserve, lock=lock
    )
