"""Search by words beside search by meaning: BM25 over hashed terms.  Pure.

A term is a word in small letters; an identifier (``read_limited``, ``ModelStore``) counts as itself
and as its parts.  Terms are kept as 32-bit hashes (CRC-32), so the index holds no text; two words
of one hash are taken for one, about one pair among 93,000 words.

BM25: Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009), with the inverse
document frequency that never gets negative.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest

K1: Final = 1.2
"""How soon more of the same word stops to count."""
B: Final = 0.75
"""How much a long text's words count less."""
MAX_QUERY_TERMS: Final = 1024
"""Terms of a question beyond these are not looked at."""
_MAX_WORD: Final = 64

_WORD: Final = re.compile(r"\w+")
_NAME: Final = re.compile(r"_|[^\W\d_]\d|[^\W\d_A-Z][A-Z]")
_PART: Final = re.compile(r"[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|[A-Z][^\W\d_A-Z]*|\d+")


def terms(text: str) -> Iterator[str]:
    """Yield the terms of a text, in order."""
    for found in _WORD.finditer(text):
        word = found[0][:_MAX_WORD]
        yield word.casefold()
        if not word.islower():  # an underscore, a capital or a digit may join words
            parts = _PART.findall(word)
        else:
            parts = word.split("_") if "_" in word else []
        if len(parts) > 1:
            yield from (part.casefold() for part in parts if part)


def names_something(question: str) -> bool:
    """Whether a question holds a name of code: with an underscore, a digit, or a capital inside.

    Such a word says where to look better than any meaning does.
    """
    return any(_NAME.search(found[0].strip("_")) is not None for found in _WORD.finditer(question))


def rarity(having: int, every: int) -> float:
    """Return what a term weighs that ``having`` of ``every`` texts have (above 0)."""
    return math.log(1 + (every - having + 0.5) / (having + 0.5))


def term_hash(term: str) -> int:
    """Return the 32-bit number that stands for a term."""
    return crc32(term.encode("utf-8", "surrogatepass"))


class Lexical:
    """The words of many texts; texts are known by their number, from 0."""

    def __init__(self, texts: Iterable[str]) -> None:
        hashes: list[NDArray[np.uint32]] = []
        counts: list[NDArray[np.uint32]] = []
        lengths: list[int] = []
        for text in texts:
            found = Counter(term_hash(term) for term in terms(text))
            hashes.append(np.fromiter(found.keys(), np.uint32, len(found)))
            counts.append(np.fromiter(found.values(), np.uint32, len(found)))
            lengths.append(found.total())
        sizes = np.fromiter(map(len, hashes), np.int64, len(hashes))
        every = np.concatenate([np.zeros(0, np.uint32), *hashes])
        order = np.argsort(every, kind="stable")  # within a term, texts stay in order
        self._texts = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)[order]
        self._counts = np.concatenate([np.zeros(0, np.uint32), *counts])[order]
        self._terms, self._starts = np.unique(every[order], return_index=True)
        self._lengths = np.array(lengths, np.float64)
        self._mean = float(self._lengths.mean()) if lengths else 0.0

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        parts = (self._texts, self._counts, self._terms, self._starts, self._lengths)
        return sum(part.nbytes for part in parts)

    def scores(self, question: str) -> NDArray[np.float64]:
        """Return the BM25 score of every text; a term of the question counts once."""
        scores = np.zeros(len(self))
        if not self._mean:
            return scores
        wanted: dict[int, None] = {}
        for term in terms(question):
            wanted[term_hash(term)] = None
            if len(wanted) == MAX_QUERY_TERMS:
                break
        for number in wanted:
            rows, often = self._having(number)
            if not len(rows):
                continue
            damped = often + K1 * (1 - B + B * self._lengths[rows] / self._mean)
            scores[rows] += rarity(len(rows), len(self)) * often * (K1 + 1) / damped
        return scores

    def _having(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the texts that have a term, and how often."""
        at = int(np.searchsorted(self._terms, np.uint32(number)))
        if at == len(self._terms) or self._terms[at] != number:
            return self._texts[:0], self._counts[:0]
        end = self._starts[at + 1] if at + 1 < len(self._starts) else len(self._texts)
        return self._texts[self._starts[at] : end], self._counts[self._starts[at] : end]

    def rarities(self, question: str, among: Collection[int]) -> dict[str, float]:
        """Return what each term of a question weighs by how many of some texts have it."""
        rows = np.fromiter(among, np.uint32, len(among))
        return {
            term: rarity(int(np.isin(self._having(term_hash(term))[0], rows).sum()), len(rows))
            for term in dict.fromkeys(terms(question))
        }

    def nearest(self, question: str, count: int) -> list[tuple[int, float]]:
        """Return the best ``count`` texts that share a term with the question, and their scores."""
        if count < 1:
            raise InvalidRequest(f"{count} texts cannot be looked for.", code="bad_count")
        scores = self.scores(question)
        found = np.flatnonzero(scores)
        best = found[np.argsort(-scores[found], kind="stable")][:count]
        return [(int(row), float(scores[row])) for row in best]
