"""Whoever is out stays out: removed and revoked nodes are connected to nobody who knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from pyagent_node.consensus.state import is_member
from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm

PART_SECONDS: Final = 5.0
"""How long a node may stay connected to somebody of whom it has applied that it is out."""


class OutsidersStayOut(Always):
    """They go on dialling, and under some faults sending, until they are switched off."""

    name: ClassVar[str] = "outsiders stay out"

    def __init__(self) -> None:
        self._since: dict[tuple[int, int, int], float] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look for connections that should have been cut."""
        out = [machine for machine in swarm.machines if machine.gone and machine.up]
        now, found = trio.current_time(), set()
        for other in out:
            for machine in swarm.up():
                if machine.parts is None or other.peer_id not in machine.parts.mesh.connected:
                    continue
                record = machine.parts.consensus.state.members.get(other.peer_id)
                if record is None or is_member(record):
                    continue
                key = (machine.number, machine.lives, other.number)
                found.add(key)
                if now - self._since.setdefault(key, now) > PART_SECONDS:
                    yield f"node {machine.number} is still connected to {other.number}, who is out"
                    return
        self._since = {key: since for key, since in self._since.items() if key in found}
