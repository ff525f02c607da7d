"""Decides who owns the buckets of the mesh; runs on every node, acts on the one that leads the log.

Whoever is there for a moment gets its share; whoever is away for longer than the mesh's setting
``context_patience``, was removed, or is being drained, gives its buckets to others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import trio

from pyagent_node.base.errors import Conflict, PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import SetBuckets, SpreadContext
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.node.context_forms import Size, may_spread, plan_spread
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.steward import Sightings
from pyagent_node.sharding.context.catalog import sketch_bytes
from pyagent_node.sharding.context.owners import Table, owner_table
from pyagent_node.sharding.context.port import ContextStore

log = logging.getLogger("pyagent_node.context")


def plan_owners(
    table: Table,
    weights: Mapping[PeerId, float],
    up: Callable[[PeerId], float],
    *,
    barred: Collection[PeerId],
    copies: int,
    patience: float,
    settle: float,
) -> Table | None:
    """Return the table that should be in force, ``None`` where it is or that cannot be told yet.

    ``weights`` are of the nodes that said theirs; ``up`` says for how long a node has been there
    (negative: away), in seconds.  A node that owns something and is not known long enough keeps it.
    """
    owning = {peer for row in table for peer in row}
    chosen: dict[PeerId, float] = {}
    for peer in owning | weights.keys():
        here = up(peer)
        if peer in barred or (here < -patience if peer in owning else here < settle):
            continue
        weight = weights.get(peer)
        if weight is None:
            return None
        chosen[peer] = weight
    new = owner_table(chosen, replication=copies)
    return new if new and new != table else None


class BucketSteward:
    """Also has the log say which contexts' sketches lie spread over the nodes.

    ``weights`` gives what each peer offers; ``seconds`` lie between two looks."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        store: ContextStore,
        reach: Reach,
        weights: Callable[[], Mapping[PeerId, float]],
        *,
        seconds: float,
        settle: float,
    ) -> None:
        self.changes = 0
        """Tables of owners that this node had committed."""
        self._mesh = mesh
        self._consensus = consensus
        self._store = store
        self._reach = reach
        self._weights = weights
        self._seconds = seconds
        self._settle = settle
        self._sightings = Sightings(mesh.peer_id, trio.current_time())

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look()
            await trio.sleep(self._seconds)

    async def look(self) -> None:
        """Look once; have committed what is due."""
        state = self._consensus.state
        owning = {peer for row in state.buckets for peer in row}
        self._sightings.look(self._mesh.peers(), owning, trio.current_time())
        if not self._consensus.leads or not (state.contexts or state.buckets):
            return
        members = state.members.values()
        barred = {m.peer_id for m in members if m.draining or not is_member(m)}
        clients = {p.peer_id for p in self._mesh.peers() if p.role == "client"}
        weights = {**self._weights(), self._mesh.peer_id: float(self._store.limit_bytes)}
        try:
            new = plan_owners(
                state.buckets,
                weights,
                self._sightings.up,
                barred=barred | clients,
                copies=state.settings["context_copies"],
                patience=state.settings["context_patience"],
                settle=self._settle,
            )
            await self._spread()
            if new is None:
                return
            await self._consensus.propose(SetBuckets(new, state.bucket_epoch))
        except Conflict as error:
            log.info("the owners of contexts changed meanwhile: %s", error)
        except PyAgentError as error:
            log.info("the owners of contexts stay as they are: %s", error)
        else:
            self.changes += 1
            names = sorted({peer for row in new for peer in row})
            log.info("contexts are spread over %d nodes", len(names))

    async def _spread(self) -> None:
        state = self._consensus.state
        sizes = [
            Size(
                info.name,
                sketch_bytes(self._store.catalog(info.id)),
                info.spread,
                not may_spread(info),
            )
            for info in state.contexts.values()
        ]
        found = plan_spread(
            sizes,
            state.settings["context_index_bytes"],
            owners=len({peer for row in state.buckets for peer in row}),
            copies=state.settings["context_copies"],
        )
        if found is not None:
            context = state.contexts[found.name]
            await self._consensus.propose(SpreadContext(found.name, context.id, not found.spread))
            where = "on every node" if found.spread else "spread over the nodes"
            log.info("the sketches of context %s are to be %s", found.name, where)
