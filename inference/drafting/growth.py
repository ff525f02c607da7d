"""Which guesses a tree is made of, under a budget: pure.

The value of a guess is the probability that it comes true: the product of the confidences on its
path.  A tree of n guesses adds most to an answer, on average, if it has the n of highest value (Li
et al., "EAGLE-2", 2024).  Since none is worth more than the one that it follows, these form a tree,
and looking further at the guess of highest value finds them one by one.

Looking further costs a pass of a model where a model guesses, and its confidences are worth less
the further it looks.  So not everything is looked at: what comes first is taken in several ways
whatever it promises, and further on only what is not far behind the best of its layer, which makes
trees deep and narrow where one guess is nearly sure, and wide where none is (Liu et al., "TALON",
2026).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final, NamedTuple

from pyagent_node.inference.drafting.port import MAX_DRAFT, Draft
from pyagent_node.inference.drafting.tree import ROOT

WIDTH: Final = 3
"""The most guesses that follow the same one."""
GATE: Final = 0.05
"""Beyond the first layer a guess must be worth this part of the best one of its layer."""


class Candidate(NamedTuple):
    """A guess for a place, and the probability that it is right given what comes before it."""

    token: int
    confidence: float


class Growth:
    """A tree while it grows to ``limit`` guesses; none is worth less than ``floor``."""

    def __init__(self, limit: int, *, floor: float = 0.0, gate: float = GATE) -> None:
        self._limit = max(0, min(limit, MAX_DRAFT))
        self._floor = floor
        self._gate = gate
        self._tokens: list[int] = []
        self._confidence: list[float] = []
        self._values: list[float] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._layers: list[float] = []
        self._open: list[tuple[float, int]] = []

    def add(self, parent: int, candidates: Sequence[Candidate]) -> None:
        """Take in guesses that follow guess number ``parent``; :data:`ROOT` for the text."""
        value, depth = (1.0, 0) if parent == ROOT else (self._values[parent], self._depths[parent])
        if depth == len(self._layers):
            self._layers.append(0.0)
        for token, confidence in candidates:
            worth = value * min(1.0, max(0.0, confidence))
            best = self._layers[depth] = max(self._layers[depth], worth)
            if worth < self._floor or (depth and worth < self._gate * best):
                continue
            self._tokens.append(token)
            self._confidence.append(confidence)
            self._values.append(worth)
            self._parents.append(parent)
            self._depths.append(depth + 1)
            heapq.heappush(self._open, (-worth, len(self._tokens) - 1))

    def next(self) -> int | None:
        """Return the guess to look further from; ``None`` when the best are found."""
        if not self._open:
            return None
        value = -self._open[0][0]
        enough = heapq.nlargest(self._limit, self._values)
        if len(enough) == self._limit and (not enough or value <= enough[-1]):
            return None
        return heapq.heappop(self._open)[1]

    def path(self, index: int) -> list[int]:
        """Return the tokens that lead to a guess, and its own."""
        tokens: list[int] = []
        while index != ROOT:
            tokens.append(self._tokens[index])
            index = self._parents[index]
        return tokens[::-1]

    def draft(self, source: str) -> Draft:
        """Return the tree of the best guesses."""
        values = self._values
        # of equals those that were found first, which the others may follow
        ranked = sorted(range(len(values)), key=lambda index: (-values[index], index))
        kept = set(ranked[: self._limit])
        below: dict[int, list[int]] = {}
        for index in ranked:
            if index in kept:
                below.setdefault(self._parents[index], []).append(index)
        tokens: list[int] = []
        confidence: list[float] = []
        parents: list[int] = []
        todo = [(index, ROOT) for index in reversed(below.get(ROOT, []))]
        while todo:
            index, parent = todo.pop()
            place = len(tokens)
            tokens.append(self._tokens[index])
            confidence.append(self._confidence[index])
            parents.append(parent)
            todo += [(child, place) for child in reversed(below.get(index, []))]
        return Draft(tuple(tokens), tuple(confidence), source, tuple(parents))


def merged(drafts: Sequence[Draft], limit: int, source: str) -> Draft:
    """Return the best guesses of several chains, as one tree; of one guess the higher confidence.

    Where two agree they are one branch.
    """
    nodes: dict[tuple[int, ...], float] = {}
    for draft in drafts:
        path: tuple[int, ...] = ()
        for token, confidence in zip(draft.tokens, draft.confidence, strict=True):
            path = (*path, token)
            nodes[path] = max(nodes.get(path, 0.0), confidence)
    growth = Growth(limit, gate=0.0)
    places: dict[tuple[int, ...], int] = {(): ROOT}
    for path in sorted(nodes, key=len):
        growth.add(places[path[:-1]], [Candidate(path[-1], nodes[path])])
        places[path] = len(places) - 1
    return growth.draft(source)
