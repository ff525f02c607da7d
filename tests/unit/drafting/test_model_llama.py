"""The model drafter with llama.cpp: a model guesses what it says itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import OpenSequence, StepInput
from pyagent_node.inference.drafting.model import ModelDrafters
from pyagent_node.inference.runner import (
    RunnerSpec,
    SliceRunner,
    open_slice_runner,
    open_tokenizer_runner,
)
from pyagent_node.inference.sampling import SamplingParams

WARM = SamplingParams(seed=11, temperature=0.8, top_p=0.95, frequency_penalty=0.3)


async def say(runner: SliceRunner, prompt: list[int], n: int) -> list[int]:
    """Return ``n`` tokens of the model, one by one; drafters take the lowest sequences first."""
    await runner.apply([OpenSequence(1, WARM)])
    answer: list[int] = []
    new = prompt
    while len(answer) < n:
        position = len(prompt) + len(answer) - len(new)
        step = StepInput(1, position, np.array(new, np.int32), None, True)
        (output,) = await runner.decode([step])
        new = [output.sampled[0].token]
        answer += new
    return answer


@pytest.mark.slow
@pytest.mark.model
async def test_it_guesses_what_it_says_itself(bundled_model: Path) -> None:
    path = str(bundled_model)
    spec = RunnerSpec(path, Slice(0, 30, True), n_ctx=512, n_seq=2, threads=1)
    async with open_slice_runner(spec) as runner, open_tokenizer_runner(path) as tokenizer:
        pieces = await tokenizer.pieces()
        prompt = await tokenizer.tokenize("The first three rivers of Europe by length are")
        wanted = await say(runner, prompt, 24)
        drafter = ModelDrafters("itself", runner, pieces).for_model(pieces, WARM)
        drafter.extend(prompt)
        await drafter.prepare()
        draft = await drafter.propose([], 6)
        assert draft.tokens == tuple(wanted[:6])
        assert all(0 < confidence <= 1 for confidence in draft.confidence)
        drafter.extend(wanted[:2])
        assert (await drafter.propose([1, 2, 3], 3)).tokens
        drafter.extend(wanted[2:10])
        assert (await drafter.propose(wanted[10:14], 8)).tokens == tuple(wanted[14:22])
        await drafter.aclose()
