"""A model file of which some chunks are there: a sparse file and a bitmap of verified chunks.

The order of writes makes it safe to die at any point: a chunk is checked, written and synced before
the bitmap on disk says that it is there.  What the bitmap does not know is fetched again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

from pyagent_node.base.errors import CorruptData, NotFound, PyAgentError
from pyagent_node.base.files import mapped, read_limited, write_atomic
from pyagent_node.inference.models.chunks import ChunkSet
from pyagent_node.inference.models.gguf_format import parse_header
from pyagent_node.inference.models.gguf_types import GgufHeader
from pyagent_node.inference.models.manifest import ModelManifest
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.native import blake3

PARTIAL: Final = "partial.gguf"
BITMAP: Final = "partial.chunks"
CHECKSUM_BYTES: Final = 32
SYNC_CHUNKS: Final = 32
"""Chunks written between two writes of the bitmap: the most work that a crash can undo."""


class PartialModel:
    """One partly held model; its methods block and may be called from several threads.

    Opening it creates the files.  A bitmap that does not fit (torn, of another size) counts as
    empty: everything is fetched again.
    """

    def __init__(self, folder: Path, manifest: ModelManifest) -> None:
        self.manifest = manifest
        self.path = folder / PARTIAL
        self._bitmap = folder / BITMAP
        self._lock = threading.Lock()
        self._unsynced = 0
        """Changes that the bitmap on disk does not know."""
        self._header: GgufHeader | None = None
        self._have = read_bitmap(folder, manifest)
        self._closed = False
        with mapped(self.path, "opening"):
            if not self.path.exists() or self.path.stat().st_size != manifest.size:
                self._have = ChunkSet(manifest.count)
                with self.path.open("wb") as file:
                    file.truncate(manifest.size)

    @property
    def have(self) -> ChunkSet:
        """A copy of the set of verified chunks."""
        with self._lock:
            return self._have.copy()

    def write_chunk(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Check and keep one chunk; ``False`` when it was there already.

        Raises :class:`CorruptData` (``chunk_corrupt``), :class:`Unavailable` (``disk_full``) and
        :class:`NotFound` (``model_not_found``) when the model was removed meanwhile.
        """
        self.manifest.check_chunk(index, data)
        with self._lock:
            self._check_open()
            if index in self._have:
                return False
            with mapped(self.path, "writing"), self.path.open("r+b", buffering=0) as file:
                file.seek(self.manifest.range(index).start)
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            self._have.add(index)
            self._unsynced += 1
            if self._unsynced >= SYNC_CHUNKS:
                self._sync()
        return True

    def read_chunk(self, index: int) -> bytes:
        """Return a chunk that is there, checked again.

        Raises :class:`NotFound` (``chunk_not_held``).  A chunk that rotted on disk is forgotten, to
        be fetched again, and counts as not there.
        """
        with self._lock:
            self._check_open()
            if index not in self._have:
                raise not_held(self.manifest, index)
            place = self.manifest.range(index)
            with mapped(self.path, "reading"), self.path.open("rb", buffering=0) as file:
                file.seek(place.start)
                data = file.read(place.stop - place.start)
            try:
                self.manifest.check_chunk(index, data)
            except CorruptData:
                self._have.discard(index)
                self._unsynced += 1
                self._sync()
                raise not_held(self.manifest, index) from None
        return data

    def sync(self) -> None:
        """Make what was written durable."""
        with self._lock:
            if not self._closed:
                self._sync()

    def model_file(self) -> ModelFile:
        """Return the file with its header; raises :class:`Unavailable` (``bytes_missing``)."""
        have = self.have
        if self._header is None:
            missing = have.missing(self.manifest.header_chunks())
            if missing:
                raise NotFound(
                    f"The header of model {self.manifest.digest[:16]} was not fetched yet.",
                    code="header_missing",
                )
            with mapped(self.path, "reading"), self.path.open("rb") as file:
                data = file.read(self.manifest.header_bytes)
            self._header = parse_header(data, self.manifest.size)
        return ModelFile(self.path, self._header, have, self.manifest.chunk_bytes)

    def close(self) -> None:
        """Refuse every further use: the files are removed or become something else."""
        with self._lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise NotFound(
                f"Model {self.manifest.digest[:16]} was removed from this node.",
                code="model_not_found",
            )

    def _sync(self) -> None:
        if not self._unsynced:  # another process may know more than we do
            return
        with mapped(self.path, "writing"), self.path.open("r+b") as file:
            os.fsync(file.fileno())
        bits = self._have.to_bytes()
        write_atomic(self._bitmap, blake3(bits) + bits)
        self._unsynced = 0


def read_bitmap(folder: Path, manifest: ModelManifest) -> ChunkSet:
    """Return which chunks the bitmap in ``folder`` names; none if there is no sound one."""
    with contextlib.suppress(PyAgentError):
        data = read_limited(folder / BITMAP, CHECKSUM_BYTES + manifest.count)
        if blake3(data[CHECKSUM_BYTES:]) == data[:CHECKSUM_BYTES]:
            return ChunkSet(manifest.count, data[CHECKSUM_BYTES:])
    return ChunkSet(manifest.count)


def not_held(manifest: ModelManifest, index: int) -> NotFound:
    """Return the error for a chunk that this node does not hold."""
    return NotFound(
        f"This node does not hold chunk {index} of model {manifest.digest[:16]}.",
        code="chunk_not_held",
        chunk=index,
    )
