"""How many guesses a step carries, and how many steps are in flight: pure.

A step that carries guesses takes longer than a plain one and adds more tokens to the answer.  With
R the best rate (tokens a second) that can be had, a step of n guesses is worth E(n) - R * S(n + 1)
tokens, where E is what it adds on average (by the calibrated confidences) and S the time it takes
(by the cost model): the n that is worth most is sent, be it none.  R is the rate of doing so, found
as it goes (Dinkelbach's method for the ratio of two sums).  A drafter that takes time is asked only
while that pays, and stops at guesses whose value is less than their price.

What is not known is found out without paying for it where that is possible (guesses that were not
sent are judged too), and else within an allowance: what trying out has cost beyond plain decoding,
stays little above a plain pass and half a percent of the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Final

from pyagent_node.inference.drafting.allowance import Allowance
from pyagent_node.inference.drafting.calibration import Calibration, Judge
from pyagent_node.inference.drafting.costs import NEVER
from pyagent_node.inference.drafting.lessons import Lessons
from pyagent_node.inference.drafting.port import MAX_DRAFT, Draft, Forecast, Pass, Plan
from pyagent_node.inference.drafting.portions import Portions, tokens_added
from pyagent_node.inference.drafting.profile import Profile, best_plan, piped_rate

MAX_LENGTH: Final = 16
MAX_DEPTH: Final = 8
TRUSTED: Final = 2
"""Guesses of an unknown drafter that are sent; each that is right allows two more."""
MEMORY: Final = 0.95
"""What is left of a pass's weight in rates after the next: about 20 count."""
ENOUGH_PLAIN: Final = 3.0
"""Plain passes that must be known for guesses that take time, unless they promise this much:"""
CLEAR: Final = 2.0
"""Times the plain rate: an error in what a plain pass takes does not change the answer then."""
RECHECK: Final = 24
"""Passes after which the time of a plain one is measured again, more where guessing pays well."""
FIRST_PAUSE: Final = 8
LAST_PAUSE: Final = 128
CHANCES: Final = 2
"""Drafts in a row that one gets that did not pay, when it is asked again."""
HEARD: Final = 2
"""Drafts as many as what earlier sessions got of theirs counts for."""
PROBE: Final = 4
"""Guesses that a drafter that did not pay is asked for when it gets another chance."""
CERTAIN: Final = 0.995
DOUBTFUL: Final = 0.002
MODEST: Final = 0.15
MAX_MODESTY: Final = 6.0
"""A drafter stops by its own confidences: for one that makes too little of them (by more than
``MODEST``) the floor is raised to the power that they are off by."""
CHEAP: Final = 0.01
"""A guess that takes less than this part of a token's time is always asked for."""
EARLY: Final = 12
LOOK_EVERY: Final = 6
"""Drafts after which the plan is looked at again; after each of the first ``EARLY``."""
WASTE: Final = 0.5
"""The part of a drafter's time for guesses in vain by which it is late with those that count."""

CROWDED: Final = 4.0
"""Where a pass takes more than so many times its computing, void steps end before it comes."""


