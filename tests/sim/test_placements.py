"""Placements become stages and heads on every node, and stay so through failures."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    NotFound,
    PyAgentError,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.types import Placement
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.keeping import FIRST_PAUSE
from pyagent_node.node.placement_board import LOST_SECONDS, STALL_SECONDS
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.pipeline import peer
from pyagent_node.simulations.placements import N_LAYERS, HostingWorld, open_hosting_world

PARAMS = SamplingParams(seed=3, temperature=0.7)
PROMPT = list(range(40))
EXPECTED = toy_generate(N_LAYERS, PROMPT, 10, PARAMS)


def ignore(progress: Progress) -> None:
    """Take a progress report."""


async def ready(world: HostingWorld, placement: Placement) -> None:
    """Wait until every node can be head for a ready placement."""
    for node in world.nodes:
        await node.board.wait_ready(placement, ignore)


@asynccontextmanager
async def placed(
    nodes: int, boundaries: tuple[int, ...], on: tuple[int, ...]
) -> AsyncIterator[tuple[HostingWorld, Placement]]:
    """Run a swarm with a ready placement."""
    async with open_hosting_world(nodes) as world:
        placement = await world.place(boundaries, on)
        await ready(world, placement)
        yield world, placement


async def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for ``condition`` on the simulated clock."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - the state has no event
            await trio.sleep(0.01)


async def test_every_node_serves_a_placed_model(autojump_clock: MockClock) -> None:
    async with placed(4, (3, 7), (1, 2, 3)) as (world, placement):
        for node in world.nodes:
            (model,) = node.pipeline.engine.models()
            assert model.placement == placement
            assert await node.ask(PROMPT, 10, PARAMS) == EXPECTED
        assert [len(node.assets.runners) for node in world.nodes] == [0, 1, 1, 1]


async def test_status_shows_ranks_with_state_and_load(autojump_clock: MockClock) -> None:
    async with open_hosting_world(3) as world:
        assert await world.nodes[0].board.views() == ()
        placement = await world.place((4,), (1, 2))
        await trio.sleep(0.1)
        (view,) = await world.nodes[0].board.views()
        assert not view.ready
        assert [(r.state, r.detail) for r in view.ranks] == [
            ("loading", "fetching, 1 of 2 bytes"),
        ] * 2
        await ready(world, placement)
        (view,) = await world.nodes[0].board.views()
        assert (view.ready, view.name, view.epoch) == (True, "toy", 1)
        assert [(r.layers, r.head, r.state, r.sessions) for r in view.ranks] == [
            ((0, 4), False, "ready", 0),
            ((4, 10), True, "ready", 0),
        ]
        world.network.isolate(peer(2))
        (view,) = await world.nodes[0].board.views()
        assert [r.state for r in view.ranks] == ["ready", "unknown"]


async def test_a_dead_runner_is_started_again_and_requests_wait_for_it(
    autojump_clock: MockClock,
) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, _):
        for _ in range(3):
            world.nodes[1].assets.runners[0].kill()
            await trio.sleep(0.01)
            assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED
        (report,) = world.nodes[1].controller.reports().ranks
        assert (report.state, report.failures, report.error) == ("ready", 3, None)


async def test_a_generation_goes_on_when_a_runner_dies_under_it(
    autojump_clock: MockClock,
) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, _):

        async def kill() -> None:
            for node in (2, 1, 0):
                await trio.sleep(1.5)
                world.nodes[node].assets.runners[0].kill("SIGSEGV")

        sampling = SamplingParams(temperature=0.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            tokens = await world.nodes[0].ask(PROMPT, 100, sampling)
        assert tokens == toy_generate(N_LAYERS, PROMPT, 100, sampling)


async def test_pauses_between_attempts_grow(autojump_clock: MockClock) -> None:
    async with open_hosting_world(1) as world:
        assets = world.nodes[0].assets
        assets.seconds = 0.0
        assets.faults = [Unavailable("no peer has it", code="no_source") for _ in range(9)]
        placement = await world.place((), (0,))
        await eventually(lambda: len(assets.attempts) == 10, 400)
        pauses = [b - a for a, b in itertools.pairwise(assets.attempts)]
        assert FIRST_PAUSE * 0.8 <= pauses[0] <= FIRST_PAUSE * 1.2
        assert all(a < b for a, b in itertools.pairwise(pauses[:7]))
        assert max(pauses) <= 72
        await ready(world, placement)


async def test_a_new_placement_starts_after_the_old_one_has_let_go(
    autojump_clock: MockClock,
) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, _):
        for boundaries, on in (((5,), (1, 2)), ((2,), (2, 1)), ((), (1,))):
            placement = await world.place(boundaries, on)
            await ready(world, placement)
            assert await world.nodes[0].ask(PROMPT, 10, PARAMS) == EXPECTED
        assert all(node.assets.most_at_once == 1 for node in world.nodes)
        assert [len(node.assets.runners) for node in world.nodes] == [0, 1, 0]


async def test_placements_in_quick_succession_leave_the_last(autojump_clock: MockClock) -> None:
    async with open_hosting_world(2) as world:
        for boundaries in ((2,), (3,), (4,), (5,), (6,)):
            placement = await world.place(boundaries, (0, 1))
        await ready(world, placement)
        assert await world.nodes[1].ask(PROMPT, 10, PARAMS) == EXPECTED
        assert all(node.assets.most_at_once == 1 for node in world.nodes)


async def test_unloading_frees_everything(autojump_clock: MockClock) -> None:
    async with placed(3, (3, 7), (0, 1, 2)) as (world, placement):
        await world.unplace()
        with trio.fail_after(5):
            await world.nodes[0].board.wait_gone(placement)
        await trio.sleep(0.2)
        for node in world.nodes:
            assert node.assets.runners == []
            assert node.pipeline.engine.models() == []
            assert node.pipeline.stages.views() == []
            assert node.controller.reports().ranks == ()
        with pytest.raises(NotFound):
            await world.nodes[0].ask(PROMPT, 10, PARAMS)
        again = await world.place((5,), (0, 1))
        assert again.epoch == 2
        await ready(world, again)


async def test_a_node_that_comes_late_serves_what_is_placed(autojump_clock: MockClock) -> None:
    async with placed(2, (5,), (0, 1)) as (world, placement):
        late = await world.add()
        await eventually(lambda: late.consensus.state.placements != {})
        await late.board.wait_ready(placement, ignore)
        assert await late.ask(PROMPT, 10, PARAMS) == EXPECTED


# ---- waiting ---------------------------------------------------------------------------------


async def test_waiting_reports_progress(autojump_clock: MockClock) -> None:
    told: list[Progress] = []
    async with open_hosting_world(2) as world:
        for node in world.nodes:
            node.assets.seconds = 3.0
        placement = await world.place((5,), (0, 1))
        await world.nodes[0].board.wait_ready(placement, told.append)
    assert {p.step for p in told} == {"fetch", "ready"}
    assert any((p.done, p.total, p.unit) == (2, 4, "bytes") for p in told)
    assert (told[-1].done, told[-1].total, told[-1].unit) == (2, 2, "ranks")


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        (Unsupported("no such cut", code="unsupported_architecture"), 1),
        (Unavailable("no peer has it", code="no_source"), 3),
    ],
)
async def test_a_rank_that_cannot_get_ready_ends_the_wait(
    fault: PyAgentError, attempts: int, autojump_clock: MockClock
) -> None:
    async with open_hosting_world(2) as world:
        world.nodes[1].assets.faults = [fault] * 5
        placement = await world.place((5,), (0, 1))
        with pytest.raises(type(fault)) as caught:
            await world.nodes[0].board.wait_ready(placement, ignore)
        assert caught.value.code == fault.code
        assert caught.value.facts["rank"] == 1
        assert caught.value.facts["peer_id"] == peer(1)
        assert "Rank 1 on " in str(caught.value)
        assert len(world.nodes[1].assets.attempts) == attempts


async def test_a_node_that_is_gone_ends_the_wait(autojump_clock: MockClock) -> None:
    async with open_hosting_world(2) as world:
        placement = await world.place((5,), (0, 1))
        world.network.isolate(peer(1))
        start = trio.current_time()
        with pytest.raises(Unavailable) as caught:
            await world.nodes[0].board.wait_ready(placement, ignore)
        assert caught.value.code == "peer_lost"
        assert LOST_SECONDS < trio.current_time() - start < LOST_SECONDS + 5


async def test_another_placement_ends_the_wait(autojump_clock: MockClock) -> None:
    async with open_hosting_world(2) as world:
        placement = await world.place((5,), (0, 1))
        await world.place((4,), (0, 1))
        with pytest.raises(Conflict) as caught:
            await world.nodes[0].board.wait_ready(placement, ignore)
        assert caught.value.code == "stale_epoch"


async def test_a_load_of_which_nothing_moves_ends_at_a_deadline(
    autojump_clock: MockClock,
) -> None:
    async with open_hosting_world(1) as world:
        world.nodes[0].assets.seconds = 10 * STALL_SECONDS
        placement = await world.place((), (0,))
        with pytest.raises(DeadlineExceeded) as caught:
            await world.nodes[0].board.wait_ready(placement, ignore)
        assert caught.value.code == "load_stalled"
