"""Where slices, runners and head assets come from: the store, the peers, child processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId, Slice
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.fetching import TransferStats
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.transfer import ensure_head_assets, ensure_slice
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.inference.runner import (
    RunnerSpec,
    TokenizerRunner,
    open_slice_runner,
    open_tokenizer_runner,
)
from pyagent_node.node.holdings import RunnerKey
from pyagent_node.node.keeping import HostProgress
from pyagent_node.node.placement_parts import HeadParts
from pyagent_node.node.speeds import SpeedBook


class _HeadParts(NamedTuple):
    vocabulary: Vocabulary
    tokenizer: TokenizerRunner
    embeddings: EmbeddingTable | None

    @property
    def failed(self) -> trio.Event:
        return self.tokenizer.failed

    @property
    def failure(self) -> RunnerFailed | None:
        return self.tokenizer.failure


class LocalAssets:
    """Implements ``placements.Assets``.

    Fetches what is missing from every connected peer; ``stats`` counts that.  ``threads`` is what
    each slice computes with (``None``: the runner's default); ``speeds`` notes how fast they are.
    """

    def __init__(
        self,
        mesh: Mesh,
        store: ModelStore,
        *,
        threads: int | None = None,
        stats: TransferStats | None = None,
        speeds: SpeedBook | None = None,
    ) -> None:
        self._speeds = speeds
        self.stats = stats or TransferStats()
        self._mesh = mesh
        self._store = store
        self._threads = threads

    def _peers(self) -> list[PeerId]:
        return [peer.peer_id for peer in self._mesh.peers()]

    @asynccontextmanager
    async def runner(
        self, model: ModelRecord, key: RunnerKey, epoch: int, progress: HostProgress
    ) -> AsyncIterator[StageRunner]:
        """Fetch a slice and run it while the context lasts."""
        path = await self._fetch(model, key.slice, epoch, progress)
        progress("loading")
        spec = RunnerSpec(
            path=str(path),
            slice=key.slice,
            n_ctx=key.n_ctx,
            n_seq=key.n_seq,
            threads=self._threads,
            backend=key.backend,
        )
        async with open_slice_runner(spec) as runner:
            if self._speeds is None:
                yield runner
                return
            async with self._speeds.following(model.digest, key.slice, path, runner):
                yield runner

    @asynccontextmanager
    async def head(
        self, model: ModelRecord, epoch: int, progress: HostProgress
    ) -> AsyncIterator[HeadParts]:
        """Fetch header and embeddings and run a tokenizer while the context lasts."""
        assets = await ensure_head_assets(
            self._mesh,
            self._store,
            model,
            self._peers(),
            progress=lambda done, total: progress("fetching", done, total),
            stats=self.stats,
            epoch=epoch,
        )
        progress("loading")
        with assets:
            async with open_tokenizer_runner(str(assets.tokenizer)) as tokenizer:
                vocabulary = Vocabulary(
                    pieces=tuple(await tokenizer.pieces()),
                    end_tokens=frozenset(tokenizer.info.end_tokens),
                )
                yield _HeadParts(vocabulary, tokenizer, assets.embeddings)

    async def spare(
        self, model: ModelRecord, part: Slice, epoch: int, progress: HostProgress
    ) -> None:
        """Fetch a slice, without running it."""
        await self._fetch(model, part, epoch, progress)

    async def tidy(self, model: Digest, needed: Callable[[], frozenset[Slice]]) -> None:
        """Delete slice files but those that are ``needed``; what made them stays."""
        async with self._store.busy(model):
            await trio.to_thread.run_sync(self._store.drop_slices, model, needed())

    async def _fetch(
        self, model: ModelRecord, part: Slice, epoch: int, progress: HostProgress
    ) -> Path:
        return await ensure_slice(
            self._mesh,
            self._store,
            model,
            part,
            self._peers(),
            progress=lambda done, total: progress("fetching", done, total),
            stats=self.stats,
            epoch=epoch,
        )
