"""Guesses in flight when ranks die, links break and the model is placed anew: no token changes."""

from __future__ import annotations

import functools
import random

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.inference.generation import Finished, GenerationEvent
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.pipeline import PipelineWorld, open_pipeline_world, peer

from .drafters import oracles
from .failover import Journals, drained, expected, prompt, request, stream, tokens_of
from .test_failover import FAULTS


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
async def test_one_fault_at_any_moment_changes_no_token(
    fault: str, autojump_clock: MockClock
) -> None:
    rng = random.Random(fault)
    for name, depth in (("quick", 1), ("quick", 5), ("slow", 3)):
        speculators, _ = oracles(0.2)
        journals = Journals()
        async with open_pipeline_world(
            5, latency=0.01, speculators=speculators, journal=journals
        ) as world:
            world.place((3, 7), (1, 2, 3), seconds=0.02)
            plain = request(prompt(30), 60)
            ask = msgspec.structs.replace(
                plain, speculation=name, draft_length=3, draft_depth=depth
            )
            got: list[GenerationEvent] = []
            strike = functools.partial(FAULTS[fault], world)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(functools.partial(stream, world, ask, got=got))
                await trio.sleep(rng.uniform(0.1, 1.0))
                strike()
            assert tokens_of(got) == expected(plain)
            ((journal, outcome),) = journals.ended.values()
            assert [sampled.token for sampled in journal.tokens] == expected(plain)
            assert outcome == "finished"
            await trio.sleep(1.5)
            await drained(world)


@pytest.mark.parametrize("name", ["quick", "slow", "gone"])
async def test_another_head_goes_on_guessing_if_it_can(
    name: str, autojump_clock: MockClock
) -> None:
    speculators, factories = oracles(0.2)
    journals = Journals()
    async with open_pipeline_world(
        4, latency=0.01, speculators=speculators, journal=journals
    ) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.005)
        plain = request(prompt(30), 60)
        real = "quick" if name == "gone" else name
        await stream(world, msgspec.structs.replace(plain, speculation=real, draft_length=4))
        ((whole, _),) = journals.ended.values()
        assert (whole.speculation, whole.draft_length, whole.draft_depth) == (real, 4, None)
        half = msgspec.structs.replace(whole, tokens=whole.tokens[:20], speculation=name)
        async with world.pipelines[2].engine.resume(half, 10) as events:
            got = [event async for event in events]
        assert tokens_of(got) == expected(plain)[10:]
        last = got[-1]
        assert isinstance(last, Finished)
        usage = last.usage.speculation
        assert (usage is not None and usage.accepted > 5) == (name != "gone")
        for changes in ({"draft_length": 99}, {"speculation": "x" * 10_000}, {"draft_depth": -1}):
            bad = msgspec.structs.replace(half, **changes)
            async with world.pipelines[2].engine.resume(bad, 10) as events:
                assert tokens_of([event async for event in events]) == expected(plain)[10:]
        await drained(world)
        assert all(d.closed == 1 for d in factories[real].made)


class Storm:
    """Sessions that guess in all ways, over placements that come and go."""

    def __init__(self, world: PipelineWorld, seed: int, sessions: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.seed = seed
        self.sessions = sessions
        self.left = sessions
        self.first = [(0, peer(1)), (3, peer(2)), (7, peer(3))]

    async def one(self, index: int) -> None:
        """Ask, and check the answer."""
        rng = random.Random(1000 * self.seed + index)
        sampling = SamplingParams(
            seed=index, temperature=rng.choice([0.0, 0.8]), repetition_penalty=1.1
        )
        plain = request(prompt(rng.choice([3, 40, 600]), index), 70, sampling=sampling)
        ask = msgspec.structs.replace(
            plain,
            speculation=rng.choice(["quick", "slow", "prompt"]),
            draft_length=rng.choice([None, 1, 4, 12]),
            draft_depth=rng.randrange(1, 7),
        )
        await trio.sleep(rng.uniform(0, 1))
        assert tokens_of(await stream(self.world, ask)) == expected(plain)
        self.left -= 1

    async def faults(self) -> None:
        """Strike until all have their answers."""
        names = sorted(FAULTS)
        while self.left:
            await trio.sleep(self.rng.uniform(0.3, 1.5))
            fault = self.rng.choice(names)
            ranks = self.world.placement.ranks
            at_first = [(r.slice.first, r.peer_id) for r in ranks] == self.first
            if not at_first and fault.endswith(("runner", "new epoch")):
                continue  # they are about the ranks of the first placement
            FAULTS[fault](self.world)
            if fault.endswith("runner"):
                await trio.sleep(1.1)  # it is started again under the same placement

    async def run(self) -> None:
        """Run to the end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.faults)
            for index in range(self.sessions):
                nursery.start_soon(self.one, index)


@pytest.mark.slow
@pytest.mark.parametrize("sessions", [1, 8])
@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_changes_no_token(
    seed: int, sessions: int, autojump_clock: MockClock
) -> None:
    speculators, factories = oracles(0.25)
    async with open_pipeline_world(5, latency=0.005, speculators=speculators) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.005)
        await Storm(world, seed, sessions).run()
        await trio.sleep(3)
        await drained(world)
        assert all(d.closed == 1 for factory in factories.values() for d in factory.made)
