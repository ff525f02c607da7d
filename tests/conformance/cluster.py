"""A cluster of one engine on the simulated network and disks; nodes that die and come back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeVar

import trio

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import Command, SetBuckets, SetMeshSetting
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.port import Applied, Consensus
from pyagent_node.node.identity import NodeKey
from pyagent_node.simulations.deterministic import run_deterministic
from pyagent_node.simulations.disk import SimulatedDisk, SimulatedLog
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network

from .observer import Observer

T = TypeVar("T")

LATENCY: Final = 0.01
ELECTION_SECONDS: Final = 2.0
"""The longest election timeout of the engines under test, with their default timing."""
POLL_SECONDS: Final = 0.05
REGISTER: Final = "session_ttl"
"""The mesh setting that serves as a register; values from 10 to 86,400."""


class Opener(Protocol):
    """Opens an engine on a node; the same for every engine."""

    def __call__(
        self,
        mesh: Mesh,
        store: LogStore,
        *,
        founder: bool,
        rng: random.Random,
        new_request: Callable[[], bytes],
        compact_entries: int,
        **others: Any,
    ) -> AbstractAsyncContextManager[Consensus]:
        """See the engine."""
        ...


@dataclass
class Machine:
    """One node through its lives."""

    number: int
    peer_id: PeerId
    disk: SimulatedDisk
    founder: bool = False
    engine: Consensus | None = None
    mesh: SimulatedMesh | None = None
    failure: BaseException | None = None
    """What ended the engine by itself."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)
    ending: Literal["", "stopped", "killed", "power"] = ""
    """How this life ends: in order, with the program, with the machine."""

    @property
    def running(self) -> Consensus:
        """The engine, which runs."""
        assert self.engine is not None, f"node {self.number} is down"
        return self.engine


