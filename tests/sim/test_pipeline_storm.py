"""Seeded storms over whole pipelines: answers come, and are right, and nothing leaks."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.pipeline import peer
from pyagent_node.simulations.placements import N_LAYERS, HostingWorld, open_hosting_world

NODES = 4
REQUESTS = 30


class Storm:
    """One run: faults and requests drawn from one seed."""

    def __init__(self, world: HostingWorld, seed: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()

    async def one_request(self, number: int) -> None:
        """Ask, maybe give up half way, and check an answer that came."""
        rng = random.Random(number)
        await trio.sleep(rng.uniform(0, 20))
        node = self.world.nodes[rng.randrange(NODES)]
        params = SamplingParams(seed=number, temperature=rng.choice([0.0, 0.9]))
        prompt = [rng.randrange(128) for _ in range(rng.choice([3, 40, 1100]))]
        n = rng.randrange(1, 60)
        patience = rng.choice([0.3, 2.0, 200.0])
        with trio.move_on_after(patience) as scope:
            tokens = await node.ask(prompt, n, params)
            assert tokens == toy_generate(N_LAYERS, prompt, n, params)
            self.outcomes["answered"] += 1
        if scope.cancelled_caught:
            self.outcomes["cancelled"] += 1

    async def faults(self) -> None:
        """Cut and heal links, isolate nodes, kill runners, place anew."""
        rng, world = self.rng, self.world
        for _ in range(12):
            await trio.sleep(rng.uniform(0.2, 3))
            a, b = rng.sample(range(NODES), 2)
            match rng.randrange(4):
                case 0:
                    world.network.cut(peer(a), peer(b))
                    await trio.sleep(rng.uniform(0, 2))
                    world.network.heal(peer(a), peer(b))
                case 1:
                    world.network.isolate(peer(a))
                    await trio.sleep(rng.uniform(0, 2))
                    world.network.rejoin(peer(a))
                case 2:
                    for runner in world.nodes[a].assets.runners[:1]:
                        runner.kill()
                case 3:
                    cuts = tuple(sorted(rng.sample(range(1, N_LAYERS), rng.randrange(4))))
                    await world.place(cuts, tuple(rng.choices(range(NODES), k=len(cuts) + 1)))


@pytest.mark.parametrize("seed", range(6))
async def test_a_storm_delays_answers_and_leaves_no_leaks(
    seed: int, autojump_clock: MockClock
) -> None:
    async with open_hosting_world(NODES) as world:
        await world.place((3, 7), (1, 2, 3))
        storm = Storm(world, seed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(storm.faults)
            for number in range(REQUESTS):
                nursery.start_soon(storm.one_request, 1000 * seed + number)
        assert storm.outcomes.total() == REQUESTS
        assert storm.outcomes["answered"] >= 5
        # Sessions whose closing was lost with a link are freed by the idle deadline.
        await trio.sleep(400)
        for node in world.nodes:
            assert node.pipeline.engine.sessions() == []
            assert all(v.sessions == v.queued == 0 for v in node.pipeline.stages.views())
            assert all(runner.open_slots == 0 for runner in node.assets.runners)
        placement = world.nodes[0].consensus.state.placements
        assert len(placement) == 1
        params = SamplingParams(seed=1, temperature=0.5)
        for node in world.nodes:
            assert await node.ask([1, 2, 3], 8, params) == toy_generate(
                N_LAYERS, [1, 2, 3], 8, params
            )
