"""Records and bodies as bytes.  Pure.

A record::

    magic "PACR"  version u16  zero u16
    MessagePack array (see _Wire): chunks as differences, so that most numbers take one byte
    the first 16 bytes of BLAKE3 of all that

A *bare* record (version 2) is one without its sketches, for contexts whose sketches lie spread
over the nodes (``shares``).  Before its last 16 bytes stand those of the whole record, so that a
document has one digest in either form.  Nobody can check that digest without the sketches: a
member's word is taken for it, as for everything that a record says.

What was not written by :func:`encode_record` or :func:`encode_body` is refused.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import numpy as np

from pyagent_node.base.contexts import CONTEXT_ID_BYTES, MAX_IDENTITY
from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import ContextId
from pyagent_node.native import blake3
from pyagent_node.sharding.context.chunking import MAX_SOURCE
from pyagent_node.sharding.context.owners import BUCKETS
from pyagent_node.sharding.context.records import (
    CHECK_BYTES,
    DIGEST_BYTES,
    MAX_CHUNK_WINDOWS,
    MAX_CHUNKS,
    MAX_NUMBER,
    WEIGHT_BYTES,
    ChunkBody,
    ChunkRow,
    DocumentRecord,
    Version,
)
from pyagent_node.sharding.context.sketches import MAX_DIMENSIONS, check_vectors

MAX_RECORD: Final = 32 * MIB
"""The most bytes of an encoded record: some 800,000 windows."""
MAX_BODY: Final = 4 * MIB
"""The most bytes of an encoded body."""
RECORD_VERSION: Final = 1
BARE_VERSION: Final = 2
_MAGIC: Final = b"PACR"
_BODY_MAGIC: Final = b"PACB"
_HEAD: Final = struct.Struct("<4sHH")
_SEAL: Final = 16
_FIELDS: Final = 7


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record as it is encoded; ``rows`` holds seven differences for each chunk."""

    context: bytes
    source: str
    version: Version
    digest: bytes
    size: int
    modified: int
    added: int
    removed: bool
    encoder: str
    rows: list[int]
    checks: bytes
    sketches: bytes


