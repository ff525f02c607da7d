"""Ranks move to living nodes by themselves, and only when they have to."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.types import Placement
from pyagent_node.consensus.commands import AdmitMember, SetDraining, SetMeshSetting
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.api.schema import Progress
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.pipeline import MODEL, peer
from pyagent_node.simulations.placements import N_LAYERS, HostingWorld, open_hosting_world

PARAMS = SamplingParams(seed=3, temperature=0.7)
PROMPT = list(range(40))
EXPECTED = toy_generate(N_LAYERS, PROMPT, 10, PARAMS)


def ignore(progress: Progress) -> None:
    """Take a progress report."""


def placement(world: HostingWorld) -> Placement:
    """Return the placement as node 0 knows it."""
    return world.nodes[0].consensus.state.placements[MODEL]


def where(world: HostingWorld) -> list[int]:
    """Return the numbers of the nodes that hold the ranks."""
    numbers = {peer(n): n for n in range(len(world.nodes))}
    return [numbers[rank.peer_id] for rank in placement(world).ranks]


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Wait for ``condition`` on the simulated clock; return how long it took."""
    start = trio.current_time()
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - the state has no event
            await trio.sleep(0.005)
    return trio.current_time() - start


def reserved(world: HostingWorld, standbys: int, spares: int) -> bool:
    """Whether each rank has so many ready standbys and spares."""
    ready = {
        (node.mesh.peer_id, report.rank, report.loaded)
        for node in world.nodes
        for report in node.controller.reports().reserves
        if report.state == "ready"
    }
    return all(
        len(rank.standbys) == standbys
        and len(rank.spares) == spares
        and all((p, rank.rank, True) in ready for p in rank.standbys)
        and all((p, rank.rank, False) in ready for p in rank.spares)
        for rank in placement(world).ranks
    )


@asynccontextmanager
async def healing_world(
    nodes: int, on: tuple[int, ...] = (1, 2), *, standbys: int = 1, spares: int = 0
) -> AsyncIterator[HostingWorld]:
    """Run a swarm whose placement has all the standbys that are wanted; node 0 leads."""
    async with open_hosting_world(nodes, heal=True) as world:
        consensus = world.nodes[0].consensus
        await consensus.propose(SetMeshSetting("standbys", standbys))
        await consensus.propose(SetMeshSetting("spares", spares))
        for n in range(nodes):
            await consensus.propose(AdmitMember(peer(n), f"n{n}", "voter", b"c"))
        cuts = {1: (), 2: (5,), 3: (3, 7)}[len(on)]
        placed = await world.place(cuts, on)
        for node in world.nodes:
            await node.board.wait_ready(placed, ignore)
        await eventually(lambda: reserved(world, standbys, spares))
        yield world


async def test_standbys_and_spares_come_by_themselves(autojump_clock: MockClock) -> None:
    async with healing_world(4, spares=1) as world:
        assert placement(world).epoch == 1
        for rank in placement(world).ranks:
            assert len({rank.peer_id, *rank.standbys, *rank.spares}) == 3
        standbys = [rank.standbys[0] for rank in placement(world).ranks]
        assert set(standbys) == {peer(0), peer(3)}  # those that hold no rank


