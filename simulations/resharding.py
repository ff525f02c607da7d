"""An operator of the simulated swarm moves layers while the model serves, and is disturbed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId, Placement, Rank, Slice
from pyagent_node.consensus.commands import SetPlacement
from pyagent_node.node.api.schema import Progress
from pyagent_node.simulations.draws import N_LAYERS
from pyagent_node.simulations.fault_kinds import Phase, Reshard
from pyagent_node.simulations.pipeline import MODEL, peer

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

RESHARD_SECONDS: Final = 30.0
"""How long an operator waits for the next ranks before the change is given up."""
ONLY_LOADED: Final = "switched when loaded"
"""The invariant that is looked after here."""


async def reshard(swarm: Swarm, deed: Reshard) -> None:
    """Do it on the node that is asked, with the code behind ``placement apply``.

    It ends with that node's program, as a request of it would.
    """
    machine = swarm.machines[deed.asked]
    parts = machine.parts
    before = parts.consensus.state.placements.get(MODEL) if parts is not None else None
    if parts is None or before is None:
        return
    blow = _Blow(swarm, deed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_after, machine.over, nursery.cancel_scope)
        with trio.move_on_after(RESHARD_SECONDS):
            try:
                command = _command(deed, before)
                placement = await parts.resharder.reshard(command, blow.note)
                swarm.trace.add(machine.number, "resharded", f"epoch {placement.epoch}")
                blow.strike("committed")
            except PyAgentError as error:
                swarm.trace.add(machine.number, "refused", f"reshard: {error.code}")
        nursery.cancel_scope.cancel()
    await blow.over()


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _command(deed: Reshard, before: Placement) -> SetPlacement:
    cuts = (0, *deed.boundaries, N_LAYERS)
    last = len(cuts) - 2
    ranks = tuple(
        Rank(r, Slice(cuts[r], cuts[r + 1], r == last), peer(deed.nodes[r]))
        for r in range(last + 1)
    )
    return SetPlacement(MODEL, ranks, before.n_ctx, before.n_seq, before.epoch)


def _check_loaded(swarm: Swarm, lives: Mapping[PeerId, int]) -> None:
    """Nodes that have lived all the time have loaded what is prepared: a switch waits for that."""
    for machine in swarm.up():
        if machine.parts is None or machine.lives != lives.get(machine.peer_id):
            continue
        for report in machine.parts.controller.reports().prepared:
            if report.state != "ready" and not report.failures:
                swarm.violation(
                    ONLY_LOADED,
                    f"change {report.number} is to be committed before rank {report.rank} is"
                    f" loaded on node {machine.number}",
                )


class _Blow:
    """Follows a change, and kills the victim when it has come to its phase, once."""

    def __init__(self, swarm: Swarm, deed: Reshard) -> None:
        self._swarm = swarm
        self._deed = deed
        self._struck: Machine | None = None
        self._lives = {machine.peer_id: machine.lives for machine in swarm.machines}

    def note(self, progress: Progress) -> None:
        """Take a progress report of the change."""
        if progress.step == "prepare":
            self.strike("loading" if progress.done else "proposed")
        elif progress.step == "switch":
            _check_loaded(self._swarm, self._lives)
            self.strike("ready")

    def strike(self, phase: Phase) -> None:
        """Kill the victim, if this is when it is to be."""
        victim = self._swarm.machines[self._deed.victim]
        if phase == self._deed.hit and self._struck is None and victim.up:
            self._swarm.trace.add(victim.number, "hit", f"a change is {phase}")
            self._struck = victim
            victim.holds += 1
            self._swarm.kill(victim)

    async def over(self) -> None:
        """Let the victim come back after its time; whoever keeps the swarm running starts it."""
        if self._struck is not None:
            try:
                await trio.sleep(self._deed.seconds)
            finally:
                self._struck.holds -= 1
