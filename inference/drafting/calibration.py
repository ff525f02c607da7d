"""How often guesses turn out right, by who made them and how sure they said they were: pure.

A drafter's confidence is a claim.  Outcomes are counted by the source of a guess, its place among
the guesses since the last token that was known, and the confidence claimed, in cells that start
from what the wider cell (the same source and confidence at any place) says, which starts from the
claim itself.  Since a token is sampled by its position, whatever was guessed, guesses that were
never sent are judged as well.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from pyagent_node.inference.drafting.port import Draft

CLAIM_WEIGHT: Final = 4.0
"""A claim weighs as much as this many outcomes."""
WIDER_WEIGHT: Final = 10.0
MEMORY: Final = 0.98
"""The same within a session: about the last 50 outcomes count."""
PLACES: Final = (1, 2, 4, 8, 16, 32)
BANDS: Final = 8
FIRST_BAND: Final = -2.0
LOWEST: Final = 0.002
HIGHEST: Final = 0.998
MAX_PENDING: Final = 64
"""Drafts that wait to be judged; beyond, the oldest are not."""
MAX_SOURCES: Final = 16


class _Cell:
    __slots__ = ("hits", "trials")

    def __init__(self) -> None:
        self.hits = 0.0
        self.trials = 0.0

    def add(self, hit: bool, memory: float) -> None:
        self.hits = self.hits * memory + hit
        self.trials = self.trials * memory + 1.0

    def mean(self, prior: float, weight: float) -> float:
        return (self.hits + weight * prior) / (self.trials + weight)


def _place(index: int) -> int:
    return bisect_right(PLACES, index)


def _band(claim: float) -> int:
    """Return which of ``BANDS`` bands of log-odds, from 0.12 to 0.98, a claim lies in."""
    odds = math.log(claim / (1.0 - claim))
    return min(BANDS - 1, max(0, math.floor(odds - FIRST_BAND) + 1))


class Calibration:
    """Turns claims into probabilities.

    ``before`` is what earlier sessions have taught: it stands where a claim would, and learns as
    well.  ``memory`` is what is left of an outcome's weight after the next of its cell.
    """

    def __init__(self, before: Calibration | None = None, *, memory: float = MEMORY) -> None:
        self._before = before
        self._memory = memory
        self._cells: dict[tuple[str, int, int], _Cell] = {}
        self._wider: dict[tuple[str, int], _Cell] = {}
        self._hits: dict[str, int] = {}

    def hits(self, source: str) -> int:
        """Return how many of its guesses were right so far."""
        earlier = 0 if self._before is None else self._before.hits(source)
        return earlier + self._hits.get(source, 0)

    def probability(self, source: str, index: int, claim: float) -> float:
        """Return how likely a guess is right if all ``index`` since what was known are."""
        claim = min(HIGHEST, max(LOWEST, claim))
        band = _band(claim)
        if self._before is not None:
            claim = self._before.probability(source, index, claim)
        wider = self._wider.get((source, band))
        mean = claim if wider is None else wider.mean(claim, CLAIM_WEIGHT)
        cell = self._cells.get((source, _place(index), band))
        if cell is not None:
            mean = cell.mean(mean, WIDER_WEIGHT)
        return min(HIGHEST, max(LOWEST, mean))

    def probabilities(self, draft: Draft, ahead: int = 0) -> list[float]:
        """Return the probabilities of all guesses of a draft that comes after ``ahead`` others."""
        return [
            self.probability(draft.source, index, claim)
            for index, claim in enumerate(draft.confidence, ahead)
        ]

    def add(self, source: str, index: int, claim: float, *, hit: bool) -> None:
        """Take in how a guess turned out, given that those before it were right."""
        if self._before is not None:
            self._before.add(source, index, claim, hit=hit)
        if source not in self._hits and len(self._hits) >= MAX_SOURCES:
            return
        self._hits[source] = self._hits.get(source, 0) + hit
        band = _band(min(HIGHEST, max(LOWEST, claim)))
        self._wider.setdefault((source, band), _Cell()).add(hit, self._memory)
        self._cells.setdefault((source, _place(index), band), _Cell()).add(hit, self._memory)


class Outcome(msgspec.Struct, frozen=True):
    """A guess, the how manieth since what was known, and how it turned out."""

    source: str
    index: int
    claim: float
    hit: bool


class _Pending(msgspec.Struct):
    start: int
    tokens: tuple[int, ...]
    ahead: int
    draft: Draft
    judged: int = 0


class Judge:
    """Finds out which guesses were right, sent or not, once the tokens are there."""

    def __init__(self) -> None:
        self.position = 0
        self._pending: deque[_Pending] = deque(maxlen=MAX_PENDING)

    def wait_for(self, draft: Draft, ahead: Sequence[int]) -> None:
        """Note a draft that was made after the tokens so far and ``ahead``."""
        if draft.tokens:
            tokens = (*ahead, *draft.tokens)
            self._pending.append(_Pending(self.position, tokens, len(ahead), draft))

    def accepted(self, tokens: Sequence[int]) -> list[Outcome]:
        """Take in tokens of the session; return what they say about guesses."""
        outcomes: list[Outcome] = []
        start = self.position
        self.position += len(tokens)
        waiting = list(self._pending)
        self._pending.clear()
        for item in waiting:
            alive = True
            while alive and item.judged < len(item.tokens):
                place = item.start + item.judged - start
                if place >= len(tokens):
                    break
                alive = tokens[place] == item.tokens[item.judged]
                index = item.judged - item.ahead
                if index >= 0:
                    claim = item.draft.confidence[index]
                    outcomes.append(Outcome(item.draft.source, item.judged, claim, alive))
                item.judged += 1
            if alive and item.judged < len(item.tokens):
                self._pending.append(item)
        return outcomes
