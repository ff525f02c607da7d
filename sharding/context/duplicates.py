"""Joins texts that say the same: word for word, or nearly.  Pure.

Texts with the same words in the same order are the same.  Near ones are found by MinHash LSH
(``datasketch``, of the optional ``pyagent-node[context]``) over runs of four words, and then
compared for real, so that none is joined by chance.  The first of a group stands for all of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final

from pyagent_node.base.errors import InvalidRequest, Unavailable

RUN_WORDS: Final = 4
LIKENESS: Final = 0.85
"""Shared runs of words over all runs (Jaccard) from which on two texts are taken for one."""
PERMUTATIONS: Final = 96

_WORD: Final = re.compile(r"\w+")


def same_texts(texts: Sequence[str]) -> list[int]:
    """Return, for each text, the number of the first one with the same words in the same order."""
    first: dict[bytes, int] = {}
    found: list[int] = []
    for number, text in enumerate(texts):
        words = " ".join(_words(text)).encode("utf-8", "surrogatepass")
        found.append(first.setdefault(hashlib.blake2b(words, digest_size=32).digest(), number))
    return found


def near_texts(texts: Sequence[str], *, likeness: float = LIKENESS) -> list[int]:
    """Return, for each text, the number of the one that stands for it: itself, or one before it.

    A text is joined to the first earlier one that stands for itself and is at least ``likeness``
    alike; texts that :func:`same_texts` joins are.  Raises :class:`InvalidRequest`
    (``bad_likeness``) and :class:`Unavailable` (``context_extra_missing``).
    """
    if not 0.5 <= likeness <= 1:
        raise InvalidRequest("A likeness lies between 0.5 and 1.", code="bad_likeness")
    try:
        from datasketch import MinHash, MinHashLSH  # noqa: PLC0415 - optional, slow to import
    except ImportError:
        raise Unavailable(
            "Joining near-duplicate texts needs datasketch.",
            code="context_extra_missing",
            remedy="Run: pip install 'pyagent-node[context]'",
        ) from None
    found = same_texts(texts)
    # Look a little below the threshold: a hash that misses a pair cannot be made good later.
    near = MinHashLSH(threshold=max(0.4, likeness - 0.15), num_perm=PERMUTATIONS)
    for number, text in enumerate(texts):
        runs = runs_of(text)
        if found[number] != number or not runs:
            continue
        hashed = MinHash(num_perm=PERMUTATIONS, seed=1)
        hashed.update_batch(sorted(runs))
        for other in sorted(int(str(key)) for key in near.query(hashed)):
            others = runs_of(texts[other])
            if likeness_of(runs, others) >= likeness:
                found[number] = other
                break
        else:
            near.insert(number, hashed)
    return [found[stands] for stands in found]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def likeness_of(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    """Return the shared runs over all runs (Jaccard) of two texts; 0 for texts without words."""
    return len(one & other) / len(one | other) if one and other else 0.0


def runs_of(text: str) -> frozenset[bytes]:
    """Return the runs of :data:`RUN_WORDS` words of a text, or its words if they are fewer."""
    words = _words(text)
    last = max(1, len(words) - RUN_WORDS + 1) if words else 0
    return frozenset(
        " ".join(words[at : at + RUN_WORDS]).encode("utf-8", "surrogatepass") for at in range(last)
    )
