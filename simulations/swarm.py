"""The simulated swarm: machines, their network, what befalls them, and what must hold meanwhile.

A run has three phases.  The swarm forms and a model is placed; then faults strike on schedule while
people ask (the safety phase); then everything is mended, and within :data:`HEAL_SECONDS` the swarm
must be whole and every question answered.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import trio

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError, Unavailable
from pyagent_node.base.types import Drafting, Rank, Slice
from pyagent_node.consensus.commands import (
    AdmitMember,
    Command,
    RegisterModel,
    SetDrafting,
    SetPlacement,
)
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.state import is_member
from pyagent_node.node.nurseries import background
from pyagent_node.simulations.draws import N_LAYERS
from pyagent_node.simulations.guessers import DRAFT_RECORD
from pyagent_node.simulations.librarian import Librarian
from pyagent_node.simulations.machine import Machine
from pyagent_node.simulations.members import certificate_of
from pyagent_node.simulations.mesh import SimulatedNetwork, open_network
from pyagent_node.simulations.pipeline import MODEL, peer
from pyagent_node.simulations.placements import RECORD
from pyagent_node.simulations.trace import Trace
from pyagent_node.simulations.workload import Person

LATENCY: Final = 0.002
N_CTX: Final = 1024
N_SEQ: Final = 4
FORM_SECONDS: Final = 120.0
HEAL_SECONDS: Final = 300.0
POLL_SECONDS: Final = 0.05
RETRY_SECONDS: Final = 0.5
DIAL_SECONDS: Final = 1.0
MAX_VIOLATIONS: Final = 20


class Violation(NamedTuple):
    """Something that must never happen did."""

    time: float
    invariant: str
    detail: str


class Swarm:
    """The machines and everything around them; get one from :func:`open_swarm`."""

    def __init__(
        self, network: SimulatedNetwork, nursery: trio.Nursery, rng: random.Random, trace: Trace
    ) -> None:
        self.network = network
        self.nursery = nursery
        self.rng = rng
        self.trace = trace
        self.machines: list[Machine] = []
        self.people: list[Person] = []
        self.librarian: Librarian | None = None
        self.violations: list[Violation] = []
        self._dialling: set[tuple[int, int]] = set()

    def violation(self, invariant: str, detail: str) -> None:
        """Record that ``invariant`` was broken."""
        self.trace.add(None, "VIOLATION", f"{invariant}: {detail}")
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(Violation(trio.current_time(), invariant, detail))

    # ---- machines --------------------------------------------------------------------------

    def add(self) -> Machine:
        """Put one more machine there; it is off."""
        machine = Machine(len(self.machines), random.Random(self.rng.random()))  # noqa: S311
        self.machines.append(machine)
        return machine

    async def start(self, machine: Machine) -> None:
        """Switch a machine on and wait until its node is up (or has failed).

        Of several who do so at once the first one does it.
        """
        await machine.over.wait()
        if machine.switch_on():
            await self.nursery.start(machine.live, self.network, self.trace)
            await self.greet()

    def kill(self, machine: Machine) -> None:
        """Cut a machine's power."""
        if machine.up:
            self.trace.add(machine.number, "dies")
            machine.die(self.network)

    def up(self) -> list[Machine]:
        """Return the machines whose node runs."""
        return [machine for machine in self.machines if machine.up]

    async def greet(self) -> None:
        """Connect whoever can be connected, as nodes with each other's addresses do."""
        up, dialling = self.up(), self._dialling
        for at, a in enumerate(up, start=1):
            if a.parts is None or len(a.parts.mesh.connected) >= len(up) - 1:
                continue
            for b in up[at:]:
                reachable = self.network.reachable(a.peer_id, b.peer_id)
                pair = (a.number, b.number)
                if b.peer_id not in a.parts.mesh.connected and reachable and pair not in dialling:
                    dialling.add(pair)
                    self.nursery.start_soon(self._dial, a, b)

    async def _dial(self, a: Machine, b: Machine) -> None:
        try:
            if a.parts is not None and b.parts is not None:
                await a.parts.mesh.connect(b.parts.mesh.addresses[0])
        except PyAgentError as error:
            self.trace.add(a.number, "dial", f"{b.number}: {error.code}")
        finally:
            self._dialling.discard((a.number, b.number))

    async def see_departures(self) -> None:
        """Switch off for good, after a while, whoever is a member no more."""
        while True:
            await trio.sleep(DIAL_SECONDS)
            leader = self.leader()
            if leader is None or leader.parts is None:
                continue
            members = leader.parts.consensus.state.members
            for machine in self.machines:
                record = members.get(machine.peer_id)
                if record is not None and not is_member(record) and not machine.gone:
                    machine.gone = True
                    self.trace.add(machine.number, "is out")
                    self.nursery.start_soon(self._retire, machine)

    async def _retire(self, machine: Machine) -> None:
        await trio.sleep(machine.lingers)
        machine.holds += 1
        self.kill(machine)

    async def dial_for_ever(self) -> None:
        """Reconnect what can be reconnected."""
        while True:
            await trio.sleep(DIAL_SECONDS)
            await self.greet()

    # ---- what an operator does -------------------------------------------------------------

    def leader(self) -> Machine | None:
        """Return the machine that leads the latest term, if one does."""
        leading = [
            (m.parts.consensus.node.core.term, m)
            for m in self.up()
            if m.parts is not None and m.parts.consensus.leads
        ]
        return max(leading, key=lambda pair: pair[0])[1] if leading else None

    async def propose(self, command: Command, seconds: float = FORM_SECONDS) -> Applied | None:
        """Propose on the first machine, which holds the mesh's authority, until that works.

        Returns ``None`` if it did not in time, or was refused for good.
        """
        machine = self.machines[0]
        with trio.move_on_after(seconds):
            while True:
                if machine.parts is not None:
                    try:
                        return await machine.parts.consensus.propose(command)
                    except PyAgentError as error:
                        self.trace.add(machine.number, "refused", error.code)
                        if not isinstance(error, Unavailable | DeadlineExceeded):
                            return None
                await trio.sleep(RETRY_SECONDS)
        return None

    async def form(self, nodes: int, boundaries: tuple[int, ...] = (4, 7)) -> None:
        """Start the machines, admit them, wait until they vote, and place the model."""
        for _ in range(nodes):
            await self.start(self.add())
        for machine in self.machines:
            await self.admit(machine)
        for record in (RECORD, DRAFT_RECORD):
            await self.propose(RegisterModel(record))
        wanted = min(nodes - (nodes + 1) % 2, 7)
        with trio.move_on_after(FORM_SECONDS):
            while self.voters() < wanted:  # noqa: ASYNC110 - many nodes change it
                await trio.sleep(POLL_SECONDS)
        if self.voters() < wanted:
            self.violation("forming", f"{self.voters()} voters, not {wanted}")
        count = min(nodes, len(boundaries) + 1)
        await self.place(boundaries[: count - 1], tuple(range(nodes - count, nodes)))
        await self.draft(self.rng.randrange(nodes))

    async def admit(self, machine: Machine) -> None:
        """Let the log know a member."""
        await self.propose(
            AdmitMember(
                machine.peer_id, f"n{machine.number}", "voter", certificate_of(machine.number)
            )
        )

    def voters(self) -> int:
        """Return how many vote, as the leader says."""
        leader = self.leader()
        if leader is None or leader.parts is None:
            return 0
        return len(leader.parts.consensus.status().voters)

    async def place(
        self, boundaries: tuple[int, ...], nodes: tuple[int, ...], seconds: float = FORM_SECONDS
    ) -> None:
        """Place the model anew."""
        leader = self.leader()
        if leader is None or leader.parts is None:
            return
        cuts = (0, *boundaries, N_LAYERS)
        last = len(cuts) - 2
        ranks = tuple(
            Rank(r, Slice(cuts[r], cuts[r + 1], r == last), peer(nodes[r])) for r in range(last + 1)
        )
        before = leader.parts.consensus.state.placements.get(MODEL)
        epoch = before.epoch if before is not None else 0
        command = SetPlacement(MODEL, ranks, N_CTX, N_SEQ, epoch)
        with trio.move_on_after(seconds):
            try:
                await leader.parts.consensus.propose(command)
            except PyAgentError as error:
                self.trace.add(leader.number, "refused", f"placement: {error.code}")

    async def draft(self, node: int, seconds: float = FORM_SECONDS) -> None:
        """Let a node draft for the model's sessions."""
        leader = self.leader()
        if leader is None or leader.parts is None:
            return
        placement = leader.parts.consensus.state.placements.get(MODEL)
        if placement is None:
            return
        drafting = Drafting(drafter=DRAFT_RECORD.digest, peer_id=peer(node))
        with trio.move_on_after(seconds):
            try:
                await leader.parts.consensus.propose(SetDrafting(MODEL, drafting, placement.epoch))
            except PyAgentError as error:
                self.trace.add(leader.number, "refused", f"drafting: {error.code}")

    # ---- people ----------------------------------------------------------------------------

    def ask(self) -> Person:
        """Let somebody ask a question."""
        person = Person(len(self.people), self, random.Random(self.rng.random()))  # noqa: S311
        self.people.append(person)
        self.nursery.start_soon(person.ask)
        return person


@asynccontextmanager
async def open_swarm(seed: int, trace: Trace) -> AsyncIterator[Swarm]:
    """Run an empty swarm whose every random choice comes from ``seed``."""
    rng = random.Random(seed)  # noqa: S311 - must repeat itself
    async with open_network(latency=LATENCY) as network, background() as nursery:
        swarm = Swarm(network, nursery, rng, trace)
        nursery.start_soon(swarm.dial_for_ever)
        nursery.start_soon(swarm.see_departures)
        yield swarm
