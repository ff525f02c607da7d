"""What an operator does to the simulated swarm, through the same code as the real verbs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import SetDraining
from pyagent_node.node.api.mesh_schema import RemoveMemberRequest, RevokeRequest
from pyagent_node.simulations.fault_kinds import (
    ChurnLeaders,
    Draft,
    Drain,
    Join,
    Leave,
    MoveLeader,
    Replace,
    Reshard,
    Revoke,
)
from pyagent_node.simulations.joining import join
from pyagent_node.simulations.resharding import reshard

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine, Parts
    from pyagent_node.simulations.swarm import Swarm

SECONDS: Final = 5.0
"""How long an operator waits for what was asked."""
PART_SECONDS: Final = 40.0
"""The same for a member's removal, which may have to wait for other voters."""
RETRY_SECONDS: Final = 0.5

Deed = MoveLeader | ChurnLeaders | Replace | Reshard | Draft | Drain | Join | Leave | Revoke


class Operator:
    """Asks on node 0, which holds the mesh's authority; takes no for an answer in the end."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._drained: set[PeerId] = set()
        """Whoever was asked to be drained; the log may learn of it late."""

    async def do(self, deed: Deed) -> None:
        """Do it, or give it up after a while."""
        swarm = self._swarm
        match deed:
            case MoveLeader():
                await self._transfer(swarm.machines[deed.to])
            case ChurnLeaders():
                await self._churn(deed)
            case Replace():
                await swarm.place(deed.boundaries, deed.nodes, SECONDS)
            case Reshard():
                await reshard(swarm, deed)
            case Draft():
                await swarm.draft(deed.node, SECONDS)
            case Drain():
                node = swarm.machines[deed.node].peer_id
                self._drained.add(node)
                await swarm.propose(SetDraining(node, True), SECONDS)
                await trio.sleep(deed.seconds)
                await swarm.propose(SetDraining(node, False), SECONDS)
            case Join():
                for _ in range(deed.count):
                    machine = swarm.add()
                    await swarm.start(machine)
                    await join(swarm, machine)
            case Leave():
                for number in deed.nodes:
                    await self._remove(swarm.machines[number], deed.seconds)
            case Revoke():
                await self._revoke(swarm.machines[deed.node], deed.seconds)

    async def undrain(self) -> None:
        """Take every node that was drained back into service."""
        states = [m.parts.consensus.state for m in self._swarm.up() if m.parts is not None]
        draining = {r.peer_id for s in states for r in s.members.values() if r.draining}
        for machine in self._swarm.machines:
            if machine.peer_id in draining | self._drained and not machine.gone:
                await self._swarm.propose(SetDraining(machine.peer_id, False), SECONDS)

    async def _transfer(self, to: Machine) -> None:
        leader = self._swarm.leader()
        if leader is not None and leader.parts is not None:
            consensus = leader.parts.consensus
            await self._try(lambda: consensus.transfer(to.peer_id))

    async def _churn(self, deed: ChurnLeaders) -> None:
        swarm = self._swarm
        for _ in range(deed.times):
            leader = swarm.leader()
            if leader is not None and leader.parts is not None:
                voters = leader.parts.consensus.status().voters
                heirs = [m for m in swarm.machines if m.peer_id in voters and m is not leader]
                if heirs:
                    await self._transfer(swarm.rng.choice(heirs))
            await trio.sleep(deed.seconds / deed.times)

    async def _try(self, work: Callable[[], Awaitable[object]]) -> None:
        with trio.move_on_after(SECONDS):
            try:
                await work()
            except PyAgentError as error:
                self._swarm.trace.add(None, "refused", error.code)

    async def _remove(self, machine: Machine, lingers: float) -> None:
        request = RemoveMemberRequest(node=machine.peer_id, force=True)
        machine.lingers = lingers
        await self._part(machine, lambda clerk: clerk.governance.remove(request))

    async def _revoke(self, machine: Machine, lingers: float) -> None:
        request = RevokeRequest(node=machine.peer_id, reason="simulated")
        machine.lingers = lingers
        await self._part(machine, lambda clerk: clerk.governance.revoke(request))

    async def _part(self, machine: Machine, ask: Callable[[Parts], Awaitable[object]]) -> None:
        """Repeat until it is out; the swarm notices that by itself."""
        clerk = self._swarm.machines[0]
        with trio.move_on_after(PART_SECONDS):
            while not machine.gone:
                if clerk.parts is not None:
                    try:
                        await ask(clerk.parts)
                    except PyAgentError as error:
                        self._swarm.trace.add(clerk.number, "refused", error.code)
                await trio.sleep(RETRY_SECONDS)
