"""How many guesses of a draft a step is to carry, and what steps behind it are worth: pure.

A guess costs what it adds to its step, at each rank in turn, or, in a step that is sent
behind, what that keeps one rank busy for.  So guesses that are nearly sure go out in portions that
follow each other closely, and those that are not all in one step or not at all.  Times are worth
``rate`` tokens a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from pyagent_node.inference.drafting.costs import NEVER, CostModel
from pyagent_node.inference.drafting.port import MAX_DRAFT

REACH: Final = 0.15
"""So likely all guesses in flight are right at least, where there are as many as there may be."""


def tokens_added(odds: Sequence[float]) -> float:
    """Return how many tokens a step with such guesses adds on average."""
    tokens, together = 1.0, 1.0
    for chance in odds:
        together *= chance
        tokens += together
    return tokens


class Portions:
    """Finds the portions of drafts for ranks of known speed, up to ``depth`` steps in flight."""

    def __init__(self, costs: CostModel, *, ranks: int, depth: int) -> None:
        self._costs = costs
        self._ranks = ranks
        self._depth = depth

    def child_seconds(self, width: int) -> tuple[float, float]:
        """Return the time that a step costs which follows others, if they are right and if not."""
        busy = self._costs.busy_seconds(width, self._ranks)
        return self._costs.pace_seconds(width, self._ranks), self._costs.waste * busy

    def later_seconds(self, width: int, before: int) -> float:
        """Return by how much later such a step is done, since the one before it is narrower.

        That one is ahead of it at each rank by less than it takes there itself.
        """
        if width <= before:
            return 0.0
        busy = self._costs.busy_seconds
        return (self._ranks - 1) * (busy(width, self._ranks) - busy(before, self._ranks))

    def alone(self, odds: Sequence[float], rate: float, plain: float) -> int:
        """Return how many guesses to send in a step that is alone, be it none.

        ``plain`` is the time of a step without any.
        """
        if not odds:
            return 0
        best, best_worth = 0, 1.0 - rate * plain
        behind = self._behind(odds, 1.0, rate, 1)
        tokens, together = 1.0, 1.0
        for n, chance in enumerate(odds, 1):
            together *= chance
            tokens += together
            worth = tokens - rate * self._costs.seconds(n + 1) + behind[n]
            if worth > best_worth:
                best, best_worth = n, worth
        return self._reaching(best, odds) if any(behind) else best

    def child(self, odds: Sequence[float], holds: float, rate: float, before: int) -> int:
        """Return how many guesses to send in a step that follows those in flight.

        These are all right with probability ``holds``; it counts if its own first one is, too.
        ``before`` tokens are in the last of them.
        """
        if not odds:
            return 0
        right = together = holds * odds[0]
        behind = self._behind(odds, holds, rate, 0)
        best, best_worth, tokens = 0, 0.0, 0.0
        for n, chance in enumerate(odds, 1):
            together *= chance if n > 1 else 1.0
            tokens += together
            pace, wrong = self.child_seconds(n)
            pace += self.later_seconds(n, before)
            worth = tokens - rate * (right * pace + (1.0 - right) * wrong) + behind[n]
            if worth > best_worth:
                best, best_worth = n, worth
        return self._reaching(best, odds)

    def _behind(self, odds: Sequence[float], holds: float, rate: float, more: int) -> list[float]:
        """Return, for each number of guesses of a draft, what steps behind them are worth.

        They carry the guesses that are left, in the portions that are worth most.  The step
        itself has ``more`` tokens than guesses.

        A portion with all that may follow it adds no more than the tokens that are left, so the
        search among portions ends where the cheapest that are left cost too much for that.
        """
        count = len(odds)
        worth = [0.0] * (count + 1)
        if self._depth <= 1 or not self._costs.computing_known:
            return worth
        together = [holds]
        for chance in odds:
            together.append(together[-1] * chance)
        prices: list[tuple[float, float, float, float]] = []
        least_pace = least_wrong = math.inf
        for width in range(count - 1, 0, -1):
            pace, wrong = (rate * seconds for seconds in self.child_seconds(width))
            least_pace, least_wrong = min(least_pace, pace), min(least_wrong, wrong)
            prices.append((pace, wrong, least_pace, least_wrong))
        prices.reverse()
        later = max(0.0, self.later_seconds(2, 1) * rate)
        left = 0.0
        for start in range(count - 1, 0, -1):
            right = together[start + 1]
            left += right
            in_vain, before = 1.0 - right, start + more
            tokens, best = 0.0, 0.0
            for width in range(1, count - start + 1):
                pace, wrong, least_pace, least_wrong = prices[width - 1]
                if left - right * least_pace - in_vain * least_wrong <= best:
                    break
                tokens += together[start + width]
                value = tokens - right * pace - in_vain * wrong + worth[start + width]
                if width > before:
                    value -= right * later * (width - before)
                best = max(best, value)
            worth[start] = best
        return worth

    def _reaching(self, best: int, odds: Sequence[float]) -> int:
        """Return how many guesses a step must carry that those in flight reach far enough.

        That is to where what follows will hardly be right, if guesses go on as they begin.
        """
        if not best or self._depth <= 1:
            return best
        mean = math.fsum(map(math.log, odds)) / len(odds)
        reach = min(MAX_DRAFT, math.log(REACH) / min(-NEVER, mean))
        return min(len(odds), max(best, math.ceil(reach / self._depth)))
