"""One node holds the whole model, others are the heads and guess: their steps share batches."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.inference.generation import GenerationEvent
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.deterministic import run_deterministic
from pyagent_node.simulations.pipeline import open_pipeline_world

from .drafters import oracles
from .failover import drained, expected, prompt, request, stream, tokens_of

STRONG = 3
CLIENTS = 8
SECONDS = 0.01
"""What a batch takes, whatever is in it."""


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_guesses_of_many_heads_share_batches_and_change_no_token(wrong: float, seed: int) -> None:
    """How many steps are together depends on whose turn it is first, which the seed draws."""
    run_deterministic(partial(_share_batches, wrong), seed)


async def _share_batches(wrong: float) -> None:
    speculators, _ = oracles(wrong)
    async with open_pipeline_world(STRONG + 1, latency=0.02, speculators=speculators) as world:
        world.place((), (STRONG,), seconds=SECONDS)
        asks = [
            msgspec.structs.replace(
                request(prompt(12, i), 40, sampling=SamplingParams(seed=i, temperature=0.7)),
                speculation="quick",
                draft_length=4,
                draft_depth=1,
            )
            for i in range(CLIENTS)
        ]
        answers: list[list[GenerationEvent]] = [[] for _ in asks]

        async def client(index: int) -> None:
            answers[index] = await stream(world, asks[index], node=index % STRONG)

        async with trio.open_nursery() as nursery:
            for index in range(CLIENTS):
                nursery.start_soon(client, index)
        for ask, events in zip(asks, answers, strict=True):
            assert tokens_of(events) == expected(ask)
        widths = world.runners[0].widths
        together = [batch for batch in widths if len(batch) > 1 and max(batch) > 1]
        assert sum(map(len, together)) > CLIENTS * (2 if wrong else 4)
        assert all(sum(batch) <= 32 for batch in together)
        await drained(world)


async def test_one_head_that_sends_all_it_may_leaves_the_others_their_turns(
    autojump_clock: MockClock,
) -> None:
    """Seven sessions of 31 wrong guesses a step each, several in flight, beside one without."""
    speculators, _ = oracles(1.0)
    async with open_pipeline_world(3, latency=0.0, speculators=speculators) as world:
        world.place((), (2,), seconds=SECONDS)
        plain = request(prompt(12, 99), 60, sampling=SamplingParams(temperature=0.0))
        greedy = msgspec.structs.replace(
            request(prompt(12, 1), 600, sampling=SamplingParams(temperature=0.0)),
            speculation="quick",
            draft_length=31,
            draft_depth=1,
        )
        stamps: list[float] = []
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS - 1):
                nursery.start_soon(stream, world, greedy)
            await trio.sleep(20 * SECONDS)
            async with world.pipelines[1].engine.generate(plain) as events:
                async for _ in events:
                    stamps.append(trio.current_time())
            nursery.cancel_scope.cancel()
        pauses = [after - before for before, after in pairwise(stamps)]
        assert max(pauses) <= 2.5 * SECONDS
