"""Joins rankings into one by the ranks alone, so that scores need no common scale.  Pure.

Reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pyagent_node.base.errors import InvalidRequest

SMOOTHING: Final = 60.0
"""The constant of the paper: how little the first ranks differ from each other."""


def fuse(
    rankings: Sequence[Sequence[int]],
    *,
    weights: Sequence[float] | None = None,
    smoothing: float = SMOOTHING,
) -> list[tuple[int, float]]:
    """Return every item of the rankings (best first) with its score, best first.

    An item's score is the sum of ``weight / (smoothing + rank)``, ranks from 1; of equal ones the
    lower number comes first.  Raises :class:`InvalidRequest` (``bad_fusion``).
    """
    shares = [1.0] * len(rankings) if weights is None else list(weights)
    if len(shares) != len(rankings) or smoothing < 0 or any(not 0 <= w < 1e9 for w in shares):
        raise InvalidRequest(
            "Rankings are joined with one weight of 0 or more for each.", code="bad_fusion"
        )
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, shares, strict=True):
        if len(set(ranking)) != len(ranking):
            raise InvalidRequest("A ranking names an item twice.", code="bad_fusion")
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + weight / (smoothing + rank)
    return sorted(scores.items(), key=lambda one: (-one[1], one[0]))
