"""Guesses by suffix on the bundled model, over three real runners: the tokens of plain decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from pyagent_node.inference.drafting.suffix import SuffixDrafters
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationRequest,
    SpeculationUsage,
)
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.pipeline.engine import PipelineEngine
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.sampling import SamplingParams

from .real_pipeline import NAME, open_real_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

RECORDS = json.dumps(
    [{"name": f"river {n}", "length": 37 * n % 900, "sea": "north"} for n in range(8)], indent=1
)
"""Something that a small model goes on with as it is."""
N = 30


async def ask(
    engine: PipelineEngine,
    seed: int,
    name: str = "none",
    length: int | None = None,
    depth: int | None = None,
) -> tuple[list[object], SpeculationUsage | None]:
    """Ask for more of the records."""
    request = GenerationRequest(
        NAME,
        prompt=RECORDS[: 500 + 7 * seed],
        max_tokens=N,
        ignore_eos=True,
        sampling=SamplingParams(
            seed=seed,
            temperature=0.8 * (seed % 2),
            frequency_penalty=0.02,
            logprobs=True,
            top_logprobs=3,
        ),
        speculation=name,
        draft_length=length,
        draft_depth=depth,
    )
    tokens: list[object] = []
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Generated):
                tokens.append((event.token, event.logprob, event.top))
            else:
                assert isinstance(event, Finished)
                usage = event.usage.speculation
    return tokens, usage


async def test_tokens_and_log_probabilities_are_those_of_plain_decoding(
    bundled_model: Path, tmp_path: Path
) -> None:
    store = ModelStore(tmp_path)
    digest = store.add_file(bundled_model, about=About(NAME)).digest
    async with open_real_pipeline(
        store,
        digest,
        (3, 20),
        n_ctx=512,
        n_seq=8,
        speculators=Speculators([SuffixDrafters()]),
    ) as pipeline:
        engine = pipeline.head.engine
        plain = {seed: (await ask(engine, seed))[0] for seed in range(6)}
        saved = 0
        for seed, (length, depth) in enumerate([(7, 1), (31, 1), (3, 4), (None, None)]):
            tokens, usage = await ask(engine, seed, "suffix", length, depth)
            assert tokens == plain[seed]
            assert usage is not None
            saved += usage.accepted
        assert saved > N // 2
        together: dict[int, list[object]] = {}

        async def one(seed: int) -> None:
            together[seed] = (await ask(engine, seed, "auto", 2 + seed, 1 + seed % 3))[0]

        async with trio.open_nursery() as nursery:
            for seed in plain:
                nursery.start_soon(one, seed)
        assert together == plain