class _WireBody(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    context: bytes
    source: str
    version: Version
    ordinal: int
    text: str
    spans: tuple[tuple[int, int], ...]
    vectors: bytes


_encoder: Final = msgspec.msgpack.Encoder()
_decode_wire: Final = msgspec.msgpack.Decoder(_Wire)
_decode_body: Final = msgspec.msgpack.Decoder(_WireBody)


def encode_record(record: DocumentRecord) -> bytes:
    """Return the bytes of a record, the same for equal records.

    Raises :class:`InvalidRequest` (``bad_context_record``) for parts that do not fit together, and
    :class:`LimitExceeded` (``context_record_too_large``).
    """
    problem = _problem(record)
    if problem is not None:
        raise InvalidRequest(f"This is no record of a document: {problem}.", code=_BAD_RECORD)
    rows: list[int] = []
    at, line = 0, 1
    for place, row in enumerate(record.chunks):
        rows += (
            row.start - at,
            row.end - row.start,
            row.line - line,
            row.tokens,
            row.bucket,
            row.windows,
            place - row.same,
        )
        at, line = row.end, row.line
    wire = _Wire(
        record.context,
        record.source,
        record.version,
        record.digest,
        record.size,
        record.modified,
        record.added,
        record.removed,
        record.encoder,
        rows,
        b"".join(row.check for row in record.chunks),
        record.sketches,
    )
    version = BARE_VERSION if record.whole else RECORD_VERSION
    data = _HEAD.pack(_MAGIC, version, 0) + _encoder.encode(wire) + record.whole
    if len(data) + _SEAL > MAX_RECORD:
        raise LimitExceeded(
            f"The document {record.source[:200]!r} has too many windows for one record.",
            code="context_record_too_large",
            remedy="Add it in parts.",
            size=len(data),
            limit=MAX_RECORD,
        )
    return data + blake3(data)[:_SEAL]


def decode_record(data: bytes | bytearray | memoryview) -> DocumentRecord:
    """Return the record of some bytes.

    Raises :class:`CorruptData` (``bad_context_record``) and, for a newer version,
    :class:`Unsupported` (``context_record_version``).
    """
    inner, whole = _open(bytes(data), _MAGIC, MAX_RECORD, _BAD_RECORD), b""
    if _version(data) == BARE_VERSION:
        inner, whole = inner[:-_SEAL], bytes(inner[-_SEAL:])
    try:
        wire = _decode_wire.decode(inner)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _corrupt("it is malformed", _BAD_RECORD) from None
    count, rest = divmod(len(wire.rows), _FIELDS)
    if rest or count > MAX_CHUNKS or len(wire.checks) != count * CHECK_BYTES:
        raise _corrupt("its chunks are not whole", _BAD_RECORD)
    if any(abs(number) >= MAX_NUMBER for number in wire.rows):
        raise _corrupt("a number in it is too large", _BAD_RECORD)
    chunks: list[ChunkRow] = []
    at, line = 0, 1
    for place in range(count):
        gap, length, lines, tokens, bucket, windows, back = wire.rows[
            place * _FIELDS : (place + 1) * _FIELDS
        ]
        start, line = at + gap, line + lines
        at = start + length
        check = wire.checks[place * CHECK_BYTES : (place + 1) * CHECK_BYTES]
        chunks.append(ChunkRow(start, at, line, tokens, bucket, windows, place - back, check))
    record = DocumentRecord(
        context=ContextId(wire.context),
        source=wire.source,
        version=wire.version,
        digest=wire.digest,
        size=wire.size,
        modified=wire.modified,
        added=wire.added,
        removed=wire.removed,
        encoder=wire.encoder,
        chunks=tuple(chunks),
        sketches=wire.sketches,
        whole=whole,
    )
    problem = _problem(record)
    if problem is not None:
        raise _corrupt(problem, _BAD_RECORD)
    return record


def bare(record: DocumentRecord, digest: bytes) -> DocumentRecord:
    """Return a record without its sketches; ``digest`` is its :func:`record_digest`.

    One that has no windows has no sketches either, and stays as it is.
    """
    if record.whole or not record.windows:
        return record
    return msgspec.structs.replace(record, sketches=b"", whole=digest)


def encode_body(body: ChunkBody) -> bytes:
    """Return the bytes of a body.

    Raises :class:`InvalidRequest` (``bad_context_body``) for one that is none.
    """
    problem = _body_problem(body)
    wire = _WireBody(
        body.context,
        body.source,
        body.version,
        body.ordinal,
        body.text,
        body.spans,
        body.vectors,
    )
    data = b"" if problem else _HEAD.pack(_BODY_MAGIC, RECORD_VERSION, 0) + _encoder.encode(wire)
    if problem or len(data) + _SEAL > MAX_BODY:
        raise InvalidRequest(
            f"This is no body of a chunk: {problem or 'it is too large'}.", code=_BAD_BODY
        )
    return data + blake3(data)[:_SEAL]


def decode_body(data: bytes | bytearray | memoryview) -> ChunkBody:
    """Return the body of some bytes; whether it is the wanted one its ``id`` says.

    Raises :class:`CorruptData` (``bad_context_body``) and, for a newer version,
    :class:`Unsupported` (``context_record_version``).
    """
    inner = _open(bytes(data), _BODY_MAGIC, MAX_BODY, _BAD_BODY)
    try:
        wire = _decode_body.decode(inner)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _corrupt("it is malformed", _BAD_BODY) from None
    body = ChunkBody(
        context=ContextId(wire.context),
        source=wire.source,
        version=wire.version,
        ordinal=wire.ordinal,
        text=wire.text,
        spans=wire.spans,
        vectors=wire.vectors,
    )
    problem = _body_problem(body)
    if problem is not None:
        raise _corrupt(problem, _BAD_BODY)
    return body


def check_body(body: ChunkBody) -> ChunkBody:
    """Return a body that is new here if its vectors can be sketched.

    One that is held already is not refused for it.  Raises :class:`InvalidRequest`
    (``bad_vectors``).
    """
    check_vectors(body.matrix())
    return body


def record_digest(data: bytes) -> bytes:
    """Return the digest of an encoded record, the same for its bare form."""
    if _version(data) == BARE_VERSION:
        return bytes(data[-2 * _SEAL : -_SEAL])
    return bytes(data[-_SEAL:])


_BAD_RECORD: Final = "bad_context_record"
_BAD_BODY: Final = "bad_context_body"


def _version(data: bytes | bytearray | memoryview) -> int:
    return int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")


def _open(data: bytes, magic: bytes, limit: int, code: str) -> memoryview:
    if not _HEAD.size + _SEAL <= len(data) <= limit:
        raise _corrupt("it does not have the length of one", code)
    start, version, zero = _HEAD.unpack_from(data)
    if start != magic or zero:
        raise _corrupt("it does not begin like one", code)
    if version != RECORD_VERSION and (magic, version) != (_MAGIC, BARE_VERSION):
        raise Unsupported(
            f"A part of a context has version {version}; this program knows {RECORD_VERSION}.",
            code="context_record_version",
            remedy="Update this node.",
        )
    if blake3(data[:-_SEAL])[:_SEAL] != data[-_SEAL:]:
        raise _corrupt("its checksum is wrong", code)
    return memoryview(data)[_HEAD.size : -_SEAL]


def _problem(record: DocumentRecord) -> str | None:
    """Return what is wrong with a record, if anything."""
    problem = _name_problem(record.context, record.source, record.version)
    if problem is not None:
        return problem
    numbers = (record.size, record.modified, record.added)
    if len(record.digest) != DIGEST_BYTES or not all(0 <= n < MAX_NUMBER for n in numbers):
        return "its digest, size or times make no sense"
    if len(record.encoder) > MAX_IDENTITY or not record.encoder.isprintable():
        return "its encoder has no good name"
    if record.removed and (record.chunks or record.sketches):
        return "it is removed and has chunks"
    if len(record.chunks) > MAX_CHUNKS:
        return f"it has more than {MAX_CHUNKS} chunks"
    at, line, windows = 0, 1, 0
    for place, row in enumerate(record.chunks):
        ordered = at <= row.start < row.end < MAX_NUMBER and line <= row.line < MAX_NUMBER
        sane = 0 <= row.tokens < MAX_NUMBER and 0 <= row.bucket < BUCKETS
        if not ordered or not sane or len(row.check) != CHECK_BYTES:
            return f"chunk {place} makes no sense"
        own = row.same == place
        if own != (row.windows > 0) or not 0 <= row.windows <= MAX_CHUNK_WINDOWS:
            return f"chunk {place} has a wrong number of windows"
        if not own and not (0 <= row.same < place and record.chunks[row.same].same == row.same):
            return f"chunk {place} is the same as one that stands for nothing"
        at, line, windows = row.end, row.line, windows + row.windows
    if not windows:
        return "it has sketches of no window" if record.sketches or record.whole else None
    if record.whole:
        fits = len(record.whole) == _SEAL and not record.sketches
        return None if fits else "it is bare and has sketches, or does not say of what it is bare"
    size, rest = divmod(len(record.sketches), windows)
    if rest or size <= WEIGHT_BYTES:
        return "its sketches do not have one size"
    weights = np.frombuffer(record.sketches[windows * (size - WEIGHT_BYTES) :], "<f2")
    return None if np.isfinite(weights).all() else "its weights are no numbers"


def _body_problem(body: ChunkBody) -> str | None:
    problem = _name_problem(body.context, body.source, body.version)
    if problem is not None:
        return problem
    if not 0 <= body.ordinal < MAX_CHUNKS or not 0 < len(body.spans) <= MAX_CHUNK_WINDOWS:
        return "it has no place or no windows"
    if not all(0 <= start < end <= len(body.text) for start, end in body.spans):
        return "its windows lie outside of its text"
    size, rest = divmod(len(body.vectors), len(body.spans))
    if rest or size % 2 or not 0 < size // 2 <= MAX_DIMENSIONS:
        return "its vectors do not have one size"
    if not np.isfinite(np.frombuffer(body.vectors, "<f2")).all():
        return "its vectors are no numbers"
    return None if _whole(body.text) else "its text holds half characters"


def _name_problem(context: bytes, source: str, version: Version) -> str | None:
    if len(context) != CONTEXT_ID_BYTES:
        return "its context has no id"
    if not 0 < len(source) <= MAX_SOURCE or not source.isprintable():
        return "its source has no good name"
    writer = version.writer
    if not 0 < version.counter < MAX_NUMBER or not 0 < len(writer) <= 128 or not writer.isascii():
        return "its version makes no sense"
    return None


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _corrupt(why: str, code: str) -> CorruptData:
    what = "record of a document" if code == _BAD_RECORD else "body of a chunk"
    return CorruptData(f"These bytes are no {what}: {why}.", code=code)
