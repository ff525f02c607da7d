"""Those who guess in the simulated swarm: some know the answer, some err, stall, lie or die.

Whatever they do, an answer stays the same.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import Unavailable
from pyagent_node.inference.drafting.port import Draft, Drafter
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import N_VOCAB, toy_tokens
from pyagent_node.simulations.draws import N_LAYERS
from pyagent_node.simulations.guesses import random_tree

LATE_SECONDS: Final = 3.0
"""What the late drafter takes; more than anybody waits for."""
READ_SECONDS: Final = 0.5
WRONG: Final = (0.0, 0.1, 0.3, 0.6, 1.0)
"""How often guesses of a drafter are wrong; one of these for each session."""
KNOWN: Final = 256
"""Answers that are kept for the oracles."""


class Answer:
    """What the whole model says to a prompt, computed as far as somebody asked."""

    def __init__(self, tokens: Iterator[int]) -> None:
        self._tokens = tokens
        self._known: list[int] = []

    def first(self, n: int) -> list[int]:
        """Return the first ``n`` tokens, or all that there are."""
        self._known += islice(self._tokens, max(0, n - len(self._known)))
        return self._known[:n]


@functools.lru_cache(maxsize=KNOWN)
def _answer(prompt: tuple[int, ...], sampling: bytes) -> Answer:
    params = msgspec.msgpack.decode(sampling, type=SamplingParams)
    return Answer(toy_tokens(N_LAYERS, prompt, params))


def answer_to(prompt: Sequence[int], sampling: SamplingParams) -> Answer:
    """Return the whole toy model's answer; asked twice, it is computed once."""
    return _answer(tuple(prompt), msgspec.msgpack.encode(sampling))


class Oracle:
    """Guesses the true answer, each token wrong with a probability of ``wrong``.

    It takes the answer for that to what it was told first: the prompt.  ``complain`` is told when
    it hears something else.
    """

    def __init__(
        self,
        name: str,
        sampling: SamplingParams,
        wrong: float,
        rng: random.Random,
        complain: Callable[[str], None],
    ) -> None:
        self.name = name
        self.closed = 0
        self.asked = 0
        self._sampling = sampling
        self._wrong = wrong
        self._rng = rng
        self._complain = complain
        self._told: list[int] = []
        self._prompt = 0
        self._answer: Answer | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens; they are those of the whole model."""
        if self._answer is None:
            self._prompt = len(tokens)
            self._answer = answer_to(tokens, self._sampling)
        self._told += tokens
        got = self._told[self._prompt :]
        if got != self._answer.first(len(got)):
            self._complain(f"drafter {self.name} was told a token that is not of the answer")

    def guess(self, ahead: Sequence[int], limit: int) -> Draft:
        """Return what comes, or something else."""
        self.asked += 1
        assert self._answer is not None, "it has been told the prompt"
        at = len(self._told) - self._prompt + len(ahead)
        tokens = tuple(
            self._rng.randrange(N_VOCAB) if self._rng.random() < self._wrong else token
            for token in self._answer.first(at + limit)[at:]
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
        assert self._answer is not None, "it has been told the prompt"
        at = len(self._told) - self._prompt + len(ahead)
        answer = self._answer.first(at + limit + 1)
        if at + limit >= len(answer):
            return self.guess(ahead, limit)
        return random_tree(
            self._rng,
            limit,
            lambda path: answer[at + len(path)],
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
        await trio.sleep(READ_SECONDS)
        self.read = True

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess after a while."""
        if not self.read:
            self._complain(f"drafter {self.name} was asked before it had read the prompt")
        return await super().propose(ahead, limit)


class Illiterate(QuickOracle):
    """Fails over the prompt."""

    async def prepare(self) -> None:
        """Fail."""
        await trio.sleep(READ_SECONDS)
        raise Unavailable("What does it say?", code="drafter_gone")


class Stalling(Oracle):
    """Answers twice and then never again."""

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Hang."""
        if self.asked >= 2:
            await trio.sleep_forever()
        return self.guess(ahead, limit)


class Late(Oracle):
    """Answers, now and then, when nobody waits for it any more."""

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess at once, or much too late."""
        draft = self.guess(ahead, limit)
        if self._rng.random() < 0.2:
            await trio.sleep(LATE_SECONDS)
        return draft


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
        return 7  # type: ignore[return-value]  # the bug that it plays


KINDS: Final[dict[str, type[Oracle]]] = {
    "quick": QuickOracle,
    "slow": SlowOracle,
    "prompt": Oracle,
    "reading": Reading,
    "illiterate": Illiterate,
    "stalling": Stalling,
    "late": Late,
    "dying": Dying,
    "buggy": Buggy,
    "lying": Lying,
    "nonsense": Nonsense,
    "growing": Growing,
    "quick growing": QuickGrowing,
    "weeds": Weeds,
}


class OracleFactory:
    """Makes drafters of one kind, and keeps them; ``wrong`` says how often the next one errs."""

    def __init__(
        self,
        name: str,
        wrong: Callable[[], float],
        rng: random.Random,
        complain: Callable[[str], None],
    ) -> None:
        self.name = name
        self.made: list[Oracle] = []
        self._wrong = wrong
        self._rng = rng
        self._complain = complain

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> Drafter:
        """Return a drafter that knows the answer."""
        rng = random.Random(self._rng.random())  # noqa: S311 - must repeat itself
        drafter = KINDS[self.name](self.name, sampling, self._wrong(), rng, self._complain)
        self.made.append(drafter)
        return drafter
