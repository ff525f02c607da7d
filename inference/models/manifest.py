"""The manifest of a model: its digest and the digest of every chunk.

A node that trusts a manifest (because its digest stands in the replicated log) can take single
chunks from anybody and check each one.  A manifest is a function of the file and the chunk size
alone, so every node that holds the file makes the same one, whatever name it gives the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.base.files import mapped
from pyagent_node.base.limits import CHUNK_BYTES, KIB, MIB
from pyagent_node.base.types import Digest
from pyagent_node.inference.models.chunks import chunk_count, chunk_range, chunks_of
from pyagent_node.inference.models.gguf_format import MAX_HEADER_BYTES
from pyagent_node.inference.models.gguf_types import ByteRange
from pyagent_node.native import blake3, hash_file

MANIFEST_VERSION: Final = 1
DIGEST_BYTES: Final = 32
MAX_MANIFEST_BYTES: Final = 32 * MIB
"""Longest encoded manifest: a million chunks, or a terabyte in chunks of one MiB."""
MIN_CHUNK_BYTES: Final = 4 * KIB
MAX_CHUNK_BYTES: Final = 16 * MIB

_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
MAX_NAME: Final = 128
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:+-]{{0,{MAX_NAME - 1}}}", re.ASCII)


def check_digest(text: str) -> Digest:
    """Return ``text`` as a digest; raises :class:`InvalidRequest` (``bad_digest``)."""
    if not _DIGEST.fullmatch(text):
        raise InvalidRequest(
            f"{text[:80]!r} is not a digest (64 lowercase hexadecimal digits).", code="bad_digest"
        )
    return Digest(text)


def check_name(text: str) -> str:
    """Return ``text`` as a model name; raises :class:`InvalidRequest` (``bad_name``).

    Letters, digits and ``._:+-``, beginning with a letter or digit, at most 128; not a digest.
    """
    if not _NAME.fullmatch(text) or _DIGEST.fullmatch(text):
        raise InvalidRequest(
            f"{text[:80]!r} cannot be a model name: use letters, digits and ._:+- only.",
            code="bad_name",
        )
    return text


class ModelManifest(msgspec.Struct, frozen=True, array_like=True):
    """What a model file consists of.

    ``digest`` is BLAKE3 of the whole file of ``size`` bytes; ``chunks`` holds the 32-byte BLAKE3
    digests of its chunks of ``chunk_bytes``; the first ``header_bytes`` hold the GGUF header.
    """

    version: int
    digest: Digest
    size: int
    header_bytes: int
    chunk_bytes: int
    chunks: bytes

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return len(self.chunks) // DIGEST_BYTES

    def encode(self) -> bytes:
        """Return the canonical encoding."""
        return msgspec.msgpack.encode(self)

    @property
    def manifest_digest(self) -> Digest:
        """BLAKE3 of the encoding: what the replicated log holds."""
        return Digest(blake3(self.encode()).hex())

    def range(self, index: int) -> ByteRange:
        """Return the bytes of one chunk."""
        return chunk_range(index, self.size, self.chunk_bytes)

    def header_chunks(self) -> list[int]:
        """Return the chunks that hold the header."""
        return chunks_of([ByteRange(0, self.header_bytes)], self.chunk_bytes)

    def check_chunk(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Check one chunk; raises :class:`CorruptData` (``chunk_corrupt``)."""
        place = self.range(index)
        expected = self.chunks[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        if len(data) != place.stop - place.start or blake3(data) != expected:
            raise CorruptData(
                f"Chunk {index} of model {self.digest[:16]} does not match its digest.",
                code="chunk_corrupt",
                chunk=index,
                model=self.digest,
            )


def decode_manifest(data: bytes | memoryview, expected: Digest | None = None) -> ModelManifest:
    """Decode and check a manifest; ``expected`` is the digest it must have.

    Raises :class:`CorruptData` (``manifest_corrupt``, ``manifest_mismatch``),
    :class:`LimitExceeded` (``manifest_too_large``) and :class:`Unsupported`
    (``manifest_version``).
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise LimitExceeded(
            f"A manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}.",
            code="manifest_too_large",
        )
    if expected is not None and blake3(data).hex() != expected:
        raise CorruptData(
            f"The manifest is not the one with digest {expected}.", code="manifest_mismatch"
        )
    try:
        manifest = msgspec.msgpack.decode(data, type=ModelManifest)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise _corrupt(str(error)[:200]) from None
    if manifest.version != MANIFEST_VERSION:
        raise Unsupported(
            f"The manifest has version {manifest.version}; version {MANIFEST_VERSION} is read.",
            code="manifest_version",
        )
    if not _DIGEST.fullmatch(manifest.digest):
        raise _corrupt("its digest")
    chunk_bytes = manifest.chunk_bytes
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes & (chunk_bytes - 1):
        raise _corrupt(f"chunks of {chunk_bytes} bytes")
    if not 0 < manifest.header_bytes <= min(manifest.size, MAX_HEADER_BYTES):
        raise _corrupt(f"a header of {manifest.header_bytes} bytes")
    if len(manifest.chunks) != DIGEST_BYTES * chunk_count(manifest.size, chunk_bytes):
        raise _corrupt(f"{len(manifest.chunks)} bytes of digests for {manifest.size} bytes")
    return manifest


def build_manifest(
    path: Path,
    *,
    header_bytes: int,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] | None = None,
) -> ModelManifest:
    """Read the whole file and return its manifest; ``progress`` gets the bytes done so far."""
    with mapped(path, "reading"):
        size = path.stat().st_size
        digest, chunks = hash_file(str(path), chunk_bytes, progress)
    if size == 0 or len(chunks) != DIGEST_BYTES * chunk_count(size, chunk_bytes):
        raise CorruptData(f"{path} is empty or changed while it was read.", code="file_changed")
    return ModelManifest(
        version=MANIFEST_VERSION,
        digest=Digest(digest.hex()),
        size=size,
        header_bytes=header_bytes,
        chunk_bytes=chunk_bytes,
        chunks=chunks,
    )


def _corrupt(what: str) -> CorruptData:
    return CorruptData(f"A malformed model manifest was refused: {what}.", code="manifest_corrupt")
