"""Fetching slices from honest peers over the simulated mesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import trio

from pyagent_node.base.types import Slice
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.inference.models.blob_server import BlobServer
from pyagent_node.inference.models.fetching import TransferStats
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.transfer import (
    ensure_head_assets,
    ensure_slice,
)

CHUNK = 4096
PART = Slice(1, 3, False)

Swarming = Callable[..., Any]


async def test_a_slice_comes_with_its_own_bytes_only(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        stats = TransferStats()
        seen: list[tuple[int, int | None]] = []
        path = await ensure_slice(
            swarm.mesh,
            swarm.store,
            swarm.model,
            PART,
            swarm.peers(),
            progress=lambda done, total: seen.append((done, total)),
            stats=stats,
        )
        assert path.read_bytes() == swarm.expected()
        assert stats.bytes_fetched == swarm.needed() < swarm.model.size * 0.75
        assert stats.bytes_wasted == 0
        assert not stats.dropped
        assert seen[-1] == (swarm.needed(), swarm.needed())
        assert [done for done, total in seen if total] == sorted(d for d, t in seen if t)
        stored = swarm.store.get(swarm.model.digest)
        assert stored.path is None
        assert stored.name == "tiny"
        assert stored.bytes_held == stats.bytes_fetched
        assert stored.slices == ("1-3",)
        assert await swarm.fetch() == swarm.expected()
        assert stats.bytes_fetched == swarm.needed()


async def test_a_record_of_the_log_is_enough(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        record = ModelRecord(
            digest=swarm.model.digest,
            name="no valid name!",
            size=swarm.model.size,
            architecture="llama",
            n_layers=4,
            n_embd=128,
            n_vocab=320,
            n_ctx_train=256,
            manifest=swarm.model.manifest,
            created=0,
        )
        await ensure_slice(swarm.mesh, swarm.store, record, PART, swarm.peers())
        assert swarm.store.get(record.digest).name == record.digest[:16]


async def test_the_whole_model_and_its_ends(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        for part in (Slice(0, 1, False), Slice(3, 4, True), Slice(0, 4, True)):
            assert await swarm.fetch(part) == swarm.expected(part)
        assert swarm.store.get(swarm.model.digest).path is not None
        assert not list(swarm.store.root.glob("*/partial.*"))
        for part in (PART, Slice(0, 4, True)):
            swarm.network.isolate(swarm.mesh.peer_id)
            assert await swarm.fetch(part) == swarm.expected(part)


async def test_head_assets(swarming: Swarming, llama: ModuleType) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        stats = TransferStats()
        assets = await ensure_head_assets(
            swarm.mesh, swarm.store, swarm.model, swarm.peers(), stats=stats
        )
        with assets:
            assert assets.embeddings.rows(np.arange(3, dtype=np.int32)).any()
            with llama.Vocabulary(assets.tokenizer) as vocabulary:
                assert vocabulary.chat_template() == b"{{ messages }}"
        assert stats.bytes_fetched < swarm.model.size / 4
        before = stats.bytes_fetched
        await swarm.fetch(Slice(0, 1, False), stats)
        assert stats.bytes_fetched < before + swarm.needed(Slice(0, 1, False))
        swarm.network.isolate(swarm.mesh.peer_id)
        with await ensure_head_assets(swarm.mesh, swarm.store, swarm.model, []):
            pass


async def test_several_peers_share_the_work(swarming: Swarming) -> None:
    async with swarming(latency=0.001) as swarm:
        peers = [await swarm.honest(swarm.full_store()) for _ in range(3)]
        stats = TransferStats()
        assert await swarm.fetch(stats=stats) == swarm.expected()
        assert set(stats.by_peer) == {mesh.peer_id for mesh in peers}
        assert stats.bytes_fetched == swarm.needed()


async def test_peers_with_parts_complete_each_other(swarming: Swarming) -> None:
    async with swarming() as swarm:
        seed = await swarm.honest()
        halves = []
        for part in (Slice(0, 2, False), Slice(2, 4, True)):
            store, mesh = swarm.new_store(), swarm.join()
            BlobServer(store).attach(mesh)
            await swarm.network.connect_all()
            await ensure_slice(mesh, store, swarm.model, part, [seed.peer_id])
            halves.append(mesh.peer_id)
        swarm.network.crash(seed.peer_id)
        stats = TransferStats()
        assert await swarm.fetch(stats=stats) == swarm.expected()
        assert set(stats.by_peer) == set(halves)


async def test_a_transfer_goes_on_after_a_restart(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        stats = TransferStats()
        seen = itertools.count()

        with trio.CancelScope() as scope:

            def stop(done: int, total: int | None) -> None:
                if next(seen) == 40:
                    scope.cancel()

            await ensure_slice(
                swarm.mesh,
                swarm.store,
                swarm.model,
                PART,
                swarm.peers(),
                progress=stop,
                stats=stats,
            )
        assert scope.cancelled_caught
        assert 0 < stats.bytes_fetched < swarm.needed()
        swarm.store = ModelStore(swarm.store.root)  # a new process
        assert swarm.store.get(swarm.model.digest).bytes_held == stats.bytes_fetched
        assert await swarm.fetch(stats=stats) == swarm.expected()
        assert stats.bytes_fetched == swarm.needed()


async def test_a_crash_before_the_bitmap_was_written_costs_those_chunks_only(
    swarming: Swarming,
) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        await swarm.fetch()
        folder = swarm.store.root / swarm.model.digest
        (folder / "partial.chunks").write_bytes(b"torn")
        for file in (folder / "slices").iterdir():
            file.unlink()
        swarm.store = ModelStore(swarm.store.root)
        stats = TransferStats()
        assert await swarm.fetch(stats=stats) == swarm.expected()
        assert stats.bytes_fetched == swarm.needed()


async def test_overlapping_slices_at_once_fetch_each_chunk_once(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        stats = TransferStats()
        parts = [Slice(0, 2, False), Slice(1, 3, False), Slice(1, 3, False), Slice(2, 4, True)]
        results: dict[int, bytes] = {}

        async def one(index: int) -> None:
            results[index] = await swarm.fetch(parts[index], stats)

        async with trio.open_nursery() as nursery:
            for index in range(len(parts)):
                nursery.start_soon(one, index)
        for index, part in enumerate(parts):
            assert results[index] == swarm.expected(part)
        assert stats.bytes_fetched == swarm.store.get(swarm.model.digest).bytes_held
        assert stats.bytes_wasted == 0
