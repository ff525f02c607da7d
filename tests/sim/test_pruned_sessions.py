"""Sessions with a budget of cells over a swarm of the toy: longer than a slot, and disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import msgspec
import pytest
import trio

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.inference.generation import Finished, Generated, GenerationEvent, Usage
from pyagent_node.inference.kv.budgets import Pruning, positions
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.pipeline import PipelineWorld, open_pipeline_world
from pyagent_node.simulations.pruning import PruningToy

from .failover import drained, prompt, request, stream, tokens_of

LAYERS, N_CTX, TRAINED = 3, 900, 3000
ROLLING = Pruning(256, rolling=True)
HELD = Pruning(256)


def place(world: PipelineWorld, nodes: Sequence[int], boundaries: Sequence[int] = (1, 2)) -> None:
    world.place(boundaries, nodes, n_layers=LAYERS, n_ctx=N_CTX, trained=TRAINED)


async def answered(
    world: PipelineWorld,
    pruning: Pruning | None,
    *,
    length: int,
    n: int,
    then: Callable[[int], None] | None = None,
) -> tuple[list[int], Usage]:
    """Ask; ``then`` is called with the number of events after each of them."""
    ask = msgspec.structs.replace(request(prompt(length), n), pruning=pruning, ignore_eos=True)
    got: list[GenerationEvent] = []
    async with world.pipelines[0].engine.generate(ask) as events:
        async for event in events:
            got.append(event)
            if then is not None:
                then(len(got))
    last = got[-1]
    assert isinstance(last, Finished)
    return tokens_of(got), last.usage


def most(world: PipelineWorld) -> list[int]:
    """Return the most cells that a slot of each rank has held."""
    return [cast("PruningToy", runner).most for runner in world.runners]


async def test_a_prompt_longer_than_a_slot_is_read_piece_by_piece(autojump_clock: object) -> None:
    async with open_pipeline_world(4) as world:
        place(world, (1, 2, 3))
        tokens, usage = await answered(world, ROLLING, length=1600, n=40)
        assert len(tokens) == 40
        assert usage.prompt_tokens == 1600
        assert max(most(world)) <= 256 + 512
        assert usage.evicted is not None
        assert usage.evicted.held <= 3 * (256 + 64 + 1)
        # every token but the last of the answer became a cell on each rank
        assert usage.evicted.held + usage.evicted.cells == 3 * (1600 + 39)
        assert usage.evicted.bytes > 0
        assert not any(runner.refused for runner in world.runners)
        again, _ = await answered(world, ROLLING, length=1600, n=40)
        assert again == tokens
        await drained(world)


@pytest.mark.parametrize("pruning", [HELD, ROLLING])
async def test_an_answer_outgrows_its_slot(autojump_clock: object, pruning: Pruning) -> None:
    async with open_pipeline_world(4) as world:
        place(world, (1, 2, 3))
        tokens, usage = await answered(world, pruning, length=300, n=650)
        assert len(tokens) == 650
        assert usage.evicted is not None
        assert max(most(world)) <= N_CTX
        assert not any(runner.refused for runner in world.runners)


async def test_the_prompt_is_held_until_its_end_unless_the_budget_rolls(
    autojump_clock: object,
) -> None:
    async with open_pipeline_world(4) as world:
        place(world, (1, 2, 3))
        plain = request(prompt(800), 1)
        whole = toy_generate(LAYERS, prompt(800), 1, plain.sampling)
        held, _ = await answered(world, HELD, length=800, n=1)
        assert held == whole
        assert max(most(world)) == 800
        rolled, _ = await answered(world, ROLLING, length=800, n=1)
        assert rolled != whole


async def test_two_sessions_read_their_prompts_at_once(autojump_clock: object) -> None:
    async with open_pipeline_world(4) as world:
        place(world, (1, 2, 3))
        alone = await answered(world, ROLLING, length=1300, n=9)
        found: list[list[int]] = []

        async def one(length: int) -> None:
            tokens, _ = await answered(world, ROLLING, length=length, n=9)
            if length == 1300:
                found.append(tokens)

        async with trio.open_nursery() as nursery:
            for length in (1300, 1100, 700, 1300):
                nursery.start_soon(one, length)
        assert found == [alone[0]] * 2
        assert max(most(world)) <= 256 + 512
        assert not any(runner.refused for runner in world.runners)


@pytest.mark.parametrize("at", [0, 150])
@pytest.mark.parametrize("rank", [0, 1, 2])
async def test_a_rank_that_dies_costs_a_reading_of_all_and_no_token(
    autojump_clock: object, rank: int, at: int
) -> None:
    """What was generated stays; the other ranks read it anew, giving cells up on the way."""
    async with open_pipeline_world(5) as world:
        place(world, (1, 2, 3))
        undisturbed, _ = await answered(world, ROLLING, length=1000, n=200)

        def fault(events: int) -> None:
            if events == at + 1:
                nodes = [1, 2, 3]
                nodes[rank] = 4
                world.network.crash(world.meshes[rank + 1].peer_id)
                place(world, nodes)

        tokens, usage = await answered(world, ROLLING, length=1000, n=200, then=fault)
        assert len(tokens) == 200
        assert tokens[: at + 1] == undisturbed[: at + 1]
        assert usage.failovers == 1
        # no block of a pruned session is kept: all but the last token is computed again
        assert usage.recomputed_tokens >= 1000 + at
        assert usage.evicted is not None
        assert usage.evicted.held <= 3 * (256 + 65)
        assert max(most(world)) <= N_CTX
        assert not any(runner.refused for runner in world.runners)
        await drained(world)


async def test_an_answer_that_outgrew_its_slot_survives_a_rank(autojump_clock: object) -> None:
    async with open_pipeline_world(5) as world:
        place(world, (1, 2, 3))

        def fault(events: int) -> None:
            if events == 620:  # 300 of the prompt and 620 tokens: more than a slot has cells
                world.network.crash(world.meshes[2].peer_id)
                place(world, (1, 4, 3))

        tokens, usage = await answered(world, HELD, length=300, n=650, then=fault)
        assert len(tokens) == 650
        assert usage.failovers == 1
        assert max(most(world)) <= N_CTX


async def test_ranks_that_cannot_give_cells_up_refuse_what_does_not_fit(
    autojump_clock: object,
) -> None:
    async with open_pipeline_world(4) as world:
        place(world, (1, 2, 3))
        for runner in world.runners:
            runner.info = msgspec.structs.replace(runner.info, prunes=False)
        with pytest.raises(Unsupported) as caught:
            await answered(world, ROLLING, length=1000, n=9)
        assert caught.value.code == "no_pruning"
        tokens, usage = await answered(world, ROLLING, length=800, n=9)
        plain = request(prompt(800), 9)
        assert tokens == toy_generate(LAYERS, prompt(800), 9, plain.sampling)
        assert usage.evicted is None


async def test_an_answer_of_no_given_length_asks_nothing_of_ranks_that_keep_all(
    autojump_clock: object,
) -> None:
    """It ends with the slot, as without a budget; only who asks for more needs ranks that can."""
    async with open_pipeline_world(4) as world:
        place(world, (1, 2, 3))
        for runner in world.runners:
            runner.info = msgspec.structs.replace(runner.info, prunes=False)
        plain = request(prompt(380), N_CTX - 380)
        ask = msgspec.structs.replace(plain, pruning=HELD, max_tokens=None, ignore_eos=True)
        tokens = tokens_of(await stream(world, ask))
        assert tokens == toy_generate(LAYERS, prompt(380), N_CTX - 380, plain.sampling)


@pytest.mark.parametrize(
    ("pruning", "length"),
    [(None, N_CTX), (HELD, N_CTX), (ROLLING, TRAINED), (Pruning(800, rolling=True), N_CTX)],
)
async def test_prompts_that_cannot_be_held_are_refused(
    autojump_clock: object, pruning: Pruning | None, length: int
) -> None:
    async with open_pipeline_world(4) as world:
        place(world, (1, 2, 3))
        with pytest.raises(InvalidRequest) as caught:
            await answered(world, pruning, length=length, n=9)
        assert caught.value.code == "prompt_too_long"


async def test_the_longest_session_ends_at_the_last_position(autojump_clock: object) -> None:
    async with open_pipeline_world(4) as world:
        world.place((1, 2), (1, 2, 3), n_layers=LAYERS, n_ctx=N_CTX, trained=1500)
        assert positions(ROLLING, 1480, n_ctx=N_CTX, trained=1500) == 1500
        ask = msgspec.structs.replace(request(prompt(1480), 400), pruning=ROLLING, ignore_eos=True)
        events = await stream(world, ask)
        assert len([event for event in events if isinstance(event, Generated)]) == 20
        assert not any(runner.refused for runner in world.runners)
