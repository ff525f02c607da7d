"""The index of a context: sketches, exact vectors for the best of them, and words.  Pure.

A question's vector is compared with every window's sketch; the best few hundred windows are
compared again by their exact vectors, which the caller fetches from wherever they lie; a chunk is
as good as its best window.  The ranking by words is joined to that one by ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.sharding.context.embedder import Vectors
from pyagent_node.sharding.context.fusion import fuse
from pyagent_node.sharding.context.lexical import Lexical, names_something
from pyagent_node.sharding.context.sketches import Rows, Sketches, check_vectors

FetchVectors = Callable[[Rows], Vectors]
"""Returns the exact vectors of windows, in the order asked for."""
Way = Literal["meaning", "words", "both"]

RERANKED: Final = 300
"""Windows that are compared by their exact vectors."""
DEPTH: Final = 50
"""Chunks of each ranking that are joined."""
WORDS_WEIGHT: Final = 0.1
"""What a rank by words counts beside one by meaning,"""
NAMED_WEIGHT: Final = 1.0
"""and where the question names something of code."""
MAX_COUNT: Final = 1000


class Hit(msgspec.Struct, frozen=True, gc=False):
    """A chunk that a question found.

    ``score`` orders the hits of one answer (its scale depends on the way).  ``meaning_rank`` and
    ``words_rank`` (from 1) say which ranking brought it; ``window`` is its best window by meaning,
    and ``likeness`` that one's inner product with the question.
    """

    chunk: int
    score: float
    meaning_rank: int | None = None
    words_rank: int | None = None
    window: int | None = None
    likeness: float | None = None


def words_weight(question: str) -> float:
    """Return what a rank by words counts for a question."""
    return NAMED_WEIGHT if names_something(question) else WORDS_WEIGHT


class Index:
    """``chunk_of[w]`` is the chunk of window ``w``; ``words`` knows the texts of the chunks.

    Raises :class:`InvalidRequest` (``bad_index``) where the parts do not fit together.
    """

    def __init__(
        self,
        sketches: Sketches,
        chunk_of: NDArray[np.uint32],
        fetch: FetchVectors,
        words: Lexical | None = None,
    ) -> None:
        fits = chunk_of.shape == (len(sketches),)
        if fits and words is not None and len(chunk_of):
            fits = int(chunk_of.max()) < len(words)
        if not fits:
            raise InvalidRequest("The parts of the index do not fit together.", code="bad_index")
        self._sketches, self._chunk_of, self._fetch, self._words = sketches, chunk_of, fetch, words

    def search(
        self,
        question: str,
        vector: NDArray[np.float32],
        *,
        count: int = 8,
        way: Way = "both",
        reranked: int = RERANKED,
    ) -> list[Hit]:
        """Return the best ``count`` chunks for a question and its vector, best first.

        Raises :class:`InvalidRequest`: ``bad_count``, ``bad_vectors``, ``no_words``.
        """
        if not 1 <= count <= MAX_COUNT or not 1 <= reranked <= len(self._sketches) + MAX_COUNT**2:
            raise InvalidRequest(
                f"{count} chunks cannot be looked for.",
                code="bad_count",
                remedy=f"Ask for 1 to {MAX_COUNT}.",
            )
        depth = max(count, DEPTH)
        meaning = [] if way == "words" else self._by_meaning(vector, depth, reranked)
        if way == "meaning" or (way == "both" and self._words is None):
            return meaning[:count]
        if self._words is None:
            raise InvalidRequest("This index knows no words.", code="no_words")
        words = self._words.nearest(question, depth)
        if way == "words":
            ranked = enumerate(words[:count], 1)
            return [Hit(chunk, score, words_rank=rank) for rank, (chunk, score) in ranked]
        by_chunk = {hit.chunk: hit for hit in meaning}
        word_rank = {chunk: rank for rank, (chunk, _) in enumerate(words, 1)}
        joined = fuse(
            [[hit.chunk for hit in meaning], list(word_rank)], weights=(1.0, words_weight(question))
        )
        return [
            msgspec.structs.replace(
                by_chunk.get(chunk, Hit(chunk, 0.0)), score=score, words_rank=word_rank.get(chunk)
            )
            for chunk, score in joined[:count]
        ]

    def _by_meaning(self, vector: NDArray[np.float32], depth: int, reranked: int) -> list[Hit]:
        if not len(self._sketches):
            return []
        rows, _ = self._sketches.nearest(vector, reranked)
        exact = self._fetch(rows)
        check_vectors(exact, self._sketches.model.dimensions)
        if len(exact) != len(rows):
            raise InvalidRequest(
                f"{len(exact)} vectors came for {len(rows)} windows.", code="bad_vectors"
            )
        likeness = exact @ vector
        hits: dict[int, Hit] = {}
        for at in np.lexsort((rows, -likeness)):
            chunk = int(self._chunk_of[rows[at]])
            if chunk not in hits:
                near = float(likeness[at])
                hits[chunk] = Hit(chunk, near, len(hits) + 1, None, int(rows[at]), near)
                if len(hits) == depth:
                    break
        return list(hits.values())
