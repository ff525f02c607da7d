"""Placements: an epoch means one placement, and what it replaced stops computing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from pyagent_node.base.types import Digest, Placement
from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm

STOP_SECONDS: Final = 5.0
"""How long a stage may outlive the entry that ended its epoch, on the node that applied it."""


class OnePlacementAnEpoch(Always):
    """No two nodes ever know different ranks under one epoch; epochs only grow."""

    name: ClassVar[str] = "one placement an epoch"

    def __init__(self) -> None:
        self._known: dict[int, tuple[Digest, object]] = {}
        self._last: dict[tuple[int, int], int] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Compare every node's placements with all that were ever seen."""
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            state = machine.parts.consensus.state
            life = (machine.number, machine.lives)
            if state.last_epoch < self._last.get(life, 0):
                yield f"the last epoch of node {machine.number} went back"
            self._last[life] = state.last_epoch
            for placement in state.placements.values():
                shape = _shape(placement)
                first = self._known.setdefault(placement.epoch, shape)
                if first != shape:
                    yield f"epoch {placement.epoch} means two placements"
                    return


def _shape(placement: Placement) -> tuple[Digest, object]:
    """Return what an epoch fixes: standbys and spares may change under it."""
    return placement.model, tuple((rank.slice, rank.peer_id) for rank in placement.ranks)


class StaleStagesStop(Always):
    """A node that knows of a newer epoch serves no stage of an older one."""

    name: ClassVar[str] = "stale stages stop"

    def __init__(self) -> None:
        self._since: dict[tuple[int, int, Digest, int, int], float] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look for stages that outlive their epoch."""
        now, found = trio.current_time(), set()
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            placements = machine.parts.consensus.state.placements
            for view in machine.parts.pipeline.stages.views():
                live = placements.get(view.model)
                if live is not None and live.epoch == view.epoch:
                    continue
                key = (machine.number, machine.lives, view.model, view.epoch, view.rank)
                found.add(key)
                if now - self._since.setdefault(key, now) > STOP_SECONDS:
                    yield f"node {machine.number} still serves rank {view.rank} of {view.epoch}"
                    return
        for key in self._since.keys() - found:
            del self._since[key]


class SessionsOfTheirEpoch(Always):
    """No stage holds a session that was opened under another epoch than its own."""

    name: ClassVar[str] = "sessions of their epoch"

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Compare the sessions of every node with its stages."""
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            stages = machine.parts.pipeline.stages
            sessions = stages.sessions()
            if not sessions:
                continue
            epochs = {(view.model, view.epoch) for view in stages.views()}
            for session in sessions:
                if (session.model, session.epoch) not in epochs:
                    yield f"node {machine.number} computes for the epoch {session.epoch}"
                    return
