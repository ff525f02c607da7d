"""Placed models move to other ranks while sessions run: prepared beside, committed at once."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from pyagent_node.base.errors import Conflict, PyAgentError, Unavailable, Unsupported
from pyagent_node.consensus.commands import PreparePlacement, RemovePlacement
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.resharding import BLOCKS_SECONDS
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.deterministic import run_deterministic
from pyagent_node.simulations.pipeline import MODEL, NAME, peer
from pyagent_node.simulations.placements import (
    N_LAYERS,
    HostingNode,
    HostingWorld,
    open_hosting_world,
)
from pyagent_node.simulations.shelf import ToyShelves

from .test_placements import eventually, ignore, placed, ready

PARAMS = SamplingParams(seed=3, temperature=0.7)
PROMPT = tuple(range(40))


class Stream:
    """One answer in progress, with the pauses between its tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.longest = 0.0
        self.reasons: list[str] = []
        self.recomputed = 0
        self.fresh = trio.Event()

    async def run(self, node: HostingNode, n: int) -> None:
        request = GenerationRequest(NAME, tokens=PROMPT, max_tokens=n, sampling=PARAMS)
        async with node.pipeline.engine.generate(request) as events:
            last = None
            async for event in events:
                now = trio.current_time()
                if last is not None:
                    self.longest = max(self.longest, now - last)
                last = now
                if isinstance(event, Generated):
                    self.tokens.append(event.token)
                    self.fresh.set()
                else:
                    self.reasons.append(event.reason)
                    self.recomputed = event.usage.recomputed_tokens


@asynccontextmanager
async def streaming(
    world: HostingWorld, *, n: int = 300, streams: int = 2
) -> AsyncIterator[list[Stream]]:
    """Run answers on node 0 meanwhile, and check them when they have ended."""
    made = [Stream() for _ in range(streams)]
    async with trio.open_nursery() as nursery:
        for each in made:
            nursery.start_soon(each.run, world.nodes[0], n)
        for each in made:
            await each.fresh.wait()
        yield made
    for each in made:
        assert each.tokens == toy_generate(N_LAYERS, list(PROMPT), n, PARAMS)


def tell(into: list[str]) -> Callable[[Progress], None]:
    return lambda progress: into.append(progress.text)


async def test_slices_are_loaded_beside_and_answers_hardly_pause(
    autojump_clock: MockClock,
) -> None:
    async with placed(4, (3, 7), (0, 1, 2)) as (world, before):
        for node in world.nodes:
            node.assets.seconds = 20.0
        told: list[str] = []
        async with streaming(world, n=2500) as streams:
            command = world.command((2, 5), (0, 3, 2))
            loading = 0.0

            def note(progress: Progress) -> None:
                nonlocal loading
                told.append(progress.text)
                if progress.step == "prepare":
                    loading = max(stream.longest for stream in streams)

            placement = await world.nodes[0].resharder.reshard(command, note)
            assert loading < 0.2
            assert placement.epoch == before.epoch + 1
            assert [rank.peer_id for rank in placement.ranks] == [peer(0), peer(3), peer(2)]
            assert world.nodes[0].consensus.state.prepared == {}
        assert max(stream.longest for stream in streams) < 3.0, "the slices take 20 s to load"
        assert told[0].startswith("loading beside what serves: 0 of 3")
        await trio.sleep(1)
        assert [len(node.assets.runners) for node in world.nodes] == [1, 0, 1, 1]
        assert [node.assets.most_at_once for node in world.nodes] == [2, 1, 2, 1]


async def test_a_prepared_switch_computes_nothing_again(autojump_clock: MockClock) -> None:
    shelves = ToyShelves(random.Random(0))
    async with open_hosting_world(4, shelves=shelves) as world:
        await ready(world, await world.place((3, 7), (0, 1, 2)))
        async with streaming(world, n=400, streams=3) as streams:
            for cut, nodes in (((2, 5), (0, 3, 2)), ((2, 8), (0, 3, 2)), ((3, 7), (0, 1, 2))):
                await trio.sleep(0.7)
                await world.nodes[1].resharder.reshard(world.command(cut, nodes), ignore)
        assert shelves.counts["rests"] >= 3 * 3 * 3
        assert [stream.recomputed for stream in streams] == [0, 0, 0]


