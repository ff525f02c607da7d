"""Whole, or only its landmarks?  In which form a rank takes a piece.  Pure.

Asked only where a session accepts loss.  What is lost is worth something, so the whole form is
taken wherever that costs little: where it is here, where its fetching is not much slower than that
of the landmarks, and where neither is faster than computing, which is exact.
"""

from __future__ import annotations

import math
from typing import Final, Literal

Form = Literal["whole", "landmarks"]

WORTH: Final = 0.95
"""Fetching has to take less than this share of the time of computing (as in ``block_costs``)."""
SLOWER: Final = 4.0
"""The whole form is put up with if it takes no more than so many times as long ..."""
PATIENCE: Final = 0.2
"""... or so many seconds longer."""


def form_of(whole: float, landmarks: float, computing: float) -> Form:
    """Return the form in which to take a piece.

    ``whole`` and ``landmarks`` are the seconds until all of a form would be here: 0 for one that
    is, infinity for one that cannot be had.  ``computing`` is what computing the piece would take,
    0 where nobody knows.
    """
    limit = WORTH * computing if computing > 0 else math.inf
    if not landmarks < limit:
        return "whole"
    if whole < limit and whole <= max(SLOWER * landmarks, landmarks + PATIENCE):
        return "whole"
    return "landmarks"
