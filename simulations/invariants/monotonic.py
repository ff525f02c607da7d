"""Terms, commit indices and applied indices of a running node never go back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class NothingGoesBack(Always):
    """Also across restarts: a term that a node has acted in survives its death."""

    name: ClassVar[str] = "nothing goes back"

    def __init__(self) -> None:
        self._terms: dict[int, int] = {}
        self._indices: dict[tuple[int, int], tuple[int, int]] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Compare every node with itself."""
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            status = machine.parts.consensus.status()
            life = (machine.number, machine.lives)
            commit, index = self._indices.get(life, (0, 0))
            if status.commit < commit or status.index < index:
                yield f"node {machine.number} went back from entry {index} to {status.index}"
            if status.index > status.commit:
                yield f"node {machine.number} applied entry {status.index} before it was committed"
            self._indices[life] = (status.commit, status.index)
            if status.role == "leader":
                if status.term < self._terms.get(machine.number, 0):
                    yield f"node {machine.number} leads the past term {status.term}"
                self._terms[machine.number] = status.term
