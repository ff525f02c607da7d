"""Nodes of a Raft engine on a simulated network, by short names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import trio

from pyagent_node.base.types import Digest, PeerId
from pyagent_node.consensus.commands import BurnTicket, Command, ModelRecord, RegisterModel
from pyagent_node.consensus.log import LogStore, MemoryLog
from pyagent_node.consensus.raft import RaftEngine, RaftTiming, open_raft
from pyagent_node.consensus.raft_core import RAFT_RS, Kind
from pyagent_node.consensus.segments import LogEntry
from pyagent_node.simulations.mesh import SimulatedMesh

from .conftest import Network, Place


def model(n: int) -> RegisterModel:
    return RegisterModel(
        ModelRecord(
            Digest(f"{n:064x}"), f"m{n}", 1, "llama", 1, 1, 1, 1, Digest("0" * 64), created=0
        )
    )


def burn(n: int) -> BurnTicket:
    return BurnTicket(f"{n:032x}", PeerId("a"), 1 << 40)


class SlowLog(MemoryLog):
    """A log on a disk that takes 5 ms to sync."""

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        await trio.sleep(0.005)
        await super().append(entries, hard_state)


def allow(command: Command, proposer: PeerId, role: str | None) -> None:
    """Let everybody propose everything."""


class Life:
    """A node from its start to its end; cancelling ``scope`` is a crash."""

    def __init__(self, mesh: SimulatedMesh, scope: trio.CancelScope) -> None:
        self.engine: RaftEngine
        self.mesh = mesh
        self.scope = scope
        self.end = trio.Event()
        self.over = trio.Event()
        self.failure: Exception | None = None


class Cluster:
    """Several nodes; the first to start founds the mesh."""

    def __init__(
        self, network: Network, nursery: trio.Nursery, *, seed: int = 0, kind: Kind = RAFT_RS
    ) -> None:
        self.kind = kind
        self.network = network
        self.nursery = nursery
        self.rng = random.Random(seed)
        self.timing = RaftTiming()
        self.authorise: Callable[[Command, PeerId, str | None], None] = allow
        self.compact_entries = 4096
        self.propose_seconds = 15.0
        self.places: dict[str, Place] = {}
        self.stores: dict[str, LogStore] = {}
        self.lives: dict[str, Life] = {}
        self._count = 0

    def place(self, name: str) -> Place:
        return self.places.setdefault(name, Place(name, "voter"))

    def peer(self, name: str) -> PeerId:
        return self.place(name).peer_id

    def peers(self, names: Iterable[str]) -> frozenset[PeerId]:
        return frozenset(self.peer(name) for name in names)

    def engine(self, name: str) -> RaftEngine:
        return self.lives[name].engine

    async def start(
        self, name: str, *, founder: bool = False, store: LogStore | None = None
    ) -> RaftEngine:
        if store is not None:
            self.stores[name] = store
        self.stores.setdefault(name, MemoryLog())
        life: Life = await self.nursery.start(self._live, name, founder)
        return life.engine

    def _ask(self, command: Command, proposer: PeerId, role: str | None) -> None:
        self.authorise(command, proposer, role)

    async def _live(self, name: str, founder: bool, task_status: trio.TaskStatus[Life]) -> None:
        life: Life | None = None
        try:
            with trio.CancelScope() as scope:
                async with self.network.started(self.place(name)) as mesh:
                    life = Life(mesh, scope)
                    await self._run(name, life, founder, task_status)
        except Exception as error:
            if life is None or name not in self.lives:
                raise
            life.failure = error
        finally:
            if life is not None:
                self.lives.pop(name, None)
                life.over.set()

    async def _run(
        self, name: str, life: Life, founder: bool, task_status: trio.TaskStatus[Life]
    ) -> None:
        async with open_raft(
            life.mesh,
            self.stores[name],
            founder=founder,
            role="voter",
            authorise=self._ask,
            timing=self.timing,
            rng=self.rng,
            new_request=lambda: self.rng.randbytes(16),
            propose_seconds=self.propose_seconds,
            compact_entries=self.compact_entries,
            kind=self.kind,
        ) as engine:
            life.engine = engine
            self.lives[name] = life
            task_status.started(life)
            await life.end.wait()

    async def finish(self, name: str) -> None:
        """End a node in order."""
        life = self.lives[name]
        life.end.set()
        await life.over.wait()

    async def stop(self, *names: str) -> None:
        """Crash nodes at once."""
        lives = [self.lives[name] for name in names]
        for life in lives:
            life.scope.cancel()
        for life in lives:
            await life.over.wait()

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110 - on the test's own clock
                await trio.sleep(0.01)

    def leaders(self) -> list[str]:
        return [n for n, life in self.lives.items() if life.engine.status().role == "leader"]

    async def leader(self) -> str:
        """Wait for one leader that all running nodes follow."""

        def agreed() -> bool:
            leaders = self.leaders()
            if len(leaders) != 1:
                return False
            peer = self.peer(leaders[0])
            return all(life.engine.status().leader == peer for life in self.lives.values())

        await self.until(agreed)
        return self.leaders()[0]

    async def found(self, voters: str, learners: str = "") -> None:
        """Start nodes and make them voters and learners, the first voter being the founder."""
        first = voters[0]
        engine = await self.start(first, founder=True)
        for name in (*voters[1:], *learners):
            await self.start(name)
        others = [*voters[1:], *learners]
        await self.until(lambda: self.peers(others) <= set(engine.members.heard))
        await engine.reconfigure(self.peers(first), self.peers(others))
        await engine.reconfigure(self.peers(voters), self.peers(learners))
        await self.settled()

    async def settled(self, seconds: float = 60.0) -> None:
        """Wait until all running nodes have applied the same."""

        def even() -> bool:
            statuses = [life.engine.status() for life in self.lives.values()]
            return (
                len({(s.index, s.commit, s.term) for s in statuses}) == 1
                and statuses[0].index == statuses[0].commit
            )

        await self.until(even, seconds)

    async def propose(self, name: str) -> int:
        """Propose one more model on a node; returns its index in the log."""
        self._count += 1
        return (await self.engine(name).propose(model(self._count))).index
