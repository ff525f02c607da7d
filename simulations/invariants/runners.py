"""Runners are asked for nothing that a stage must never ask for, whoever sends what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.simulations.guessers import DraftingRunner
from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class RunnersAreAsked(Always):
    """Positions without gaps, slots that are open, cells that are there, one decode at a time."""

    name: ClassVar[str] = "runners are asked rightly"

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Ask every runner what it had to refuse."""
        for machine in swarm.machines:
            for runner in machine.assets.runners if machine.assets is not None else ():
                if runner.refused and not isinstance(runner, DraftingRunner):
                    yield f"a runner of node {machine.number} refused: {runner.refused}"
