"""Finds a smaller schedule that still fails: delta debugging over its faults.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (IEEE TSE 2002):
``ddmin`` on the list of faults.  First halves, then ever smaller parts are left out while the rest
fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def ddmin(items: Sequence[T], fails: Callable[[Sequence[T]], bool], *, runs: int) -> list[T]:
    """Return a subsequence of ``items`` that still fails, of which no part found can be left out.

    ``fails`` is asked at most ``runs`` times; ``items`` itself is known to fail.
    """
    kept, parts = list(items), 2
    if runs > 0 and kept:
        runs -= 1
        if fails([]):
            return []
    while len(kept) >= 2 and runs > 0:
        size = -(-len(kept) // parts)
        for start in range(0, len(kept), size):
            rest = kept[:start] + kept[start + size :]
            if runs <= 0:
                return kept
            runs -= 1
            if rest and fails(rest):
                kept, parts = rest, max(parts - 1, 2)
                break
        else:
            if parts >= len(kept):
                return kept
            parts = min(parts * 2, len(kept))
    return kept
