"""A drafter rank on another node: it may crash, stall or move; tokens stay equal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import InvalidRequest, RunnerFailed, Unsupported
from pyagent_node.base.types import Digest, Drafting
from pyagent_node.consensus.commands import ModelRecord, RegisterModel, SetDrafting
from pyagent_node.inference.drafting.remote import REST_SECONDS
from pyagent_node.inference.generation import (
    SpeculationUsage,
)
from pyagent_node.node.keeping import HostProgress
from pyagent_node.node.placement_parts import HeadParts
from pyagent_node.simulations.pipeline import MODEL, NAME, peer
from pyagent_node.simulations.placements import (
    RECORD,
    ToyHead,
)

from .drafter_kit import DRAFTER, ask, draft_on, drafted, drafting_again, ignore


@pytest.mark.parametrize("head", [0, 2, DRAFTER])
async def test_it_guesses_for_every_head(autojump_clock: MockClock, head: int) -> None:
    async with drafted() as world:
        usage = await ask(world, head)
        assert usage is not None
        assert (usage.drafter, usage.failed) == (NAME, False)
        assert usage.acceptance > 0.95
        (report,) = world.nodes[DRAFTER].controller.reports().drafters
        assert report.load.guesses >= usage.drafted
        await trio.sleep(0.1)
        assert world.nodes[DRAFTER].controller.reports().drafters[0].load.sessions == 0


@pytest.mark.parametrize("depth", [1, 3])
async def test_its_guesses_may_form_trees(autojump_clock: MockClock, depth: int) -> None:
    async with drafted() as world:
        usage = await ask(world, 1, tree=True, draft_length=6, draft_depth=depth)
        assert usage is not None
        assert not usage.failed
        assert usage.tokens_per_pass > 2
        assert not world.nodes[DRAFTER].pipeline.drafts.refused


async def test_several_steps_in_flight_and_several_sessions(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.02) as world, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(lambda n=number: ask(world, n, draft_length=3, draft_depth=3))


async def test_who_says_what_holds(autojump_clock: MockClock) -> None:
    """Request before load option before the node's own setting."""
    async with drafted() as world:
        assert await ask(world, speculation=None) is None  # the node's default: none
        await draft_on(world, DRAFTER, speculation=NAME, length=5)
        by_load = await ask(world, 1, speculation=None, draft_depth=1)
        assert by_load is not None
        assert (by_load.drafter, by_load.length) == (NAME, 5)
        assert await ask(world, speculation="none") is None
        await draft_on(world, DRAFTER, speculation="elsewhere")
        instead = await ask(world, speculation=None)
        assert instead is not None
        assert instead.drafter == NAME  # a drafter that is not here: auto
        await draft_on(world, None, speculation="none")
        assert await ask(world, speculation=None) is None
        with pytest.raises(InvalidRequest, match="There is no drafter"):
            await ask(world, speculation=NAME)
        assert await ask(world, speculation="auto") is None


async def test_the_drafter_dies_and_comes_back(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.01) as world:
        found: list[SpeculationUsage | None] = []

        async def run() -> None:
            found.append(await ask(world))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.2)
            world.crash(DRAFTER)
        assert found[0] is not None
        assert found[0].failed
        assert await ask(world, 1) is None  # away: nothing to wait for
        epoch = world.nodes[0].consensus.state.placements[MODEL].epoch
        await world.restart(DRAFTER)
        await drafting_again(world, DRAFTER)
        await trio.sleep(REST_SECONDS)
        assert world.nodes[0].consensus.state.placements[MODEL].epoch == epoch
        again = await ask(world)
        assert again is not None
        assert not again.failed
        assert again.acceptance > 0.95


async def test_its_runner_dies(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.01) as world:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, world)
            await trio.sleep(0.2)
            (runner,) = world.nodes[DRAFTER].assets.runners
            world.nodes[DRAFTER].assets.faults.append(RunnerFailed("no", reason="test"))
            runner.kill()
        assert await ask(world) is None  # it failed a moment ago
        await drafting_again(world, DRAFTER)
        await trio.sleep(REST_SECONDS)
        again = await ask(world)
        assert again is not None
        assert again.acceptance > 0.95
        assert sum(world.nodes[DRAFTER].pipeline.drafts.refused.values()) == 1


