"""A simulated swarm in which some nodes hold a small model and one wants it."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.inference.models.blob_messages import (
    PROTOCOL,
    REQUESTS,
    BlobReply,
    BlobRequest,
    ChunkReply,
    GetChunk,
    GetManifest,
    HaveReply,
    ManifestReply,
)
from pyagent_node.inference.models.blob_server import BlobServer
from pyagent_node.inference.models.chunks import ChunkSet, chunks_of
from pyagent_node.inference.models.fetching import TransferStats
from pyagent_node.inference.models.slicing import slice_plan, write_slice
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About, StoredModel
from pyagent_node.inference.models.transfer import (
    ensure_slice,
)
from pyagent_node.node.identity import NodeKey
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork

CHUNK = 4096
PART = Slice(1, 3, False)


class Swarm:
    """A network in which some nodes hold a model and one wants it."""

    def __init__(self, network: SimulatedNetwork, model: Path, folder: Path) -> None:
        self.network = network
        self.source = model
        self.folder = folder
        self.numbers = itertools.count(1)
        self.store = ModelStore(folder / "mine")
        self.mesh = self.join()
        first = self.new_store()
        self.model: StoredModel = first.add_file(model, about=About("tiny"), chunk_bytes=CHUNK)
        self.seed_store = first

    def join(self) -> SimulatedMesh:
        return self.network.node(NodeKey(bytes([next(self.numbers)]) * 32).peer_id)

    def new_store(self) -> ModelStore:
        return ModelStore(self.folder / f"store{next(self.numbers)}")

    def full_store(self) -> ModelStore:
        store = self.new_store()
        store.add_file(self.source, about=About("tiny"), chunk_bytes=CHUNK)
        return store

    async def honest(self, store: ModelStore | None = None) -> SimulatedMesh:
        """Add a node that serves a store."""
        mesh = self.join()
        BlobServer(store or self.seed_store).attach(mesh)
        await self.network.connect_all()
        return mesh

    async def odd(
        self,
        answer: Callable[[BlobRequest, BlobReply, bytes], Awaitable[Frame | None]],
        manifest: bytes | None = None,
    ) -> SimulatedMesh:
        """Add a node that holds the model and whose answers go through ``answer``."""
        mesh = self.join()
        store = self.seed_store
        count = store.manifest(self.model.digest).count

        async def handle(stream: FrameStream) -> None:
            while (frame := await stream.receive()) is not None:
                request = REQUESTS.decode(frame.header)
                reply: BlobReply
                if isinstance(request, GetManifest):
                    reply = ManifestReply(request.model)
                    data = manifest or store.manifest(request.model).encode()
                elif isinstance(request, GetChunk):
                    reply = ChunkReply(request.model, request.index)
                    data = store.read_chunk(request.model, request.index)
                else:
                    reply = HaveReply(request.model, count)
                    data = ChunkSet.full(count).to_bytes()
                sent = await answer(request, reply, data)
                if sent is None:
                    return
                await stream.send(sent)

        mesh.handle(PROTOCOL, handle)
        await self.network.connect_all()
        return mesh

    def peers(self) -> list[PeerId]:
        return [peer.peer_id for peer in self.mesh.peers()]

    async def fetch(self, part: Slice = PART, stats: TransferStats | None = None) -> bytes:
        path = await ensure_slice(
            self.mesh, self.store, self.model, part, self.peers(), stats=stats
        )
        return path.read_bytes()

    def expected(self, part: Slice = PART) -> bytes:
        if part == Slice(0, 4, True):
            return self.source.read_bytes()
        write_slice(self.source, part, self.folder / "expected.gguf")
        return (self.folder / "expected.gguf").read_bytes()

    def needed(self, part: Slice = PART) -> int:
        """Bytes of the chunks that a slice needs."""
        manifest = self.seed_store.manifest(self.model.digest)
        header = self.seed_store.model_file(self.model.digest).header
        chunks = chunks_of(slice_plan(header, part).copy.needs, CHUNK)
        return sum(manifest.range(i).stop - manifest.range(i).start for i in chunks)
