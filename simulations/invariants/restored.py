"""After healing the swarm is whole again: one log, voters, ranks with standbys, all answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.simulations.pipeline import MODEL

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class Restored:
    """Asks for nothing under faults."""

    name: ClassVar[str] = "restored"

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Yield nothing."""
        yield from ()

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Look at everything a healthy swarm has."""
        off = [m.number for m in swarm.machines if not m.up and not m.gone]
        if off:
            yield f"nodes {off} do not run"
        leader = swarm.leader()
        if leader is None or leader.parts is None:
            yield "nobody leads"
            return
        status = leader.parts.consensus.status()
        if status.joint or len(status.voters) % 2 == 0:
            yield f"{len(status.voters)} voters, joint: {status.joint}"
        for machine in swarm.up():
            if machine.parts is not None and machine.parts.consensus.state.index < status.index:
                index = machine.parts.consensus.state.index
                yield f"node {machine.number} is at entry {index} of {status.index}"
        placement = leader.parts.consensus.state.placements.get(MODEL)
        if placement is None:
            yield "the model is not placed any more"
            return
        running = {machine.peer_id for machine in swarm.up()}
        for rank in placement.ranks:
            if rank.peer_id not in running:
                yield f"rank {rank.rank} is on a node that does not run"
            elif not rank.standbys and len(running) > len(placement.ranks):
                yield f"rank {rank.rank} has no standby"
        waiting = [person.number for person in swarm.people if not person.finished]
        if waiting:
            yield f"requests {waiting} were not answered"
