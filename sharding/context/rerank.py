"""The best hits again, word by word: what a question's words find in a hit's best window.  Pure.

A vector of a whole text drowns a word that matters among others.  So the encoder's states of the
question's words that say something are compared with those of every word of the window, and the
mean of the best likenesses is added to that of the whole (late interaction: Khattab and Zaharia,
"ColBERT", SIGIR 2020, here with an encoder that was not trained for it).

Such an encoder's states share a large part whatever the word: their mean is taken off before they
are compared.  And a word counts by how rare it is, for one that many candidates have finds nothing.

How many hits (:data:`COMPARED`) and what the words count (:data:`WEIGHT`) was chosen by the tuning
third of the benchmark's questions, beside other sentences of the author that are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.sharding.context.port import Found

COMPARED: Final = 24
"""Hits that are compared: their windows are short, and a question can wait for that."""
WEIGHT: Final = 1.5
"""What the likeness of words counts beside that of the whole."""
_DIGITS: Final = 6
_EMPTY_WORDS: Final = """
what which who whom whose where when why how do does did is are was were be been
has have had can could will would should may might must the a an of to in on at
by for from with and or as that this these those there it its
. , ! ? : ; ' ( )
"""
_EMPTY: Final = frozenset(_EMPTY_WORDS.split())


def says_something(word: str) -> bool:
    """Whether a word of a question is one to look for."""
    return word.lower() not in _EMPTY


def word_likenesses(
    question: NDArray[np.float32],
    weights: Sequence[float],
    windows: Sequence[NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Return how well the words of a question are found in each window.

    That is the mean, over the words of the question, of the best likeness to one of the window,
    once the mean of all windows' states is taken off.  All are states of an encoder, one row a
    word; ``weights`` (0 or more) is what each of the question's words counts.
    """
    if not windows:
        return np.zeros(0, np.float32)
    centre = np.concatenate(windows).mean(axis=0)
    shares = np.asarray(weights, np.float32)
    total = float(shares.sum())
    shares = shares / total if total > 0 else np.full(len(shares), 1 / len(shares), np.float32)
    wanted = _unit(question - centre)
    return np.array(
        [(wanted @ _unit(own - centre).T).max(axis=1) @ shares for own in windows], np.float32
    )


def best_windows(hits: Sequence[Found]) -> list[str]:
    """Return the texts of the best windows of the hits that are compared."""
    return [
        hit.text[slice(*hit.window)] if hit.window is not None else "" for hit in hits[:COMPARED]
    ]


def reordered(hits: Sequence[Found], words: NDArray[np.float32]) -> list[Found]:
    """Return hits in their new order; ``words`` has a likeness for each that was compared.

    Their scores are above 1, and so above those of hits that were not.
    """
    scores = [
        round(float(likeness) * WEIGHT + (hit.likeness or 0.0), _DIGITS)
        for hit, likeness in zip(hits, words, strict=False)
    ]
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    least = min(scores, default=0.0)
    return [
        *(
            msgspec.structs.replace(
                hits[place],
                score=round(scores[place] - min(least, 0.0) + 1, _DIGITS),
                closeness=round(float(words[place]), _DIGITS),
            )
            for place in order
        ),
        *hits[len(scores) :],
    ]


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-9), np.float32)
