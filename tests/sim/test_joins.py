"""Pieces on ranks that cannot move keys, or die while they compute them: the answer is the same."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.kv.pieces import JoinPlan, Piece
from pyagent_node.simulations.pipeline import peer

from .test_kv_blocks import GREEDY, checked, left, text, world_of

PLAN = JoinPlan((Piece(5, 90), Piece(90, 400)))


async def test_ranks_that_cannot_move_keys_compute_the_prompt(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = text(500)
        answer = checked(await world.ask(0, tokens, join=PLAN), tokens, 20, GREEDY)
        assert answer.finished.usage.joined_tokens == 0
        pieces = world.pipelines[0].engine.pieces
        assert (pieces.made, pieces.failed) == (2, 0)
        checked(await world.ask(0, tokens, join=PLAN), tokens, 20, GREEDY)
        assert (pieces.made, pieces.failed) == (2, 0)  # they are there
        await left(world, shelves)


async def test_a_rank_that_goes_while_pieces_are_made_costs_the_pieces(
    autojump_clock: MockClock,
) -> None:
    async with world_of() as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = text(500)
        engine = world.pipelines[0].engine
        async with trio.open_nursery() as nursery:

            async def lose() -> None:
                await trio.sleep(0.004)  # both are under way
                engine.peer_down(peer(2))

            nursery.start_soon(lose)
            checked(await world.ask(0, tokens, join=PLAN), tokens, 20, GREEDY)
        assert engine.pieces.failed == 2
        await left(world, shelves)


@pytest.mark.parametrize("pieces", [(), (Piece(90, 500),), (Piece(3, 9),), (Piece(50, 20),)])
async def test_plans_that_cannot_be_are_refused(
    pieces: tuple[Piece, ...], autojump_clock: MockClock
) -> None:
    async with world_of() as (world, _):
        world.place((), (1,))
        with pytest.raises(InvalidRequest) as caught:
            await world.ask(0, text(500), join=JoinPlan(pieces))
        assert caught.value.code == "bad_join"