class Cluster:
    """Nodes 0, 1, 2 ... of which 0 founds the mesh; get one from :func:`cluster`."""

    def __init__(
        self,
        network: SimulatedNetwork,
        nursery: trio.Nursery,
        open_engine: Opener,
        rng: random.Random,
        compact_entries: int,
        others: dict[str, Any],
    ) -> None:
        self.network = network
        self.rng = rng
        self.machines: list[Machine] = []
        self.observer = Observer()
        self._nursery = nursery
        self._open = open_engine
        self._compact_entries = compact_entries
        self._others = others

    # Lives ----------------------------------------------------------------------------------------

    def add(self) -> Machine:
        """Make a machine; it does not run yet."""
        number = len(self.machines)
        peer = NodeKey(bytes([number + 1]) * 32).peer_id
        disk = SimulatedDisk(random.Random(self.rng.random()), name=f"disk{number}")
        machine = Machine(number, peer, disk, founder=number == 0)
        self.machines.append(machine)
        return machine

    async def start(self, machine: Machine) -> Machine:
        """Run a machine and wait until its engine is open."""
        machine.scope, machine.over = trio.CancelScope(), trio.Event()
        machine.failure, machine.ending = None, ""
        await self._nursery.start(self._live, machine)
        return machine

    async def _live(
        self, machine: Machine, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        log = SimulatedLog(machine.disk, on_power_loss=lambda: self._lose_power(machine))
        machine.mesh = self.network.node(machine.peer_id)
        try:
            with machine.scope:
                await self._greet(machine)
                async with self._open(
                    machine.mesh,
                    log,
                    founder=machine.founder,
                    rng=random.Random(self.rng.random()),
                    new_request=lambda: self.rng.randbytes(16),
                    compact_entries=self._compact_entries,
                    **self._others,
                ) as engine:
                    machine.founder = False
                    machine.engine = engine
                    task_status.started()
                    async with self.observer.watching(machine):
                        await trio.sleep_forever()
        except* PyAgentError as errors:
            machine.failure = errors
        finally:
            machine.engine = None
            if machine.mesh is not None:
                machine.mesh = None
                self.network.crash(machine.peer_id)
            if machine.ending == "power":
                machine.disk.crash()
            elif machine.ending == "killed":
                machine.disk.survive()
            machine.over.set()
            with contextlib.suppress(RuntimeError):
                task_status.started()

    def _lose_power(self, machine: Machine) -> None:
        machine.ending = machine.ending or "power"
        machine.scope.cancel()

    async def _greet(self, machine: Machine) -> None:
        """Connect to whoever can be reached, as a node with bootstrap addresses does."""
        assert machine.mesh is not None
        for other in self.machines:
            if other.mesh is not None and other is not machine:
                with contextlib.suppress(PyAgentError):
                    if self.network.reachable(machine.peer_id, other.peer_id):
                        await machine.mesh.connect(other.mesh.addresses[0])

    async def greet(self) -> None:
        """Connect whoever can be connected."""
        for machine in self.machines:
            if machine.mesh is not None:
                await self._greet(machine)

    async def kill(self, machine: Machine, *, power: bool = False) -> None:
        """End a machine's program at once; with ``power``, lose what was not synced too."""
        self._end(machine, "power" if power else "killed")
        machine.disk.power_for = 0  # whatever it still tries on its way out does not happen
        await machine.over.wait()

    async def stop(self, machine: Machine) -> None:
        """End a machine's program in order."""
        self._end(machine, "stopped")
        await machine.over.wait()

    def _end(self, machine: Machine, ending: Literal["stopped", "killed", "power"]) -> None:
        if machine.engine is not None:
            self.observer.look(machine)
        machine.ending = ending
        machine.scope.cancel()

    async def restart(self, machine: Machine, *, power: bool = False) -> None:
        """Kill a machine and start it again."""
        await self.kill(machine, power=power)
        await self.start(machine)

    # The whole ------------------------------------------------------------------------------------

    async def form(self, count: int) -> list[Machine]:
        """Start ``count`` machines that all vote."""
        for _ in range(count):
            await self.start(self.add())
        await self.leader()
        await self.reconfigure(self.machines)
        return self.machines

    def up(self) -> list[Machine]:
        """Return the machines that run."""
        return [machine for machine in self.machines if machine.engine is not None]

    async def leader(self, among: Iterable[Machine] | None = None) -> Machine:
        """Wait for a leader that its followers know, and return it."""
        chosen = list(among) if among is not None else None
        with trio.fail_after(60):
            while True:
                for machine in chosen if chosen is not None else self.up():
                    if machine.engine is not None:
                        status = machine.engine.status()
                        if status.role == "leader" and status.leader == machine.peer_id:
                            return machine
                await trio.sleep(POLL_SECONDS)

    async def reconfigure(
        self, voters: Iterable[Machine], learners: Iterable[Machine] = (), seconds: float = 60.0
    ) -> None:
        """Make these the voters and learners, whoever leads meanwhile."""
        wanted = frozenset(machine.peer_id for machine in voters)
        others = frozenset(machine.peer_id for machine in learners)

        async def change() -> None:
            leader = await self.leader()
            await leader.running.reconfigure(wanted, others)

        await retried(change, seconds)

    async def propose(self, command: Command, seconds: float = 60.0) -> Applied:
        """Propose on whoever leads until it is taken; the command may be applied more than once."""

        async def attempt() -> Applied:
            return await (await self.leader()).running.propose(command)

        return await retried(attempt, seconds)

    async def settled(self, seconds: float = 60.0) -> int:
        """Wait until every machine that runs has applied all there is; return that index."""
        applied = await self.propose(SetMeshSetting("standbys", self.rng.randrange(5)))
        for machine in self.up():
            await retried(partial(self._follows, machine, applied.index), seconds)
        return applied.index

    async def _follows(self, machine: Machine, index: int) -> None:
        """Raise while a machine that runs has not applied an entry."""
        await trio.lowlevel.checkpoint()
        if machine.engine is not None and machine.engine.state.index < index:
            status = machine.engine.status()
            raise Unavailable(f"node {machine.number} is behind {index}: {status}", code="behind")

    def check(self) -> None:
        """Everything that must hold now."""
        for machine in self.up():
            self.observer.look(machine)
        self.observer.check()


async def retried(work: Callable[[], Awaitable[T]], seconds: float) -> T:
    """Do something until it works; what passes by itself is tried again."""
    last: PyAgentError | None = None
    with trio.move_on_after(seconds):
        while True:
            try:
                return await work()
            except PyAgentError as error:
                last = error
            await trio.sleep(0.2)
    raise AssertionError(f"it did not work within {seconds} s: {last and last.code}: {last}")


def write(value: int) -> SetMeshSetting:
    """Return a command that writes the register."""
    return SetMeshSetting(REGISTER, value)


def swap(after: int, owner: PeerId) -> SetBuckets:
    """Return a command that takes the counter from ``after`` to one more."""
    return SetBuckets(((owner,),), after)


@asynccontextmanager
async def cluster(
    open_engine: Opener,
    seed: int = 0,
    *,
    compact_entries: int = 4096,
    latency: float = LATENCY,
    **others: Any,
) -> AsyncIterator[Cluster]:
    """Run an empty cluster; at the end everything that must hold is checked.

    ``others`` go to the engine as they are.
    """
    async with open_network(latency=latency) as network, trio.open_nursery() as nursery:
        made = Cluster(network, nursery, open_engine, random.Random(seed), compact_entries, others)
        nursery.start_soon(made.observer.poll)
        yield made
        made.check()
        for machine in made.up():
            await made.stop(machine)
        nursery.cancel_scope.cancel()


def simulate(program: Callable[[], Awaitable[None]], seed: int = 0) -> None:
    """Run a test on virtual time, in an order that the seed decides."""
    run_deterministic(program, seed)
