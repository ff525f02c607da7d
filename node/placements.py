"""Makes this node's part of every placement real, and keeps it so.

The controller follows the replicated state.  For each live placement it hosts the ranks that name
this node (fetch the slice, start a runner, serve the stage) and the head's assets, so that any node
can take requests.  What fails is tried again with growing pauses; what is replaced or removed is
stopped before its successor starts, since both may not fit the memory.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError, RunnerFailed, Unavailable
from pyagent_node.base.types import Digest, PeerId, Placement, Rank
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.pipeline.head import Vocabulary
from pyagent_node.inference.pipeline.pipeline import Pipeline
from pyagent_node.inference.pipeline.ports import (
    EmbeddingRows,
    HeadModel,
    StageRunner,
    Tokenizer,
)
from pyagent_node.inference.pipeline.stage_types import StageSpec, StageView
from pyagent_node.node.placement_messages import (
    HeadReport,
    HostState,
    PlacementReports,
    RankReport,
)

logger = logging.getLogger("pyagent_node.placements")

FIRST_PAUSE: Final = 0.25
"""Pause before the first new attempt, in seconds; each one after is twice as long."""
LONGEST_PAUSE: Final = 60.0
STEADY_SECONDS: Final = 60.0
"""What ran so long has proved itself: its next failure starts with the first pause again."""
RATE_SECONDS: Final = 1.0
"""Shortest time over which a stage's throughput is measured."""


class HostProgress(Protocol):
    """Takes the progress of an attempt."""

    def __call__(self, state: HostState, done: int = 0, total: int | None = None) -> None:
        """Note the state, and the bytes fetched so far of those needed."""
        ...


class HeadParts(Protocol):
    """What a head is made of; ``failed`` is set when the tokenizer's process has died."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token, and the end tokens."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenises and renders."""
        ...

    @property
    def embeddings(self) -> EmbeddingRows | None:
        """The embedding table; ``None`` where one rank holds the whole model."""
        ...

    @property
    def failed(self) -> trio.Event:
        """Set when the parts can no longer be used."""
        ...

    @property
    def failure(self) -> RunnerFailed | None:
        """Why."""
        ...


class Assets(Protocol):
    """Where slices, runners and head assets come from (see ``node.assets``).

    Both methods report ``"fetching"`` and ``"loading"`` on the way and raise errors of
    ``base.errors``.
    """

    def runner(
        self, model: ModelRecord, placement: Placement, rank: Rank, progress: HostProgress
    ) -> AbstractAsyncContextManager[StageRunner]:
        """Fetch a slice and run it while the context lasts."""
        ...

    def head(
        self, model: ModelRecord, placement: Placement, progress: HostProgress
    ) -> AbstractAsyncContextManager[HeadParts]:
        """Fetch header and embeddings and run a tokenizer while the context lasts."""
        ...


