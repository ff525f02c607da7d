"""Terms, commit indices and applied indices of a running node never go back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class NothingGoesBack(Always):
    """Also across restarts: a term that a node has led survives its death."""

    name: ClassVar[str] = "nothing goes back"

    def __init__(self) -> None:
        self._terms: dict[int, tuple[int, int]] = {}
        self._indices: dict[tuple[int, int], tuple[int, int]] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Compare every node with itself."""
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            engine = machine.parts.consensus
            core, applied = engine.node.core.status(), engine.node.history.index
            life = (machine.number, machine.lives)
            commit, index = self._indices.get(life, (0, 0))
            if core.commit < commit or applied < index:
                yield f"node {machine.number} went back from entry {index} to {applied}"
            if applied > core.commit:
                yield f"node {machine.number} applied entry {applied} before it was committed"
            self._indices[life] = (core.commit, applied)
            erasures = machine.disk.erasures + machine.disk.damages
            led, before = self._terms.get(machine.number, (0, erasures))
            if erasures == before and core.term < led:
                yield f"node {machine.number} led term {led} and is in term {core.term}"
            if engine.leads:
                self._terms[machine.number] = (core.term, erasures)
