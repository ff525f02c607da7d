"""The segments of the disk tier: where records lie, and how they are found without an index."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_files import BlockDirectory, BlockFile
from pyagent_node.sharding.block_index import Changes, Row
from pyagent_node.sharding.block_records import (
    RECORD_BYTES,
    SEGMENT_HEADER_BYTES,
    Label,
    decode_label,
    decode_segment_header,
    encode_segment_header,
)
from pyagent_node.sharding.kv_keys import BlockKey

log = logging.getLogger("pyagent_node.sharding.disk")

DIGITS: Final = 12
SUFFIX: Final = ".kv"


def segment_name(number: int) -> str:
    """Return the file name of a segment."""
    return f"{number:0{DIGITS}d}{SUFFIX}"


def segment_number(name: str) -> int | None:
    """Return the number of a segment from its file name, ``None`` for another file."""
    stem = name.removesuffix(SUFFIX)
    good = name.endswith(SUFFIX) and len(stem) == DIGITS and stem.isascii() and stem.isdigit()
    return int(stem) if good else None


class Spot(NamedTuple):
    """Where a record lies in its segment: ``size`` bytes from ``offset`` on."""

    offset: int
    size: int


class Segment:
    """An open segment: ``spots`` of the blocks that count, ``end`` of what may be appended to.

    A ``sealed`` one is appended to no more.
    """

    def __init__(self, number: int, model: Digest, file: BlockFile, end: int) -> None:
        self.number = number
        self.model = model
        self.file = file
        self.end = end
        self.live = 0
        self.spots: dict[BlockKey, Spot] = {}
        self.sealed = False

    def place(self, key: BlockKey, spot: Spot) -> None:
        """Count a record."""
        self.spots[key] = spot
        self.live += spot.size

    def drop(self, key: BlockKey) -> None:
        """Count a record no more."""
        self.live -= self.spots.pop(key).size

    def read(self, key: BlockKey, spot: Spot) -> tuple[Label, bytes] | None:
        """Return label and payload; ``None`` unless they are whole and those of ``key``."""
        data = self.file.read(spot.offset, spot.size)
        label = decode_label(self.model, data)
        if label is None or label.key != key or label.size != spot.size:
            return None
        payload = data[RECORD_BYTES:]
        return (label, payload) if label.fits(payload) else None

    def scan(self, start: int) -> list[tuple[Label, Spot]]:
        """Return the good records from ``start`` to the end, and cut a torn tail off.

        Records whose labels are good and whose payloads are not stay as dead bytes.
        """
        found: list[tuple[Label, Spot]] = []
        size = self.file.size()
        at = start
        while at < size:
            label = decode_label(self.model, self.file.read(at, RECORD_BYTES))
            if label is None or at + label.size > size:
                log.warning(
                    "segment %d of KV blocks ended in %d bytes of an unfinished write;"
                    " they were cut off",
                    self.number,
                    size - at,
                )
                self.file.truncate(at)
                break
            if label.fits(self.file.read(at + RECORD_BYTES, label.length)):
                found.append((label, Spot(at, label.size)))
            at += label.size
        self.end = at
        return found


class SegmentSet:
    """All segments of a directory, and what has to be told to the index.

    ``where`` says in which segment a block lies, ``file_bytes`` is the size of all of them,
    ``changes`` wait for the index, ``lost`` are blocks that were found damaged or went with their
    segment, ``trouble`` is what went wrong beside an operation that did its own part.
    """

    def __init__(self, directory: BlockDirectory, segment_bytes: int) -> None:
        self.segments: dict[int, Segment] = {}
        self.where: dict[BlockKey, int] = {}
        self.file_bytes = 0
        self.changes = Changes()
        self.lost: list[BlockKey] = []
        self.trouble: PyAgentError | None = None
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._next = 1

    def open(self, rows: Iterable[Row], ends: Mapping[int, int]) -> list[Row]:
        """Open the segments that are there; returns those of ``rows`` that hold, and new ones.

        ``rows`` and ``ends`` are what the index remembers.
        """
        self.changes = Changes()
        self.lost.clear()
        names = self._directory.names()
        numbers = sorted(n for n in map(segment_number, names) if n is not None)
        self._next = max([0, *numbers, *ends]) + 1
        by_segment: dict[int, list[Row]] = {}
        for row in rows:
            by_segment.setdefault(row.segment, []).append(row)
        for number in by_segment.keys() | ends.keys():
            if number not in numbers:
                for row in by_segment.get(number, ()):
                    self.changes.drop(row.key)
                self.changes.remove_segment(number)
        found: dict[BlockKey, Row] = {}
        for number in numbers:
            opened = self._open_one(number, by_segment.get(number, ()), ends.get(number))
            for key, row in opened.items():
                if key in found:  # a rewriting was cut short: two copies, the later one counts
                    self.segments[found[key].segment].drop(key)
                    self.changes.put(row)
                found[key] = row
                self.where[key] = number
        return list(found.values())

    def _open_one(
        self, number: int, rows: Iterable[Row], indexed: int | None
    ) -> dict[BlockKey, Row]:
        file = self._directory.open(segment_name(number))
        segment = _open_segment(number, file)
        if segment is None:
            file.close()
            log.warning("segment %d of KV blocks has no header; it is removed", number)
            for row in rows:
                self.changes.drop(row.key)
            self.changes.remove_segment(number)
            self._directory.remove(segment_name(number))
            return {}
        self.segments[number] = segment
        size = file.size()
        kept: dict[BlockKey, Row] = {}
        for row in rows:
            if row.model == segment.model and row.offset + row.size <= size:
                key = row.key
                segment.place(key, Spot(row.offset, row.size))
                kept[key] = row
            else:
                self.changes.drop(row.key)
        start = max(SEGMENT_HEADER_BYTES, indexed or 0)
        if start > size:
            segment.end, segment.sealed = size, True  # the disk has lost the end of it
        else:
            for label, spot in segment.scan(start):
                if label.key not in segment.spots:
                    segment.place(label.key, spot)
                    kept[label.key] = self._put(label, spot, number)
            self.changes.ends[number] = segment.end
        self.file_bytes += file.size()
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
        self.changes.put(row)
        return row

    def write(self, segment: Segment, records: Sequence[tuple[Label, bytes]]) -> None:
        """Append records to a segment; all of them are there, or none and this raises."""
        data = b"".join(record for _, record in records)
        try:
            segment.file.append(data)
        except PyAgentError:
            self._undo(segment)
            raise
        for label, record in records:
            spot = Spot(segment.end, len(record))
            segment.place(label.key, spot)
            self.where[label.key] = segment.number
            self._put(label, spot, segment.number)
            segment.end += len(record)
        self.file_bytes += len(data)
        self.changes.ends[segment.number] = segment.end

    def _undo(self, segment: Segment) -> None:
        """Cut a half-written record off, or leave the segment as it is for good."""
        try:
            segment.file.truncate(segment.end)
        except PyAgentError:
            segment.sealed = True
            with contextlib.suppress(PyAgentError):
                self.file_bytes += segment.file.size() - segment.end
                segment.end = segment.file.size()

    def active(self, model: Digest, need: int) -> Segment:
        """Return the segment of a model to append ``need`` bytes to."""
        for segment in self.segments.values():
            if segment.model == model and not segment.sealed:
                empty = segment.end == SEGMENT_HEADER_BYTES
                if empty or segment.end + need <= self._segment_bytes:
                    return segment
                segment.sealed = True
                self.sync(segment)
        number, self._next = self._next, self._next + 1
        header = encode_segment_header(model)
        self._directory.create(segment_name(number), header)
        segment = Segment(
            number, model, self._directory.open(segment_name(number)), SEGMENT_HEADER_BYTES
        )
        self.segments[number] = segment
        self.file_bytes += len(header)
        self.changes.ends[number] = segment.end
        return segment

    def sync(self, segment: Segment) -> None:
        """Make a segment durable; an error is kept for :attr:`trouble`."""
        try:
            segment.file.sync()
        except PyAgentError as error:
            self.trouble = error

    def remove(self, segment: Segment) -> None:
        """Remove the file of a segment in which nothing counts."""
        size = segment.file.size()
        segment.file.close()
        del self.segments[segment.number]
        # Should this fail, the file goes on to count, and the next start finds nothing in it.
        self._directory.remove(segment_name(segment.number))
        self.file_bytes -= size
        self.changes.remove_segment(segment.number)

    def drop(self, key: BlockKey) -> None:
        """Forget a block that is there."""
        self.segments[self.where.pop(key)].drop(key)
        self.changes.drop(key)

    def lose(self, key: BlockKey) -> None:
        """Forget a block that cannot be had any more, and note it as :attr:`lost`."""
        self.drop(key)
        self.lost.append(key)

    def close(self) -> None:
        """Give all files back; idempotent."""
        for segment in self.segments.values():
            segment.file.close()
        self.segments.clear()
        self.where.clear()
        self.file_bytes = 0


def _open_segment(number: int, file: BlockFile) -> Segment | None:
    """Return a segment as its header says, without records; ``None`` if it has no good header."""
    model = decode_segment_header(file.read(0, SEGMENT_HEADER_BYTES))
    if model is None:
        return None
    return Segment(number, model, file, SEGMENT_HEADER_BYTES)
