"""Guesses of several sessions in one call of llama.cpp: nobody's company changes a bit.

Log-probabilities are compared as well as tokens, see ``test_guesses``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

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
from pyagent_node.inference.stepping.batching import Shape
from pyagent_node.inference.stepping.shapes import ShapeBook

pytestmark = [pytest.mark.slow, pytest.mark.model]

N_LAYERS = 30
SESSIONS = 8
TOKENS = 10


class Answer:
    """One session: its sampling, prompt and what single steps answer it."""

    def __init__(self, index: int) -> None:
        rng = np.random.default_rng(index)
        # some begin below llama.cpp's border at 256 cells and cross it
        self.prompt: list[int] = rng.integers(100, 40_000, (30, 250, 44, 61)[index % 4]).tolist()
        self.sampling = SamplingParams(
            seed=index,
            temperature=0.8 * (index % 2),
            repetition_penalty=1.1,
            logprobs=True,
            top_logprobs=3,
        )
        self.expected: list[Sampled] = []
        self.got: list[Sampled] = []


@pytest.fixture(scope="module")
def whole(bundled_model: Path) -> Iterator[LlamaBackend]:
    part = Slice(0, N_LAYERS, head=True)
    with closing(LlamaBackend(bundled_model, part, n_ctx=640, n_seq=SESSIONS, threads=1)) as it:
        yield it


@pytest.fixture(scope="module")
def answers(whole: LlamaBackend) -> list[Answer]:
    """What each session is answered token by token, alone in sequence 0."""
    made = [Answer(index) for index in range(SESSIONS)]
    for answer in made:
        whole.apply(OpenSequence(0, answer.sampling))
        tokens, position = answer.prompt, 0
        while len(answer.expected) < TOKENS + 6:
            answer.expected += decode(whole, [step(0, position, tokens, 0)])[0]
            position += len(tokens)
            tokens = [answer.expected[-1].token]
        whole.apply(FreeSequence(0))
    return made


def step(seq: int, position: int, tokens: Sequence[int], drafts: int) -> StepInput:
    return StepInput(seq, position, np.array(tokens, np.int32), None, True, drafts)


def decode(backend: LlamaBackend, steps: Sequence[StepInput]) -> list[list[Sampled]]:
    return [list(output.sampled) for output in backend.decode(steps)]


def test_the_bundled_model_passes_in_every_shape_that_matters(whole: LlamaBackend) -> None:
    """A shape is tried when rows for it come up, and then it is known."""
    assert {(2, 4), (4, 4), (8, 4)} <= set(whole.info.joint_shapes)
    rng = np.random.default_rng(8)
    prompts = rng.integers(100, 40_000, (SESSIONS, 12)).tolist()
    tried: list[tuple[tuple[int, int], bool]] = []
    note = ShapeBook.note

    def spy(book: ShapeBook, shape: Shape, cells: int, *, passed: bool) -> None:
        tried.append((shape, passed))
        note(book, shape, cells, passed=passed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShapeBook, "note", spy)
        got = []
        for n in (4, 4, 2):
            for seq, prompt in enumerate(prompts):
                whole.apply(OpenSequence(seq, SamplingParams(seed=seq, temperature=0)))
                decode(whole, [step(seq, 0, prompt, 0)])
            got.append(decode(whole, [step(s, 12, p[:n], n - 1) for s, p in enumerate(prompts)]))
            for seq in range(SESSIONS):
                whole.apply(FreeSequence(seq))
    assert tried == [((8, 4), True), ((8, 2), True)]
    assert got[0] == got[1]
    assert [each[0] for each in got[0]] == [each[0] for each in got[2]]


@pytest.mark.parametrize("most", [5, MAX_DRAFTS])
def test_eight_sessions_that_guess_together_get_what_each_gets_alone(
    whole: LlamaBackend, answers: list[Answer], most: int
) -> None:
    """Right, wrong and partly right guesses, of all lengths, in changing company."""
    rng = random.Random(most)
    for seq, answer in enumerate(answers):
        whole.apply(OpenSequence(seq, answer.sampling))
        answer.got = decode(whole, [step(seq, 0, answer.prompt, 0)])[0]
    while left := [seq for seq, answer in enumerate(answers) if len(answer.got) < TOKENS]:
        steps = []
        for seq in rng.sample(left, rng.randint((len(left) + 1) // 2, len(left))):
            answer = answers[seq]
            at, count = len(answer.got), rng.randrange(most + 1)
            right = [s.token for s in answer.expected[at : at + rng.randrange(count + 1)]]
            drafts = (right + [rng.randrange(49_152) for _ in range(count)])[:count]
            tokens = [answer.got[-1].token, *drafts]
            steps.append(step(seq, len(answer.prompt) + at - 1, tokens, len(drafts)))
        for done, sampled in zip(steps, decode(whole, steps), strict=True):
            answers[done.seq].got += sampled
    for seq, answer in enumerate(answers):
        whole.apply(FreeSequence(seq))
        n = min(len(answer.got), len(answer.expected))
        assert answer.got[:n] == answer.expected[:n]


def test_a_slice_gives_the_same_rows_in_company(
    bundled_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ranks before the last compute all guesses, and pass activations on."""
    part = Slice(0, 6, head=False)
    path = tmp_path_factory.mktemp("slices") / "front.gguf"
    write_slice(bundled_model, part, path)
    rng = np.random.default_rng(5)
    with ExitStack() as stack:
        front = stack.enter_context(
            closing(LlamaBackend(path, part, n_ctx=600, n_seq=SESSIONS, threads=1))
        )
        table = stack.enter_context(EmbeddingTable(bundled_model))
        steps = []
        for seq, n in enumerate((5, 8, 1, 32, 4, 4, 7, 12)):
            before = rng.integers(100, 40_000, 240 + 5 * seq).astype(np.int32)
            front.apply(OpenSequence(seq))
            front.decode([StepInput(seq, 0, before, table.rows(before), False)])
            tokens = rng.integers(100, 40_000, n).astype(np.int32)
            steps.append(
                StepInput(seq, len(before), tokens, table.rows(tokens), False, max(0, n - 1))
            )
        together = [output.activations for output in front.decode(steps)]
        for each, rows in zip(steps, together, strict=True):
            assert rows is not None
            front.apply(TrimSequence(each.seq, each.position))
            for index in range(len(each.tokens)):
                one = each.tokens[index : index + 1]
                alone = StepInput(each.seq, each.position + index, one, table.rows(one), False)
                (output,) = front.decode([alone])
                assert output.activations is not None
                assert np.array_equal(output.activations[0], rows[index])
