"""What plans promise, by how likely guesses have been of late: pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from pyagent_node.inference.drafting.costs import NEVER, CostModel

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


class _Times(NamedTuple):
    """What a step takes that is alone in flight, one rank for it, and the guessing."""

    alone: float
    busy: float
    drafting: float


def _times(costs: CostModel, length: int, ranks: int) -> _Times:
    return _Times(
        costs.draft_seconds * length + costs.seconds(length + 1),
        costs.busy_seconds(length + 1, ranks),
        costs.draft_seconds * (length + 1),
    )


def plan_rate(profile: Profile, costs: CostModel, length: int, depth: int, ranks: int) -> float:
    """Return the tokens a second that a plan promises.

    With several steps in flight each begins with a guess of the token that the one before it ends
    with.  As long as all guesses hold, results come at the pace of the slowest of: the trip shared
    by the steps in flight, a rank's computing, the guessing.  A wrong one is answered after a whole
    trip, and what was sent behind it is lost.
    """
    tokens, together = 1.0, 1.0
    for index in range(length):
        together *= profile.chance(index)
        tokens += together
    times = _times(costs, length, ranks)
    return _rate(times, depth, tokens, together * profile.chance(length))


def best_plan(
    profile: Profile,
    costs: CostModel,
    *,
    ranks: int,
    max_length: int,
    max_depth: int,
    slowness: float,
) -> tuple[int, int]:
    """Return the length and the depth that promise most.

    What is promised for more than one step in flight is divided by ``slowness``.
    """
    best, best_rate = (0, 1), plan_rate(profile, costs, 0, 1, ranks)
    tokens, together = 1.0, 1.0
    for length in range(max_length + 1):
        if length:
            together *= profile.chance(length - 1)
            tokens += together
        times = _times(costs, length, ranks)
        holds = together * profile.chance(length)
        for depth in range(1, (max_depth if length else 1) + 1):
            rate = _rate(times, depth, tokens, holds)
            if depth > 1:
                rate /= slowness
            if rate > best_rate:
                best, best_rate = (length, depth), rate
    return best


def _rate(times: _Times, depth: int, tokens: float, holds: float) -> float:
    """Return the rate where a step adds ``tokens`` and the next holds that often."""
    if depth <= 1:
        return tokens / max(NEVER, times.alone)
    pace = max(times.alone / depth, times.busy, times.drafting)
    steps = 1.0 / (1.0 - holds)
    return tokens * steps / max(NEVER, times.alone + pace * (steps - 1.0))
