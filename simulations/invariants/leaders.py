"""No two nodes lead the same term."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class OneLeaderATerm(Always):
    """Election safety (Ongaro and Ousterhout, "In Search of an Understandable Consensus
    Algorithm", figure 3).
    """

    name: ClassVar[str] = "one leader a term"

    def __init__(self) -> None:
        self._leaders: dict[int, int] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Compare who says to lead with who ever said so for that term."""
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            engine = machine.parts.consensus
            if not engine.leads:
                continue
            term = engine.node.core.term
            first = self._leaders.get(term)
            if first is None:
                self._leaders[term] = machine.number
                swarm.trace.add(machine.number, "leads", f"term {term}")
            elif first != machine.number:
                yield f"nodes {first} and {machine.number} both lead term {term}"
