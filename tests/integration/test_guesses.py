"""Steps with guesses in llama.cpp: right, wrong and partly right ones leave every bit as it was.

Log-probabilities are compared as well as tokens: they are computed from all logits in doubles, so
that one flipped bit anywhere shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    MAX_DRAFTS,
    FreeSequence,
    OpenSequence,
    StepInput,
    TrimSequence,
)
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.sampling import Sampled, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.model]

N_LAYERS = 30
CUT = 14
N_SEQ = 2


class Chain:
    """Two ranks, each of whose sequences is trimmed as a pipeline trims it."""

    def __init__(self, backends: Sequence[LlamaBackend], table: EmbeddingTable) -> None:
        self.front, self.tail = backends
        self.table = table
        self.ends = [0] * N_SEQ

    def open(self, seq: int, sampling: SamplingParams) -> None:
        self.front.apply(OpenSequence(seq))
        self.tail.apply(OpenSequence(seq, sampling))
        self.ends[seq] = 0

    def free(self, seq: int) -> None:
        for backend in (self.front, self.tail):
            backend.apply(FreeSequence(seq))

    def step(
        self, seq: int, position: int, tokens: Sequence[int], drafts: int = 0
    ) -> list[Sampled]:
        ids = np.array(tokens, np.int32)
        if position < self.ends[seq]:
            self.front.apply(TrimSequence(seq, position))
        rows = self.table.rows(ids)
        (middle,) = self.front.decode([StepInput(seq, position, ids, rows, False, drafts)])
        self.ends[seq] = position + len(tokens)
        (output,) = self.tail.decode(
            [StepInput(seq, position, ids, middle.activations, True, drafts)]
        )
        return list(output.sampled)


@pytest.fixture(scope="module")
def chain(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("slices")
    with ExitStack() as stack:
        backends = []
        for part in (Slice(0, CUT, False), Slice(CUT, N_LAYERS, True)):
            path = folder / f"{part}.gguf"
            write_slice(bundled_model, part, path)
            backend = LlamaBackend(path, part, n_ctx=640, n_seq=N_SEQ, threads=1)
            backends.append(stack.enter_context(closing(backend)))
        yield Chain(backends, stack.enter_context(EmbeddingTable(bundled_model)))


def prompt(length: int) -> list[int]:
    rng = np.random.default_rng(length)
    tokens: list[int] = rng.integers(100, 40_000, length).tolist()
    return tokens


def plain(chain: Chain, tokens: list[int], sampling: SamplingParams, n: int) -> list[Sampled]:
    """Return what single steps sample, in sequence 0."""
    chain.open(0, sampling)
    got = chain.step(0, 0, tokens)
    while len(got) < n:
        got += chain.step(0, len(tokens) + len(got) - 1, [got[-1].token])
    chain.free(0)
    return got


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("length", "most"), [(40, 7), (235, 9), (494, MAX_DRAFTS)])
def test_guesses_change_no_bit(chain: Chain, temperature: float, length: int, most: int) -> None:
    """Over the borders at 256 cells and at a prefill chunk too."""
    rng = random.Random(length)
    sampling = SamplingParams(
        seed=length,
        temperature=temperature,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        logprobs=True,
        top_logprobs=5,
    )
    tokens, n = prompt(length), 28
    expected = plain(chain, tokens, sampling, n + most)
    answer = [sampled.token for sampled in expected]
    chain.open(1, sampling)
    got = chain.step(1, 0, tokens)
    accepted = 0
    while len(got) < n:
        count = rng.randrange(most + 1)
        right = answer[len(got) : len(got) + rng.randrange(count + 1)]
        drafts = (right + [rng.randrange(49_152) for _ in range(count)])[:count]
        sampled = chain.step(1, len(tokens) + len(got) - 1, [got[-1].token, *drafts], len(drafts))
        accepted += len(sampled) - 1
        got += sampled
    chain.free(1)
    assert got == expected[: len(got)]
    assert accepted > 0


def test_steps_that_cannot_have_guesses_are_refused(chain: Chain) -> None:
    rows = np.zeros((40, chain.tail.info.n_embd), np.float32)
    ids = np.ones(40, np.int32)
    chain.open(0, SamplingParams())

    def refused(position: int, n: int, drafts: int) -> None:
        with pytest.raises(InvalidRequest, match="guesses") as caught:
            chain.tail.decode([StepInput(0, position, ids[:n], rows[:n], True, drafts)])
        assert caught.value.code == "bad_step"

    refused(0, 3, 2)
    chain.tail.decode([StepInput(0, 0, ids[:1], rows[:1], False)])
    refused(1, 3, 3)
    refused(1, 3, -1)
    refused(1, 40, MAX_DRAFTS + 1)
    chain.free(0)
