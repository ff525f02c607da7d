"""The models of a node and of its mesh: pull, load, unload, remove, list.

How a model is placed is ``placing``'s.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from pyagent_node.base.errors import (
    Conflict,
    NotFound,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest
from pyagent_node.consensus.commands import (
    ForgetModel,
    ModelRecord,
    RegisterModel,
    RemovePlacement,
)
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.blob_server import BlobServer
from pyagent_node.inference.models.pull import pull
from pyagent_node.inference.models.sources import CATALOGUE
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import StoredModel
from pyagent_node.inference.models.transfer import ensure_model
from pyagent_node.node.api.placement_schema import DrainReply, DrainRequest, PlanView
from pyagent_node.node.api.schema import (
    LoadRequest,
    ModelView,
    PlacementView,
    Progress,
    PullRequest,
)
from pyagent_node.node.draft_maker import ModelDefaults
from pyagent_node.node.draining import drain
from pyagent_node.node.facts import FactsProvider
from pyagent_node.node.placement_board import PlacementBoard, Report
from pyagent_node.node.placement_messages import PlacementReports
from pyagent_node.node.placing import Placer
from pyagent_node.node.resharding import Resharder
from pyagent_node.node.rpc import Rpc

__all__ = ["ModelDefaults", "NodeModels"]

logger = logging.getLogger("pyagent_node.models")

UNLOAD_SECONDS: Final = 15.0
"""Longest wait for the nodes to stop what was unloaded; they go on stopping after it."""
T = TypeVar("T")


class NodeModels:
    """What a node can do with models; get one from :func:`open_models`."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        consensus: Consensus,
        rpc: Rpc,
        store: ModelStore,
        facts: FactsProvider,
        board: PlacementBoard,
        blobs: BlobServer,
        defaults: ModelDefaults,
        clock: Callable[[], float],
        resharder: Resharder,
    ) -> None:
        self.blobs = blobs
        self._mesh = mesh
        self._consensus = consensus
        self._store = store
        self._board = board
        self._clock = clock
        self._placer = Placer(
            mesh=mesh,
            consensus=consensus,
            rpc=rpc,
            store=store,
            facts=facts,
            board=board,
            defaults=defaults,
            find=self._find,
            resharder=resharder,
        )

    @property
    def placer(self) -> Placer:
        """What decides where layers go."""
        return self._placer

    # ---- looking ---------------------------------------------------------------------------

    async def placements(self) -> tuple[PlacementView, ...]:
        """Return every placement with the state and load of its ranks."""
        return await self._board.views()

    def parts(self) -> PlacementReports:
        """Return how this node's own ranks and heads fare."""
        return self._board.own()

    async def list(self) -> tuple[ModelView, ...]:
        """Return the models that the mesh knows or this node holds, by name."""
        stored = {m.digest: m for m in await trio.to_thread.run_sync(self._store.list)}
        digests = {*stored, *self._consensus.state.models}
        views = [self._view(digest, stored.get(digest)) for digest in digests]
        return tuple(sorted(views, key=lambda view: (view.name, view.digest)))

    def _view(self, digest: Digest, stored: StoredModel | None) -> ModelView:
        state = self._consensus.state
        record, placement = state.models.get(digest), state.placements.get(digest)
        known = record or stored
        assert known is not None, "a listed model is known somewhere"
        return ModelView(
            digest=digest,
            name=known.name,
            size=known.size,
            local_bytes=stored.bytes_held if stored is not None else 0,
            registered=record is not None,
            architecture=record.architecture if record is not None else None,
            n_layers=record.n_layers if record is not None else None,
            n_ctx_train=record.n_ctx_train if record is not None else None,
            epoch=placement.epoch if placement is not None else None,
        )

    # ---- pull ------------------------------------------------------------------------------

    async def pull(self, request: PullRequest, report: Report) -> ModelView:
        """Bring a model here: from its source, or from peers if the mesh knows it by that name.

        The mesh learns of it, unless it cannot decide now.  Raises what ``inference.models.pull``
        and ``inference.models.transfer`` raise.
        """

        def progress(done: int, total: int | None) -> None:
            report(Progress(step="download", text=request.source, done=done, total=total))

        await self._catch_up()
        record = self._registered(request.source)
        if record is not None and request.source not in CATALOGUE:
            peers = [p.peer_id for p in self._mesh.peers()]
            await ensure_model(self._mesh, self._store, record, peers, progress=progress)
            stored = await self._in_thread(self._store.get, record.digest)
        else:
            stored = await pull(
                self._store,
                request.source,
                sha256=request.sha256,
                name=request.name,
                progress=progress,
            )
        try:
            await self._register(stored)
        except PyAgentError as error:
            # The model is here, which is what was asked for; loading it tries again.
            logger.warning("the mesh did not learn of %s: %s", stored.name, error)
            report(Progress(step="register", text=f"the mesh does not know it yet: {error}"))
        return self._view(stored.digest, stored)

    async def _register(self, stored: StoredModel) -> ModelRecord:
        known = self._consensus.state.models.get(stored.digest)
        if known is not None:
            return known
        file = await self._in_thread(self._store.model_file, stored.digest)
        shape = model_shape(file.header)
        record = ModelRecord(
            digest=stored.digest,
            name=stored.name,
            size=stored.size,
            architecture=shape.architecture,
            n_layers=shape.n_layers,
            n_embd=shape.n_embd,
            n_vocab=shape.n_vocab,
            n_ctx_train=shape.n_ctx_train,
            manifest=stored.manifest,
            created=int(self._clock()),
        )
        try:
            await self._consensus.propose(RegisterModel(record))
        except Conflict:
            # Registered by another node meanwhile, maybe under another name.
            if stored.digest not in self._consensus.state.models:
                raise
        return self._consensus.state.models[stored.digest]

    def _registered(self, name: str) -> ModelRecord | None:
        for record in self._consensus.state.models.values():
            if name in (record.name, record.digest):
                return record
        return None

    async def _find(self, name: str) -> ModelRecord:
        """Return the record of a model by name or digest, registering one that lies here."""
        await self._catch_up()
        record = self._registered(name)
        if record is not None:
            return record
        try:
            stored = await self._in_thread(self._store.find, name)
        except NotFound:
            raise NotFound(
                f"Neither this node nor its mesh has a model {name[:80]!r}.",
                code="model_not_found",
                remedy="Get it with 'pyagent-node model pull'; see 'pyagent-node model list'.",
            ) from None
        return await self._register(stored)

    # ---- load ------------------------------------------------------------------------------

    async def load(self, request: LoadRequest, report: Report) -> PlacementView:
        """Place a model and wait until it can be asked; see :meth:`Placer.load`."""
        return await self._placer.load(request, report)

    async def plan(self, request: LoadRequest, report: Report) -> PlanView:
        """Say what placing a model anew would change; see :meth:`Placer.plan`."""
        return await self._placer.plan(request, report)

    async def apply(self, request: LoadRequest, report: Report) -> PlacementView:
        """Place a model anew as planned; see :meth:`Placer.apply`."""
        return await self._placer.apply(request, report)

    async def drain(self, request: DrainRequest, report: Report) -> DrainReply:
        """Take a node's work away, or let it work again; see :func:`draining.drain`."""
        await self._catch_up()
        return await drain(
            self._consensus, self._board, request.node, undo=request.undo, report=report
        )

    # ---- unload, remove --------------------------------------------------------------------

    async def unload(self, model: str) -> None:
        """Remove a placement and wait until the nodes have let go of it (or a deadline).

        Raises :class:`NotFound` (``model_not_found``, ``placement_not_found``).
        """
        await self._catch_up()
        record = self._registered(model)
        if record is None:
            raise NotFound(
                f"The mesh knows no model {model[:80]!r}.",
                code="model_not_found",
                remedy="See 'pyagent-node status' for what is loaded.",
            )
        placement = self._consensus.state.placements.get(record.digest)
        if placement is None:
            raise NotFound(
                f"{record.name} is not loaded.",
                code="placement_not_found",
                remedy="See 'pyagent-node status' for what is.",
            )
        await self._consensus.propose(RemovePlacement(record.digest, placement.epoch))
        with trio.move_on_after(UNLOAD_SECONDS):
            await self._board.wait_gone(placement)

    async def remove(self, digest: Digest) -> None:
        """Delete a model's files here, and let the mesh forget it.

        Raises :class:`Conflict` (``model_placed``) while it is loaded and :class:`NotFound`
        (``model_not_found``).
        """
        await self._catch_up()
        state = self._consensus.state
        placements = state.placements.values()
        drafts = any(p.drafting is not None and p.drafting.drafter == digest for p in placements)
        loaded = digest in state.placements
        if loaded or drafts:
            raise Conflict(
                "The model is loaded." if loaded else "The model drafts for a loaded one.",
                code="model_placed",
                remedy="Unload it first: 'pyagent-node model unload'.",
            )
        registered = digest in state.models
        try:
            await self._in_thread(self._store.remove, digest)
        except NotFound:
            if not registered:
                raise
        if registered:
            with contextlib.suppress(NotFound):  # another node was quicker
                await self._consensus.propose(ForgetModel(digest))

    async def _catch_up(self) -> None:
        """See what the mesh has decided so far; without a leader the last known state counts."""
        try:
            await self._consensus.read_barrier()
        except Unavailable as error:
            logger.info("going on with what is known here: %s", error)

    async def _in_thread(self, work: Callable[[Digest], T], digest: Digest | str) -> T:
        return await trio.to_thread.run_sync(work, Digest(digest))
