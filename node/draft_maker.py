"""Drafts of placements: the nodes are asked for their facts, and a plan is made of them.

Nothing is changed here; what becomes of a draft is ``placing``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import InvalidRequest, NotFound, Unsupported
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId, Placement
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.models.architectures import check_sliceable
from pyagent_node.inference.models.gguf_header import GgufHeader
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.transfer import ensure_head_assets
from pyagent_node.inference.pipeline.planner import plan
from pyagent_node.node.api.schema import LoadRequest, Progress
from pyagent_node.node.backend_choice import explain_backends, with_activations
from pyagent_node.node.drafter_placing import DrafterPlacer
from pyagent_node.node.drafts import (
    Draft,
    check_reserves,
    gain,
    lacking,
    token_seconds,
    with_reserves,
)
from pyagent_node.node.facts import FactsProvider
from pyagent_node.node.outfits import outfit
from pyagent_node.node.placement_board import PlacementBoard, Report
from pyagent_node.node.planning import Swarm, planner_shape, survey
from pyagent_node.node.rpc import Rpc

DEFAULT_N_CTX: Final = 2048
DEFAULT_N_SEQ: Final = 8


class ModelDefaults(msgspec.Struct, frozen=True):
    """Context length and number of sessions where a load request names none."""

    n_ctx: int = DEFAULT_N_CTX
    n_seq: int = DEFAULT_N_SEQ


class DraftMaker:
    """Plans placements from what nodes say of themselves; ``guessing`` adds who drafts tokens."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        consensus: Consensus,
        rpc: Rpc,
        store: ModelStore,
        facts: FactsProvider,
        board: PlacementBoard,
        defaults: ModelDefaults,
        guessing: DrafterPlacer,
    ) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._rpc = rpc
        self._store = store
        self._facts = facts
        self._board = board
        self._defaults = defaults
        self._guessing = guessing

    def current(self, record: ModelRecord) -> Placement | None:
        """Return the placement of a model in force."""
        return self._consensus.state.placements.get(record.digest)

    async def make(
        self,
        record: ModelRecord,
        request: LoadRequest,
        report: Report,
        slowness: Mapping[PeerId, float] = {},
    ) -> Draft:
        """Plan a model's placement anew; errors as for ``Placer.load``.

        ``slowness`` says how many times slower than they say nodes have been.
        """
        n_ctx, n_seq = self._sizes(record, request)
        check_reserves(request)
        report(Progress(step="plan", text="measuring the nodes"))
        header = await self._header(record, report)
        before = self.current(record)
        shape = planner_shape(header, record.name)
        found, used = await self._swarm(record, before)
        suit = outfit(
            request,
            found,
            shape,
            before,
            used=used,
            draining=self.draining(),
            slowness=slowness,
            n_ctx=n_ctx,
            n_seq=n_seq,
        )
        swarm, nodes, options, backends = suit.swarm, suit.nodes, suit.options, suit.backends
        try:
            check_sliceable(header)
        except Unsupported:
            if options.boundaries or (options.ranks or 1) > 1:
                raise
            options = msgspec.structs.replace(options, ranks=1)
        nodes, activations = with_activations(nodes, request.activations)
        best = plan(shape, nodes, swarm.rtt_ms, options, head=self._mesh.peer_id)
        why = explain_backends(best.ranks, nodes, backends, header.architecture)
        best = msgspec.structs.replace(best, explanation=(*best.explanation, *why))
        ranks = with_reserves(
            shape,
            best.ranks,
            swarm,
            request,
            self._consensus.state.settings,
            before=before,
            n_ctx=n_ctx,
            n_seq=n_seq,
        )

        async def measured() -> Swarm:
            return swarm

        drafting = await self._guessing.drafting(
            request,
            record,
            before.drafting if before is not None else None,
            measured,
            n_ctx=n_ctx,
            n_seq=n_seq,
            ranks=ranks,
            shape=shape,
        )
        return Draft(
            record,
            best,
            ranks,
            n_ctx,
            n_seq,
            request.standbys,
            request.spares,
            drafting,
            before,
            token_seconds(shape, before, swarm, self._mesh.peer_id),
            {node.peer_id: node.name for node in swarm.nodes},
            {model.digest: model.name for model in self._consensus.state.models.values()},
            lacking(shape, ranks, before, suit.free, n_ctx=n_ctx, n_seq=n_seq),
            gain(shape, before, ranks, swarm),
            any(each is not None for each in (request.ranks, request.layers, request.nodes)),
            backends,
            suit.able,
            {node.peer_id: node for node in swarm.nodes},
            activations,
        )

    async def plain_swarm(self, record: ModelRecord) -> Swarm:
        """Return the nodes that are there, less those that are being emptied."""
        found, _ = await self._swarm(record, None)
        away = self.draining()
        return Swarm([node for node in found.nodes if node.peer_id not in away], found.rtt_ms)

    async def _swarm(
        self, record: ModelRecord, before: Placement | None
    ) -> tuple[Swarm, Mapping[PeerId, int]]:
        """Return what nodes say of themselves, and the memory of this model's processes there."""
        swarm = await survey(self._mesh, self._rpc, self._facts, record.digest)
        return swarm, await self._board.memory(before) if before is not None else {}

    def draining(self) -> frozenset[PeerId]:
        """Return the nodes that are being emptied."""
        members = self._consensus.state.members.values()
        return frozenset(member.peer_id for member in members if member.draining)

    def _sizes(self, record: ModelRecord, request: LoadRequest) -> tuple[int, int]:
        n_ctx = request.n_ctx
        if n_ctx is None:
            n_ctx = min(self._defaults.n_ctx, record.n_ctx_train)
        elif not 1 <= n_ctx <= record.n_ctx_train:
            raise InvalidRequest(
                f"n_ctx is {n_ctx}; {record.name} was trained for 1 to {record.n_ctx_train}.",
                code="bad_parameter",
                parameter="n_ctx",
            )
        return n_ctx, self._defaults.n_seq if request.n_seq is None else request.n_seq

    async def _header(self, record: ModelRecord, report: Report) -> GgufHeader:
        """Return the model's header, fetching the head's assets (which a load needs anyway)."""
        try:
            return (await trio.to_thread.run_sync(self._store.model_file, record.digest)).header
        except NotFound:
            peers = [p.peer_id for p in self._mesh.peers()]

            def progress(done: int, total: int | None) -> None:
                report(Progress(step="fetch", text="embeddings", done=done, total=total))

            assets = await ensure_head_assets(
                self._mesh, self._store, record, peers, progress=progress
            )
            assets.close()
            return (await trio.to_thread.run_sync(self._store.model_file, record.digest)).header
