"""Decides where a model's layers go: load, plan, apply.

``load`` has a draft made (``draft_maker``), proposes the placement with its standbys and waits
until every rank is ready; what cannot get ready, or is given up, is taken back.  ``plan`` says what
planning again would change, ``apply`` changes it: the new ranks are loaded beside those in force
before they take their place (``resharding``), where nodes have the memory for both.  What happens
to a placement later, without anybody asking, is ``healer``'s and ``rebalancing``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import trio

from pyagent_node.base.errors import Conflict, PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, Drafting, PeerId, Placement
from pyagent_node.consensus.commands import (
    ModelRecord,
    RemovePlacement,
    SetPlacement,
    SetStandbys,
)
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.node.api.placement_schema import PlanView
from pyagent_node.node.api.schema import LoadRequest, PlacementView, Progress
from pyagent_node.node.draft_maker import DraftMaker, ModelDefaults
from pyagent_node.node.drafter_placing import DrafterPlacer
from pyagent_node.node.drafts import (
    Draft,
    as_it_is,
    chooses,
    first_ranks,
    plan_view,
    same,
    same_cut,
    switching,
)
from pyagent_node.node.facts import FactsProvider
from pyagent_node.node.guessing import moved, says
from pyagent_node.node.placement_board import PlacementBoard, Report
from pyagent_node.node.rebalancing import Improvement
from pyagent_node.node.resharding import Resharder
from pyagent_node.node.rpc import Rpc

logger = logging.getLogger("pyagent_node.models")

TAKE_BACK_SECONDS: Final = 5.0
"""Longest time to take back a placement that nobody waits for any more."""


class Placer:
    """What a node can do with placements; ``find`` returns a model's record by name or digest."""

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
        find: Callable[[str], Awaitable[ModelRecord]],
        resharder: Resharder,
    ) -> None:
        self._consensus = consensus
        self._board = board
        self._find = find
        self._resharder = resharder
        self._guessing = DrafterPlacer(mesh, consensus, store, find)
        self._drafts = DraftMaker(
            mesh=mesh,
            consensus=consensus,
            rpc=rpc,
            store=store,
            facts=facts,
            board=board,
            defaults=defaults,
            guessing=self._guessing,
        )

    # ---- load, plan, apply -----------------------------------------------------------------

    async def load(self, request: LoadRequest, report: Report) -> PlacementView:
        """Place a model and wait until every rank, and the head here, is ready.

        A model that is placed already is placed anew if the request says how, else it stays.
        Raises :class:`NotFound` (``model_not_found``), the errors of ``planner.plan`` and of
        ``PlacementBoard.wait_ready``; then, or when it is cancelled, what was before is restored.
        """
        record = await self._find(request.model)
        current = self._consensus.state.placements.get(record.digest)
        if current is not None and not chooses(request):
            if says(request):
                return await self._guess(record, request, current, report)
            return await self._await(current, report)
        draft = await self._drafts.make(record, request, report)
        return await self._carry_out(draft, report)

    async def plan(self, request: LoadRequest, report: Report) -> PlanView:
        """Say what placing a model anew would change, and why; errors as for :meth:`load`."""
        record = await self._find(request.model)
        request = as_it_is(request, self._drafts.current(record))
        return plan_view(await self._drafts.make(record, request, report))

    async def apply(self, request: LoadRequest, report: Report) -> PlacementView:
        """Do what :meth:`plan` says; nothing when the placement is as planned already."""
        record = await self._find(request.model)
        request = as_it_is(request, self._drafts.current(record))
        draft = await self._drafts.make(record, request, report)
        if draft.before is None or not same(draft):
            return await self._carry_out(draft, report)
        await self._reserve(draft, draft.before)
        return await self._say(draft.before, draft.drafting, report)

    async def _guess(
        self, record: ModelRecord, request: LoadRequest, current: Placement, report: Report
    ) -> PlacementView:
        """Change how the sessions of a placement guess, and nothing else."""
        drafting = await self._guessing.drafting(
            request,
            record,
            current.drafting,
            lambda: self._drafts.plain_swarm(record),
            n_ctx=current.n_ctx,
            n_seq=current.n_seq,
        )
        return await self._say(current, drafting, report)

    async def _say(
        self, before: Placement, drafting: Drafting | None, report: Report
    ) -> PlacementView:
        """Propose how sessions guess and wait until it works; else restore what was before."""
        now = await self._guessing.say(before, drafting)
        if now.drafting == before.drafting:
            return await self._await(now, report)
        done = False
        try:
            fresh = moved(before.drafting, now.drafting)
            await self._board.wait_ready(now, report, drafter=fresh)
            done = True
        finally:
            if not done:
                with trio.CancelScope(shield=True), trio.move_on_after(TAKE_BACK_SECONDS):
                    await self._unsay(before.drafting, now)
        return await self._await(now, report)

    async def _unsay(self, before: Drafting | None, now: Placement) -> None:
        """Restore how sessions guessed, unless somebody else has changed it since."""
        current = self._consensus.state.placements.get(now.model)
        if current is None or current.drafting != now.drafting:
            return
        try:
            await self._guessing.say(current, before)
        except PyAgentError as error:
            logger.warning("the drafter of %s was not taken back: %s", now.model[:12], error)

    async def improve(self, model: Digest, slowness: Mapping[PeerId, float]) -> Improvement | None:
        """Plan a placed model again, as ``rebalancing`` asks; errors as for :meth:`load`."""
        state = self._consensus.state
        record, before = state.models[model], state.placements.get(model)
        if before is None:
            return None
        request = as_it_is(LoadRequest(model=record.name), before)
        draft = await self._drafts.make(record, request, _silent, slowness)
        draining = self._drafts.draining()
        needed = any(rank.peer_id in draining for rank in before.ranks)
        if draft.lacking or same(draft) or (draft.gain is None and not needed):
            return None
        return Improvement(
            draft.gain or 0.0,
            needed,
            "; ".join(draft.plan.explanation),
            partial(self._carry_out, draft, _silent),
        )

    async def _carry_out(self, draft: Draft, report: Report) -> PlacementView:
        """Propose a draft and wait until it works; else restore what was before."""
        for line in draft.plan.explanation:
            logger.info("%s: %s", draft.record.name, line)
        done = False
        try:
            placed = await self._place(draft, report)
            placement = await self._guessing.say(placed, draft.drafting)
            fresh = moved(draft.before.drafting if draft.before else None, placement.drafting)
            what = "; ".join(draft.plan.explanation)
            report(Progress(step="place", text=f"placed at epoch {placement.epoch}: {what}"))
            ready = await self._board.wait_ready(placement, report, drafter=fresh)
            done = True
            await self._reserve(draft, ready)
        finally:
            if not done:
                with trio.CancelScope(shield=True), trio.move_on_after(TAKE_BACK_SECONDS):
                    await self._take_back(draft)
        return await self._await(ready, report)

    async def _reserve(self, draft: Draft, placement: Placement) -> None:
        """Name standbys and spares as drafted; they load while the placement serves already."""
        peers = [rank.peer_id for rank in placement.ranks]
        if peers != [rank.peer_id for rank in draft.ranks] or placement.ranks == draft.ranks:
            return  # moved meanwhile: the leader sees to the rest
        try:
            await self._consensus.propose(
                SetStandbys(
                    placement.model,
                    tuple(rank.standbys for rank in draft.ranks),
                    tuple(rank.spares for rank in draft.ranks),
                    placement.epoch,
                )
            )
        except PyAgentError as error:
            logger.info("standbys are left to the leader: %s", error)

    async def _place(self, draft: Draft, report: Report) -> Placement:
        """Put a draft into force: beside what serves if that fits, else in its place."""
        digest = draft.record.digest
        command = SetPlacement(
            model=digest,
            ranks=first_ranks(draft),
            n_ctx=draft.n_ctx,
            n_seq=draft.n_seq,
            after_epoch=draft.before.epoch if draft.before is not None else 0,
            want_standbys=draft.want_standbys,
            want_spares=draft.want_spares,
            fixed=draft.fixed,
            backends=draft.backends,
            activations=draft.activations,
        )
        report(Progress(step="place", text=switching(draft) or "placing the model"))
        if draft.before is not None and not draft.lacking:
            return await self._resharder.reshard(command, report)
        if draft.before is not None:
            logger.warning("%s: %s", draft.record.name, switching(draft))
            self._resharder.check_idle(digest)
        await self._consensus.propose(command)
        placement = self._consensus.state.placements.get(digest)
        if placement is None or not same_cut(placement, draft.ranks, draft.n_ctx, draft.n_seq):
            raise Conflict("The model was unloaded or placed anew meanwhile.", code="stale_epoch")
        return placement

    async def _take_back(self, draft: Draft) -> None:
        """Restore what was before, unless somebody else has placed the model since."""
        before, now = draft.before, self._drafts.current(draft.record)
        if now is None or not same_cut(now, draft.ranks, draft.n_ctx, draft.n_seq):
            return
        if before is not None and before.epoch == now.epoch:
            return
        try:
            if before is None:
                await self._consensus.propose(RemovePlacement(now.model, now.epoch))
            else:
                await self._consensus.propose(
                    SetPlacement(
                        model=before.model,
                        ranks=before.ranks,
                        n_ctx=before.n_ctx,
                        n_seq=before.n_seq,
                        after_epoch=now.epoch,
                        want_standbys=before.want_standbys,
                        want_spares=before.want_spares,
                        fixed=before.fixed,
                        backends=before.backends,
                        activations=before.activations,
                    )
                )
                restored = self._consensus.state.placements.get(before.model)
                if restored is not None:
                    await self._guessing.say(restored, before.drafting)
        except PyAgentError as error:
            logger.warning("epoch %d was not taken back: %s", now.epoch, error)

    async def _await(self, placement: Placement, report: Report) -> PlacementView:
        ready = await self._board.wait_ready(placement, report)
        for view in await self._board.views():
            if (view.model, view.epoch) == (ready.model, ready.epoch):
                return view
        raise Conflict("The model was unloaded or placed anew meanwhile.", code="stale_epoch")


def _silent(progress: Progress) -> None:
    """Take the progress of what nobody asked for."""
