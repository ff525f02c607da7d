"""What guessing has won and lost, and whether something may be tried that could cost time: pure.

The loss is what steps took beyond plain decoding of the same tokens.  It may come to little more
than a plain pass and a small part of the time; what was won before is set against it, within
bounds, so that a session that guesses in vain of late finds that out.  A session that has lost too
much still sees what would have come of guesses that cost nothing to make, and makes its loss good
by them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from pyagent_node.inference.drafting.costs import CostModel
from pyagent_node.inference.drafting.port import Pass

EXPLORE: Final = 0.005
"""The part of the time that may be lost by trying out."""
EXPLORE_PASSES: Final = 1.25
FORGIVEN: Final = 0.995
"""What is left of a loss after a pass, so that nothing is given up for good."""
MAX_CREDIT: Final = 4.0
"""Plain passes: what has been won in the past pays for no more than so many later losses."""
CREDIT: Final = 0.05
"""And for no more beyond that than this part of the time."""
FOREGONE: Final = 0.5
"""What guesses would have won that were not sent makes good this part of it."""


class Allowance:
    """The account of one session; ``ranks`` compute its steps, at ``costs``."""

    def __init__(self, costs: CostModel, *, ranks: int) -> None:
        self.explored = 0.0
        """The most that trying out has cost so far, in seconds."""
        self._costs = costs
        self._ranks = ranks
        self._loss = 0.0
        self._total = 0.0
        self._void = 0.0
        self._foregone: deque[int] = deque()
        self._missed = 0.0

    @property
    def room(self) -> float:
        """The seconds that may be lost from now on; not positive when too many were lost."""
        return EXPLORE_PASSES * self._costs.seconds(1) + EXPLORE * self._total - self._loss

    @property
    def affordable(self) -> bool:
        """Whether something may be tried that could cost time."""
        return self.room > 0

    def passed(self, done: Pass) -> None:
        """Take in a step; the cost model knows it already."""
        plain = self._costs.seconds(1)
        alone = done.in_flight <= 1
        took = 0.0
        # what such a pass usually takes: one that was held up by chance says nothing of guessing
        if alone:
            usual = self._costs.seconds(done.width)
            took = usual + done.draft_seconds
            if done.crowded:  # what void steps cost is seen in what they hold up
                late = done.seconds - usual
                self._costs.add_waste(late, self._void)
                took += min(max(0.0, late), self._void)
            self._void = 0.0
        elif done.gained:
            took = done.elapsed
        else:
            self._void += self._costs.busy_seconds(done.width, self._ranks)
        self._total += took
        self._loss *= FORGIVEN
        if done.drafts or done.draft_seconds or not alone:
            credit = MAX_CREDIT * plain + CREDIT * self._total
            self._loss = max(-credit, self._loss + took - done.gained * plain)
            self.explored = max(self.explored, self._loss)

    def forgo(self, guesses: Sequence[int]) -> None:
        """Note guesses that are only not sent because too much was lost before."""
        if self._foregone:
            return
        self._foregone.extend(guesses)
        self._missed = self._costs.seconds(1) - self._costs.seconds(len(guesses) + 1)

    def accepted(self, tokens: Sequence[int]) -> None:
        """Take in tokens of the session."""
        for token in tokens:
            if not self._foregone:
                return
            right = self._foregone.popleft() == token
            if right:
                self._missed += self._costs.seconds(1)
            if not right or not self._foregone:
                self._foregone.clear()
                self._loss -= FOREGONE * self._missed