async def test_a_crashed_node_is_replaced_by_its_hot_standby_at_once(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(4) as world:
        (standby,) = placement(world).ranks[1].standbys
        attempts = [len(node.assets.attempts) for node in world.nodes]
        world.crash(2)
        taken = await eventually(lambda: placement(world).epoch == 2)
        assert taken < 0.4
        assert placement(world).ranks[1].peer_id == standby
        assert where(world)[0] == 1
        answer = world.nodes[1].ask(PROMPT, 10, PARAMS)
        assert await answer == EXPECTED
        assert attempts == [len(node.assets.attempts) for node in world.nodes]
        await eventually(lambda: reserved(world, 1, 0))
        assert placement(world).epoch == 2


async def test_without_a_standby_any_node_with_room_takes_over(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(4, standbys=0) as world:
        world.nodes[0].assets.memory = 0
        await trio.sleep(15)  # until the facts were asked for again
        world.crash(1)
        await eventually(lambda: placement(world).epoch == 2)
        assert where(world) == [3, 2]
        await world.nodes[0].board.wait_ready(placement(world), ignore)
        assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_a_spare_is_preferred_to_a_node_without_the_file(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(5, standbys=0, spares=1) as world:
        (spare,) = placement(world).ranks[0].spares
        world.crash(1)
        await eventually(lambda: placement(world).epoch == 2)
        assert placement(world).ranks[0].peer_id == spare


async def test_where_no_node_has_room_the_placement_stays(autojump_clock: MockClock) -> None:
    async with healing_world(3, standbys=0) as world:
        for node in world.nodes:
            node.assets.memory = 0
        await trio.sleep(15)
        world.crash(1)
        await trio.sleep(30)
        assert placement(world).epoch == 1
        (problem,) = world.nodes[0].healer.reports().problems[MODEL]
        assert "rank 0" in problem
        assert "gone" in problem
        await world.restart(1)
        await eventually(lambda: world.nodes[0].healer.reports().problems == {})
        await world.nodes[0].board.wait_ready(placement(world), ignore)
        assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED
        assert placement(world).epoch == 1


async def test_two_nodes_that_die_together_are_both_replaced(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(6, (1, 2, 3)) as world:
        world.crash(1)
        world.crash(3)
        await eventually(lambda: not {1, 3} & set(where(world)))
        await world.nodes[0].board.wait_ready(placement(world), ignore)
        assert await world.nodes[2].ask(PROMPT, 10, PARAMS) == EXPECTED
        assert where(world)[1] == 2


async def test_a_connection_that_flaps_moves_nothing(autojump_clock: MockClock) -> None:
    async with healing_world(4) as world:
        for _ in range(10):
            world.network.cut(peer(0), peer(2))
            await trio.sleep(0.05)
            world.network.heal(peer(0), peer(2))
            await trio.sleep(0.3)
        await trio.sleep(5)
        assert placement(world).epoch == 1


async def test_a_node_that_others_hear_is_not_dead(autojump_clock: MockClock) -> None:
    async with healing_world(4) as world:
        world.network.cut(peer(0), peer(2))  # the leader alone does not hear it
        await trio.sleep(60)
        assert placement(world).epoch == 1
        assert world.nodes[0].healer.health(peer(2)) == "suspect"


async def test_a_silent_host_is_replaced_within_seconds(autojump_clock: MockClock) -> None:
    async with healing_world(4) as world:
        world.network.isolate(peer(2))
        taken = await eventually(lambda: placement(world).epoch == 2)
        assert 1 < taken < 6
        assert 2 not in where(world)
        world.network.rejoin(peer(2))
        await trio.sleep(10)
        assert placement(world).epoch == 2  # nothing moves back
        assert await world.nodes[1].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_neighbours_that_lose_each_other_are_separated(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(5, (1, 2, 3)) as world:
        world.network.cut(peer(1), peer(2))
        taken = await eventually(lambda: placement(world).epoch == 2)
        assert 3 < taken < 10
        assert where(world)[0] == 1
        assert where(world)[1] != 2
        assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED


@pytest.mark.parametrize("standbys", [0, 1])
async def test_a_neighbour_that_the_leader_alone_does_not_hear_is_replaced(
    autojump_clock: MockClock, standbys: int
) -> None:
    async with healing_world(4, (0, 2), standbys=standbys) as world:
        world.network.cut(peer(0), peer(2))  # others hear it, so it is not dead
        taken = await eventually(lambda: placement(world).epoch == 2)
        assert 3 < taken < (10 if standbys else 20)
        assert where(world)[0] == 0
        assert where(world)[1] != 2
        await world.nodes[0].board.wait_ready(placement(world), ignore)
        assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_a_runner_that_fails_again_and_again_loses_its_rank(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(4) as world:
        for _ in range(3):
            assets = world.nodes[2].assets
            await eventually(lambda assets=assets: assets.runners != [])  # type: ignore[misc]
            for runner in assets.runners:
                runner.kill("SIGKILL")
            await trio.sleep(1.5)
        await eventually(lambda: placement(world).epoch == 2)
        assert where(world)[1] != 2


async def test_a_draining_node_gives_its_work_away_when_a_standby_is_ready(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(4, standbys=0) as world:
        await world.nodes[0].consensus.propose(SetDraining(peer(2), True))
        await eventually(lambda: placement(world).epoch == 2)
        new = placement(world).ranks[1].peer_id
        assert new != peer(2)
        # It was loaded before the rank moved: served within a few milliseconds.
        await world.nodes[0].board.wait_ready(placement(world), ignore)
        await eventually(lambda: world.nodes[2].assets.runners == [])
        await trio.sleep(10)
        assert placement(world).epoch == 2
        assert all(rank.standbys == () for rank in placement(world).ranks)
        assert await world.nodes[2].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_a_drained_node_without_successor_goes_on_serving(
    autojump_clock: MockClock,
) -> None:
    async with healing_world(3, standbys=0) as world:
        for node in world.nodes:
            node.assets.memory = 0
        await trio.sleep(15)
        await world.nodes[0].consensus.propose(SetDraining(peer(2), True))
        await trio.sleep(30)
        assert where(world) == [1, 2]
        assert world.nodes[0].healer.reports().problems[MODEL]
        assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_a_dead_standby_is_replaced_after_a_while(autojump_clock: MockClock) -> None:
    async with healing_world(5) as world:
        (standby,) = placement(world).ranks[0].standbys
        number = next(n for n in range(5) if peer(n) == standby)
        if number == 0:  # the leader's own: take the other rank's
            (standby,) = placement(world).ranks[1].standbys
            number = next(n for n in range(5) if peer(n) == standby)
        world.crash(number)
        await trio.sleep(5)
        assert any(standby in rank.standbys for rank in placement(world).ranks)
        await eventually(lambda: all(standby not in r.standbys for r in placement(world).ranks))
        await eventually(lambda: reserved(world, 1, 0))
        assert placement(world).epoch == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_a_storm_of_crashes(seed: int, autojump_clock: MockClock) -> None:
    """Whatever dies, and whenever it comes back, answers are right as soon as the mesh is well."""
    rng = random.Random(seed)
    async with healing_world(6, (1, 2, 3), spares=1) as world:
        down: set[int] = set()
        for _ in range(12):
            await trio.sleep(rng.expovariate(0.2))
            if down and rng.random() < 0.5:
                number = down.pop()
                await world.restart(number)
            else:
                number = rng.randrange(1, 6)
                if number not in down and len(down) < 2:
                    world.crash(number)
                    down.add(number)
        for number in down:
            await world.restart(number)
        await trio.sleep(30)
        await world.nodes[0].board.wait_ready(placement(world), ignore)
        await eventually(lambda: reserved(world, 1, 1), 60)
        for node in world.nodes:
            assert await node.ask(PROMPT, 10, PARAMS) == EXPECTED
