"""The drafter ranks of this node: whole models that guess for the heads of other models.

Kept like any other part of a placement (see ``placements``): loaded when the log says so, again
after growing pauses when it fails, and through any number of epochs.  The node is asked over the
mesh (``inference.drafting.service``).  A model of another vocabulary is refused before it is
loaded.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import trio

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.base.types import Digest, PeerId, Placement, Slice
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.inference.drafting.model import ModelDrafters, check_vocabulary
from pyagent_node.inference.drafting.service import DraftOffer, DraftService
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.node.holdings import RunnerKey
from pyagent_node.node.keeping import HostProgress, Kept
from pyagent_node.node.part_reports import drafter_report
from pyagent_node.node.placement_messages import DrafterReport
from pyagent_node.node.placement_parts import Assets, HeadParts

Models = Mapping[Digest, ModelRecord]


class DrafterKey(NamedTuple):
    """A whole model, loaded to guess for the placed model ``target``."""

    target: Digest
    drafter: Digest
    n_layers: int
    n_ctx: int
    n_seq: int

    @property
    def slice(self) -> Slice:
        """All of it."""
        return Slice(0, self.n_layers, head=True)

    def __str__(self) -> str:
        return "the drafter"


class _Parts(NamedTuple):
    """A loaded drafter."""

    runner: StageRunner
    factory: ModelDrafters
    pieces: tuple[bytes, ...]

    @property
    def failed(self) -> trio.Event:
        return self.runner.failed

    @property
    def failure(self) -> RunnerFailed | None:
        return self.runner.failure


def wanted_drafters(
    placements: Iterable[Placement], models: Models, peer_id: PeerId
) -> dict[DrafterKey, Placement]:
    """Return what the node ``peer_id`` has to draft with, and for which placement.  Pure.

    A drafter holds as many sessions as its target, of as many tokens unless it was trained for
    fewer.
    """
    found: dict[DrafterKey, Placement] = {}
    for placement in placements:
        drafting = placement.drafting
        if drafting is None or drafting.drafter is None or drafting.peer_id != peer_id:
            continue
        model = models[drafting.drafter]
        n_ctx = min(placement.n_ctx, model.n_ctx_train)
        key = DrafterKey(placement.model, drafting.drafter, model.n_layers, n_ctx, placement.n_seq)
        found[key] = placement
    return found


class DraftRanks:
    """Keeps what this node drafts with, and offers it to ``service`` while it works.

    ``head_of`` waits for this node's head of a placed model, whose tokens a drafter must share.
    ``epoch_of`` returns the epoch of a model's placement, 0 for none.
    """

    def __init__(
        self,
        service: DraftService,
        assets: Assets,
        rng: random.Random,
        *,
        head_of: Callable[[Digest], Awaitable[HeadParts]],
        epoch_of: Callable[[Digest], int],
    ) -> None:
        self._service = service
        self._assets = assets
        self._rng = rng
        self._head_of = head_of
        self._epoch_of = epoch_of
        self._wanted: dict[DrafterKey, Placement] = {}
        self._kept: dict[DrafterKey, Kept[_Parts]] = {}

    def slices(self, model: Digest) -> frozenset[Slice]:
        """Return the slices of a model whose files are needed here to draft with."""
        return frozenset(key.slice for key in self._wanted if key.drafter == model)

    def release(self, wanted: dict[DrafterKey, Placement]) -> list[tuple[Digest, trio.Event]]:
        """Let go of what is wanted no more; return the models, and what is set when each is gone.

        What stays goes on under the epoch of its placement.
        """
        self._wanted = wanted
        gone = []
        for key in self._kept.keys() - wanted.keys():
            kept = self._kept.pop(key)
            self._service.withdraw(key.target)
            kept.release()
            gone.append((key.drafter, kept.ended))
        for key, kept in self._kept.items():
            if kept.value is not None:
                self._offer(key, kept.value)
        return gone

    def keep(self, models: Models, nursery: trio.Nursery, after: Iterable[trio.Event]) -> None:
        """Begin to keep what is newly wanted, once all of ``after`` have happened."""
        for key in sorted(self._wanted.keys() - self._kept.keys()):
            model = models[key.drafter]
            kept = Kept(
                f"{key} {model.name} of {models[key.target].name}",
                partial(self._open, model, key),
                self._rng,
                on_ready=partial(self._offer, key),
                on_lost=partial(self._lost, key),
            )
            self._kept[key] = kept
            nursery.start_soon(kept.run, tuple(after))

    def reports(self) -> tuple[DrafterReport, ...]:
        """Return how they fare."""
        return tuple(
            drafter_report(self._wanted[key], key.drafter, kept, self._memory(kept), view)
            for key, kept in self._kept.items()
            for view in [self._service.view(key.target)]
        )

    @staticmethod
    def _memory(kept: Kept[_Parts]) -> int | None:
        return kept.value.runner.info.memory_bytes if kept.value is not None else None

    def _offer(self, key: DrafterKey, parts: _Parts) -> None:
        placement = self._wanted.get(key)
        if placement is None:
            return
        self._service.offer(
            DraftOffer(
                key.target, placement.epoch, key.drafter, parts.factory, parts.pieces, key.n_ctx
            )
        )

    def _lost(self, key: DrafterKey) -> None:
        # Another drafter of the same model may have taken its place already.
        if key in self._wanted or all(other.target != key.target for other in self._wanted):
            self._service.withdraw(key.target)

    @asynccontextmanager
    async def _open(
        self, model: ModelRecord, key: DrafterKey, progress: HostProgress
    ) -> AsyncIterator[_Parts]:
        pieces = (await self._head_of(key.target)).vocabulary.pieces
        epoch = self._epoch_of(key.drafter)
        async with self._assets.head(model, epoch, progress) as head:
            own = head.vocabulary.pieces
        check_vocabulary(model.name, own, pieces)
        runner_key = RunnerKey(key.drafter, key.slice, key.n_ctx, key.n_seq)
        async with self._assets.runner(model, runner_key, epoch, progress) as runner:
            yield _Parts(runner, ModelDrafters(model.name, runner, own), pieces)