async def test_slices_that_stay_are_not_loaded_twice(autojump_clock: MockClock) -> None:
    async with placed(4, (3, 7), (0, 1, 2)) as (world, _):
        async with streaming(world):
            await world.nodes[1].resharder.reshard(world.command((3, 5), (0, 3, 2)), ignore)
        assert len(world.nodes[0].assets.attempts) == 1
        assert world.nodes[0].assets.most_at_once == 1
        # The same slice on another node, in another place: what is loaded there already is kept.
        await world.nodes[1].resharder.reshard(world.command((3, 5), (0, 2, 1)), ignore)
        assert len(world.nodes[0].assets.attempts) == 1


async def test_of_two_changes_at_once_one_is_told(autojump_clock: MockClock) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, _):
        outcomes: list[str] = []

        async def change(node: int, boundaries: tuple[int, ...]) -> None:
            try:
                await world.nodes[node].resharder.reshard(
                    world.command(boundaries, (0, 1, 2), by=node), ignore
                )
                outcomes.append("done")
            except Conflict as error:
                outcomes.append(error.code)

        async with streaming(world), trio.open_nursery() as nursery:
            nursery.start_soon(change, 1, (2, 5))
            nursery.start_soon(change, 2, (4, 8))
            nursery.start_soon(change, 2, (4, 9))
        assert sorted(outcomes) == ["change_in_progress", "change_in_progress", "done"]


@pytest.mark.parametrize("fault", [Unsupported("no such cut"), Unavailable("nobody has it")])
async def test_what_cannot_get_ready_is_dropped(
    fault: PyAgentError, autojump_clock: MockClock
) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, before):
        world.nodes[1].assets.faults = [fault] * 5
        async with streaming(world) as streams:
            with pytest.raises(type(fault)) as caught:
                await world.nodes[0].resharder.reshard(world.command((2, 5), (0, 1, 2)), ignore)
        assert caught.value.facts["peer_id"] == peer(1)
        assert max(stream.longest for stream in streams) < 0.2
        state = world.nodes[0].consensus.state
        assert (state.placements[MODEL], state.prepared) == (before, {})
        await trio.sleep(1)
        assert [len(node.assets.runners) for node in world.nodes] == [1, 1, 1]


async def test_a_change_that_is_given_up_leaves_all_as_it_was(autojump_clock: MockClock) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, before), streaming(world):
        with trio.move_on_after(0.2) as scope:
            await world.nodes[0].resharder.reshard(world.command((2, 5), (0, 1, 2)), ignore)
        assert scope.cancelled_caught
        state = world.nodes[0].consensus.state
        assert (state.placements[MODEL], state.prepared) == (before, {})


