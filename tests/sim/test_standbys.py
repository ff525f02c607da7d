"""Standbys take ranks over at once; what is held outlives the epochs that want it."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from pyagent_node.base.types import Placement, Slice
from pyagent_node.consensus.commands import SetStandbys
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


async def settle(world: HostingWorld, placement: Placement) -> None:
    """Wait until every rank, standby and spare is ready, and every node can be head."""
    for node in world.nodes:
        await node.board.wait_ready(placement, ignore)
    with trio.fail_after(30):
        while any(  # noqa: ASYNC110 - the state has no event
            reserve.state != "ready"
            for node in world.nodes
            for reserve in node.controller.reports().reserves
        ):
            await trio.sleep(0.05)


async def test_a_hot_standby_serves_as_soon_as_the_entry_is_applied(
    autojump_clock: MockClock,
) -> None:
    async with open_hosting_world(4) as world:
        first = await world.place((3, 7), (0, 1, 2), standbys=((3,), (3,), (3,)))
        await settle(world, first)
        runners = {n: list(node.assets.runners) for n, node in enumerate(world.nodes)}
        assert [len(each) for each in runners.values()] == [1, 1, 1, 3]
        attempts = [len(node.assets.attempts) for node in world.nodes]
        start = trio.current_time()
        second = await world.place((3, 7), (0, 3, 2), standbys=((3,), (), (3,)))
        with trio.fail_after(1):
            while not any(  # noqa: ASYNC110
                (view.epoch, view.rank) == (second.epoch, 1)
                for view in world.nodes[3].pipeline.stages.views()
            ):
                await trio.sleep(0.001)
        assert trio.current_time() - start < 0.02  # a few hops of one millisecond
        assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED
        assert attempts == [len(node.assets.attempts) for node in world.nodes]
        assert all(node.assets.heads == 1 for node in world.nodes)
        assert [len(node.assets.runners) for node in world.nodes] == [1, 0, 1, 3]
        for n in (0, 2, 3):
            assert world.nodes[n].assets.runners == runners[n]


async def test_a_standby_reports_itself_and_serves_no_stage(autojump_clock: MockClock) -> None:
    async with open_hosting_world(3) as world:
        placement = await world.place((5,), (0, 1), standbys=((2,), ()), spares=((), (2,)))
        await settle(world, placement)
        told = world.nodes[2].controller.reports()
        assert told.ranks == ()
        assert [(r.rank, r.loaded, r.state) for r in told.reserves] == [
            (0, True, "ready"),
            (1, False, "ready"),
        ]
        assert told.reserves[0].memory_bytes is not None
        assert world.nodes[2].pipeline.stages.views() == []
        assert world.nodes[2].assets.disk == {Slice(0, 5, False), Slice(5, 10, True)}
        assert await world.nodes[2].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_a_spare_needs_no_transfer(autojump_clock: MockClock) -> None:
    async with open_hosting_world(3) as world:
        placement = await world.place((5,), (0, 1), spares=((2,), (2,)))
        await settle(world, placement)
        assert world.nodes[2].assets.runners == []
        start = trio.current_time()
        placement = await world.place((5,), (2, 1))
        await settle(world, placement)
        # Loading takes half of the time, fetching the other half.
        assert trio.current_time() - start < world.nodes[2].assets.seconds
        assert await world.nodes[1].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_what_nothing_needs_is_deleted(autojump_clock: MockClock) -> None:
    async with open_hosting_world(2) as world:
        placement = await world.place((5,), (0, 1), standbys=((1,), ()), spares=((), (0,)))
        await settle(world, placement)
        both = {Slice(0, 5, False), Slice(5, 10, True)}
        assert [node.assets.disk for node in world.nodes] == [both, both]
        placement = await world.place((5,), (0, 1))
        await settle(world, placement)
        await trio.sleep(1)
        assert [node.assets.disk for node in world.nodes] == [
            {Slice(0, 5, False)},
            {Slice(5, 10, True)},
        ]
        await world.unplace()
        await trio.sleep(1)
        assert all(node.assets.disk == set() for node in world.nodes)


async def test_standbys_come_and_go_without_a_new_epoch(autojump_clock: MockClock) -> None:
    async with open_hosting_world(3) as world:
        placement = await world.place((5,), (0, 1))
        await settle(world, placement)
        stages = [node.pipeline.stages.views() for node in world.nodes]
        consensus = world.nodes[0].consensus
        for standbys in (((peer(2),), ()), ((), (peer(2),)), ((), ())):
            await consensus.propose(
                SetStandbys(MODEL, standbys, ((), ()), placement.epoch)  # type: ignore[arg-type]
            )
            now = consensus.state.placements[MODEL]
            assert now.epoch == placement.epoch
            await settle(world, now)
            await trio.sleep(0.2)
            assert len(world.nodes[2].assets.runners) == sum(map(len, standbys))
            assert world.nodes[2].pipeline.engine.models()[0].placement == now
        assert stages == [node.pipeline.stages.views() for node in world.nodes]


async def test_a_new_cut_on_a_standby_waits_for_its_memory(autojump_clock: MockClock) -> None:
    async with open_hosting_world(2) as world:
        await settle(world, await world.place((5,), (0, 0), standbys=((1,), (1,))))
        await settle(world, await world.place((4,), (0, 0), standbys=((1,), (1,))))
        assert [node.assets.most_at_once for node in world.nodes] == [2, 2]
        assert await world.nodes[1].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_a_standby_that_dies_is_loaded_again(autojump_clock: MockClock) -> None:
    async with open_hosting_world(3) as world:
        placement = await world.place((5,), (0, 1), standbys=((2,), ()))
        await settle(world, placement)
        world.nodes[2].assets.runners[0].kill()
        await trio.sleep(0.01)
        (report,) = world.nodes[2].controller.reports().reserves
        assert (report.state, report.failures, report.memory_bytes) == ("failed", 1, None)
        assert report.error is not None
        assert report.error.code == "runner_failed"
        await settle(world, placement)
        assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED


async def test_many_moves_in_quick_succession_leave_the_last(autojump_clock: MockClock) -> None:
    async with open_hosting_world(3) as world:
        for turn in range(12):
            a, b, c = (turn % 3, (turn + 1) % 3, (turn + 2) % 3)
            placement = await world.place((5,), (a, b), standbys=((c,), (c,)))
        await settle(world, placement)
        assert await world.nodes[1].ask(PROMPT, 10, PARAMS) == EXPECTED
        assert [len(node.assets.runners) for node in world.nodes] == [1, 2, 1]
