"""Heads and holders die all the time; every client gets its answer, to the token."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import SessionId
from pyagent_node.inference.generation import Generated
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.sessions import N_LAYERS, SessionWorld, open_session_world

NODES = 9
STEADY = 3
"""Nodes that hold the log and the ranks; the others may die."""
TOKENS = 300
SETTLED_SECONDS = 2.0
"""A session of this age is known to the mesh."""
PASSING = {
    "session_ended",
    "session_claimed",
    "session_read_elsewhere",
    "journal_unavailable",
    "no_leader",
    "peer_unreachable",
    "stream_closed",
    "head_not_ready",
    "deadline_exceeded",
}


class Customer:
    """Wants one answer, and asks whoever runs until it is whole."""

    def __init__(self, world: SessionWorld, number: int, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.seed = number
        self.prompt = [65 + number, 66, 67]
        self.tokens: list[int] = []
        self.moves = 0
        self.session: SessionId | None = None
        self._number = number
        self._began = 0.0

    async def run(self) -> None:
        while len(self.tokens) < TOKENS:
            try:
                await self._try()
            except PyAgentError as error:
                self._judge(error)
                await trio.sleep(0.2)

    def _judge(self, error: PyAgentError) -> None:
        if error.code == "session_not_found":
            age = trio.current_time() - self._began
            assert age < SETTLED_SECONDS, f"a session of {age} s was lost"
            self.session = None
        else:
            assert error.code in PASSING, repr(error)

    async def _try(self) -> None:
        alive = [n for n in self.world.nodes[STEADY:] if not n.scope.cancel_called]
        node = self.rng.choice(alive)
        if self.session is None:
            self.session = SessionId(f"{self.rng.getrandbits(128):032x}")
            self._began = trio.current_time()
            self.tokens.clear()
            request = self.world.request(self.session, self.prompt, TOKENS, seed=self.seed)
            opening = node.live.generate(request, resume_seconds=60.0)
        else:
            self.moves += 1
            opening = node.live.attach(self.session, len(self.tokens))
        with trio.move_on_after(self.rng.choice([1.5, 4.0, 1e9])):  # or until it moves on
            async with opening as reader:
                async for event in reader:
                    if isinstance(event, Generated):
                        self.tokens.append(event.token)


async def trouble(world: SessionWorld, rng: random.Random, log: list[str]) -> None:
    """Kill, restart, cut and heal, one thing at a time."""
    while True:
        await trio.sleep(rng.uniform(1.5, 3.0))
        victim = rng.randrange(STEADY, NODES)
        if rng.random() < 0.6:
            world.crash(victim)
            log.append(f"crash {victim}")
            await trio.sleep(rng.uniform(0.1, 2.0))
            await world.add(victim)
        else:
            peer = world.nodes[victim].peer_id
            world.network.isolate(peer)
            log.append(f"isolate {victim}")
            await trio.sleep(rng.uniform(0.1, 2.0))
            world.network.rejoin(peer)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_a_storm_of_dying_heads(seed: int, autojump_clock: MockClock) -> None:
    rng = random.Random(seed)
    log: list[str] = []
    async with open_session_world(NODES) as world:
        await world.place((3, 7), nodes=(0, 1, 2))
        customers = [Customer(world, i, random.Random(rng.random())) for i in range(4)]
        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trouble, world, rng, log)
                async with trio.open_nursery() as crowd:
                    for customer in customers:
                        crowd.start_soon(customer.run)
                nursery.cancel_scope.cancel()
        for customer in customers:
            params = SamplingParams(seed=customer.seed)
            assert customer.tokens == toy_generate(N_LAYERS, customer.prompt, TOKENS, params), log
        assert sum(customer.moves for customer in customers) >= len(customers)
