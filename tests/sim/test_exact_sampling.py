"""Answers that are guessed ahead follow the target's exact distribution: a chi-squared test.

What is known exactly is the distribution of each token given those before it.  Where a token has
the probability p, and those likelier than it have q together, a number drawn evenly between q and
q + p is spread evenly between 0 and 1 over all tokens of all answers, whatever came before them
(the probability integral transform for discrete variables, Smith 1985), if and only if they are
sampled right.  The drafter guesses by another distribution and noise of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from trio.testing import MockClock

from pyagent_node.inference.backend import StepInput, StepOutput
from pyagent_node.inference.drafting.port import Draft, Drafter
from pyagent_node.inference.generation import Finished, GenerationRequest
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.simulations import backend
from pyagent_node.simulations.backend import END_TOKEN, N_EMBD, N_VOCAB, ToyRunner, toy_sample
from pyagent_node.simulations.guesses import random_tree
from pyagent_node.simulations.pipeline import NAME, open_pipeline_world

from ..unit.native.reference import chi_squared_bound, distribution
from .failover import stream, tokens_of

LAYERS = 2
TOKENS = 420
"""Of an answer."""
BINS = 50
NO_END = {END_TOKEN: -99.0}
SHAPES = (
    SamplingParams(temperature=0.2, logit_bias=NO_END),
    SamplingParams(
        temperature=0.3,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        frequency_penalty=0.05,
        presence_penalty=0.1,
        logit_bias=NO_END,
    ),
)
WAYS = ((1, 1, False), (4, 1, False), (2, 3, False), (5, 1, True))
"""Guesses a step, steps in flight, and whether the guesses form a tree."""
Logits = NDArray[np.float32]


class Whole:
    """The whole toy after some tokens."""

    def __init__(self) -> None:
        self.states = [np.zeros(N_EMBD, dtype=np.int64) for _ in range(LAYERS)]
        self.position = 0
        self.logits = np.zeros(N_VOCAB, np.float32)

    def after(self, tokens: Sequence[int]) -> Whole:
        """Return it after some tokens more."""
        then = Whole()
        then.states, then.position, then.logits = self.states[:], self.position, self.logits
        then.read(tokens)
        return then

    def read(self, tokens: Sequence[int]) -> None:
        """Take in tokens."""
        row = np.zeros(N_EMBD, dtype=np.int64)
        for token in tokens:
            row = backend._embed(token)
            for layer, state in enumerate(self.states):
                row, self.states[layer] = backend._layer(layer, self.position, state, row, 0)
            self.position += 1
        if len(tokens):
            self.logits = backend._logits(row)


class Other:
    """Guesses what the model would say colder or much hotter, with noise of its own."""

    def __init__(self, name: str, sampling: SamplingParams, seed: int) -> None:
        self.name = name
        self._sampling = sampling
        self._rng = random.Random(seed)
        self._whole = Whole()

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens."""
        self._whole.read(tokens)

    def _next(self, path: Sequence[int]) -> int:
        seed = self._rng.randrange(1 << 32)
        hot = self._rng.choice((0.0, 1.0))
        other = SamplingParams(seed=seed, temperature=hot, logit_bias=NO_END)
        return toy_sample(self._whole.after(path).logits, path, other).token

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess a chain."""
        tokens: list[int] = []
        for _ in range(limit):
            tokens.append(self._next([*ahead, *tokens]))
        return Draft(tuple(tokens), (0.5,) * limit, self.name)

    def look_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess a tree."""
        return random_tree(
            self._rng,
            limit,
            lambda path: self._next([*ahead, *path]),
            right=1.0,
            n_vocab=N_VOCAB,
        )

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess a chain."""
        return self.look(ahead, limit, floor=floor)

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess a tree."""
        return self.look_tree(ahead, limit, floor=floor)

    async def aclose(self) -> None:
        """Do nothing."""


class Others:
    """Makes them."""

    name = "other"

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> Drafter:
        """Return one."""
        return Other(self.name, sampling, sampling.seed)


