"""The promise: the tokens of a seeded request do not depend on how the model is split, nor on who
else is served, and they are those of plain llama-cpp-python on the whole file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from pyagent_node.base.types import Digest
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.pipeline.engine import PipelineEngine
from pyagent_node.inference.sampling import SamplingParams

from .real_pipeline import NAME, open_real_pipeline
from .whole_model import WholeModel

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

N_CTX = 1024
N_SEQ = 8

LAYOUTS = {
    "1 rank": (),
    "2 ranks, even": (15,),
    "2 ranks, uneven": (4,),
    "3 ranks, even": (10, 20),
    "3 ranks, uneven": (3, 25),
    "5 ranks, even": (6, 12, 18, 24),
    "5 ranks, uneven": (1, 2, 20, 29),
}

TOPICS = (
    "Name three rivers.",
    "What is a prime number?",
    "Write a haiku about rain.",
    "Who was Ada Lovelace?",
    "How do I boil an egg?",
    "Explain gravity to a child.",
    "List the days of the week.",
    "def fibonacci(n):",
)
LONG = "The ship's log of the third voyage. " + " ".join(
    f"Day {day}: wind force {day % 7}, {day * 13 % 90} miles made good, {day % 5} fish caught."
    for day in range(1, 31)
)
"""More than one prefill chunk of 512 tokens."""


class Job(NamedTuple):
    """One request."""

    prompt: tuple[int, ...]
    n: int
    seed: int
    temperature: float


class Expected(NamedTuple):
    """What the whole model answers: jobs that run one after the other, and all at once."""

    alone: dict[Job, list[int]]
    together: dict[Job, list[int]]


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def expected(bundled_model: Path) -> Iterator[Expected]:
    """Return every job with the reference's answer."""
    whole = WholeModel(str(bundled_model), N_CTX)
    topics = [tuple(whole.tokenize(_chat(topic))) for topic in TOPICS]
    long = tuple(whole.tokenize(LONG))
    assert 512 < len(long) < 900
    alone = [Job(topics[0], 24, 0, 0.0), *(Job(topics[0], 24, seed, 0.8) for seed in (1, 7, 42))]
    alone += [Job(long, 8, 0, 0.0), Job(long, 8, 7, 0.8)]
    together = [Job(topic, 16, seed, 0.8 * (seed % 2)) for seed, topic in enumerate(topics)]
    yield Expected(*({j: _ask_reference(whole, j) for j in jobs} for jobs in (alone, together)))
    whole.close()


def _ask_reference(whole: WholeModel, job: Job) -> list[int]:
    return whole.generate(list(job.prompt), job.n, seed=job.seed, temperature=job.temperature)


@pytest.fixture(scope="module")
def stored(
    bundled_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelStore, Digest]:
    """Return a store with the model in it."""
    store = ModelStore(tmp_path_factory.mktemp("models"))
    return store, store.add_file(bundled_model, about=About(NAME)).digest


async def _ask(engine: PipelineEngine, job: Job) -> list[int]:
    request = GenerationRequest(
        NAME,
        tokens=job.prompt,
        max_tokens=job.n,
        ignore_eos=True,
        sampling=SamplingParams(seed=job.seed, temperature=job.temperature),
    )
    async with engine.generate(request) as events:
        return [event.token async for event in events if isinstance(event, Generated)]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_tokens_are_those_of_the_whole_model(
    layout: str, expected: Expected, stored: tuple[ModelStore, Digest]
) -> None:
    boundaries = LAYOUTS[layout]
    answers: dict[Job, list[int]] = {}
    async with open_real_pipeline(*stored, boundaries, n_ctx=N_CTX, n_seq=N_SEQ) as pipeline:
        engine = pipeline.head.engine
        for job in expected.alone:
            assert await _ask(engine, job) == expected.alone[job]

        async def ask(job: Job) -> None:
            answers[job] = await _ask(engine, job)

        async with trio.open_nursery() as nursery:
            for job in expected.together:
                nursery.start_soon(ask, job)
    assert answers == expected.together
