"""Drafts that form a tree: how they are cleaned, and what is left of them.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Final

from pyagent_node.inference.drafting.port import MAX_DRAFT, Draft

ROOT: Final = -1
"""The parent of a guess that follows the text."""


def usable_tree(
    draft: Draft,
    *,
    n_vocab: int = 2**31,
    limit: int = MAX_DRAFT,
    deepest: int = MAX_DRAFT,
    ends: Set[int] = frozenset(),
) -> Draft:
    """Return the part of a tree that can be sent, whatever a drafter made of it.

    Left out, with all that follows them, are guesses that are not of the vocabulary or one of
    ``ends``, that are the same as one beside them, or further than ``deepest`` from the text; and
    everything from where the guesses are in no preorder.  At most ``limit`` are left.  A confidence
    that is no probability counts as 0.
    """
    tokens: list[int] = []
    confidence: list[float] = []
    parents: list[int] = []
    # from the text to the last guess: its index, and that among those left
    path: list[tuple[int, int | None]] = [(ROOT, ROOT)]
    seen: set[tuple[int, int]] = set()
    for index, (token, value, parent) in enumerate(
        zip(draft.tokens, draft.confidence, draft.parents, strict=False)
    ):
        while path and path[-1][0] != parent:
            path.pop()
        if not path or len(tokens) >= min(limit, MAX_DRAFT):
            break
        place = path[-1][1]
        new: int | None = None
        good = 0 <= token < n_vocab and token not in ends and len(path) <= deepest
        if place is not None and good and (place, token) not in seen:
            seen.add((place, token))
            new = len(tokens)
            tokens.append(int(token))
            confidence.append(min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0)
            parents.append(place)
        path.append((index, new))
    return Draft(tuple(tokens), tuple(confidence), draft.source, tuple(parents))


def after(draft: Draft, tokens: Sequence[int]) -> Draft | None:
    """Return what is left of a draft when ``tokens`` came; ``None`` if it did not foresee them."""
    for token in tokens:
        at = _child(draft, token)
        if at is None:
            return None
        draft = _below(draft, at)
    return draft


def stem(draft: Draft) -> tuple[int, Draft]:
    """Return the first guess of a draft that has one, and what follows on it."""
    return draft.tokens[0], _below(draft, 0)


def _child(draft: Draft, token: int) -> int | None:
    if not draft.parents:
        return 0 if draft.tokens[:1] == (token,) else None
    pairs = zip(draft.tokens, draft.parents, strict=True)
    return next((i for i, pair in enumerate(pairs) if pair == (token, ROOT)), None)


def _below(draft: Draft, at: int) -> Draft:
    """Return what follows on guess number ``at``."""
    parents, start = draft.parents, at + 1
    if not parents:
        return Draft(draft.tokens[start:], draft.confidence[start:], draft.source)
    stop = start
    while stop < len(parents) and parents[stop] >= at:
        stop += 1
    return Draft(
        draft.tokens[start:stop],
        draft.confidence[start:stop],
        draft.source,
        tuple([max(ROOT, parent - start) for parent in parents[start:stop]]),
    )
