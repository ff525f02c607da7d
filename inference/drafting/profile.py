"""What lengths of drafts promise, by how likely guesses have been of late: pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pyagent_node.inference.drafting.costs import CostModel

SHARE: Final = 0.2
"""How much of the average the newest draft makes up."""
FEW: Final = 3
CERTAIN: Final = 0.995


class Profile:
    """How likely the guesses at each place of a draft are, given those before them, on average.

    Where a drafter has nothing to say, it counts as a guess that is never right.  ``before`` is
    what earlier sessions have taught: it is begun from, and learns as well.  ``share`` is how much
    of the average the newest draft makes up.
    """

    def __init__(self, before: Profile | None = None, *, share: float = SHARE) -> None:
        self._before = before
        self._share = share
        self._odds: list[float] = []
        self._count = 0
        self.last = 0
        if before is not None and before.known:
            self._odds, self._count = list(before._odds), FEW

    @property
    def known(self) -> bool:
        """Whether there have been enough drafts to judge by."""
        return self._count >= FEW

    def add(self, odds: Sequence[float]) -> None:
        """Take in the probabilities of a draft."""
        self._count += 1
        self.last = len(odds)
        if self._before is not None:
            self._before.add(odds)
        share = max(self._share, 1.0 / self._count)
        for index, chance in enumerate(odds):
            if index == len(self._odds):
                # that it has come to a place says more than that it has not before
                self._odds.append(chance)
            self._odds[index] += (chance - self._odds[index]) * share
        if not odds and self._odds:
            self._odds[0] -= self._odds[0] * share

    def chance(self, index: int) -> float:
        """Return the probability of guess number ``index`` if those before it are right."""
        if not self._odds:
            return 0.0
        return min(CERTAIN, self._odds[min(index, len(self._odds) - 1)])


def best_plan(
    profile: Profile, costs: CostModel, *, ranks: int, max_length: int, max_depth: int
) -> tuple[int, int]:
    """Return the length of drafts that promises most tokens a second, and the steps in flight.

    These are one or ``max_depth``.  With several in flight each begins with a guess of the token
    that the one before it ends with.  As long as all guesses hold, results come at the pace of the
    slowest of: the trip shared by the steps in flight, a rank's computing, the guessing.  A wrong
    one is answered after a whole trip, and what was sent behind it is lost.
    """
    best, best_rate = (0, 1), 1.0 / costs.seconds(1)
    tokens, together = 1.0, 1.0
    for length in range(1, max_length + 1):
        together *= profile.chance(length - 1)
        tokens += together
        alone = costs.draft_seconds * length + costs.seconds(length + 1)
        if tokens / alone > best_rate:
            best, best_rate = (length, 1), tokens / alone
        if max_depth <= 1:
            continue
        drafting = costs.draft_seconds * (length + 1)
        pace = max(alone / max_depth, costs.pace_seconds(length + 1, ranks), drafting)
        rate = piped_rate(tokens, together * profile.chance(length), alone, pace)
        if rate > best_rate:
            best, best_rate = (length, max_depth), rate
    return best


def piped_rate(tokens: float, holds: float, alone: float, pace: float) -> float:
    """Return the tokens a second where a step adds ``tokens`` and the next holds that often."""
    steps = 1.0 / (1.0 - min(CERTAIN, holds))
    return tokens * steps / (alone + pace * (steps - 1.0))
