"""A question over a context that lies on several nodes: what each of them works out.  Pure.

The asker picks windows by their sketches (:func:`candidates`), the owners of their chunks compare
the exact vectors and count the question's words (:func:`score`), and the asker puts everything in
order (:func:`rank`) and makes citations of the best (:func:`found`).  What words weigh is worked
out over all candidates at the asker, so the answer does not depend on who owns what.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import PeerId
from pyagent_node.sharding.context.duplicates import LIKENESS, likeness_of, runs_of
from pyagent_node.sharding.context.fusion import fuse
from pyagent_node.sharding.context.index import (
    DEPTH,
    MAX_COUNT,
    RERANKED,
    WORDS_WEIGHT,
    Way,
)
from pyagent_node.sharding.context.lexical import K1, B, rarity, term_hash, terms
from pyagent_node.sharding.context.port import Found, Place
from pyagent_node.sharding.context.records import ChunkBody, ChunkId, DocumentRecord
from pyagent_node.sharding.context.tables import Table

MAX_TERMS: Final = 64
"""Terms of a question beyond these are not looked at."""
MAX_QUESTION: Final = 8192
"""The most characters of a question."""
WORDS_CHUNKS: Final = 4096
"""In up to so many chunks (a million tokens) all words are counted where only they matter."""
WORDS_WINDOWS: Final = 64
"""The best window of a chunk that its words brought is one of the first so many."""
_DIGITS: Final = 6
"""Places of a likeness that count: beyond them machines differ."""


class Candidate(msgspec.Struct, frozen=True):
    """A chunk that may matter: ``windows`` are the places of those picked, likeliest first."""

    id: ChunkId
    record: DocumentRecord
    ordinal: int
    windows: tuple[int, ...]

    @property
    def bucket(self) -> int:
        """The chunk's bucket: who owns it."""
        return self.record.chunks[self.ordinal].bucket


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """What an owner says of a candidate.

    ``likeness`` is the greatest inner product of the question's vector with those of the windows
    asked for, ``window`` the place of that one.  ``length`` counts the chunk's terms, ``counts``
    how often each of the question's terms is among them.
    """

    id: ChunkId
    likeness: float
    window: int
    length: int
    counts: tuple[int, ...]


class Ranked(msgspec.Struct, frozen=True):
    """A chunk of an answer, before its text is there; the fields are those of :class:`Found`."""

    id: ChunkId
    score: float
    likeness: float
    window: int
    meaning_rank: int | None
    words_rank: int | None


def check_question(question: str, count: int) -> str:
    """Return ``question`` if it can be asked for ``count`` chunks.

    Raises :class:`InvalidRequest` (``bad_question``, ``bad_count``).
    """
    if not question.strip() or len(question) > MAX_QUESTION or "\0" in question:
        raise InvalidRequest(
            f"A question is text of 1 to {MAX_QUESTION} characters.", code="bad_question"
        )
    if not 1 <= count <= MAX_COUNT:
        raise InvalidRequest(
            f"{count} chunks cannot be looked for.",
            code="bad_count",
            remedy=f"Ask for 1 to {MAX_COUNT}.",
        )
    return question


def question_terms(question: str) -> tuple[int, ...]:
    """Return the hashes of the terms of a question, each once, in order."""
    return tuple(_asked(question))


def rarities(question: str, scored: Collection[Scored]) -> dict[str, float]:
    """Return what the terms of a question weigh: more, the fewer of the candidates have them.

    ``scored`` is what was said of the candidates when they were asked for :func:`question_terms`.
    """
    asked = list(_asked(question).values())
    told = min((len(each.counts) for each in scored), default=0)
    having = [sum(each.counts[i] > 0 for each in scored) for i in range(min(told, len(asked)))]
    return {term: rarity(own, len(scored)) for term, own in zip(asked, having, strict=False)}


