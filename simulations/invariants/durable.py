"""What a node has applied, its log still holds when it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class AppliedStays(Always):
    """An entry is applied once it is on the disks of a majority, this node's among them or not;
    what this node itself acknowledged to be durable is there after any crash but of the disk.
    """

    name: ClassVar[str] = "what was applied stays"

    def __init__(self) -> None:
        self._applied: dict[int, tuple[int, int, int]] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Compare the log of a node that came back with what it had applied before."""
        for machine in swarm.machines:
            unreadable = any(error.code == "log_corrupt" for error in machine.failures)
            if unreadable and not machine.disk.damages:
                yield f"node {machine.number} cannot read its log, though no disk is damaged"
            if machine.parts is None:
                continue
            engine = machine.parts.consensus
            life, disk = machine.lives, machine.disk.erasures + machine.disk.damages
            before, same_disk, applied = self._applied.get(machine.number, (life, disk, 0))
            if before != life and same_disk == disk:
                last = engine.node.core.status().last_index
                if last < applied:
                    yield f"node {machine.number} came back with {last} entries of {applied}"
            index = engine.state.index
            if same_disk == disk and before == life:
                index = max(index, applied)
            self._applied[machine.number] = (life, disk, index)
