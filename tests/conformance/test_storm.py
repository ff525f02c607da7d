"""Seeded storms: everything at once, and nothing that must not happen."""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections import deque

import pytest
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame

from .clients import Clients
from .cluster import Cluster, Machine, Opener, cluster, simulate

STORM_SECONDS = 60.0
SEEDS = int(os.environ.get("PYAGENT_STORM_SEEDS", "2"))
"""Storms of each engine; more of them find more."""


class Storm:
    """Weather, hardware and users, all driven by one generator."""

    def __init__(self, made: Cluster, seed: int) -> None:
        self.cluster = made
        self.clients = Clients(made)
        self.rng = random.Random(seed)
        self.calm = False
        self.reads = 0
        self._sent: dict[tuple[PeerId, PeerId, str], deque[Frame]] = {}

    async def use(self, machine: Machine) -> None:
        """A user of one node."""
        while not self.calm:
            if machine.engine is not None:
                with trio.CancelScope() as patience:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._until_over, machine, patience)
                        await self._act(machine)
                        nursery.cancel_scope.cancel()
            await trio.sleep(self.rng.uniform(0, 1.0))

    async def _until_over(self, machine: Machine, patience: trio.CancelScope) -> None:
        """A user whose node dies gets no answer."""
        await machine.over.wait()
        patience.cancel()

    async def _act(self, machine: Machine) -> None:
        match self.rng.randrange(4):
            case 0:
                await self.clients.write(machine)
            case 1:
                await self.clients.swap(machine, self.rng.choice(self.cluster.machines))
            case _:
                self.reads += await self.clients.read(machine)

    async def weather(self) -> None:
        """Cut, stall and mend links."""
        peers = [machine.peer_id for machine in self.cluster.machines]
        network = self.cluster.network
        while not self.calm:
            a, b = self.rng.sample(peers, 2)
            length = self.rng.uniform(0, 6)
            match self.rng.randrange(4):
                case 0:
                    network.cut(a, b)
                    await trio.sleep(length)
                    network.heal(a, b)
                case 1:
                    network.isolate(a)
                    await trio.sleep(length)
                    network.rejoin(a)
                case 2:
                    network.hold(a, b)
                    await trio.sleep(length)
                    network.release(a, b)
                case _:
                    for other in peers:
                        network.hold(a, other)
                    await trio.sleep(length)
                    for other in peers:
                        network.release(a, other)
            await self.cluster.greet()
            await trio.sleep(self.rng.uniform(0, 3))

    async def hardware(self) -> None:
        """Kill programs and machines, fill disks and make them slow."""
        while not self.calm:
            await trio.sleep(self.rng.uniform(0, 5))
            machine = self.rng.choice(self.cluster.machines)
            disk = machine.disk
            match self.rng.randrange(6):
                case 0:
                    await self.cluster.kill(machine)
                case 1:
                    await self.cluster.kill(machine, power=True)
                case 2:
                    disk.power_for = self.rng.randrange(12)
                    with trio.move_on_after(3):
                        await machine.over.wait()
                case 3:
                    disk.room = 0.0
                    await trio.sleep(self.rng.uniform(0, 4))
                    disk.room = 1e9
                case 4:
                    disk.delay = self.rng.uniform(0, 0.3)
                case _:
                    disk.failing_syncs = 1
                    with trio.move_on_after(3):
                        await machine.over.wait()
            disk.failing_syncs = 0
            await trio.sleep(self.rng.uniform(0, 4))
            for each in self.cluster.machines:
                if each.engine is None:
                    await self.cluster.start(each)

    async def operator(self) -> None:
        """Change who votes, hand over, compact."""
        while not self.calm:
            await trio.sleep(self.rng.uniform(0, 6))
            machine = self.rng.choice(self.cluster.machines)
            engine = machine.engine
            if engine is None:
                continue
            with trio.move_on_after(5), contextlib.suppress(PyAgentError):
                match self.rng.randrange(4):
                    case 0:
                        await engine.transfer(self.rng.choice(self.cluster.machines).peer_id)
                    case 1:
                        await engine.compact()
                    case _:
                        await self._reconfigure()

    async def _reconfigure(self) -> None:
        """Let some others vote, three at least."""
        machines = self.cluster.machines
        count = self.rng.randint(3, len(machines))
        voters = frozenset(machine.peer_id for machine in self.rng.sample(machines, count))
        rest = frozenset(machine.peer_id for machine in machines) - voters
        leader = await self.cluster.leader()
        await leader.running.reconfigure(voters, rest)

    def meddle(self, sender: PeerId, receiver: PeerId, protocol: str, frame: Frame) -> list[Frame]:
        """Now and then deliver a frame twice, and an old frame again."""
        sent = self._sent.setdefault((sender, receiver, protocol), deque(maxlen=50))
        sent.append(frame)
        luck = self.rng.random()
        if self.calm or luck > 0.1:
            return [frame]
        return [frame, frame] if luck > 0.05 else [frame, self.rng.choice(sent)]


async def storm(engine: Opener, seed: int, *, members: bool) -> None:
    rng = random.Random(seed)
    async with cluster(engine, seed, compact_entries=rng.choice([15, 60, 4096])) as made:
        await made.form(rng.choice([4, 5, 6] if members else [3, 3, 5]))
        weather = Storm(made, seed)
        if seed % 2:
            made.network.meddler = weather.meddle
        async with trio.open_nursery() as nursery:
            for machine in made.machines:
                nursery.start_soon(weather.use, machine)
                nursery.start_soon(weather.use, machine)
            nursery.start_soon(weather.weather)
            nursery.start_soon(weather.hardware)
            if members:
                nursery.start_soon(weather.operator)
            await trio.sleep(STORM_SECONDS)
            weather.calm = True
        for machine in made.machines:
            machine.disk.delay, machine.disk.room = 0.0, 1e9
            machine.disk.power_for = math.inf
            if machine.engine is None:
                await made.start(machine)
        await made.greet()
        await made.settled()
        assert len({machine.running.state.index for machine in made.machines}) <= 2
        for machine in made.machines:
            assert await weather.clients.read(machine)
        weather.clients.check()
        assert len(weather.clients.acknowledged) > 5
        assert weather.reads > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_storm(engine: Opener, seed: int) -> None:
    simulate(lambda: storm(engine, seed, members=False), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_storm_of_members(engine: Opener, seed: int) -> None:
    simulate(lambda: storm(engine, seed, members=True), seed)