class Controller:
    """Decides for one session; it shares its ``lessons`` with those before and after it.

    Before a step call :meth:`plan`; ask the drafter unless it says 0, and tell :meth:`choose` what
    it gave.  Call :meth:`passed` with each result, then :meth:`accepted` with the new tokens.
    """

    def __init__(
        self,
        *,
        ranks: int = 1,
        max_length: int = MAX_LENGTH,
        max_depth: int | None = None,
        lessons: Lessons | None = None,
    ) -> None:
        self._lessons = lessons or Lessons()
        self.costs = self._lessons.costs
        self.calibration = Calibration(self._lessons.calibration)
        self._judge = Judge()
        self._profile = Profile(self._lessons.profile)
        self._ranks = max(1, ranks)
        self._max_length = min(max_length, MAX_DRAFT)
        self._max_depth = MAX_DEPTH if max_depth is None else max(1, max_depth)
        self._allowance = Allowance(self.costs, ranks=self._ranks)
        self._portions = Portions(self.costs, ranks=self._ranks, depth=self._max_depth)
        self._plan = Plan()
        self._best = (0, 1)
        self._plain = self.costs.seconds(1)
        self._tokens = 0.0
        self._seconds = 0.0
        self._passes = 0
        self._since_plain = 0
        self._worth = self._lessons.worth or 0.0
        self._asked = 0 if self._lessons.worth is None else HEARD
        self._pause = FIRST_PAUSE
        self._paused = 0
        self._chances = 0
        self._drafted = 0
        self._right = 0
        self._gained = 0
        self._predicted = (0.0, 0.0)
        self._flying: list[float] = []
        self._width = 1
        self._following = Calibration(self._lessons.following)
        self._claims: deque[tuple[int, float]] = deque(maxlen=MAX_DRAFT)
        self._stakes: deque[float] = deque(maxlen=MAX_DRAFT)
        """What each step in flight costs if its guesses are wrong, in seconds."""
        self._modesty = 1.0
        self._means = (0.0, 0.0)

    # ---- before a step -----------------------------------------------------------------------

    def plan(self, in_flight: int = 0) -> Plan:
        """Say what the next step is to be, where so many are in flight."""
        self._plain = self.costs.seconds(1)
        self._plan = self._decide(in_flight)
        if not (self._plan.length or in_flight) and self.costs.known:
            self._predict((), 0)
        return self._plan

    def _decide(self, in_flight: int) -> Plan:
        if self._max_length < 1 or not self.costs.known:
            return Plan()
        if not in_flight and self._recheck_due():
            return Plan()
        rate = self.rate
        per_draft = self.costs.draft_seconds
        # of a step that follows another, only the time that one rank takes counts
        share = self._ranks if in_flight else 1
        price = rate * (self.costs.token_seconds / share + per_draft) / max(NEVER, self._holds)
        floor = min(0.9, price) ** self._modesty
        cheap = per_draft * rate < CHEAP
        if not self.costs.draft_known:
            return Plan(min(PROBE, self._max_length), 1, floor)
        if cheap:
            return Plan(self._max_length, self._depth(0.0), floor)
        # asking costs as well: no more than may be lost
        most = int(max(0.0, self._allowance.room) / per_draft)
        if self._asked >= HEARD and self._worth < 0:
            return self._another_chance(floor, most)
        if most < 1:
            return Plan()
        if self._profile.known and (self._asked <= EARLY or self._asked % LOOK_EVERY == 0):
            self._best = best_plan(
                self._profile,
                self.costs,
                ranks=self._ranks,
                max_length=self._max_length,
                max_depth=self._max_depth if self.costs.computing_known else 1,
            )
        best, depth = self._best
        if depth > 1:  # guesses that take their time are sent in small portions
            return Plan(min(best, most), self._depth(per_draft * (best + 1)), floor)
        # a draft that goes well may be longer than the average one
        return Plan(min(self._max_length, 2 * best + 2, most), 1, floor)

    @property
    def _holds(self) -> float:
        """How likely all guesses in flight are right."""
        return math.prod(self._flying)

    def _depth(self, drafting: float) -> int:
        """Return how many steps may be in flight, if guesses for another take ``drafting``."""
        if not (self.costs.computing_known and self._allowance.affordable):
            return 1
        if not self._flying or not drafting:
            return self._max_depth
        # a drafter that is busy with guesses for nothing is late with those that count
        holds, width = self._holds, self._best[0] + 1
        saved = self.costs.seconds(width) - self.costs.pace_seconds(width, self._ranks)
        return self._max_depth if holds * saved > (1.0 - holds) * drafting * WASTE else 1

    def _another_chance(self, floor: float, most: int) -> Plan:
        """Ask a drafter that did not pay again, after ever longer pauses."""
        self._paused += 1
        if most < 1:
            return Plan()
        if self._paused >= self._pause:
            self._paused = 0
            self._pause = min(LAST_PAUSE, 2 * self._pause)
            self._chances = CHANCES
        if not self._chances:
            return Plan()
        self._chances -= 1
        return Plan(min(PROBE, self._max_length, most), 1, floor)

    def choose(self, draft: Draft, ahead: Sequence[int] = (), in_flight: int = 0) -> int:
        """Say how many guesses of ``draft`` to send; ``ahead`` as it was proposed after.

        ``in_flight`` steps are under way; a step that follows them begins with a guess.

        Call it for every draft: those that are not sent are judged as well.
        """
        chain = draft.straight
        self._judge.wait_for(chain, ahead)
        odds = self.calibration.probabilities(chain, len(ahead))
        self._note_modesty(chain.confidence, odds)
        del self._flying[len(ahead) :]
        if in_flight:
            holds = self._holds
            right = holds * odds[0] if odds else 0.0
            best = self._portions.child(odds, holds, self.rate, self._width)
            n = self._staking(self._pick(best, draft), behind=True)
            if n:
                self._claims.append((in_flight, right))
                self._predict_child(odds[:n], right, in_flight)
        else:
            self._claims.clear()
            best = self._portions.alone(odds, self.rate, self._plain)
            self._note_worth(best, odds)
            self._profile.add(odds)
            self._stakes.clear()
            n = self._staking(self._pick(best, draft), behind=False)
            if best and not n:
                self._allowance.forgo(chain.tokens[:best])
            self._predict(odds[:n], len(odds))
        self._flying += odds[:n]
        self._width = n + (not in_flight)
        return n

    def _pick(self, best: int, draft: Draft) -> int:
        """Return how many guesses to send where ``best`` promise most."""
        if not self._allowance.affordable:
            return 0
        trusted = TRUSTED + 2 * self.calibration.hits(draft.source)
        return min(best, trusted, len(draft.tokens), self._max_length + 1)

    def _staking(self, n: int, *, behind: bool) -> int:
        """Return how many of ``n`` guesses to send, for what they cost if none of them is right.

        All that are in flight may not lose more than is allowed: in a session that is unlike those
        before it, guesses are wrong together.
        """
        room = self._allowance.room - sum(self._stakes)
        while n and self._stake(n, behind=behind) > room:
            n -= 1
        self._stakes.append(self._stake(n, behind=behind) if n else 0.0)
        return n

    def _stake(self, n: int, *, behind: bool) -> float:
        if behind:
            return self._portions.child_seconds(n)[1]
        return self.costs.seconds(n + 1) - self._plain

    def _note_modesty(self, claims: Sequence[float], odds: Sequence[float]) -> None:
        """Compare what was claimed with what it is worth."""
        if not claims:
            return
        share = max(0.1, 1.0 / (self._asked + 1))
        claimed, true = self._means
        claimed += (sum(claims) / len(claims) - claimed) * share
        true += (sum(odds) / len(odds) - true) * share
        self._means = claimed, true
        self._modesty = 1.0
        if true - claimed > MODEST:
            bend = math.log(max(DOUBTFUL, claimed)) / math.log(min(CERTAIN, true))
            self._modesty = min(MAX_MODESTY, bend)

    def _note_worth(self, n: int, odds: Sequence[float]) -> None:
        """Note what such a draft gains over plain decoding, in tokens."""
        plain = self._plain
        drafting = self.costs.draft_seconds * len(odds)
        took = self.costs.seconds(n + 1) + drafting
        tokens = tokens_added(odds[:n])
        worth = tokens - took / plain
        if n and self._max_depth > 1 and self.costs.computing_known:
            pace = max(
                took / self._max_depth, drafting, self.costs.pace_seconds(n + 1, self._ranks)
            )
            rate = piped_rate(tokens, math.prod(odds[:n]) * odds[n - 1], took, pace)
            worth = max(worth, tokens * (1.0 - 1.0 / (rate * plain)))
        self._asked += 1
        share = max(0.15, 1.0 / self._asked)
        self._worth += (worth - self._worth) * share
        self._lessons.note_worth(worth)
        if self._worth > 0:
            self._pause = FIRST_PAUSE

    def _recheck_due(self) -> bool:
        """Tell whether the time of a plain pass should be measured again."""
        gain = max(1.0, self.rate * self._plain)
        slow = self.costs.draft_seconds * self.rate >= CHEAP
        if slow and gain < CLEAR and self.costs.plain_seen < ENOUGH_PLAIN:
            return self._since_plain > 0
        return self._since_plain > RECHECK * gain * gain

    def _predict(self, odds: Sequence[float], drafted: int) -> None:
        """Note what the step that is sent now is expected to add and to take."""
        seconds = self.costs.seconds(len(odds) + 1) + self.costs.draft_seconds * drafted
        tokens = tokens_added(odds)
        self._tokens = self._tokens * MEMORY + tokens
        self._seconds = self._seconds * MEMORY + seconds
        self._predicted = self._predicted[0] + tokens, self._predicted[1] + seconds

    def _predict_child(self, odds: Sequence[float], right: float, in_flight: int) -> None:
        """Note the same of a step that follows others in flight.

        Where one guess is right the next one is likelier to be.  Sending goes by what is sure
        all the same: what is sent for nothing costs more than it says.
        """
        pace, wrong = self._portions.child_seconds(len(odds))
        tokens = tokens_added(odds[1:])
        self._tokens = self._tokens * MEMORY + right * tokens
        self._seconds = self._seconds * MEMORY + right * pace + (1.0 - right) * wrong
        right = self._following.probability("", in_flight, right)
        known, seconds = self._predicted
        self._predicted = known + right * tokens, seconds + right * pace + (1.0 - right) * wrong

    # ---- after a step ------------------------------------------------------------------------

    def passed(self, done: Pass) -> None:
        """Take in what a step took."""
        alone = done.in_flight <= 1
        # behind void steps a pass takes longer, unless they are done while it travels
        telling = alone and not (done.crowded and CROWDED * done.compute_seconds > done.seconds)
        if telling:
            self.costs.add_pass(done.width, done.seconds, done.compute_seconds)
        self._passes += 1
        self._since_plain = 0 if done.width == 1 and telling else self._since_plain + 1
        self._drafted += done.drafts
        self._right += done.accepted
        self._gained += done.gained
        self._plain = self.costs.seconds(1)
        self._allowance.passed(done)
        if self._stakes:
            self._stakes.popleft()
        if not alone:
            if self._claims:
                before, claim = self._claims.popleft()
                self._following.add("", before, claim, hit=done.gained > 0)
            if done.gained:
                self.costs.add_pace(done.width, done.elapsed, self._ranks)
        if not done.gained or done.accepted < done.drafts:
            self._flying.clear()
        if alone and (done.drafts or done.draft_seconds > 0):
            self.costs.add_draft(max(1, self._profile.last), done.draft_seconds)

    def accepted(self, tokens: Sequence[int]) -> None:
        """Take in tokens of the session: the prompt, then what joins the answer."""
        self._allowance.accepted(tokens)
        del self._flying[: len(tokens)]
        for outcome in self._judge.accepted(tokens):
            self.calibration.add(outcome.source, outcome.index, outcome.claim, hit=outcome.hit)

    # ---- what it believes --------------------------------------------------------------------

    @property
    def rate(self) -> float:
        """Tokens a second that can be had, as far as is known; never less than plain decoding's."""
        plain = 1.0 / self._plain
        return max(plain, self._tokens / self._seconds) if self._seconds > 0 else plain

    def forecast(self) -> Forecast:
        """Say what is believed; the rate with guesses is that of the passes so far."""
        plain = 1.0 / self.costs.seconds(1) if self.costs.known else 0.0
        tokens, seconds = self._predicted
        return Forecast(
            plan=self._plan,
            pass_seconds=self.costs.pass_seconds,
            token_seconds=self.costs.token_seconds,
            draft_seconds=self.costs.draft_seconds,
            acceptance=self._right / self._drafted if self._drafted else 0.0,
            tokens_per_pass=self._gained / self._passes if self._passes else 0.0,
            tokens_per_second=tokens / seconds if seconds > NEVER else plain,
            plain_tokens_per_second=plain,
            explored_seconds=max(0.0, self._allowance.explored),
        )


class FixedController(Controller):
    """Always the same plan; it predicts all the same, and what it sees it keeps to itself."""

    def __init__(self, plan: Plan, *, ranks: int = 1) -> None:
        super().__init__(ranks=ranks, max_length=plan.length, max_depth=plan.depth)
        self._fixed = plan

    def _decide(self, in_flight: int) -> Plan:
        return self._fixed

    def _pick(self, best: int, draft: Draft) -> int:
        return min(len(draft.tokens), self._fixed.length + (self._fixed.depth > 1))

    def _staking(self, n: int, *, behind: bool) -> int:
        return n
