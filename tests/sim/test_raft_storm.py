"""The engines raft-rs and pysyncobj in a seeded storm: crashes, cuts, hand-overs, new voters."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter, defaultdict

import pytest
import trio
import trio.testing

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.consensus.commands import Command, ModelRecord, RegisterModel
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.pysyncobj_engine import PYSYNCOBJ
from pyagent_node.consensus.raft import RaftEngine, open_raft
from pyagent_node.consensus.raft_core import RAFT_RS, Kind
from pyagent_node.consensus.state import check_invariants, encode_snapshot
from pyagent_node.node.identity import NodeKey
from pyagent_node.simulations.mesh import SimulatedNetwork, open_network

PEERS = [NodeKey(bytes([n]) * 32).peer_id for n in range(1, 6)]
STORM_SECONDS = 120.0


def model(n: int) -> RegisterModel:
    digest = Digest(f"{n:064x}")
    return RegisterModel(
        ModelRecord(digest, f"m{n}", 1, "llama", 1, 1, 1, 1, Digest("0" * 64), created=0)
    )


def allow(command: Command, proposer: PeerId, role: str | None) -> None:
    """Let everybody propose everything."""


class Storm:
    """Five nodes that come and go while each of them proposes, and some of them vote."""

    def __init__(self, network: SimulatedNetwork, seed: int, kind: Kind) -> None:
        self.kind = kind
        self.network = network
        self.rng = random.Random(seed)
        self.compaction = [7, 50, 1000] if seed % 2 else [10_000]
        self.logs = {peer: MemoryLog() for peer in PEERS}
        self.engines: dict[PeerId, RaftEngine] = {}
        self.acknowledged: set[Digest] = set()
        self.proposed = 0
        self.leaders: dict[int, set[PeerId]] = defaultdict(set)
        self.chains: dict[int, bytes] = {}
        self.applied: dict[PeerId, Counter[Command]] = defaultdict(Counter)
        self.calm = trio.Event()

    def request(self) -> bytes:
        return self.rng.randbytes(16)

    async def live(self, peer: PeerId) -> None:
        """Run a node through several lives, the last of which outlives the storm."""
        founder = peer == PEERS[0]
        while True:
            mesh = self.network.node(peer)
            await self.greet()
            async with (
                open_raft(
                    mesh,
                    self.logs[peer],
                    founder=founder,
                    role="voter",
                    authorise=allow,
                    compact_entries=self.rng.choice(self.compaction),
                    new_request=self.request,
                    rng=self.rng,
                    kind=self.kind,
                ) as engine,
                trio.open_nursery() as nursery,
            ):
                self.engines[peer] = engine
                nursery.start_soon(self.propose, engine)
                nursery.start_soon(self.follow, peer, engine)
                nursery.start_soon(self.lead, engine)
                with trio.move_on_after(self.rng.uniform(1, 30)):
                    await self.calm.wait()
                if self.calm.is_set():
                    await trio.sleep_forever()
                nursery.cancel_scope.cancel()
            founder = False
            self.network.crash(peer)
            await trio.sleep(self.rng.uniform(0, 5))

    async def greet(self) -> None:
        """Connect whoever can be, as nodes with bootstrap addresses do."""
        for a, b in itertools.combinations(PEERS, 2):
            with contextlib.suppress(Unavailable):
                await self.network.find(b, a).connect(self.network.find(a, b).addresses[0])

    async def propose(self, engine: RaftEngine) -> None:
        while not self.calm.is_set():
            self.proposed += 1
            command = model(self.proposed)
            try:
                await engine.propose(command)
                self.acknowledged.add(command.model.digest)
                assert command.model.digest in engine.state.models
            except PyAgentError:
                await trio.sleep(0.1)
            await trio.sleep(self.rng.uniform(0, 0.7))

    async def follow(self, peer: PeerId, engine: RaftEngine) -> None:
        """Look at every moment: one leader a term, one log."""
        while True:
            status = engine.status()
            if status.role == "leader":
                self.leaders[status.term].add(peer)
                assert len(self.leaders[status.term]) == 1
            for index in range(max(1, status.index - 20), status.index + 1):
                chain = engine.chain_at(index)
                if chain is not None:
                    assert self.chains.setdefault(index, chain) == chain, index
            await trio.sleep(0.1)

    async def lead(self, engine: RaftEngine) -> None:
        """Change voters and hand over, as whoever leads may."""
        while not self.calm.is_set():
            await trio.sleep(self.rng.uniform(1, 4))
            if engine.status().role != "leader":
                continue
            with contextlib.suppress(PyAgentError):
                if self.rng.random() < 0.3:
                    await engine.transfer(self.rng.choice(PEERS))
                else:
                    voters = frozenset(self.rng.sample(PEERS, self.rng.choice([3, 3, 4, 5])))
                    await engine.reconfigure(voters, frozenset(PEERS) - voters)

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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RAFT_RS, PYSYNCOBJ], ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(8))
async def test_storm(seed: int, kind: Kind, autojump_clock: trio.testing.MockClock) -> None:
    async with open_network(latency=0.02) as network, trio.open_nursery() as nursery:
        storm = Storm(network, seed, kind)
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