async def test_another_placement_ends_the_change(autojump_clock: MockClock) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, before):

        async def interfere() -> None:
            await trio.sleep(0.2)
            await world.place((4, 8), (0, 1, 2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(interfere)
            with pytest.raises(Conflict) as caught:
                await world.nodes[1].resharder.reshard(world.command((2, 5), (0, 1, 2)), ignore)
        assert caught.value.code == "not_prepared"
        assert world.nodes[0].consensus.state.placements[MODEL].epoch == before.epoch + 1


async def test_what_nobody_sees_to_is_dropped(autojump_clock: MockClock) -> None:
    """A preparation of a node that has forgotten it, as after a restart."""
    async with placed(3, (3, 7), (0, 1, 2)) as (world, before):
        command = world.command((2, 5), (0, 1, 2))
        await world.nodes[1].consensus.propose(
            PreparePlacement(MODEL, command.ranks, 4096, 4, before.epoch, peer(1))
        )
        await eventually(lambda: not world.nodes[0].consensus.state.prepared)
        await trio.sleep(2)
        assert [len(node.assets.runners) for node in world.nodes] == [1, 1, 1]


async def test_blocks_are_waited_for_but_not_for_ever(autojump_clock: MockClock) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, _):
        left = [5]
        world.nodes[1].controller._behind = lambda model: left[0]

        async def arrive() -> None:
            while left[0]:
                await trio.sleep(0.5)
                left[0] -= 1

        told: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(arrive)
            await world.nodes[0].resharder.reshard(world.command((2, 5), (0, 1, 2)), tell(told))
        assert any(text.startswith("1 KV blocks") for text in told)
        left[0] = 1
        start = trio.current_time()
        await world.nodes[0].resharder.reshard(world.command((3, 5), (0, 1, 2)), ignore)
        assert BLOCKS_SECONDS < trio.current_time() - start < BLOCKS_SECONDS + 3


async def test_unloading_ends_a_change(autojump_clock: MockClock) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, before):
        consensus = world.nodes[2].consensus
        async with trio.open_nursery() as nursery:

            async def unload() -> None:
                await trio.sleep(0.2)
                await consensus.propose(RemovePlacement(MODEL, before.epoch))

            nursery.start_soon(unload)
            with pytest.raises(PyAgentError) as caught:
                await world.nodes[1].resharder.reshard(world.command((2, 5), (0, 1, 2)), ignore)
        assert caught.value.code == "not_prepared"
        await trio.sleep(1)
        assert [len(node.assets.runners) for node in world.nodes] == [0, 0, 0]


async def test_status_shows_a_change_that_is_under_way(autojump_clock: MockClock) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, _):
        seen: list[tuple[int, str, tuple[str, ...]]] = []

        async def look() -> None:
            while True:
                await trio.sleep(0.1)
                (view,) = await world.nodes[2].board.views()
                if view.prepared is not None:
                    told = view.prepared
                    assert told.layers == ((0, 2), (2, 5), (5, 10))
                    seen.append((told.ready, told.by, told.nodes))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await world.nodes[1].resharder.reshard(world.command((2, 5), (0, 1, 2)), ignore)
            nursery.cancel_scope.cancel()
        by = peer(1)[-8:]
        nodes = tuple(peer(n)[-8:] for n in range(3))
        assert seen[0] == (0, by, nodes)
        assert seen[-1] == (3, by, nodes)
        (view,) = await world.nodes[2].board.views()
        assert view.prepared is None


MOVES = st.lists(
    st.tuples(
        st.floats(0.0, 1.5),
        st.lists(st.integers(1, N_LAYERS - 1), max_size=3, unique=True).map(sorted),
        st.permutations(range(5)),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=4,
)
"""When, which boundaries, which nodes, and who is asked."""


@pytest.mark.slow
@given(moves=MOVES, seed=st.integers(0, 99), n=st.integers(60, 300))
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_any_boundaries_at_any_moments_change_no_token(
    moves: list[tuple[float, list[int], list[int], int]], seed: int, n: int
) -> None:
    """With KV blocks, a session computes less than a block and what was on its way again."""

    async def program() -> None:
        shelves = ToyShelves(random.Random(seed))
        async with open_hosting_world(5, shelves=shelves) as world:
            await ready(world, await world.place((3, 7), (0, 1, 2)))
            async with streaming(world, n=n, streams=3) as streams:
                for wait, cut, nodes, asked in moves:
                    await trio.sleep(wait)
                    count = len(cut) + 1
                    await world.nodes[asked].consensus.read_barrier()
                    command = world.command(tuple(cut), tuple(nodes[:count]), by=asked)
                    await world.nodes[asked].resharder.reshard(command, ignore)
            for stream in streams:
                assert stream.recomputed <= len(moves) * 2 * 64
            assert world.nodes[0].consensus.state.last_epoch == 1 + len(moves)

    run_deterministic(program, seed)
