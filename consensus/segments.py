"""The bytes of a log file: records with checksums, and what may be wrong with them.  Pure.

A segment is a header (magic, the index of the snapshot it continues, the number of the first
segment of its generation, checksum) and records.  A record is
``u32 length | u32 crc32(payload) | u32 crc32(the eight bytes before) | payload`` and
holds everything that one ``append`` made durable.  So a crash can only spoil the **last** record,
and only by leaving it short or by leaving whole disk sectors of it as zeros; that is a torn tail,
of which nothing was ever acknowledged.  Any other damage is corruption and is never repaired
silently.  (etcd's write-ahead log tells the two apart in the same way.)
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import msgspec

from pyagent_node.base.errors import CorruptData, LimitExceeded
from pyagent_node.base.limits import MAX_TAIL

SECTOR = 512
MAGIC = b"PYALOG2\n"
_SEGMENT_HEADER = struct.Struct(">8sQQI")
_MAGIC_V1 = b"PYALOG1\n"
_SEGMENT_HEADER_V1 = struct.Struct(">8sQI")
_RECORD_HEADER = struct.Struct(">III")
SEGMENT_HEADER_BYTES = _SEGMENT_HEADER.size
MAX_RECORD = MAX_TAIL

_SNAPSHOT_MAGIC = b"PYASNAP1"
_SNAPSHOT_HEADER = struct.Struct(">8sQQQI")


class LogEntry(msgspec.Struct, frozen=True, array_like=True):
    """One entry: its place in the log, the term it was written in, and opaque bytes."""

    index: int
    term: int
    data: bytes


class Snapshot(msgspec.Struct, frozen=True):
    """The state machine after entry ``index`` (of ``term``), as opaque bytes."""

    index: int
    term: int
    data: bytes


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What one ``append`` wrote: entries, and the engine's own durable facts if they changed."""

    entries: list[LogEntry]
    hard_state: bytes | None


class Segment(NamedTuple):
    """A decoded segment: the snapshot index it continues, its records, how many bytes are good.

    ``start`` is the number of the segment with which its generation begins; 0 in a segment of the
    first layout, which is always the only one of its generation.
    """

    base: int
    start: int
    batches: list[Batch]
    good: int


def encode_segment_header(base: int, start: int) -> bytes:
    """Return the header of a segment that continues the snapshot at index ``base``."""
    head = struct.pack(">8sQQ", MAGIC, base, start)
    return head + struct.pack(">I", zlib.crc32(head))


def encode_record(batch: Batch) -> bytes:
    """Return the bytes of one record; raises :class:`LimitExceeded` (``record_too_large``)."""
    payload = msgspec.msgpack.encode(batch)
    if len(payload) > MAX_RECORD:
        raise LimitExceeded(
            f"A log record of {len(payload)} bytes is over the limit of {MAX_RECORD}.",
            code="record_too_large",
        )
    head = struct.pack(">II", len(payload), zlib.crc32(payload))
    return head + struct.pack(">I", zlib.crc32(head)) + payload


def decode_segment(data: bytes, name: str, *, last: bool) -> Segment:
    """Return what ``data`` holds; only the ``last`` segment of a log may have a torn tail.

    Raises :class:`CorruptData` (``log_corrupt``) naming the file and the offset.
    """
    base, start, at = _decode_header(data, name)
    batches: list[Batch] = []
    while at < len(data):
        end = _record_end(data, at)
        if end is None:
            if last and _torn(data, at):
                break
            raise corrupt(name, at, "a checksum does not match")
        try:
            payload = memoryview(data)[at + _RECORD_HEADER.size : end]
            batches.append(msgspec.msgpack.decode(payload, type=Batch))
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise corrupt(name, at, "a record is not one of this program's") from None
        at = end
    return Segment(base, start, batches, at)


def _decode_header(data: bytes, name: str) -> tuple[int, int, int]:
    """Return the snapshot index, the first segment of the generation, and the header's size."""
    form = _SEGMENT_HEADER_V1 if data[:8] == _MAGIC_V1 else _SEGMENT_HEADER
    if len(data) < form.size:
        raise corrupt(name, 0, "its header is missing")
    magic, base, *start, crc = form.unpack_from(data)
    if magic not in (MAGIC, _MAGIC_V1) or crc != zlib.crc32(data[: form.size - 4]):
        raise corrupt(name, 0, "its header is wrong")
    return base, start[0] if start else 0, form.size


def _record_end(data: bytes, at: int) -> int | None:
    start = at + _RECORD_HEADER.size
    if start > len(data):
        return None
    length, crc, head_crc = _RECORD_HEADER.unpack_from(data, at)
    if head_crc != zlib.crc32(data[at : at + 8]) or start + length > len(data):
        return None
    good = zlib.crc32(memoryview(data)[start : start + length]) == crc
    return start + length if good else None


def _torn(data: bytes, at: int) -> bool:
    """Say whether the bad record at ``at`` is what a crash in the middle of a write leaves."""
    start = at + _RECORD_HEADER.size
    if start > len(data):
        return True
    length, _, head_crc = _RECORD_HEADER.unpack_from(data, at)
    if head_crc != zlib.crc32(data[at : at + 8]):
        # Only a sector of the header itself can have spoilt it; zeros further on are data.
        return _has_zero_sector(data, at, start)
    end = start + length
    return end > len(data) or (end == len(data) and _has_zero_sector(data, at, end))


def _has_zero_sector(data: bytes, at: int, end: int) -> bool:
    """Say whether a sector that has bytes in [at, end) holds nothing but zeros from ``at`` on."""
    while at < end:
        stop = min(len(data), at - at % SECTOR + SECTOR)
        if not any(memoryview(data)[at:stop]):
            return True
        at = stop
    return False


def encode_snapshot_file(snapshot: Snapshot) -> bytes:
    """Return the content of a snapshot file."""
    size = len(snapshot.data)
    head = struct.pack(">8sQQQ", _SNAPSHOT_MAGIC, snapshot.index, snapshot.term, size)
    crc = zlib.crc32(snapshot.data, zlib.crc32(head))
    return head + struct.pack(">I", crc) + snapshot.data


def decode_snapshot_file(data: bytes, name: str) -> Snapshot:
    """Return the snapshot in a file; raises :class:`CorruptData` (``log_corrupt``)."""
    if len(data) < _SNAPSHOT_HEADER.size:
        raise corrupt(name, 0, "it is too short")
    magic, index, term, length, crc = _SNAPSHOT_HEADER.unpack_from(data)
    body = data[_SNAPSHOT_HEADER.size :]
    if (
        magic != _SNAPSHOT_MAGIC
        or length != len(body)
        or crc != zlib.crc32(body, zlib.crc32(data[: _SNAPSHOT_HEADER.size - 4]))
    ):
        raise corrupt(name, 0, "a checksum does not match")
    return Snapshot(index, term, body)


def corrupt(name: str, at: int, why: str) -> CorruptData:
    """Return the error for a damaged file of the log."""
    return CorruptData(
        f"The log file {name} is damaged at byte {at}: {why}.",
        code="log_corrupt",
        remedy=(
            "Check the disk. If other nodes hold the log, move the log directory away and start the"
            " node: it fetches the log from them. Else restore the directory from a backup."
        ),
        path=name,
        offset=at,
    )
