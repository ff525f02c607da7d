"""A world to guess in: tokens that a drafter gets right or wrong, and steps that take their time.

Whether the guess for a token is right is settled beforehand, so that every way of guessing meets
the same luck.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from pyagent_node.inference.drafting.controller import Controller, FixedController
from pyagent_node.inference.drafting.port import Draft, Pass, Plan

LENGTHS = (0, 1, 2, 3, 5, 8, 16)
RIGHT, WRONG = 1, 2


class World(msgspec.Struct, frozen=True):
    """A pass of w tokens takes rtt + a + b * w seconds, a guess d.

    ``chance`` is how likely the guess for a token is right, ``claim`` what the drafter says then.
    """

    a: float
    b: float
    d: float
    rtt: float
    chance: Callable[[int], float]
    claim: Callable[[float], float] = lambda chance: chance
    tokens: int = 600
    noise: float = 0.05
    seed: int = 0
    tells_computing: bool = True

    def run(self, controller: Controller, spent: list[float] | None = None) -> float:
        """Generate; return tokens a second.  ``spent`` gets the seconds of each pass."""
        luck = random.Random(self.seed)
        chances = [
            min(0.99, max(0.01, p + luck.uniform(-0.2, 0.2) * (1 - p)))
            for p in map(self.chance, range(self.tokens + 40))
        ]
        right = [luck.random() < chance for chance in chances]
        noise = random.Random(self.seed + 1)
        now, made = 0.0, 0
        controller.accepted([0] * 10)
        while made < self.tokens:
            plan = controller.plan()
            sent, drafting, hits = 0, 0.0, 0
            if plan.length:
                draft, hits = self._draft(chances[made:], right[made:], plan)
                drafting = self.d * len(draft.tokens)
                sent = controller.choose(draft)
                assert 0 <= sent <= len(draft.tokens)
            computing = self.a + self.b * (sent + 1)
            took = (self.rtt + computing) * (1 + noise.uniform(-self.noise, self.noise))
            gained = min(sent, hits) + 1
            controller.passed(
                Pass(
                    width=sent + 1,
                    seconds=took,
                    drafts=sent,
                    accepted=gained - 1,
                    gained=gained,
                    compute_seconds=computing if self.tells_computing else 0.0,
                    draft_seconds=drafting,
                    elapsed=took + drafting,
                )
            )
            controller.accepted([RIGHT] * gained)
            now, made = now + took + drafting, made + gained
            if spent is not None:
                spent += [(took + drafting) / gained] * gained
        return made / now

    def _draft(self, chances: list[float], right: list[bool], plan: Plan) -> tuple[Draft, int]:
        claims: list[float] = []
        together = 1.0
        for chance in chances[: plan.length]:
            claim = self.claim(chance)
            together *= claim
            if together < plan.floor and (claims or not self.d):
                break
            claims.append(claim)
        hits = [*right, False].index(False)
        tokens = [RIGHT if ok else WRONG for ok in right[: len(claims)]]
        return Draft(tuple(tokens), tuple(claims), "world"), hits

    def fixed(self, length: int) -> float:
        """Return the rate with always so many guesses."""
        return self.run(FixedController(Plan(length)))

    def adaptive(self) -> float:
        """Return the rate of the controller, without knowing anything beforehand."""
        return self.run(Controller(max_depth=1))

    def best(self) -> float:
        """Return the rate of the best fixed length."""
        return max(self.fixed(length) for length in LENGTHS)
