"""What is prepared disturbs nothing that serves, and is gone when the change is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.node.holdings import runner_key, wanted
from pyagent_node.simulations.guessers import DraftingRunner

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm


class PreparedDisturbsNothing:
    """Looks at every node's state, and at what it keeps loaded."""

    name: ClassVar[str] = "prepared ranks disturb nothing"

    def check(self, swarm: Swarm) -> Iterator[str]:
        """What is prepared follows on what is in force, and that is kept meanwhile."""
        for machine in swarm.up():
            if machine.parts is None:
                continue
            state = machine.parts.consensus.state
            for model, prepared in state.prepared.items():
                placement = state.placements.get(model)
                if placement is None or placement.epoch != prepared.after_epoch:
                    yield (
                        f"node {machine.number} prepares what follows on epoch"
                        f" {prepared.after_epoch}, which has ended"
                    )
                    continue
                kept = machine.parts.controller.kept_runners()
                held = wanted([placement], machine.peer_id).runners
                asked = wanted([], machine.peer_id, [prepared]).runners
                if asked & kept and not held <= kept:
                    missing = ", ".join(sorted(str(key) for key in held - kept))
                    yield f"node {machine.number} let go of {missing} for what is only prepared"

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Nothing is prepared any more, and nothing of it is loaded."""
        leader = swarm.leader()
        if leader is None or leader.parts is None:
            return
        for prepared in leader.parts.consensus.state.prepared.values():
            yield f"preparation {prepared.number} was left"
        for machine in swarm.up():
            yield from _left_over(machine)


def _left_over(machine: Machine) -> Iterator[str]:
    if machine.parts is None or machine.assets is None:
        return
    placements = machine.parts.consensus.state.placements.values()
    keys = {
        runner_key(placement, rank, machine.peer_id)
        for placement in placements
        for rank in placement.ranks
        if machine.peer_id in (rank.peer_id, *rank.standbys)
    }
    runners = [r for r in machine.assets.runners if not isinstance(r, DraftingRunner)]
    if len(runners) > len(keys):
        yield f"node {machine.number} has {len(runners)} runners where {len(keys)} are wanted"
