"""Sessions whose activations cross in f16: guesses, failovers and new heads change nothing."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import Unsupported
from pyagent_node.inference.generation import Finished, GenerationEvent
from pyagent_node.simulations.pipeline import PipelineWorld, open_pipeline_world
from pyagent_node.simulations.shelf import ToyShelves

from .drafters import oracles
from .failover import Journals, drained, expected, prompt, request, stream, tokens_of
from .test_failover import FAULTS

CUTS = (3, 7)
HOPS = "activations/f16/0,3,7"
ASK = request(prompt(40), 30)


def classes_of(events: list[GenerationEvent]) -> tuple[str, ...]:
    """Return the exactness classes that served an answer."""
    last = events[-1]
    assert isinstance(last, Finished)
    return last.usage.classes


async def calm() -> list[int]:
    """Return the answer that nothing disturbs."""
    async with open_pipeline_world(4, latency=0.002) as world:
        world.place(CUTS, (1, 2, 3), activations="f16")
        events = await stream(world, ASK)
        assert HOPS in classes_of(events)
        return tokens_of(events)


async def test_f32_says_nothing_and_one_rank_crosses_nowhere(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(4) as world:
        world.place(CUTS, (1, 2, 3), activations="")
        exact = await stream(world, ASK)
        world.place((), (1,), activations="f16")
        alone = await stream(world, ASK)
    for events in (exact, alone):
        assert tokens_of(events) == expected(ASK)
        assert not any(name.startswith("activations/") for name in classes_of(events))


async def test_another_cut_is_another_class(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(4) as world:
        world.place((5,), (1, 2), activations="f16")
        events = await stream(world, ASK)
    assert "activations/f16/0,5" in classes_of(events)
    assert tokens_of(events) != expected(ASK), "the toy's numbers do not fit"


@pytest.mark.parametrize("fault", ["middle runner", "tail runner", "first node", "moved rank"])
async def test_a_failover_changes_no_token(fault: str, autojump_clock: MockClock) -> None:
    wanted = await calm()
    async with open_pipeline_world(5, latency=0.002) as world:
        world.place(CUTS, (1, 2, 3), activations="f16")
        disturb = FAULTS[fault]
        got: list[GenerationEvent] = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await stream(world, ASK, got=got)

            nursery.start_soon(read)
            await trio.sleep(0.6)
            if fault == "moved rank":
                world.place(CUTS, (1, 4, 3), activations="f16")
            else:
                disturb(world)
        assert tokens_of(got) == wanted
        assert got[-1].usage.failovers == 1  # type: ignore[union-attr]
        assert [name for name in classes_of(got) if name.startswith("act")] == [HOPS]
        await drained(world)


@pytest.mark.parametrize("name", ["quick", "prompt"])
async def test_guesses_change_no_token(name: str, autojump_clock: MockClock) -> None:
    wanted = await calm()
    speculators, _ = oracles(0.3)
    async with open_pipeline_world(4, latency=0.01, speculators=speculators) as world:
        world.place(CUTS, (1, 2, 3), activations="f16")
        for length, depth in ((5, 1), (2, 4)):
            ask = msgspec.structs.replace(
                ASK, speculation=name, draft_length=length, draft_depth=depth
            )
            assert tokens_of(await stream(world, ask)) == wanted


async def test_another_head_goes_on_from_the_journal(autojump_clock: MockClock) -> None:
    wanted = await calm()
    journals = Journals()
    async with open_pipeline_world(4, latency=0.002, journal=journals) as world:
        world.place(CUTS, (1, 2, 3), activations="f16")
        async with world.pipelines[0].engine.generate(ASK) as events:
            async for _ in events:
                if (journal := next(iter(journals.open.values()))).tokens[9:]:
                    break
        async with world.pipelines[2].engine.resume(journal, 0) as again:
            assert tokens_of([event async for event in again]) == wanted


async def _second(world: PipelineWorld, cuts: tuple[int, ...], activations: str) -> int:
    """Return how many tokens of a long prompt come from blocks, asked for the second time."""
    world.place(cuts, range(1, len(cuts) + 2), activations=activations)
    events = await stream(world, request(prompt(300), 4))
    last = events[-1]
    assert isinstance(last, Finished)
    return last.usage.cached_tokens


async def test_blocks_are_shared_within_one_class_only(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(4, shelves=ToyShelves(random.Random(0))) as world:
        assert await _second(world, CUTS, "f16") == 0
        assert await _second(world, CUTS, "f16") >= 192
        assert await _second(world, CUTS, "") == 0, "exact cells are not those of f16"
        assert await _second(world, (5,), "f16") == 0, "nor are those behind other hops"
        assert await _second(world, (5,), "") >= 192, "exact cells do not depend on the cut"


@pytest.mark.parametrize("classes", [("toy/a",) * 3, ("toy/a", "toy/b", "toy/b")])
async def test_a_prompt_finds_its_blocks_behind_any_classes(
    classes: tuple[str, ...], autojump_clock: MockClock
) -> None:
    async with open_pipeline_world(4, shelves=ToyShelves(random.Random(0))) as world:
        world.place(CUTS, (1, 2, 3), classes=classes)
        cached = []
        for _ in range(2):
            last = (await stream(world, request(prompt(300), 4)))[-1]
            assert isinstance(last, Finished)
            cached.append(last.usage.cached_tokens)
    assert cached == [0, 192]


async def test_a_kind_that_a_node_does_not_know_is_named(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(4) as world:
        world.place(CUTS, (1, 2, 3), activations="f4")
        with pytest.raises(Unsupported, match="'f4'"):
            await stream(world, ASK)
