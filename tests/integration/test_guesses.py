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

from pyagent_node.base.errors import InvalidRequest, LimitExceeded
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
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
from pyagent_node.inference.trees import follow, principal
from pyagent_node.simulations.guesses import random_tree

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
        self.tail_ends = [0] * N_SEQ

    def open(self, seq: int, sampling: SamplingParams) -> None:
        self.front.apply(OpenSequence(seq))
        self.tail.apply(OpenSequence(seq, sampling))
        self.ends[seq] = self.tail_ends[seq] = 0

    def free(self, seq: int) -> None:
        for backend in (self.front, self.tail):
            backend.apply(FreeSequence(seq))

    def step(
        self,
        seq: int,
        position: int,
        tokens: Sequence[int],
        drafts: int = 0,
        parents: tuple[int, ...] = (),
    ) -> list[Sampled]:
        ids = np.array(tokens, np.int32)
        if position < self.ends[seq]:
            self.front.apply(TrimSequence(seq, position))
        rows = self.table.rows(ids)
        if position < self.tail_ends[seq]:
            self.tail.apply(TrimSequence(seq, position))
        (middle,) = self.front.decode([StepInput(seq, position, ids, rows, False, drafts, parents)])
        known = len(tokens) - drafts
        self.ends[seq] = position + known + principal(parents, known, drafts)
        (output,) = self.tail.decode(
            [StepInput(seq, position, ids, middle.activations, True, drafts, parents)]
        )
        self.tail_ends[seq] = position + known + len(output.sampled) - 1
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


@pytest.mark.parametrize(
    ("length", "most", "temperature"), [(40, 7, 0.0), (245, 12, 0.8), (500, MAX_DRAFTS, 0.8)]
)
def test_trees_change_no_bit(chain: Chain, temperature: float, length: int, most: int) -> None:
    """Over the borders at 256 cells and at a prefill chunk too."""
    rng = random.Random(length)
    sampling = SamplingParams(
        seed=length,
        temperature=temperature,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        logprobs=True,
        top_logprobs=5,
    )
    tokens, n = prompt(length), 20
    expected = plain(chain, tokens, sampling, n + most)
    answer = [sampled.token for sampled in expected]
    chain.open(1, sampling)
    got = chain.step(1, 0, tokens)
    accepted = elsewhere = carried = 0

    def following(path: Sequence[int]) -> int:
        return answer[min(len(got) + len(path), len(answer) - 1)]

    while len(got) < n:
        draft = random_tree(
            rng,
            rng.randrange(most + 1),
            following,
            right=0.7,
            n_vocab=49_152,
        )
        known = [sampled.token for sampled in got[-1 - carried :]]
        parents = tuple(len(known) + parent for parent in draft.parents)
        position = len(tokens) + len(got) - len(known)
        drafts = len(draft.tokens)
        sampled = chain.step(1, position, [*known, *draft.tokens], drafts, parents)
        right = [one.token for one in sampled[:-1]]
        path = follow(parents, (*known, *draft.tokens), drafts, right)
        assert len(path) == len(right)
        straight = sum(place == guess for place, guess in enumerate(path))
        carried = len(right) - straight
        accepted += straight
        elsewhere += carried
        got += sampled
        if carried >= MAX_DECODE_ROWS:
            return_to = len(tokens) + len(got) - 1 - carried
            part = [one.token for one in got[-1 - carried :][:MAX_DECODE_ROWS]]
            chain.step(1, return_to, part)
            carried -= MAX_DECODE_ROWS
    chain.free(1)
    assert got == expected[: len(got)]
    assert accepted + elsewhere > 0


def test_a_step_whose_guesses_form_no_tree_is_refused_and_leaves_all_as_it_was(
    chain: Chain,
) -> None:
    tokens, sampling = prompt(12), SamplingParams(temperature=0.0, logprobs=True)
    expected = plain(chain, tokens, sampling, 3)
    chain.open(1, sampling)
    chain.step(1, 0, tokens)
    first = expected[0].token
    for parents, code in (((0, 0), "bad_tree"), ((1, 0), "bad_tree"), ((0,), "bad_tree")):
        with pytest.raises(InvalidRequest) as caught:
            chain.step(1, 12, [first, 5, 5], 2, parents)
        assert caught.value.code == code
    with pytest.raises(InvalidRequest) as caught:
        chain.step(1, 12, [first] * 9 + [5, 6], 2, (8, 8))
    assert caught.value.code == "bad_step"
    assert chain.step(1, 12, [first, 5, expected[1].token], 2, (0, 0)) == expected[1:]
    chain.free(1)


def test_a_wide_tree_needs_room_for_its_longest_path_only(chain: Chain) -> None:
    chain.open(1, SamplingParams(temperature=0.0))
    chain.step(1, 0, prompt(chain.tail.info.n_ctx - 3))
    position, wide = chain.tail.info.n_ctx - 3, range(100, 100 + MAX_DRAFTS - 2)
    with pytest.raises(LimitExceeded):
        chain.step(1, position, [7, 1, 2, 3, *wide[1:]], MAX_DRAFTS, (0, 1, 2, *[0] * 28))
    assert chain.step(1, position, [7, 1, 2, *wide], MAX_DRAFTS, (0, 1, *[0] * 29))
    chain.free(1)


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
