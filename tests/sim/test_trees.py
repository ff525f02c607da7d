"""Guesses that form trees change no token: not on one rank or three, not when ranks die."""

from __future__ import annotations

import functools
import random

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.inference.generation import Finished, GenerationEvent, GenerationRequest
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.pipeline import open_pipeline_world

from .drafters import oracles
from .failover import Journals, drained, expected, prompt, request, stream, timeless, tokens_of
from .test_failover import FAULTS

KINDS = ("growing", "quick growing", "weeds")


def growing(ask: GenerationRequest, name: str, size: int, depth: int) -> GenerationRequest:
    """Return ``ask`` with trees."""
    return msgspec.structs.replace(
        ask, speculation=name, draft_length=size, draft_depth=depth, draft_tree=True
    )


@pytest.mark.parametrize(("boundaries", "wrong"), [((), 0.2), ((3, 7), 0.0), ((3, 7), 0.2)])
@pytest.mark.parametrize("name", KINDS)
async def test_tokens_are_those_of_plain_decoding(
    boundaries: tuple[int, ...], name: str, wrong: float, autojump_clock: MockClock
) -> None:
    speculators, factories = oracles(wrong)
    async with open_pipeline_world(4, latency=0.01, speculators=speculators) as world:
        world.place(boundaries, range(1, len(boundaries) + 2))
        for seed, (size, depth) in enumerate([(6, 1), (31, 1), (9, 3), (2, 4)]):
            sampling = SamplingParams(
                seed=seed,
                temperature=0.8 * (seed % 2),
                repetition_penalty=1.1,
                frequency_penalty=0.2,
                logprobs=True,
                top_logprobs=2,
            )
            plain = request(prompt(20, seed), 40, sampling=sampling)
            events = await stream(world, growing(plain, name, size, depth))
            assert tokens_of(events) == expected(plain)
            assert timeless(events) == timeless(await stream(world, plain))
            last = events[-1]
            assert isinstance(last, Finished)
            counts = last.usage.speculation
            assert counts is not None
            assert not counts.failed
            assert counts.accepted <= counts.drafted
            if wrong == 0.0 and name != "weeds":
                assert counts.accepted > 0
        await drained(world)
        assert all(d.closed == 1 for d in factories[name].made)


async def test_a_tree_is_worth_a_trip_where_its_first_branch_is_wrong(
    autojump_clock: MockClock,
) -> None:
    speculators, _ = oracles(0.25)
    async with open_pipeline_world(3, latency=0.05, speculators=speculators) as world:
        world.place((3, 7), (0, 1, 2), seconds=0.001)
        ask = request(prompt(20, 8), 60, sampling=SamplingParams(temperature=0.0))
        events = await stream(world, growing(ask, "quick growing", 31, 1))
        last = events[-1]
        assert isinstance(last, Finished)
        plain = (await stream(world, ask))[-1]
        assert isinstance(plain, Finished)
        assert last.usage.tokens_per_second > 1.5 * plain.usage.tokens_per_second
        usage = last.usage.speculation
        assert usage is not None
        assert usage.passes + usage.accepted == 60 - 1  # the prompt's own token


async def test_the_context_may_be_full_to_the_last_cell(autojump_clock: MockClock) -> None:
    speculators, _ = oracles(0.1)
    for boundaries in ((), (5,)):
        async with open_pipeline_world(2, speculators=speculators) as world:
            world.place(boundaries, range(len(boundaries) + 1), n_ctx=64)
            for depth in (1, 4):
                plain = request(prompt(40, 1), 50, sampling=SamplingParams(temperature=0.0))
                events = await stream(world, growing(plain, "quick growing", 31, depth))
                assert timeless(events) == timeless(await stream(world, plain))
            await drained(world)


@pytest.mark.parametrize("name", ["growing", "quick growing"])
async def test_eight_sessions_at_once(name: str, autojump_clock: MockClock) -> None:
    speculators, _ = oracles(0.25)
    async with open_pipeline_world(4, latency=0.004, speculators=speculators) as world:
        world.place((3, 7), (1, 2, 3), n_seq=6)

        async def one(index: int) -> None:
            sampling = SamplingParams(seed=index, temperature=0.9 if index % 3 else 0.0)
            plain = request(prompt(5 + 20 * index, index), 30, sampling=sampling)
            ask = growing(plain, name, 2 + 3 * index, 1 + index % 4) if index else plain
            assert tokens_of(await stream(world, ask, node=index % 4)) == expected(plain)

        async with trio.open_nursery() as nursery:
            for index in range(8):
                nursery.start_soon(one, index)
        await drained(world)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
async def test_one_fault_at_any_moment_changes_no_token(
    fault: str, autojump_clock: MockClock
) -> None:
    rng = random.Random(fault)
    for name, depth in (("quick growing", 1), ("growing", 3)):
        speculators, _ = oracles(0.2)
        journals = Journals()
        async with open_pipeline_world(
            5, latency=0.01, speculators=speculators, journal=journals
        ) as world:
            world.place((3, 7), (1, 2, 3), seconds=0.02)
            plain = request(prompt(30), 60)
            got: list[GenerationEvent] = []
            strike = functools.partial(FAULTS[fault], world)
            async with trio.open_nursery() as nursery:
                ask = growing(plain, name, 8, depth)
                nursery.start_soon(functools.partial(stream, world, ask, got=got))
                await trio.sleep(rng.uniform(0.1, 1.0))
                strike()
            assert tokens_of(got) == expected(plain)
            ((journal, outcome),) = journals.ended.values()
            assert journal.draft_tree
            assert outcome == "finished"
            await trio.sleep(1.5)
            await drained(world)


async def test_another_head_goes_on_with_trees(autojump_clock: MockClock) -> None:
    speculators, _ = oracles(0.2)
    journals = Journals()
    async with open_pipeline_world(
        4, latency=0.01, speculators=speculators, journal=journals
    ) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.005)
        plain = request(prompt(30), 60)
        await stream(world, growing(plain, "quick growing", 9, 2))
        ((whole, _),) = journals.ended.values()
        half = msgspec.structs.replace(whole, tokens=whole.tokens[:20])
        async with world.pipelines[2].engine.resume(half, 10) as events:
            assert tokens_of([event async for event in events]) == expected(plain)[10:]
        await drained(world)
