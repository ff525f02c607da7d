"""The engine "single" in a seeded storm: crashes, restarts and cut links, the writer's included."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter

import pytest
import trio

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.consensus.commands import ModelRecord, RegisterModel
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.replica import Replica
from pyagent_node.consensus.single import SingleEngine, open_single
from pyagent_node.consensus.state import check_invariants, encode_snapshot
from pyagent_node.node.identity import NodeKey
from pyagent_node.simulations.mesh import SimulatedNetwork, open_network

PEERS = [NodeKey(bytes([n]) * 32).peer_id for n in range(4)]
LEADER = PEERS[0]
STORM_SECONDS = 120.0


def model(n: int) -> RegisterModel:
    digest = Digest(f"{n:064x}")
    return RegisterModel(
        ModelRecord(digest, f"m{n}", 1, "llama", 1, 1, 1, 1, Digest("0" * 64), created=0)
    )


class Storm:
    """Four nodes that come and go while each of them proposes."""

    def __init__(self, network: SimulatedNetwork, seed: int) -> None:
        self.network = network
        self.rng = random.Random(seed)
        self.compaction = [7, 50, 1000] if seed % 2 else [10_000]
        self.logs = {peer: MemoryLog() for peer in PEERS}
        self.engines: dict[PeerId, SingleEngine] = {}
        self.acknowledged: set[Digest] = set()
        self.proposed = 0
        self.calm = trio.Event()

    def request(self) -> bytes:
        return self.rng.randbytes(16)

    async def live(self, peer: PeerId) -> None:
        """Run a node through several lives, the last of which outlives the storm."""
        while True:
            mesh = self.network.node(peer)
            await self.greet()
            async with (
                open_single(
                    mesh,
                    self.logs[peer],
                    leader=LEADER,
                    compact_entries=self.rng.choice(self.compaction),
                    new_request=self.request,
                    rng=self.rng,
                ) as engine,
                trio.open_nursery() as nursery,
            ):
                self.engines[peer] = engine
                nursery.start_soon(self.propose, engine)
                with trio.move_on_after(self.rng.uniform(1, 20)):
                    await self.calm.wait()
                if self.calm.is_set():
                    await trio.sleep_forever()
                nursery.cancel_scope.cancel()
            self.network.crash(peer)
            await trio.sleep(self.rng.uniform(0, 5))

    async def greet(self) -> None:
        """Connect whoever can be, as nodes with bootstrap addresses do."""
        for a, b in itertools.combinations(PEERS, 2):
            with contextlib.suppress(Unavailable):
                await self.network.find(b, a).connect(self.network.find(a, b).addresses[0])

    async def propose(self, engine: SingleEngine) -> None:
        while not self.calm.is_set():
            self.proposed += 1
            command = model(self.proposed)
            try:
                await engine.propose(command)
                self.acknowledged.add(command.model.digest)
                assert command.model.digest in engine.state.models
            except PyAgentError:
                await trio.sleep(0.1)
            await trio.sleep(self.rng.uniform(0, 0.5))

    async def weather(self) -> None:
        end = trio.current_time() + STORM_SECONDS
        while trio.current_time() < end:
            a, b = self.rng.sample(PEERS, 2)
            self.network.cut(a, b)
            await trio.sleep(self.rng.uniform(0, 4))
            self.network.heal(a, b)
            await self.greet()
            await trio.sleep(self.rng.uniform(0, 2))
        self.calm.set()


@pytest.mark.parametrize("seed", range(8))
async def test_storm(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    async with open_network(latency=0.02) as network, trio.open_nursery() as nursery:
        storm = Storm(network, seed)
        for peer in PEERS:
            nursery.start_soon(storm.live, peer)
        await storm.weather()
        await trio.sleep(30)
        await storm.greet()
        await trio.sleep(30)
        engines = [storm.engines[peer] for peer in PEERS]
        for engine in engines:
            await engine.read_barrier()
            check_invariants(engine.state)
        assert len({encode_snapshot(engine.state) for engine in engines}) == 1
        assert storm.acknowledged <= set(engines[0].state.models)
        assert len(storm.acknowledged) > 100
        nursery.cancel_scope.cancel()
    await check_log(storm.logs[LEADER])


async def check_log(log: MemoryLog) -> None:
    """What is kept of the log holds no command twice, and applies from its snapshot on."""
    stored = await log.load()
    replica = Replica()
    if stored.snapshot is None:
        commands = Counter(replica.apply(entry)[1].command for entry in stored.entries)
        assert set(commands.values()) <= {1}
    assert stored.last_index > 100