def spread(
    prompt: Sequence[int], answer: Sequence[int], sampling: SamplingParams, rng: random.Random
) -> Iterator[float]:
    """Yield a number for each token of an answer, spread evenly if it was sampled right.

    It is 1 for a token that cannot be.
    """
    bias = sorted(sampling.logit_bias.items())
    shape = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "bias_tokens": np.array([token for token, _ in bias], np.int32),
        "bias_values": np.array([value for _, value in bias], np.float32),
    }
    whole = Whole()
    whole.read(prompt)
    history = [*prompt]
    for token in answer:
        exact = distribution(whole.logits, np.array(history, np.int32), **shape)
        before = 0.0
        for likelier, chance in exact.items():
            if likelier == token:
                break
            before += chance
        yield before + rng.random() * exact.get(token, 0.0)
        whole.read([token])
        history.append(token)


async def collect(each: int) -> tuple[list[float], float]:
    """Return those numbers for answers guessed in all ways, and the share of right guesses."""
    rng = random.Random(5)
    numbers: list[float] = []
    drafted = accepted = 0
    speculators = Speculators([Others()], clock=lambda: 0.0)
    async with open_pipeline_world(2, speculators=speculators) as world:
        world.place((1,), (0, 1), n_layers=LAYERS)
        for sampling in SHAPES:
            for length, depth, tree in WAYS:
                for _ in range(each):
                    prompt = tuple(rng.randrange(128) for _ in range(8))
                    shaped = msgspec.structs.replace(sampling, seed=rng.randrange(1 << 32))
                    ask = GenerationRequest(
                        NAME,
                        tokens=prompt,
                        max_tokens=TOKENS,
                        sampling=shaped,
                        speculation="other",
                        draft_length=length,
                        draft_depth=depth,
                        draft_tree=tree,
                    )
                    events = await stream(world, ask)
                    numbers += spread(prompt, tokens_of(events), shaped, rng)
                    last = events[-1]
                    assert isinstance(last, Finished)
                    assert last.usage.speculation is not None
                    drafted += last.usage.speculation.drafted
                    accepted += last.usage.speculation.accepted
    return numbers, accepted / drafted


def chi_squared(numbers: Sequence[float]) -> float:
    """Return how uneven numbers between 0 and 1 are."""
    counts, _ = np.histogram(numbers, bins=BINS, range=(0, 1))
    expected = len(numbers) / BINS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_guessed_answers_follow_the_exact_distribution(autojump_clock: MockClock) -> None:
    # Right sampling fails with one choice of seeds in a million; they are fixed: it never flakes.
    numbers, right = await collect(3)
    assert len(numbers) >= 10_000
    assert max(numbers) < 1.0
    assert 0.02 < right < 0.5  # guesses of another distribution: some right, most wrong
    assert chi_squared(numbers) < chi_squared_bound(BINS - 1)


@contextmanager
def lenient() -> Iterator[None]:
    """Let the last rank accept one guess in five without looking."""
    rng = random.Random(1)
    now: list[StepInput] = []
    chain, sample = ToyRunner._chain, backend.toy_sample

    def remember(self: ToyRunner, step: StepInput) -> StepOutput:
        now[:] = [step]
        return chain(self, step)

    def accept(logits: Logits, history: Sequence[int], params: SamplingParams) -> Sampled:
        step = now[0]
        at = len(history) - step.position
        if at < len(step.tokens) and rng.random() < 0.2:
            return Sampled(int(step.tokens[at]))
        return sample(logits, history, params)

    with (
        mock.patch.object(ToyRunner, "_chain", remember),
        mock.patch.object(backend, "toy_sample", accept),
    ):
        yield


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_rank_that_accepts_one_guess_in_five_unseen_shows(
    autojump_clock: MockClock,
) -> None:
    with lenient():
        numbers, _ = await collect(1)
    assert len(numbers) >= 3_000
    assert chi_squared(numbers) > chi_squared_bound(BINS - 1)
