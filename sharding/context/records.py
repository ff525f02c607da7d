"""What nodes know and hold of a context: records of documents, bodies of chunks.  Pure.

A *document* is one source (a file's name, say) of one context.  Its *record* says what of it can be
found: where its chunks lie in it, and the sketches of their windows.  Every node holds every
record; a document's newest version is its record with the highest :class:`Version`, and a removed
one is a record that says so, so that nodes which met in any order agree.  A *body* is what only a
chunk's owners hold: its text and the exact vectors of its windows.  A chunk's id is a digest that a
record gives, and a body too, so a body that was changed is not the chunk of its record.

How they travel and are kept: ``record_codec``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NewType

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.native import blake3
from pyagent_node.sharding.context.chunking import MAX_SOURCE

ChunkId = NewType("ChunkId", bytes)
"""16 bytes of a digest of context, source, version, place and content of a chunk."""

CHUNK_ID_BYTES: Final = 16
CHECK_BYTES: Final = 8
"""Bytes of a chunk's own digest in its row."""
DIGEST_BYTES: Final = 32
MAX_CHUNKS: Final = 1 << 18
"""The most chunks of a document."""
MAX_CHUNK_WINDOWS: Final = 4096
MAX_NUMBER: Final = 1 << 53
"""Numbers in a record are below this, so that every reader has them exactly."""

WEIGHT_BYTES: Final = 2
"""Bytes of a sketch's weight."""
_ID_DOMAIN: Final = b"pyagent chunk 1\0"
_CHECK_DOMAIN: Final = b"pyagent chunk text 1\0"


class Version(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Which of two versions of a document is newer: the higher one, counter before writer."""

    counter: int
    writer: PeerId


class ChunkRow(msgspec.Struct, frozen=True, gc=False):
    """A chunk in its record: characters ``[start, end)`` of the text, from ``line`` (from 1) on.

    ``windows`` of the record's sketches belong to it, after those of the chunks before.  ``same``
    is the place of the chunk that says (nearly) the same and stands for it: its own, or that of an
    earlier one; then it has no windows and no body.  ``check`` is :func:`content_check`.
    """

    start: int
    end: int
    line: int
    tokens: int
    bucket: int
    windows: int
    same: int
    check: bytes


class DocumentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a document.

    ``digest`` is BLAKE3 of its bytes as they were read, ``size`` their number; ``modified`` and
    ``added`` are in seconds since 1970.  ``removed``: the document is there no longer; then there
    are no chunks.  ``encoder`` made the vectors.  ``sketches`` holds the packed sketches of all
    windows, then their weights (little-endian float16).  ``whole`` is the digest of the whole
    record where this one is bare: it has windows and no sketches.
    """

    context: ContextId
    source: str
    version: Version
    digest: bytes
    size: int
    modified: int
    added: int
    removed: bool = False
    encoder: str = ""
    chunks: tuple[ChunkRow, ...] = ()
    sketches: bytes = b""
    whole: bytes = b""

    @property
    def windows(self) -> int:
        """Windows of all chunks."""
        return sum(chunk.windows for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.tokens for chunk in self.chunks)

    def packed(self) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """Return the sketches ``[windows, bits / 8]`` and their weights ``[windows]``."""
        windows = self.windows
        split = len(self.sketches) - windows * WEIGHT_BYTES
        rows = np.frombuffer(self.sketches[:split], np.uint8).reshape(windows, -1)
        weights = np.frombuffer(self.sketches[split:], "<f2").astype(np.float16)
        return (rows if windows else np.zeros((0, 0), np.uint8)), weights

    def id_of(self, ordinal: int) -> ChunkId:
        """Return the id of the chunk at a place."""
        check = self.chunks[ordinal].check
        return chunk_id(self.context, self.source, self.version, ordinal, check)


class ChunkBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk's owner holds: its text and the exact vectors of its windows.

    ``vectors`` are the windows' unit vectors in little-endian float16, one after the other;
    ``spans`` says which characters ``[start, end)`` of the text each window is.
    """

    context: ContextId
    source: str
    version: Version
    ordinal: int
    text: str
    spans: tuple[tuple[int, int], ...]
    vectors: bytes

    @property
    def id(self) -> ChunkId:
        """The chunk's id, as its record gives it too if nothing was changed."""
        check = content_check(self.text, self.spans, self.vectors)
        return chunk_id(self.context, self.source, self.version, self.ordinal, check)

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        return len(self.vectors) // 2 // len(self.spans) if self.spans else 0

    def matrix(self) -> NDArray[np.float32]:
        """Return the vectors, ``[windows, dimensions]``."""
        flat = np.frombuffer(self.vectors, "<f2").astype(np.float32)
        return flat.reshape(len(self.spans), -1) if self.spans else np.zeros((0, 0), np.float32)


def content_check(text: str, spans: Sequence[tuple[int, int]], vectors: bytes) -> bytes:
    """Return the digest of a chunk's content that its row carries."""
    data = text.encode()
    flat = b"".join(struct.pack("<II", *span) for span in spans)
    sizes = struct.pack("<QQ", len(data), len(flat))
    return blake3(_CHECK_DOMAIN + sizes + data + flat + vectors)[:CHECK_BYTES]


def chunk_id(
    context: ContextId, source: str, version: Version, ordinal: int, check: bytes
) -> ChunkId:
    """Return the id of a chunk."""
    name, writer = source.encode(), version.writer.encode()
    sizes = struct.pack("<QQQQ", version.counter, ordinal, len(name), len(writer))
    digest = blake3(_ID_DOMAIN + context + sizes + name + writer + check)
    return ChunkId(digest[:CHUNK_ID_BYTES])


def check_source(source: str) -> str:
    """Return the name of a source if it can be one: it is shown on terminals and in answers.

    Raises :class:`InvalidRequest` (``bad_context_source``).
    """
    if not 0 < len(source) <= MAX_SOURCE or not source.isprintable():
        raise InvalidRequest(
            f"{source[:80]!r} cannot be the name of a source.",
            code="bad_context_source",
            remedy=f"A name has 1 to {MAX_SOURCE} characters that can be printed.",
        )
    return source
