"""From what a load request says about guessing to a proposal: finds the model and the node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from pyagent_node.base.errors import NotFound
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Drafting, PeerId, Placement, Rank
from pyagent_node.consensus.commands import ModelRecord, SetDrafting
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.models.gguf_header import GgufHeader
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.transfer import ensure_header
from pyagent_node.inference.pipeline.plan_types import ModelShape
from pyagent_node.node.api.schema import LoadRequest
from pyagent_node.node.guessing import (
    Wish,
    check_guessing,
    check_room,
    check_sizes,
    choose_drafter_node,
    merged,
    says,
    wish_of,
)
from pyagent_node.node.planning import Swarm, find_node, planner_shape


class DrafterPlacer:
    """Says how the sessions of a placement guess; ``find`` returns a model's record."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        store: ModelStore,
        find: Callable[[str], Awaitable[ModelRecord]],
    ) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._store = store
        self._find = find

    async def drafting(
        self,
        request: LoadRequest,
        record: ModelRecord,
        before: Drafting | None,
        swarm: Callable[[], Awaitable[Swarm]],
        *,
        n_ctx: int,
        n_seq: int,
        ranks: Sequence[Rank] = (),
        shape: ModelShape | None = None,
    ) -> Drafting | None:
        """Return how sessions of ``record`` shall guess, with a node for the drafter if one is due.

        ``ranks`` are those that are to be loaded besides, with their standbys, of the given
        ``shape``.  Raises what
        :func:`guessing.check_guessing`, :func:`guessing.check_sizes`, :func:`planning.find_node`,
        :func:`guessing.check_room` and :func:`guessing.choose_drafter_node` raise, and
        :class:`NotFound` (``drafter_not_found``).
        """
        if not says(request):
            return before
        check_guessing(request, (model.name for model in self._consensus.state.models.values()))
        wish = wish_of(request)
        if wish is None:
            return merged(request, before, None)
        try:
            drafter = await self._find(wish.model)
        except NotFound as error:
            raise NotFound(
                f"There is no model {wish.model[:80]!r} to draft with.",
                code="drafter_not_found",
                remedy="Get it with 'pyagent-node model pull'; see 'pyagent-node model list'.",
            ) from error
        check_sizes(drafter, record)
        taken: Counter[PeerId] = Counter()
        if shape is not None:
            for rank in ranks:
                need = shape.needs(rank.slice, n_ctx=n_ctx, n_seq=n_seq)
                taken.update(dict.fromkeys((rank.peer_id, *rank.standbys), need))
        node = await self._node(
            wish, drafter, before, await swarm(), taken, n_ctx=n_ctx, n_seq=n_seq
        )
        return merged(request, before, (drafter.digest, node))

    async def _node(
        self,
        wish: Wish,
        drafter: ModelRecord,
        before: Drafting | None,
        swarm: Swarm,
        taken: Mapping[PeerId, int],
        *,
        n_ctx: int,
        n_seq: int,
    ) -> PeerId:
        named = find_node(wish.node, swarm.nodes) if wish.node is not None else None
        there = (before.drafter, before.peer_id) if before is not None else None
        if named is not None and there == (drafter.digest, named.peer_id):
            return named.peer_id  # it needs no more room
        n_ctx = min(n_ctx, drafter.n_ctx_train)
        shape = planner_shape(await self._header(drafter), drafter.name)
        if named is not None:
            check_room(shape, named, n_ctx=n_ctx, n_seq=n_seq, taken=taken)
            return named.peer_id
        chosen = choose_drafter_node(
            shape,
            swarm.nodes,
            swarm.rtt_ms,
            head=self._mesh.peer_id,
            n_ctx=n_ctx,
            n_seq=n_seq,
            taken=taken,
        )
        return chosen.peer_id

    async def _header(self, record: ModelRecord) -> GgufHeader:
        try:
            return (await trio.to_thread.run_sync(self._store.model_file, record.digest)).header
        except NotFound:
            peers = [p.peer_id for p in self._mesh.peers()]
            return await ensure_header(self._mesh, self._store, record, peers)

    async def say(self, placement: Placement, drafting: Drafting | None) -> Placement:
        """Propose how the sessions of ``placement`` guess, unless they do; return what holds then.

        Raises what ``propose`` raises, :class:`Conflict` (``stale_epoch``) above all.
        """
        if placement.drafting != drafting:
            await self._consensus.propose(SetDrafting(placement.model, drafting, placement.epoch))
        return self._consensus.state.placements.get(placement.model, placement)