def _asked(question: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for term in terms(question):
        found.setdefault(term_hash(term), term)
        if len(found) == MAX_TERMS:
            break
    return found


def candidates(table: Table, vector: NDArray[np.float32], count: int = RERANKED) -> list[Candidate]:
    """Return the chunks of the ``count`` likeliest windows by their sketches, likeliest first."""
    if not len(table.sketches):
        return []
    rows, _ = table.sketches.nearest(vector, count)
    places: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        at = (int(table.documents[row]), int(table.ordinals[row]))
        places.setdefault(at, []).append(int(table.places[row]))
    return [
        Candidate(
            table.records[document].id_of(ordinal), table.records[document], ordinal, tuple(w)
        )
        for (document, ordinal), w in places.items()
    ]


def every_chunk(records: Sequence[DocumentRecord]) -> list[Candidate] | None:
    """Return all chunks of some documents as candidates, ``None`` for over :data:`WORDS_CHUNKS`.

    Sketches say nothing of words, so a ranking by words alone compares all chunks that it can.
    """
    if chunks_of(records) > WORDS_CHUNKS:
        return None
    return [
        Candidate(record.id_of(at), record, at, tuple(range(min(row.windows, WORDS_WINDOWS))))
        for record in records
        for at, row in enumerate(record.chunks)
        if row.windows
    ]


def chunks_of(records: Iterable[DocumentRecord]) -> int:
    """Return how many chunks of their own some documents have."""
    return sum(bool(row.windows) for record in records for row in record.chunks)


def score_all(
    bodies: Iterable[ChunkBody],
    windows: Mapping[ChunkId, Collection[int]],
    vector: NDArray[np.float32],
    words: Sequence[int],
) -> list[Scored]:
    """Return what the owner of chunks says of them; those that do not fit are left out.

    A record may promise windows that its body has not: that is no reason to say nothing of others.
    """
    scored: list[Scored] = []
    for body in bodies:
        with contextlib.suppress(InvalidRequest):
            scored.append(score(body, windows[body.id], vector, words))
    return scored


def score(
    body: ChunkBody, windows: Collection[int], vector: NDArray[np.float32], words: Sequence[int]
) -> Scored:
    """Return what the owner of a chunk says of it; ``words`` are :func:`question_terms`.

    Raises :class:`InvalidRequest` (``bad_windows``) for windows that the chunk does not have, and
    (``bad_vectors``) for a vector of another length.
    """
    held = body.matrix()
    if held.shape[1] != len(vector):
        raise InvalidRequest(
            f"The question's vector has {len(vector)} numbers, the chunk's {held.shape[1]}.",
            code="bad_vectors",
        )
    wanted = sorted(set(windows))
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(held):
        raise InvalidRequest("A chunk has no such window.", code="bad_windows")
    likeness = held[wanted] @ vector
    best = int(likeness.argmax())
    counts = Counter(term_hash(term) for term in terms(body.text))
    return Scored(
        body.id,
        round(float(likeness[best]), _DIGITS),
        wanted[best],
        counts.total(),
        tuple(counts[word] for word in words),
    )


def rank(
    scored: Iterable[Scored],
    *,
    count: int,
    way: Way = "both",
    words: float = WORDS_WEIGHT,
) -> list[Ranked]:
    """Return the best ``count`` of what the owners said, best first.

    ``words`` is what a rank by words counts (:func:`.index.words_weight` of the question).

    The order is a function of the set of ``scored``: equals are put in order by their ids.
    """
    by_id = {each.id: each for each in scored}
    every = sorted(by_id.values(), key=lambda each: each.id)
    depth = max(count, DEPTH)
    meaning = sorted(range(len(every)), key=lambda i: (-every[i].likeness, i))[:depth]
    weights = _bm25(every)
    spoken = [
        i for i in sorted(range(len(every)), key=lambda i: (-weights[i], i)) if weights[i] > 0
    ]
    spoken = spoken[:depth]
    meaning_rank = {at: place for place, at in enumerate(meaning, 1)}
    words_rank = {at: place for place, at in enumerate(spoken, 1)}
    if way == "meaning":
        order = [(at, every[at].likeness) for at in meaning]
    elif way == "words":
        order = [(at, weights[at]) for at in spoken]
    else:
        order = fuse([meaning, spoken], weights=(1.0, words))
    return [
        Ranked(
            every[at].id,
            value,
            every[at].likeness,
            every[at].window,
            meaning_rank.get(at) if way != "words" else None,
            words_rank.get(at) if way != "meaning" else None,
        )
        for at, value in order[:count]
    ]


def found(
    ranked: Sequence[Ranked],
    bodies: Mapping[ChunkId, ChunkBody],
    locate: Callable[[ChunkId], tuple[DocumentRecord, int] | None],
    *,
    count: int,
    owners: Mapping[ChunkId, PeerId] | None = None,
) -> tuple[Found, ...]:
    """Return the best ``count`` chunks with their texts; equal texts are joined into the first.

    ``locate`` says whose chunk it is; one that is of no newest version any more, or has no body,
    is left out.
    """
    hits: list[Found] = []
    held_runs: list[frozenset[bytes]] = []
    for each in ranked:
        body, place = bodies.get(each.id), locate(each.id)
        if body is None or place is None or each.window >= len(body.spans):
            continue
        runs = runs_of(body.text)
        twin = next((i for i, r in enumerate(held_runs) if likeness_of(runs, r) >= LIKENESS), None)
        hit = _found(each, body, *place, owner=(owners or {}).get(each.id))
        if twin is not None:
            first = hits[twin]
            here = Place(hit.source, hit.first_line, hit.last_line)
            hits[twin] = msgspec.structs.replace(first, same=(*first.same, here, *hit.same))
        elif len(hits) < count:
            hits.append(hit)
            held_runs.append(runs)
    return tuple(hits)


def _found(
    ranked: Ranked, body: ChunkBody, record: DocumentRecord, ordinal: int, owner: PeerId | None
) -> Found:
    row = record.chunks[ordinal]
    lines = max(0, len(body.text.rstrip().splitlines()) - 1)
    same = tuple(
        Place(record.source, other.line, other.line + lines)
        for place, other in enumerate(record.chunks)
        if other.same == ordinal and place != ordinal
    )
    return Found(
        id=ranked.id,
        source=record.source,
        version=record.version,
        ordinal=ordinal,
        first_line=row.line,
        last_line=row.line + lines,
        tokens=row.tokens,
        score=ranked.score,
        text=body.text,
        likeness=ranked.likeness,
        window=body.spans[ranked.window],
        meaning_rank=ranked.meaning_rank,
        words_rank=ranked.words_rank,
        owner=owner,
        same=same,
    )


def _bm25(every: Sequence[Scored]) -> list[float]:
    """Return the BM25 weight of each candidate among the candidates (see ``lexical``)."""
    weights = [0.0] * len(every)
    mean = sum(each.length for each in every) / len(every) if every else 0.0
    if not mean:
        return weights
    for term in range(min(len(each.counts) for each in every)):
        having = [i for i, each in enumerate(every) if each.counts[term] > 0]
        weight = rarity(len(having), len(every))
        for i in having:
            often = every[i].counts[term]
            damped = often + K1 * (1 - B + B * every[i].length / mean)
            weights[i] += weight * often * (K1 + 1) / damped
    return [round(weight, _DIGITS) for weight in weights]
