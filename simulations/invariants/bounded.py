"""Nothing grows without a bound: tasks, streams, sessions, slots, journals, the log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from pyagent_node.inference.pipeline.stage_types import StageLimits
from pyagent_node.simulations.guessers import DraftingRunner

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm

MAX_STREAMS: Final = 256
"""Streams of a node with one peer, in either direction."""
MAX_JOURNALS: Final = 512
LIMITS: Final = StageLimits()
MAX_LOG_BYTES: Final = 4 << 20
"""A log that is compacted every few entries stays far below."""


TASKS_A_NODE: Final = 62
TASKS_A_PEER: Final = 13
"""Tasks that a node may have when nothing is asked, and for each node besides: five streams that it
serves, two that it writes for ranks and one for journals, each watched, and the two of Raft.

Five nodes have 517 of 635.  An answer that is read but whose reader may come back has two tasks for
``SENT_SECONDS`` (30 s) after its end: one that forgets it, one that tends its journal.
"""
BUSY: Final = 3
"""So many times as many it may have meanwhile."""


def _tasks(nodes: int) -> int:
    return nodes * (TASKS_A_NODE + TASKS_A_PEER * nodes)


class Bounded:
    """Looked at under faults; after healing nothing of any request may be left."""

    name: ClassVar[str] = "bounded"

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look at every node's counts."""
        living = trio.lowlevel.current_statistics().tasks_living
        if living > BUSY * _tasks(len(swarm.machines)):
            yield f"{living} tasks run for {len(swarm.machines)} nodes"
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            streams = machine.parts.mesh.most_streams()
            if streams > MAX_STREAMS:
                yield f"node {machine.number} holds {streams} streams with one peer"
            for view in machine.parts.pipeline.stages.views():
                if view.sessions > LIMITS.sessions or view.queued > LIMITS.queued_steps:
                    yield (
                        f"rank {view.rank} of node {machine.number} has {view.sessions} sessions"
                        f" and {view.queued} steps waiting"
                    )
            copies = len(machine.parts.journals.holder.book)
            if copies > MAX_JOURNALS:
                yield f"node {machine.number} keeps {copies} journals"
            size = sum(machine.disk.size(name) for name in machine.disk.names())
            if size > MAX_LOG_BYTES:
                yield f"the log of node {machine.number} takes {size} bytes"

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Look for what requests left behind."""
        up, living = len(swarm.up()), trio.lowlevel.current_statistics().tasks_living
        if living > _tasks(up):
            yield f"{living} tasks still run for {up} nodes"
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            left = machine.parts.pipeline.stages.sessions()
            if left:
                yield f"node {machine.number} still serves {len(left)} sessions"
            if machine.assets is not None:
                # a drafter's slot may be left to its next user
                runners = (r for r in machine.assets.runners if not isinstance(r, DraftingRunner))
                slots = sum(runner.open_slots for runner in runners)
                if slots:
                    yield f"runners of node {machine.number} still hold {slots} slots"
