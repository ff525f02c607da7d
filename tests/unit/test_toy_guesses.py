"""Steps with guesses on the toy model: what is sampled is what single steps would have given."""

from __future__ import annotations

import random

import numpy as np
import pytest
from trio.testing import MockClock

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import OpenSequence, StepInput, TrimSequence
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import END_TOKEN, N_VOCAB, ToyRunner, toy_generate

LAYERS = 4
WHOLE = Slice(0, LAYERS, head=True)
PROMPT = (72, 101, 108, 108, 111)


def step(position: int, tokens: list[int], drafts: int = 0) -> StepInput:
    """Return a step of sequence 0 that samples."""
    return StepInput(0, position, np.array(tokens, np.int32), None, True, drafts)


def guesses(rng: random.Random, answer: list[int], at: int) -> list[int]:
    """Return guesses for what comes after ``at`` tokens of an answer: right up to some point."""
    n = rng.randrange(1, 9)
    right = answer[at : at + rng.randrange(n + 1)]
    return (right + [rng.randrange(N_VOCAB) for _ in range(n)])[:n]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_guesses_change_no_token(
    seed: int, temperature: float, autojump_clock: MockClock
) -> None:
    rng = random.Random(seed)
    params = SamplingParams(
        seed=seed,
        temperature=temperature,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        logit_bias={END_TOKEN: -100.0},
    )
    answer = toy_generate(LAYERS, PROMPT, 60, params)
    runner = ToyRunner(WHOLE, whole=True)
    await runner.apply([OpenSequence(0, params)])
    (output,) = await runner.decode([step(0, list(PROMPT))])
    got = [sampled.token for sampled in output.sampled]
    while len(got) < 50:
        drafts = guesses(rng, answer, len(got))
        position = len(PROMPT) + len(got) - 1
        (output,) = await runner.decode([step(position, [got[-1], *drafts], len(drafts))])
        assert 1 <= len(output.sampled) <= len(drafts) + 1
        got += [sampled.token for sampled in output.sampled]
    assert got == answer[: len(got)]


async def test_a_sequence_goes_on_from_where_it_was_trimmed_to(autojump_clock: MockClock) -> None:
    params = SamplingParams(temperature=0.0)
    answer = toy_generate(LAYERS, PROMPT, 5, params)
    runner = ToyRunner(WHOLE, whole=True)
    await runner.apply([OpenSequence(0, params)])
    await runner.decode([step(0, [*PROMPT, 1, 2, 3])])
    await runner.apply([TrimSequence(0, len(PROMPT))])
    (output,) = await runner.decode([step(len(PROMPT), answer[:4])])
    assert [sampled.token for sampled in output.sampled] == answer[4:]


@pytest.mark.parametrize(("position", "n", "drafts"), [(0, 3, 2), (5, 3, 3), (5, 3, -1)])
async def test_a_step_of_nothing_but_guesses_is_refused(
    position: int, n: int, drafts: int, autojump_clock: MockClock
) -> None:
    runner = ToyRunner(WHOLE, whole=True)
    await runner.apply([OpenSequence(0, SamplingParams())])
    if position:
        await runner.decode([step(0, list(PROMPT))])
    with pytest.raises(InvalidRequest):
        await runner.decode([step(position, [1] * n, drafts)])
