"""The promise of KV blocks, on the real model: not a bit of an answer changes by reusing them.

The shelves of these tests refuse to keep two blocks of one name with different bits, so every
request also checks that its blocks are those of the requests before it.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from pyagent_node.base.types import Digest, SessionId
from pyagent_node.inference.generation import Generated, GenerationEvent, GenerationRequest, Usage
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.pipeline.journal import Outcome, SessionJournal
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.sharding.kv_keys import reusable
from pyagent_node.simulations.shelf import ToyShelves

from .real_pipeline import NAME, RealPipeline, open_real_pipeline
from .whole_model import WholeModel

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

N_CTX = 1152
LENGTHS = {(): (65, 128, 513), (11,): (64, 127, 500, 512, 576, 1000)}
"""Of the prompts to ask with, by the boundaries of the ranks."""
TEXT = "The ship's log of the third voyage. " + " ".join(
    f"Day {day}: wind force {day % 7}, {day * 13 % 90} miles made good, {day % 5} fish caught."
    for day in range(1, 60)
)
SAMPLING = (
    SamplingParams(temperature=0.0, logprobs=True, top_logprobs=4),
    SamplingParams(temperature=0.8, seed=7, logprobs=True, top_logprobs=4),
)


class Journal:
    """Keeps the journal of the last session."""

    def __init__(self) -> None:
        self.last: SessionJournal | None = None

    def begin(self, journal: SessionJournal) -> None:
        """Note a session."""
        self.last = journal

    def append(self, session: SessionId, start: int, tokens: Sequence[Sampled]) -> None:
        """Note its tokens."""
        assert self.last is not None
        self.last = msgspec.structs.replace(self.last, tokens=(*self.last.tokens, *tokens))

    def end(self, session: SessionId, outcome: Outcome) -> None:
        """Take no notice."""


@pytest.fixture(scope="module")
def text(bundled_model: Path) -> Iterator[tuple[int, ...]]:
    """Return the tokens of a long text."""
    whole = WholeModel(str(bundled_model), N_CTX)
    yield tuple(whole.tokenize(TEXT))
    whole.close()


@pytest.fixture(scope="module")
def stored(
    bundled_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelStore, Digest]:
    """Return a store with the model in it."""
    store = ModelStore(tmp_path_factory.mktemp("models"))
    return store, store.add_file(bundled_model, about=About(NAME)).digest


@asynccontextmanager
async def shelved(
    stored: tuple[ModelStore, Digest], boundaries: Sequence[int], shelves: ToyShelves
) -> AsyncIterator[tuple[RealPipeline, Journal]]:
    """Run the model cut at ``boundaries`` over ``shelves``."""
    journal = Journal()
    async with open_real_pipeline(
        *stored, boundaries, n_ctx=N_CTX, n_seq=2, shelves=shelves, journal=journal
    ) as pipeline:
        yield pipeline, journal


async def said(events: AsyncIterator[GenerationEvent]) -> tuple[list[Generated], Usage]:
    """Return an answer without its times."""
    tokens: list[Generated] = []
    async for event in events:
        if not isinstance(event, Generated):
            return tokens, event.usage
        tokens.append(msgspec.structs.replace(event, step_seconds=0.0, compute_seconds=0.0))
    raise AssertionError("an answer ends")


async def asked(
    pipeline: RealPipeline, prompt: Sequence[int], n: int, sampling: SamplingParams, *, cache: bool
) -> tuple[list[Generated], Usage]:
    """Ask for ``n`` tokens, and give the ranks time to put their blocks away."""
    request = GenerationRequest(
        NAME,
        tokens=tuple(prompt),
        max_tokens=n,
        ignore_eos=True,
        sampling=sampling,
        prompt_cache=cache,
    )
    async with pipeline.head.engine.generate(request) as events:
        answer = await said(events)
    while any(s for p in pipeline.ranks for s in p.stages.sessions()):
        await trio.lowlevel.checkpoint()
    return answer


@pytest.mark.parametrize("boundaries", LENGTHS)
async def test_prompts_that_begin_alike_get_the_bits_of_prompts_that_are_computed(
    boundaries: tuple[int, ...], stored: tuple[ModelStore, Digest], text: tuple[int, ...]
) -> None:
    shelves = ToyShelves(random.Random(0))
    async with shelved(stored, boundaries, shelves) as (pipeline, _):
        cut = max(runner.info.prefill_cut for runner in pipeline.runners)
        for turn, length in enumerate(sorted(LENGTHS[boundaries], reverse=True)):
            prompt, sampling = text[:length], SAMPLING[turn % 2]
            plain, usage = await asked(pipeline, prompt, 6, sampling, cache=False)
            assert usage.cached_tokens == 0
            again, usage = await asked(pipeline, prompt, 6, sampling, cache=True)
            held = 0 if turn == 0 else length // 64
            count = reusable(
                prompt_tokens=length, journal_tokens=length, blocks=held, prefill_cut=cut
            )
            assert usage.cached_tokens == 64 * count
            assert again == plain


async def test_a_session_goes_on_from_blocks_of_its_answer_on_other_slices(
    stored: tuple[ModelStore, Digest], text: tuple[int, ...]
) -> None:
    shelves = ToyShelves(random.Random(0))
    prompt = text[:200]
    for sampling in SAMPLING:
        async with shelved(stored, (11,), shelves) as (pipeline, journals):
            plain, _ = await asked(pipeline, prompt, 150, sampling, cache=True)
            journal = journals.last
            assert journal is not None
        cut = msgspec.structs.replace(journal, tokens=journal.tokens[:100])
        async with (
            shelved(stored, (7, 20), shelves) as (pipeline, _),
            pipeline.head.engine.resume(cut, 0) as events,
        ):
            again, usage = await said(events)
        assert again == plain
        assert usage.recomputed_tokens <= 300 % 64


@pytest.mark.parametrize("seed", [1, 2])
async def test_any_slices_at_any_moments_give_the_same_answer(
    seed: int, stored: tuple[ModelStore, Digest], text: tuple[int, ...]
) -> None:
    rng = random.Random(seed)
    shelves, prompt = ToyShelves(rng), text[: rng.randrange(65, 500)]
    sampling, done, n = SAMPLING[seed % 2], 0, 120
    journal: SessionJournal | None = None
    plain: list[Generated] = []
    for _ in range(4):
        boundaries = sorted(rng.sample(range(1, 29), rng.randrange(3)))
        async with shelved(stored, boundaries, shelves) as (pipeline, journals):
            if journal is None:
                plain, _ = await asked(pipeline, prompt, n, sampling, cache=False)
                again, _ = await asked(pipeline, prompt, n, sampling, cache=True)
            else:
                cut = msgspec.structs.replace(journal, tokens=journal.tokens[:done])
                async with pipeline.head.engine.resume(cut, 0) as events:
                    again, usage = await said(events)
                # the block that the prompt ends in depends on its end, and so does the one before
                assert usage.recomputed_tokens < 128, boundaries
            assert again == plain, boundaries
            journal = journals.last
        assert journal is not None
        done = min(n - 1, done + rng.randrange(1, 40))