class _Part:
    """A rank or the head of one placement on this node, and how it fares."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.state: HostState = "fetching"
        self.error: PyAgentError | None = None
        self.failures = 0
        self.done = 0
        self.total: int | None = None
        self.memory_bytes: int | None = None
        self.rate = 0.0
        self._sample = (0.0, 0)

    def progress(self, state: HostState, done: int = 0, total: int | None = None) -> None:
        """Note how far the attempt is."""
        self.state, self.done, self.total = state, done, total

    def sample(self, tokens: int, now: float) -> None:
        """Measure the throughput since the last sample that is old enough."""
        then, before = self._sample
        if tokens < before or then == 0.0:
            self._sample = (now, tokens)
        elif now - then >= RATE_SECONDS:
            self.rate = (tokens - before) / (now - then)
            self._sample = (now, tokens)


class _Hosted:
    """A placement with a part on this node."""

    def __init__(self, placement: Placement, parts: list[_Part]) -> None:
        self.placement = placement
        self.parts = parts
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


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
    ) -> None:
        self._peer_id = peer_id
        self._consensus = consensus
        self._pipeline = pipeline
        self._assets = assets
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._hosted: dict[Digest, _Hosted] = {}

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

    def _reconcile(self, nursery: trio.Nursery) -> None:
        state = self._consensus.state
        for digest, hosted in list(self._hosted.items()):
            wanted = state.placements.get(digest)
            if wanted is None or wanted.epoch != hosted.placement.epoch:
                hosted.scope.cancel()
                if wanted is None:
                    self._pipeline.engine.forget(digest)
        for digest, placement in state.placements.items():
            before = self._hosted.get(digest)
            if before is not None and before.placement.epoch == placement.epoch:
                continue
            mine = [r.rank for r in placement.ranks if r.peer_id == self._peer_id]
            parts = [_Part(None), *(_Part(rank) for rank in mine)]
            hosted = self._hosted[digest] = _Hosted(placement, parts)
            self._pipeline.engine.expect(digest, state.models[digest].name)
            nursery.start_soon(self._host, state.models[digest], hosted, before)

    async def _host(self, model: ModelRecord, hosted: _Hosted, before: _Hosted | None) -> None:
        try:
            if before is not None:
                await before.ended.wait()
            with hosted.scope:
                async with trio.open_nursery() as nursery:
                    for part in hosted.parts:
                        run = self._run_head if part.rank is None else self._run_rank
                        nursery.start_soon(self._keep, model, hosted.placement, part, run)
        finally:
            hosted.ended.set()
            if self._hosted.get(model.digest) is hosted:
                del self._hosted[model.digest]

    async def _keep(
        self,
        model: ModelRecord,
        placement: Placement,
        part: _Part,
        run: Callable[[ModelRecord, Placement, _Part], Awaitable[RunnerFailed]],
    ) -> None:
        """Run a part; whenever it fails, say so, pause, and run it again."""
        what = "the head" if part.rank is None else f"rank {part.rank}"
        pause = FIRST_PAUSE
        while True:
            part.progress("fetching")
            started = trio.current_time()
            error: PyAgentError
            try:
                error = await run(model, placement, part)
            except PyAgentError as caught:
                error = caught
            except Exception:
                logger.exception("%s of %s failed in an unforeseen way", what, model.name)
                error = PyAgentError("An internal error; see this node's log.", code="internal")
            if trio.current_time() - started > STEADY_SECONDS:
                pause = FIRST_PAUSE
            part.error = error
            part.failures += 1
            part.progress("failed")
            logger.warning(
                "%s of %s failed, next attempt in %.1f s: %s", what, model.name, pause, error
            )
            await trio.sleep(pause * self._rng.uniform(0.8, 1.2))
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _run_rank(
        self, model: ModelRecord, placement: Placement, part: _Part
    ) -> RunnerFailed:
        assert part.rank is not None, "a rank's part has a number"
        rank = placement.ranks[part.rank]
        async with self._assets.runner(model, placement, rank, part.progress) as runner:
            part.memory_bytes = runner.info.memory_bytes
            part.progress("ready")
            return await self._pipeline.stages.serve(stage_spec(model, placement, rank), runner)

    async def _run_head(
        self, model: ModelRecord, placement: Placement, part: _Part
    ) -> RunnerFailed:
        engine = self._pipeline.engine
        async with self._assets.head(model, placement, part.progress) as parts:
            engine.offer(
                HeadModel(
                    name=model.name,
                    created=model.created,
                    placement=placement,
                    vocabulary=parts.vocabulary,
                    tokenizer=parts.tokenizer,
                    embeddings=parts.embeddings,
                )
            )
            try:
                part.progress("ready")
                await parts.failed.wait()
            finally:
                engine.withdraw(placement.model, placement.epoch)
            return parts.failure or RunnerFailed("The tokenizer has died.", reason="unknown")

    # ---- reports ---------------------------------------------------------------------------

    def reports(self) -> PlacementReports:
        """Return how this node's parts fare."""
        now = trio.current_time()
        views = {(v.model, v.epoch, v.rank): v for v in self._pipeline.stages.views()}
        ranks: list[RankReport] = []
        heads: list[HeadReport] = []
        for hosted in self._hosted.values():
            placement = hosted.placement
            for part in () if hosted.scope.cancel_called else hosted.parts:
                if part.rank is None:
                    heads.append(_head_report(placement, part))
                    continue
                view = views.get((placement.model, placement.epoch, part.rank))
                ranks.append(_rank_report(placement, part, view, now))
        return PlacementReports(tuple(ranks), tuple(heads))


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
    )


def _rank_report(
    placement: Placement, part: _Part, view: StageView | None, now: float
) -> RankReport:
    assert part.rank is not None, "a rank's part has a number"
    if view is not None:
        part.sample(view.tokens, now)
    return RankReport(
        model=placement.model,
        epoch=placement.epoch,
        rank=part.rank,
        state=part.state,
        error=part.error.to_info() if part.error and part.state == "failed" else None,
        failures=part.failures,
        done=part.done,
        total=part.total,
        memory_bytes=part.memory_bytes if part.state == "ready" else None,
        load=view,
        tokens_per_second=part.rate if view is not None else 0.0,
    )


def _head_report(placement: Placement, part: _Part) -> HeadReport:
    return HeadReport(
        model=placement.model,
        epoch=placement.epoch,
        state=part.state,
        error=part.error.to_info() if part.error and part.state == "failed" else None,
        failures=part.failures,
        done=part.done,
        total=part.total,
    )


def not_hosted(rank: int, peer: PeerId) -> Unavailable:
    """Return the error for a rank that its node does not report."""
    return Unavailable(
        f"Node {peer} does not answer for rank {rank}.",
        code="peer_lost",
        remedy="Check that it runs and is connected: 'pyagent-node peers'.",
        rank=rank,
        peer_id=peer,
    )
