"""Drafters for tests: they know the answer, and are as wrong, slow or broken as they are told."""

from __future__ import annotations

import random
from collections.abc import Sequence

import trio

from pyagent_node.base.errors import Unavailable
from pyagent_node.inference.drafting.port import Draft
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import N_VOCAB, toy_generate
from pyagent_node.simulations.guesses import random_tree

LAYERS = 10
FAR = 300
"""Tokens of an answer that an oracle knows."""


class Oracle:
    """Guesses the true answer, each token wrong with a probability of ``wrong``.

    It takes the answer for that to what it was told first: the prompt.
    """

    def __init__(self, name: str, sampling: SamplingParams, wrong: float, seed: int) -> None:
        self.name = name
        self.closed = 0
        self.asked = 0
        self._sampling = sampling
        self._wrong = wrong
        self._rng = random.Random(seed)
        self._told: list[int] = []
        self._prompt = 0
        self._answer: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens; they are those of the whole model."""
        if not self._told:
            self._prompt = len(tokens)
            self._answer = toy_generate(LAYERS, tokens, FAR, self._sampling)
        self._told += tokens
        got = self._told[self._prompt :]
        assert got[: len(self._answer)] == self._answer[: len(got)]

    def guess(self, ahead: Sequence[int], limit: int) -> Draft:
        """Return what comes, or something else."""
        self.asked += 1
        at = len(self._told) - self._prompt + len(ahead)
        tokens = tuple(
            self._rng.randrange(N_VOCAB) if self._rng.random() < self._wrong else token
            for token in self._answer[at : at + limit]
        )
        return Draft(tokens, (1.0 - self._wrong,) * len(tokens), self.name)

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess at once."""
        return self.guess(ahead, limit)

    async def aclose(self) -> None:
        """Note that it is over."""
        self.closed += 1


class QuickOracle(Oracle):
    """An oracle that never waits."""

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess at once."""
        return self.guess(ahead, limit)


class SlowOracle(Oracle):
    """An oracle that takes its time, now more, now less."""

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess after a while."""
        draft = self.guess(ahead, limit)
        await trio.sleep(self._rng.choice([0.0, 0.001, 0.02, 0.07]))
        return draft


class Growing(Oracle):
    """An oracle that can guess in several ways at once."""

    def tree(self, ahead: Sequence[int], limit: int) -> Draft:
        """Return a tree that is right somewhere, if at all."""
        self.asked += 1
        at = len(self._told) - self._prompt + len(ahead)
        if at + limit >= len(self._answer):
            return self.guess(ahead, limit)
        return random_tree(
            self._rng,
            limit,
            lambda path: self._answer[at + len(path)],
            right=1.0 - self._wrong,
            n_vocab=N_VOCAB,
        )

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess after a while."""
        draft = self.tree(ahead, limit)
        await trio.sleep(self._rng.choice([0.0, 0.001, 0.02]))
        return draft


class QuickGrowing(Growing, QuickOracle):
    """One that never waits."""

    def look_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess at once."""
        return self.tree(ahead, limit)


class Weeds(QuickGrowing):
    """Its trees are none."""

    def look_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Grow in all directions."""
        right = self.tree(ahead, limit)
        n = self._rng.randrange(1, 50)
        kinds = [
            Draft(right.tokens, right.confidence, self.name, right.parents[::-1]),
            Draft(right.tokens[::-1], right.confidence, self.name, right.parents),
            Draft(right.tokens, (), self.name, right.parents),
            Draft((5,) * n, (float("nan"),) * n, self.name, (-1,) * n),
            Draft((5,) * n, (2.0,) * n, self.name, tuple(range(n))),
            Draft((2**70, -1), (0.5, 0.5), self.name, (2**70, -(2**70))),
            Draft((129, 1), (0.5, 0.5), self.name, (-1, 0)),
        ]
        return self._rng.choice(kinds)


class Reading(SlowOracle):
    """Reads the prompt for a while first."""

    read = False

    async def prepare(self) -> None:
        """Take half a second."""
        await trio.sleep(0.5)
        self.read = True

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess after a while."""
        assert self.read
        return await super().propose(ahead, limit)


class Illiterate(QuickOracle):
    """Fails over the prompt."""

    async def prepare(self) -> None:
        """Fail."""
        await trio.sleep(0.5)
        raise Unavailable("What does it say?", code="drafter_gone")


class Stalling(Oracle):
    """Answers twice and then never again."""

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Hang."""
        if self.asked >= 2:
            await trio.sleep_forever()
        return self.guess(ahead, limit)


class Dying(Oracle):
    """Answers twice and then dies."""

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Fail."""
        if self.asked >= 2:
            raise Unavailable("The drafter is gone.", code="drafter_gone")
        return self.guess(ahead, limit)


class Buggy(QuickOracle):
    """Answers twice and then breaks in a way that nobody thought of."""

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Break."""
        if self.asked >= 2:
            raise ZeroDivisionError
        return self.guess(ahead, limit)


class Lying(QuickOracle):
    """Sends what is no token, too much of it, and is sure of everything."""

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Lie."""
        self.asked += 1
        right = self.guess(ahead, limit).tokens
        kinds: list[tuple[int, ...]] = [
            (),
            (N_VOCAB, *right),
            (-1,),
            (2**70,),
            (*right, *[5] * 5000),
            (129, 129, 129),
            (0,) * limit,
        ]
        tokens = self._rng.choice(kinds)
        sure = self._rng.choice([1.0, float("nan"), float("inf"), -1.0, 1e300])
        return Draft(tokens, (sure,) * (len(tokens) + self._rng.randrange(-1, 2)), self.name)


class Nonsense(QuickOracle):
    """Answers with something that is not even a draft."""

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return a number."""
        return 7  # type: ignore[return-value]


KINDS: dict[str, type[Oracle]] = {
    "quick": QuickOracle,
    "slow": SlowOracle,
    "prompt": Oracle,
    "reading": Reading,
    "illiterate": Illiterate,
    "stalling": Stalling,
    "dying": Dying,
    "buggy": Buggy,
    "lying": Lying,
    "nonsense": Nonsense,
    "growing": Growing,
    "quick growing": QuickGrowing,
    "weeds": Weeds,
}


class OracleFactory:
    """Makes drafters of one kind, and keeps them."""

    def __init__(self, name: str, wrong: float) -> None:
        self.name = name
        self.made: list[Oracle] = []
        self._wrong = wrong

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> Oracle:
        """Return a drafter that knows the answer."""
        drafter = KINDS[self.name](self.name, sampling, self._wrong, len(self.made))
        self.made.append(drafter)
        return drafter


def oracles(wrong: float = 0.2) -> tuple[Speculators, dict[str, OracleFactory]]:
    """Return one factory of each kind."""
    factories = {name: OracleFactory(name, wrong) for name in KINDS}
    return Speculators(factories.values(), clock=lambda: 0.0), factories