async def test_it_is_too_slow(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.05) as world:
        world.network.set_latency(peer(0), peer(DRAFTER), 1.0)
        usage = await ask(world)
        assert usage is not None
        assert usage.failed
        assert usage.accepted == 0


async def test_it_says_nothing_at_all(autojump_clock: MockClock) -> None:
    async with drafted() as world:
        world.network.hold(peer(DRAFTER), peer(0))
        usage = await ask(world)
        assert usage is not None
        assert usage.accepted == 0


async def test_placed_anew_it_goes_on(autojump_clock: MockClock) -> None:
    """A session moves to another epoch, and its drafter with it."""
    async with drafted(latency=0.01) as world:
        found: list[SpeculationUsage | None] = []

        async def run() -> None:
            found.append(await ask(world))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.25)
            before = world.nodes[0].consensus.state.placements[MODEL]
            after = await world.place((3, 7), (0, 2, 1))
            assert after.epoch > before.epoch
            assert after.drafting == before.drafting
        assert found[0] is not None
        assert not found[0].failed
        assert found[0].acceptance > 0.9


async def test_another_vocabulary_is_refused_by_name(autojump_clock: MockClock) -> None:
    """Its node finds out before it loads the model, and whoever waits for it is told."""
    other = msgspec.structs.replace(RECORD, digest=Digest("9" * 64), name="other")
    async with drafted() as world:
        node, consensus = world.nodes[DRAFTER], world.nodes[0].consensus
        loading = node.assets.head

        @asynccontextmanager
        async def head(
            model: ModelRecord, epoch: int, progress: HostProgress
        ) -> AsyncIterator[HeadParts]:
            async with loading(model, epoch, progress) as parts:
                assert isinstance(parts, ToyHead)
                pieces = (*parts.vocabulary.pieces[:65], b"?", *parts.vocabulary.pieces[66:])
                strange = msgspec.structs.replace(parts.vocabulary, pieces=pieces)
                yield parts._replace(vocabulary=strange)

        node.assets.head = head  # type: ignore[method-assign]
        await consensus.propose(RegisterModel(other))
        placement = consensus.state.placements[MODEL]
        drafting = Drafting("auto", drafter=other.digest, peer_id=peer(DRAFTER))
        await consensus.propose(SetDrafting(MODEL, drafting, placement.epoch))
        placement = consensus.state.placements[MODEL]
        with pytest.raises(Unsupported, match="other cannot draft for this model: its token 65"):
            await world.nodes[0].board.wait_ready(placement, ignore, drafter=True)
        await world.nodes[0].board.wait_ready(placement, ignore)  # the ranks are fine
        (view,) = await world.nodes[1].board.views()
        assert view.ready
        assert view.speculation == "auto"
        assert view.drafter is not None
        assert (view.drafter.name, view.drafter.node) == ("other", peer(DRAFTER)[-8:])
        assert view.drafter.state == "failed"
        assert "vocabulary" in (view.drafter.detail or "") or "token 65" in (
            view.drafter.detail or ""
        )
        assert not node.assets.runners  # it was never loaded
        failed = await ask(world, speculation="other")
        assert failed is not None
        assert failed.failed


async def test_unloaded_with_its_model(autojump_clock: MockClock) -> None:
    async with drafted() as world:
        placement = world.nodes[0].consensus.state.placements[MODEL]
        assert len(world.nodes[DRAFTER].assets.runners) == 1
        assert (await world.nodes[0].board.memory(placement)).keys() >= {peer(DRAFTER)}
        await world.unplace()
        with trio.fail_after(20):
            await world.nodes[0].board.wait_gone(placement)
        assert not any(node.assets.runners for node in world.nodes)
