"""Makes this node's part of every placement real, and keeps it so.

The controller follows the replicated state.  It keeps what the placements want of this node:
runners of its ranks and standbys, slice files of its spares, and the head of every placed model, so
that any node can take requests.  These outlive a placement: under a new epoch only what is new is
started, so that a standby serves its rank as soon as the entry that says so is applied.  What fails
is tried again with growing pauses; what nothing wants any more is stopped before anything new
starts, since both may not fit the memory.  What is only prepared is loaded beside the rest: the
placement in force serves on, and when the log commits the change the runners are there already.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError, RunnerFailed
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.pipeline.pipeline import Pipeline
from pyagent_node.inference.pipeline.ports import HeadModel, StageRunner
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.node.draft_ranks import DraftRanks, wanted_drafters
from pyagent_node.node.holdings import (
    NOTHING,
    HeadKey,
    RunnerKey,
    SpareKey,
    Wanted,
    runner_key,
    wanted,
)
from pyagent_node.node.keeping import FIRST_PAUSE, HostProgress, Kept, Mortal
from pyagent_node.node.part_reports import (
    Rate,
    head_report,
    prepared_report,
    rank_report,
    reserve_report,
)
from pyagent_node.node.placement_messages import PlacementReports, ReserveReport
from pyagent_node.node.placement_parts import Assets, HeadParts

logger = logging.getLogger("pyagent_node.placements")

K = TypeVar("K")
T = TypeVar("T", bound=Mortal)


class _OnDisk:
    """A spare: a file does not die."""

    def __init__(self) -> None:
        self.failed = trio.Event()
        self.failure: RunnerFailed | None = None


class _Stage:
    """A rank that this node serves under one epoch."""

    def __init__(self, placement: Placement, rank: Rank) -> None:
        self.placement = placement
        self.rank = rank
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        """Set when its runner is not used for it any more."""
        self.rate = Rate()


class PlacementController:
    """Hosts this node's parts of all placements; one instance a node."""

    def __init__(
        self,
        peer_id: PeerId,
        consensus: Consensus,
        pipeline: Pipeline,
        assets: Assets,
        *,
        rng: random.Random | None = None,
        behind: Callable[[Digest], int] | None = None,
    ) -> None:
        """``behind`` counts the KV blocks of a model's sessions still to go to prepared ranks."""
        self._peer_id = peer_id
        self._consensus = consensus
        self._pipeline = pipeline
        self._assets = assets
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._behind = behind
        self._placements: Mapping[Digest, Placement] = {}
        self._prepared: Mapping[Digest, Prepared] = {}
        self._wanted: Wanted = NOTHING
        self._runners: dict[RunnerKey, Kept[StageRunner]] = {}
        self._spares: dict[SpareKey, Kept[_OnDisk]] = {}
        self._heads: dict[HeadKey, Kept[HeadParts]] = {}
        self._drafters = DraftRanks(
            pipeline.drafts, assets, self._rng, head_of=self._head_of, epoch_of=self._epoch
        )
        self._stages: dict[tuple[Digest, int], _Stage] = {}
        self._offered: dict[Digest, Placement] = {}
        self._leaving: list[trio.Event] = []
        """Set as runners that were let go of end; the next ones wait for them."""
        self._ending: list[trio.Event] = []
        """Likewise for heads, which nobody waits for."""

    async def run(self) -> None:
        """Follow the replicated state until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                index = self._consensus.state.index
                self._reconcile(nursery)
                try:
                    async with self._consensus.applied(index) as entries:
                        async for _ in entries:
                            self._reconcile(nursery)
                except LimitExceeded:
                    logger.info("fell behind the log; reading the state anew")
                await trio.lowlevel.checkpoint()

    # ---- from the log to what is held ------------------------------------------------------

    def _reconcile(self, nursery: trio.Nursery) -> None:
        state = self._consensus.state
        if state.placements is self._placements and state.prepared is self._prepared:
            return
        before, self._placements = self._placements, state.placements
        self._prepared = state.prepared
        self._wanted = wanted(self._placements.values(), self._peer_id, self._prepared.values())
        engine = self._pipeline.engine
        for digest in before.keys() - self._placements.keys():
            self._withdraw(digest)
            engine.forget(digest)
        self._release(nursery, self._stop_stages())
        for digest in self._placements:
            engine.expect(digest, state.models[digest].name)
            self._offer(digest)
        self._keep(nursery)
        self._start_stages(nursery)

    def _stop_stages(self) -> dict[RunnerKey, list[trio.Event]]:
        """Stop the ranks that this node has no more; returns what tells that runners are free."""
        ending: dict[RunnerKey, list[trio.Event]] = {}
        for where, stage in list(self._stages.items()):
            placement = self._wanted.stages.get(where)
            if placement is None or placement.epoch != stage.placement.epoch:
                stage.scope.cancel()
                key = runner_key(stage.placement, stage.rank, self._peer_id)
                ending.setdefault(key, []).append(stage.over)
                del self._stages[where]
        return ending

    def _release(
        self, nursery: trio.Nursery, ending: Mapping[RunnerKey, Sequence[trio.Event]]
    ) -> None:
        """Let go of what is wanted no more, and of its files once nothing uses them.

        A runner goes when the ranks ``ending`` on it have handed over what their sessions need.
        """
        self._leaving = [event for event in self._leaving if not event.is_set()]
        self._ending = [event for event in self._ending if not event.is_set()]
        ends: dict[Digest, list[trio.Event]] = {}
        for key, kept in _take_out(self._runners, self._wanted.runners):
            nursery.start_soon(_release_after, kept, ending.get(key, ()))
            self._leaving.append(kept.ended)
            ends.setdefault(key.model, []).append(kept.ended)
        drafts = wanted_drafters(
            self._placements.values(), self._consensus.state.models, self._peer_id
        )
        for model, ended in self._drafters.release(drafts):
            self._leaving.append(ended)
            ends.setdefault(model, []).append(ended)
        for spare, file in _take_out(self._spares, self._wanted.spares):
            file.release()
            ends.setdefault(spare.model, []).append(file.ended)
        for _, parts in _take_out(self._heads, self._wanted.heads):
            parts.release()
            self._ending.append(parts.ended)
        for digest, events in ends.items():
            nursery.start_soon(self._tidy, digest, events)

    async def _tidy(self, digest: Digest, after: Sequence[trio.Event]) -> None:
        for event in after:
            await event.wait()
        try:
            await self._assets.tidy(
                digest, lambda: self._wanted.slices(digest) | self._drafters.slices(digest)
            )
        except PyAgentError as error:
            logger.warning("old slices of model %s stay on disk: %s", digest[:12], error)

    def _keep(self, nursery: trio.Nursery) -> None:
        """Begin to keep what is newly wanted; runners wait for room."""
        models = self._consensus.state.models
        for runner in sorted(self._wanted.runners - self._runners.keys()):
            opener = partial(self._open_runner, models[runner.model], runner)
            kept = Kept(self._what(runner, runner.model), opener, self._rng)
            self._runners[runner] = kept
            nursery.start_soon(kept.run, tuple(self._leaving))
        for spare in sorted(self._wanted.spares - self._spares.keys()):
            fetch = partial(self._open_spare, models[spare.model], spare)
            file = Kept(self._what(spare, spare.model), fetch, self._rng)
            self._spares[spare] = file
            nursery.start_soon(file.run)
        for head in sorted(self._wanted.heads - self._heads.keys()):
            head_kept = Kept(
                self._what(head, head.model),
                partial(self._open_head, models[head.model]),
                self._rng,
                on_ready=partial(self._head_ready, head.model),
                on_lost=partial(self._withdraw, head.model),
            )
            self._heads[head] = head_kept
            nursery.start_soon(head_kept.run)
        self._drafters.keep(models, nursery, self._leaving)

    def _what(self, key: RunnerKey | SpareKey | HeadKey, model: Digest) -> str:
        return f"{key} of {self._consensus.state.models[model].name}"

    async def _head_of(self, model: Digest) -> HeadParts:
        return await self._heads[HeadKey(model)].ready()

    def _epoch(self, model: Digest) -> int:
        placement = self._placements.get(model)
        return placement.epoch if placement is not None else 0

    def _open_runner(
        self, model: ModelRecord, key: RunnerKey, progress: HostProgress
    ) -> AbstractAsyncContextManager[StageRunner]:
        return self._assets.runner(model, key, self._epoch(key.model), progress)

    def _open_head(
        self, model: ModelRecord, progress: HostProgress
    ) -> AbstractAsyncContextManager[HeadParts]:
        return self._assets.head(model, self._epoch(model.digest), progress)

    @asynccontextmanager
    async def _open_spare(
        self, model: ModelRecord, key: SpareKey, progress: HostProgress
    ) -> AsyncIterator[_OnDisk]:
        await self._assets.spare(model, key.slice, self._epoch(key.model), progress)
        yield _OnDisk()

    # ---- ranks -----------------------------------------------------------------------------

    def _start_stages(self, nursery: trio.Nursery) -> None:
        models = self._consensus.state.models
        for where, placement in self._wanted.stages.items():
            if where not in self._stages:
                rank = placement.ranks[where[1]]
                stage = self._stages[where] = _Stage(placement, rank)
                kept = self._runners[runner_key(placement, rank, self._peer_id)]
                spec = stage_spec(models[placement.model], placement, rank)
                nursery.start_soon(self._serve, stage, spec, kept)

    async def _serve(self, stage: _Stage, spec: StageSpec, kept: Kept[StageRunner]) -> None:
        """Serve a rank under one epoch with whatever runner there is."""
        try:
            await self._serve_on(stage, spec, kept)
        finally:
            stage.over.set()

    async def _serve_on(self, stage: _Stage, spec: StageSpec, kept: Kept[StageRunner]) -> None:
        with stage.scope:
            while True:
                runner = await kept.ready()
                try:
                    failure = await self._pipeline.stages.serve(spec, runner)
                except PyAgentError as error:
                    logger.warning("rank %d is not served: %s", spec.rank, error)
                    await trio.sleep(FIRST_PAUSE)
                    continue
                except Exception:
                    logger.exception("serving rank %d failed in an unforeseen way", spec.rank)
                    failure = RunnerFailed("An internal error; see this node's log.", reason="bug")
                kept.spoil(runner, failure)
                await kept.gone(runner)

    # ---- heads -----------------------------------------------------------------------------

    def _head_ready(self, digest: Digest, parts: HeadParts) -> None:
        self._offer(digest)

    def _offer(self, digest: Digest) -> None:
        """Let the engine take requests under the current placement, if the head is there."""
        placement = self._placements[digest]
        kept = self._heads.get(HeadKey(digest))
        parts = kept.value if kept is not None else None
        if parts is None or self._offered.get(digest) == placement:
            return
        model = self._consensus.state.models[digest]
        self._offered[digest] = placement
        drafting = placement.drafting
        drafter = drafting.drafter if drafting is not None else None
        self._pipeline.engine.offer(
            HeadModel(
                name=model.name,
                created=model.created,
                placement=placement,
                vocabulary=parts.vocabulary,
                tokenizer=parts.tokenizer,
                embeddings=parts.embeddings,
                n_ctx_train=model.n_ctx_train,
                drafter=self._consensus.state.models[drafter].name if drafter else None,
            )
        )

    def _withdraw(self, digest: Digest) -> None:
        placement = self._offered.pop(digest, None)
        if placement is not None:
            self._pipeline.engine.withdraw(digest, placement.epoch)

    # ---- reports ---------------------------------------------------------------------------

    def reports(self) -> PlacementReports:
        """Return how this node's parts fare."""
        now = trio.current_time()
        views = {(v.model, v.epoch, v.rank): v for v in self._pipeline.stages.views()}
        ranks = []
        for stage in self._stages.values():
            placement, rank = stage.placement, stage.rank
            view = views.get((placement.model, placement.epoch, rank.rank))
            rate = stage.rate.sample(view.tokens, now) if view is not None else 0.0
            kept = self._runners[runner_key(placement, rank, self._peer_id)]
            ranks.append(rank_report(placement, rank, kept, view, rate))
        reserves = [r for p in self._placements.values() for r in self._reserves(p)]
        heads = [
            head_report(placement, head)
            for digest, placement in self._placements.items()
            if (head := self._heads.get(HeadKey(digest))) is not None
        ]
        leaving = sum(not event.is_set() for event in (*self._leaving, *self._ending))
        return PlacementReports(
            tuple(ranks),
            tuple(heads),
            tuple(reserves),
            leaving=leaving,
            drafters=self._drafters.reports(),
            prepared=tuple(
                prepared_report(
                    prepared, rank, self._runners[runner_key(prepared, rank, self._peer_id)]
                )
                for prepared in self._prepared.values()
                for rank in prepared.ranks
                if rank.peer_id == self._peer_id
            ),
            behind={m: self._behind(m) for m in self._prepared} if self._behind else {},
        )

    def kept_runners(self) -> frozenset[RunnerKey]:
        """Return the runners that this node keeps now, whether they work or not."""
        return frozenset(self._runners)

    def _reserves(self, placement: Placement) -> Iterator[ReserveReport]:
        for rank in placement.ranks:
            if self._peer_id in rank.standbys:
                runner = self._runners[runner_key(placement, rank, self._peer_id)]
                memory = runner.value.info.memory_bytes if runner.value is not None else None
                yield reserve_report(placement, rank, runner, loaded=True, memory=memory)
            elif self._peer_id in rank.spares:
                key = SpareKey(placement.model, rank.slice)
                if (spare := self._spares.get(key)) is not None:
                    yield reserve_report(placement, rank, spare, loaded=False, memory=None)


def _take_out(table: dict[K, Kept[T]], keep: Set[K]) -> list[tuple[K, Kept[T]]]:
    """Remove what is not to be kept from ``table``; the caller lets go of it."""
    gone = [(key, kept) for key, kept in table.items() if key not in keep]
    for key, _ in gone:
        del table[key]
    return gone


async def _release_after(kept: Kept[StageRunner], events: Sequence[trio.Event]) -> None:
    for event in events:
        await event.wait()
    kept.release()


def stage_spec(model: ModelRecord, placement: Placement, rank: Rank) -> StageSpec:
    """Return the stage that ``rank`` is."""
    ranks, at = placement.ranks, rank.rank
    return StageSpec(
        model=placement.model,
        epoch=placement.epoch,
        rank=at,
        peer_id=rank.peer_id,
        slice=rank.slice,
        upstream=ranks[at - 1].peer_id if at else None,
        downstream=ranks[at + 1].peer_id if at + 1 < len(ranks) else None,
        n_embd=model.n_embd,
        n_vocab=model.n_vocab,
        n_ctx=placement.n_ctx,
        n_seq=placement.n_seq,
        activations=placement.crossing,
    )
