"""Fetching slices from slow, lying and dying peers over the simulated mesh."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.types import Digest, PeerId, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.inference.models import blob_client, blob_server, fetching, partial
from pyagent_node.inference.models.blob_messages import (
    REPLIES,
    BlobReply,
    BlobRequest,
    ChunkReply,
    GetChunk,
    HaveReply,
    ManifestReply,
)
from pyagent_node.inference.models.blob_server import BlobServer
from pyagent_node.inference.models.chunks import ChunkSet
from pyagent_node.inference.models.fetching import TransferStats
from pyagent_node.inference.models.manifest import build_manifest, decode_manifest
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.models.transfer import (
    ensure_manifest,
    ensure_model,
    ensure_slice,
)
from pyagent_node.node.identity import NodeKey

CHUNK = 4096
PART = Slice(1, 3, False)

Swarming = Callable[..., Any]


def reply(message: BlobReply, tail: bytes = b"") -> Frame:
    return Frame(REPLIES.encode(message), tail)


async def truthful(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    return reply(message, data)


async def tampering(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    if isinstance(request, GetChunk):
        data = data[:-1] + bytes([data[-1] ^ 1])
    return reply(message, data)


async def test_a_tampered_chunk_costs_a_peer_its_turn(swarming: Swarming) -> None:
    async with swarming() as swarm:
        liar = await swarm.odd(tampering)
        honest = await swarm.honest()
        stats = TransferStats()
        assert await swarm.fetch(stats=stats) == swarm.expected()
        assert stats.dropped == {liar.peer_id: "chunk_corrupt"}
        assert stats.chunks_corrupt == 1
        assert set(stats.by_peer) == {honest.peer_id}


async def test_tampered_chunks_alone_are_refused_by_name(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.odd(tampering)
        with pytest.raises(CorruptData) as caught:
            await swarm.fetch()
        assert caught.value.code == "chunk_corrupt"
        assert swarm.store.get(swarm.model.digest).bytes_held == 0
        assert not list(swarm.store.root.glob("*/slices/*"))


async def test_a_tampered_manifest_is_refused_by_name(swarming: Swarming) -> None:
    async with swarming() as swarm:
        other = build_manifest(swarm.source, header_bytes=8, chunk_bytes=CHUNK)
        await swarm.odd(truthful, manifest=other.encode())
        with pytest.raises(CorruptData) as caught:
            await swarm.fetch()
        assert caught.value.code == "manifest_mismatch"
        await swarm.honest()
        manifest = await ensure_manifest(swarm.mesh, swarm.store, swarm.model, swarm.peers())
        assert manifest.manifest_digest == swarm.model.manifest


async def _short(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    return reply(message, data[:-1] if isinstance(request, GetChunk) else data)


async def _other_chunk(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    if isinstance(message, ChunkReply):
        message = ChunkReply(message.model, message.index + 1)
    return reply(message, data)


async def _garbage(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    return Frame(b"\xc1garbage") if isinstance(request, GetChunk) else reply(message, data)


async def _other_type(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    return reply(ManifestReply(Digest("0" * 64)), data)


async def _wrong_bitmap(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    return reply(message, data + b"\0" if isinstance(message, HaveReply) else data)


async def _wrong_count(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
    if isinstance(message, HaveReply):
        message = HaveReply(message.model, message.count + 1)
    return reply(message, data)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (_short, "chunk_corrupt"),
        (_other_chunk, "unexpected_reply"),
        (_garbage, "malformed_message"),
        (_wrong_bitmap, "bitmap_malformed"),
        (_wrong_count, "unexpected_reply"),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_left(
    swarming: Swarming,
    answer: Callable[[BlobRequest, BlobReply, bytes], Awaitable[Frame | None]],
    code: str,
) -> None:
    async with swarming() as swarm:
        odd = await swarm.odd(answer)
        stats = TransferStats()
        with pytest.raises(CorruptData) as caught:
            await swarm.fetch(stats=stats)
        assert caught.value.code == code
        await swarm.honest()
        assert await swarm.fetch(stats=stats) == swarm.expected()
        assert stats.dropped == {odd.peer_id: code}


async def test_a_wrong_kind_of_answer(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.odd(_other_type)
        with pytest.raises(CorruptData) as caught:
            await swarm.fetch()
        assert caught.value.code == "unexpected_reply"


async def test_a_peer_that_dies_in_mid_transfer(swarming: Swarming) -> None:
    async with swarming() as swarm:
        sent = itertools.count()
        names: list[PeerId] = []

        async def dying(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
            if isinstance(request, GetChunk) and next(sent) == 5:
                swarm.network.crash(names[0])
            return reply(message, data)

        names.append((await swarm.odd(dying)).peer_id)
        stats = TransferStats()
        with pytest.raises(Unavailable) as caught:
            await swarm.fetch(stats=stats)
        assert caught.value.code == "no_source"
        held = swarm.store.get(swarm.model.digest).bytes_held
        assert held == stats.bytes_fetched > 0
        await swarm.honest()
        assert await swarm.fetch(stats=stats) == swarm.expected()
        assert stats.bytes_fetched == swarm.needed()


async def test_a_silent_peer_does_not_hold_up_the_others(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are stolen by the other peer, long before its deadline."""
    async with swarming() as swarm:

        async def silent(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
            if isinstance(request, GetChunk):
                await trio.sleep_forever()
            return reply(message, data)

        await swarm.odd(silent)
        await swarm.honest()
        with trio.fail_after(blob_client.REPLY_SECONDS / 2):
            assert await swarm.fetch() == swarm.expected()


async def test_a_silent_peer_alone_is_given_up(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_client, "REPLY_SECONDS", 0.05)
    monkeypatch.setattr(fetching, "ATTEMPTS", 2)

    async def silent(request: BlobRequest, message: BlobReply, data: bytes) -> Frame | None:
        if isinstance(request, GetChunk):
            await trio.sleep_forever()
        return reply(message, data)

    async with swarming() as swarm:
        odd = await swarm.odd(silent)
        stats = TransferStats()
        with pytest.raises(Unavailable) as caught:
            await swarm.fetch(stats=stats)
        assert caught.value.code == "no_source"
        assert stats.dropped == {odd.peer_id: "peer_slow"}


async def test_nobody_to_ask(swarming: Swarming) -> None:
    async with swarming() as swarm:
        for peers in ([], [swarm.mesh.peer_id], [NodeKey(b"x" * 32).peer_id]):
            with pytest.raises(Unavailable) as caught:
                await ensure_slice(swarm.mesh, swarm.store, swarm.model, PART, peers)
            assert caught.value.code == "no_source"
        await swarm.honest(swarm.new_store())
        with pytest.raises(Unavailable) as caught:
            await swarm.fetch()
        assert caught.value.code == "no_source"


async def test_chunks_that_nobody_holds_end_the_wait(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(fetching, "REFRESH_SECONDS", 0.05)
    async with swarming() as swarm:
        seed = await swarm.honest()
        store, half = swarm.new_store(), swarm.join()
        BlobServer(store).attach(half)
        await swarm.network.connect_all()
        await ensure_slice(half, store, swarm.model, Slice(0, 2, False), [seed.peer_id])
        swarm.network.crash(seed.peer_id)
        with pytest.raises(Unavailable) as caught:
            await swarm.fetch()
        assert caught.value.code == "no_source"
        assert caught.value.facts["chunks"] > 0


async def test_a_peer_that_is_fetching_too_is_asked_again(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "REFRESH_SECONDS", 0.02)
    monkeypatch.setattr(blob_server, "ASKS_PER_PEER", 10_000)
    async with swarming() as swarm:
        seed = await swarm.honest()
        store, middle = swarm.new_store(), swarm.join()
        BlobServer(store).attach(middle)
        await swarm.network.connect_all()
        await ensure_manifest(middle, store, swarm.model, [seed.peer_id])
        asked = trio.Event()
        real_have = store.have

        def have(digest: Digest) -> ChunkSet:
            trio.from_thread.run_sync(asked.set)
            return real_have(digest)

        monkeypatch.setattr(store, "have", have)
        async with trio.open_nursery() as nursery:

            async def get() -> None:
                await ensure_slice(swarm.mesh, swarm.store, swarm.model, PART, [middle.peer_id])

            nursery.start_soon(get)
            await asked.wait()
            await ensure_slice(middle, store, swarm.model, PART, [seed.peer_id])
        assert await swarm.fetch() == swarm.expected()


async def test_a_full_disk_is_no_peers_fault(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarming() as swarm:
        await swarm.honest()

        def full(self: object, index: int, data: bytes) -> bool:
            raise Unavailable("full", code="disk_full")

        stats = TransferStats()
        with monkeypatch.context() as patch:
            patch.setattr(partial.PartialModel, "write_chunk", full)
            with pytest.raises(Unavailable) as caught:
                await swarm.fetch(stats=stats)
        assert caught.value.code == "disk_full"
        assert not stats.dropped
        assert await swarm.fetch() == swarm.expected()


async def test_too_little_room_is_said_before_anything_is_fetched(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 10})())
        stats = TransferStats()
        with pytest.raises(Unavailable) as caught:
            await swarm.fetch(stats=stats)
        assert caught.value.code == "disk_full"
        assert stats.bytes_fetched == 0


async def test_a_model_that_cannot_be_split_is_refused_after_its_header(
    swarming: Swarming, tiny: ModuleType, tmp_path: Path
) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        other = swarm.seed_store.add_file(
            tiny.tiny_model(tmp_path / "gemma.gguf", arch="gemma2"),
            about=About("gemma"),
            chunk_bytes=CHUNK,
        )
        stats = TransferStats()
        with pytest.raises(Unsupported) as caught:
            await ensure_slice(swarm.mesh, swarm.store, other, PART, swarm.peers(), stats=stats)
        assert caught.value.code == "unsupported_architecture"
        assert stats.bytes_fetched < other.size / 10
        path = await ensure_slice(swarm.mesh, swarm.store, other, Slice(0, 4, True), swarm.peers())
        assert path.stat().st_size == other.size
        with pytest.raises(InvalidRequest):
            await swarm.fetch(Slice(3, 9, False))


async def test_a_registered_file_that_is_truncated(swarming: Swarming, tmp_path: Path) -> None:
    """A member registered a manifest of a cut file: its header says so before the layers come."""
    async with swarming() as swarm:
        cut = tmp_path / "cut.gguf"
        data = swarm.source.read_bytes()
        cut.write_bytes(data[: len(data) // 2])
        with pytest.raises(CorruptData) as caught:
            swarm.seed_store.add_file(cut, about=About("cut"))
        assert caught.value.code == "gguf_truncated"
        length = swarm.seed_store.model_file(swarm.model.digest).header.length
        manifest = build_manifest(cut, header_bytes=length, chunk_bytes=CHUNK)
        swarm.seed_store.add_manifest(manifest, "cut")
        held = swarm.seed_store.partial(manifest.digest)
        for index in range(manifest.count):
            held.write_chunk(index, cut.read_bytes()[slice(*manifest.range(index))])
        await swarm.honest()
        model = swarm.seed_store.get(manifest.digest)
        with pytest.raises(CorruptData) as caught:
            await ensure_slice(swarm.mesh, swarm.store, model, PART, swarm.peers())
        assert caught.value.code == "gguf_truncated"


async def test_a_manifest_whose_chunks_make_another_file(
    swarming: Swarming, tmp_path: Path
) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        manifest = swarm.seed_store.manifest(swarm.model.digest)
        lie = decode_manifest(
            type(manifest)(
                **{
                    **{f: getattr(manifest, f) for f in manifest.__struct_fields__},
                    "digest": Digest("0" * 64),
                }
            ).encode()
        )
        swarm.seed_store.add_manifest(lie)
        held = swarm.seed_store.partial(lie.digest)
        for index in range(lie.count):
            held.write_chunk(index, swarm.seed_store.read_chunk(swarm.model.digest, index))
        with pytest.raises(CorruptData) as caught:
            await ensure_model(
                swarm.mesh,
                swarm.store,
                swarm.seed_store.get(lie.digest),
                swarm.peers(),
            )
        assert caught.value.code == "digest_mismatch"
        assert swarm.store.get(lie.digest).bytes_held == 0


async def test_rot_on_the_servers_disk_is_seen_there(
    swarming: Swarming, caplog: pytest.LogCaptureFixture
) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        path = swarm.seed_store.get(swarm.model.digest).path
        assert path is not None
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(data)
        stats = TransferStats()
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(Unavailable) as caught,
        ):
            await swarm.fetch(Slice(3, 4, True), stats)
        assert caught.value.code == "no_source"
        assert stats.chunks_corrupt == 0
        assert str(path) not in str(caught.value)
        assert "does not match its digest" in caplog.text
