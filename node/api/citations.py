"""What an answer is drawn from.  A plain value."""

from __future__ import annotations

import msgspec


class Citation(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk that the model was given; ``number`` counts from the best one on, from 1."""

    number: int
    source: str
    first_line: int
    last_line: int
    score: float
