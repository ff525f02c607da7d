"""While the mesh can decide, work moves away from nodes that are dead or being drained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from pyagent_node.base.types import PeerId
from pyagent_node.simulations.invariants.port import Always
from pyagent_node.simulations.pipeline import MODEL

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

EVERY: Final = 10
"""Looks between two that this file takes part in."""
DEAD_SECONDS: Final = 20.0
"""How long a rank may stay without a node under one steady leader."""
DRAIN_SECONDS: Final = 25.0
"""How long a drained node may keep a rank under one steady leader."""


class RanksMove(Always):
    """The time counts anew whenever the leader changes: it must first learn who is well."""

    name: ClassVar[str] = "ranks move"

    def __init__(self) -> None:
        self._since: dict[tuple[str, int], float] = {}
        self._leader: tuple[int, int, int] | None = None
        self._looks = 0

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look at every rank's node."""
        self._looks += 1
        if self._looks % EVERY:
            return
        leader = swarm.leader()
        if leader is None or leader.parts is None:
            self._since.clear()
            return
        consensus = leader.parts.consensus
        reign = (leader.number, leader.lives, consensus.node.core.term)
        if reign != self._leader or not _free(swarm, leader):
            self._leader = reign
            self._since.clear()
            return
        state, now = consensus.state, trio.current_time()
        placement = state.placements.get(MODEL)
        off = {machine.peer_id for machine in swarm.machines if not machine.up}
        found: set[tuple[str, int]] = set()
        for rank in placement.ranks if placement is not None else ():
            record = state.members.get(rank.peer_id)
            draining = record is not None and record.draining
            for what, so, limit in (
                ("dead", rank.peer_id in off, DEAD_SECONDS),
                ("drained", draining, DRAIN_SECONDS),
            ):
                key = (what, rank.rank)
                if so:
                    found.add(key)
                    if now - self._since.setdefault(key, now) > limit:
                        yield f"rank {rank.rank} is on a {what} node for {limit:.0f} s"
        for key in self._since.keys() - found:
            del self._since[key]


def _free(swarm: Swarm, leader: Machine) -> bool:
    """Say whether the leader reaches somebody who could take work and has none."""
    assert leader.parts is not None, "it leads"
    state = leader.parts.consensus.state
    placement = state.placements.get(MODEL)
    taken: set[PeerId] = {rank.peer_id for rank in placement.ranks} if placement else set()
    return any(
        machine.peer_id not in taken
        and not machine.starved
        and machine.peer_id in leader.parts.mesh.connected
        and (record := state.members.get(machine.peer_id)) is not None
        and not record.draining
        for machine in swarm.up()
    )
