"""Those who guess hear the answer and nothing else, and are let go when it is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class GuessersAreTold:
    """Drafters are told what was accepted, in order, and are closed once."""

    name: ClassVar[str] = "drafters hear the answer"

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Ask the drafters of every node."""
        for machine in swarm.machines:
            if machine.guessers is not None:
                for complaint in machine.guessers.complaints[:1]:
                    yield f"on node {machine.number} {complaint}"

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Look for drafters that were not closed, or closed twice."""
        for machine in swarm.machines:
            if machine.guessers is not None:
                for name, factory in machine.guessers.factories.items():
                    wrong = sum(drafter.closed != 1 for drafter in factory.made)
                    if wrong:
                        yield f"{wrong} drafters {name} of node {machine.number} were not closed"
