"""A text becomes a document: cut into chunks, windows to embed, a record and bodies.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import ContextId
from pyagent_node.sharding.context.chunking import Chunk, chunks
from pyagent_node.sharding.context.defaults import Axes
from pyagent_node.sharding.context.duplicates import near_texts
from pyagent_node.sharding.context.embedder import Vectors
from pyagent_node.sharding.context.records import (
    DIGEST_BYTES,
    ChunkBody,
    ChunkRow,
    DocumentRecord,
    Version,
    content_check,
)
from pyagent_node.sharding.context.sketches import check_vectors
from pyagent_node.sharding.context.windows import Window, windows

TOKEN_CHARACTERS: Final = 64
"""No more characters count as one token: an encoder may take a word of a megabyte for one."""


class Cut(NamedTuple):
    """A text in chunks.

    ``same[i]`` is the chunk that says (nearly) the same as chunk ``i`` and stands for it: itself,
    or an earlier one; ``windows[i]`` is empty then.
    """

    chunks: tuple[Chunk, ...]
    same: tuple[int, ...]
    windows: tuple[tuple[Window, ...], ...]

    def texts(self) -> list[str]:
        """Return the texts of all windows, each once, in order."""
        return list(dict.fromkeys(window.text for own in self.windows for window in own))

    @property
    def joined(self) -> int:
        """Chunks that others stand for."""
        return sum(place != same for place, same in enumerate(self.same))


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a document's record says of it besides its chunks; see :class:`DocumentRecord`."""

    context: ContextId
    source: str
    version: Version
    digest: bytes
    size: int
    modified: int
    added: int
    encoder: str


def cut(text: str, source: str, count: Callable[[str], int]) -> Cut:
    """Cut a text; ``count`` says how many tokens a text has for the encoder.

    Raises what :func:`chunks` and :func:`near_texts` do.
    """

    def counted(piece: str) -> int:
        return max(count(piece), len(piece) // TOKEN_CHARACTERS)

    found = tuple(chunks(text, source, counted))
    same = near_texts([chunk.text for chunk in found]) if len(found) > 1 else [0] * len(found)
    return Cut(
        found,
        tuple(same),
        tuple(
            windows(chunk.text) if same[place] == place else () for place, chunk in enumerate(found)
        ),
    )


def document(
    parts: Cut, vectors: Vectors, about: About, axes: Axes
) -> tuple[DocumentRecord, list[ChunkBody]]:
    """Return the record and the bodies of a text; ``vectors`` are those of ``parts.texts()``.

    Raises :class:`InvalidRequest` (``bad_vectors``).
    """
    texts = parts.texts()
    check_vectors(vectors, axes.model.dimensions)
    if len(vectors) != len(texts):
        raise InvalidRequest(
            f"{len(vectors)} vectors came for {len(texts)} windows.", code="bad_vectors"
        )
    row_of = {text: row for row, text in enumerate(texts)}
    own = [np.array([row_of[w.text] for w in each], np.int64) for each in parts.windows]
    buckets = _buckets(vectors, own, axes)
    rows: list[ChunkRow] = []
    bodies: list[ChunkBody] = []
    for place, chunk in enumerate(parts.chunks):
        spans = tuple((window.start, window.end) for window in parts.windows[place])
        exact = vectors[own[place]].astype("<f2").tobytes()
        check = content_check(chunk.text, spans, exact)
        rows.append(
            ChunkRow(
                chunk.start,
                chunk.end,
                chunk.line,
                chunk.tokens,
                buckets[parts.same[place]],
                len(spans),
                parts.same[place],
                check,
            )
        )
        if spans:
            bodies.append(
                ChunkBody(
                    context=about.context,
                    source=about.source,
                    version=about.version,
                    ordinal=place,
                    text=chunk.text,
                    spans=spans,
                    vectors=exact,
                )
            )
    order = np.concatenate([np.zeros(0, np.int64), *own])
    packed, weights = axes.model.sketch(vectors[order])
    record = DocumentRecord(
        context=about.context,
        source=about.source,
        version=about.version,
        digest=about.digest,
        size=about.size,
        modified=about.modified,
        added=about.added,
        encoder=about.encoder,
        chunks=tuple(rows),
        sketches=packed.tobytes() + weights.astype("<f2").tobytes(),
    )
    return record, bodies


def removal(record: DocumentRecord, version: Version, now: int) -> DocumentRecord:
    """Return the record that says that a document is there no longer, since ``now``."""
    return DocumentRecord(
        context=record.context,
        source=record.source,
        version=version,
        digest=bytes(DIGEST_BYTES),
        size=0,
        modified=now,
        added=now,
        removed=True,
    )


def _buckets(vectors: Vectors, own: Sequence[np.ndarray], axes: Axes) -> list[int]:
    """Return the bucket of each chunk: that of the direction its windows have on the whole."""
    means = np.zeros((len(own), axes.model.dimensions), np.float32)
    for place, rows in enumerate(own):
        if len(rows):
            means[place] = vectors[rows].mean(axis=0)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return [int(bucket) for bucket in axes.buckets.of(means / np.maximum(norms, 1e-9))]
