"""Slices of the bundled model over real libp2p connections on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.inference.models.blob_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    ChunkReply,
    GetChunk,
    GetManifest,
    HaveReply,
    ManifestReply,
)
from pyagent_node.inference.models.blob_server import BlobServer
from pyagent_node.inference.models.fetching import TransferStats
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About, StoredModel
from pyagent_node.inference.models.transfer import ensure_head_assets, ensure_slice
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh
from pyagent_node.node.mesh.settings import MeshConfig
from tests.integration.mesh_kit import LOOPBACK, Guard

pytestmark = [pytest.mark.daemons, pytest.mark.slow, pytest.mark.model]

PART = Slice(10, 20, False)


@asynccontextmanager
async def meshes(count: int) -> AsyncIterator[list[Libp2pMesh]]:
    """Open nodes that all know the first one."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                open_mesh(
                    MeshConfig(key=NodeKey.generate(), membership=Guard(), listen=(LOOPBACK,))
                )
            )
            for _ in range(count)
        ]
        for node in nodes[1:]:
            await nodes[0].connect(node.addresses[0])
        yield nodes


@pytest.fixture
def model(bundled_model: Path, tmp_path: Path) -> tuple[ModelStore, StoredModel]:
    store = ModelStore(tmp_path / "seed")
    return store, store.add_file(bundled_model, about=About("smollm2-135m"))


async def test_a_slice_from_two_peers(
    model: tuple[ModelStore, StoredModel], bundled_model: Path, tmp_path: Path
) -> None:
    seed, stored = model
    async with meshes(3) as (mine, *others):
        for other in others:
            BlobServer(seed).attach(other)
        peers = [other.peer_id for other in others]
        store, stats = ModelStore(tmp_path / "mine"), TransferStats()
        path = await ensure_slice(mine, store, stored, PART, peers, stats=stats)
        write_slice(bundled_model, PART, tmp_path / "expected")
        assert path.read_bytes() == (tmp_path / "expected").read_bytes()
        assert set(stats.by_peer) == set(peers)
        assert stats.bytes_fetched < 28_000_000
        with await ensure_head_assets(mine, store, stored, peers, stats=stats):
            assert stats.bytes_fetched < 60_000_000


async def test_a_tampered_chunk_is_refused_by_name(
    model: tuple[ModelStore, StoredModel], tmp_path: Path
) -> None:
    seed, stored = model
    manifest = seed.manifest(stored.digest)

    async def lie(stream: FrameStream) -> None:
        while (frame := await stream.receive()) is not None:
            match REQUESTS.decode(frame.header):
                case GetManifest(digest):
                    answer = Frame(REPLIES.encode(ManifestReply(digest)), manifest.encode())
                case GetChunk(digest, index):
                    data = bytearray(seed.read_chunk(digest, index))
                    data[7] ^= 1
                    answer = Frame(REPLIES.encode(ChunkReply(digest, index)), bytes(data))
                case other:
                    have = seed.have(other.model)
                    reply = HaveReply(other.model, have.count)
                    answer = Frame(REPLIES.encode(reply), have.to_bytes())
            await stream.send(answer)

    async with meshes(3) as (mine, liar, honest):
        liar.handle(PROTOCOL, lie)
        BlobServer(seed).attach(honest)
        store, stats = ModelStore(tmp_path / "mine"), TransferStats()
        with trio.fail_after(30), pytest.raises(CorruptData) as caught:
            await ensure_slice(mine, store, stored, PART, [liar.peer_id], stats=stats)
        assert caught.value.code == "chunk_corrupt"
        both: list[PeerId] = [liar.peer_id, honest.peer_id]
        await ensure_slice(mine, store, stored, PART, both, stats=stats)
        assert stats.dropped == {liar.peer_id: "chunk_corrupt"}
        assert set(stats.by_peer) == {honest.peer_id}
