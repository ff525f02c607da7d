"""A model file on disk, whole or partly there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pyagent_node.base.errors import Unavailable
from pyagent_node.inference.models.chunks import ChunkSet, chunks_of
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.gguf_types import ByteRange, GgufHeader


class ModelFile(NamedTuple):
    """A GGUF file and what is known of it.

    ``have`` is ``None`` for a whole file; for a sparse one it is the set of chunks of
    ``chunk_bytes`` that were verified: no other byte of it may be used.
    """

    path: Path
    header: GgufHeader
    have: ChunkSet | None = None
    chunk_bytes: int = 0

    @classmethod
    def open(cls, path: Path) -> ModelFile:
        """Read the header of a whole file."""
        return cls(path, read_header(path))

    def require(self, ranges: Sequence[ByteRange]) -> None:
        """Check that these bytes are there.

        Raises :class:`Unavailable` (``bytes_missing``) with the number of chunks to fetch.
        """
        if self.have is None:
            return
        missing = self.have.missing(chunks_of(ranges, self.chunk_bytes))
        if missing:
            raise Unavailable(
                f"{len(missing)} needed chunks of {self.path.name} are not on this node.",
                code="bytes_missing",
                remedy="Fetch them from a peer that holds the model, then try again.",
                chunks=len(missing),
            )
