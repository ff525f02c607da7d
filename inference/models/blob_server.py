"""Serves manifests and chunks of the models in the store to peers of the mesh."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from pyagent_node.base.errors import (
    Conflict,
    ErrorInfo,
    LimitExceeded,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.limits import MAX_PEERS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.serving import StreamCounts, serve_stream
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.models.blob_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    BlobError,
    BlobReply,
    BlobRequest,
    ChunkReply,
    GetChunk,
    GetHave,
    GetManifest,
    HaveReply,
    ManifestReply,
)
from pyagent_node.inference.models.store import ModelStore

STREAMS_PER_PEER: Final = 4
"""Streams of this protocol that one peer may hold open."""
READS_AT_ONCE: Final = 4
"""Chunks that are read from disk at the same time, over all peers."""
ASKS_PER_PEER: Final = 32
"""Manifests and bitmaps that a peer may ask for at once ..."""
ASKS_PER_SECOND: Final = 2.0
"""... and how many more each second."""
IDLE_SECONDS: Final = 300.0
"""A stream without a request for so long is closed."""
SEND_SECONDS: Final = 120.0
"""Longest time for a peer to take one answer."""

PUBLIC: Final = (
    "model_not_found",
    "chunk_not_held",
    "bad_digest",
    "stale_epoch",
    "too_many_requests",
)
"""Errors that a peer is told as they are."""

T = TypeVar("T")

_log = logging.getLogger("pyagent_node.models.blobs")


class Allowance:
    """A token bucket: ``burst`` at once, ``rate`` a second after that.  Pure; time is passed in."""

    def __init__(self, burst: float, rate: float, now: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = burst
        self._at = now

    def take(self, now: float) -> bool:
        """Take one; ``False`` when there is none left."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def full(self, now: float) -> bool:
        """Whether nothing was taken lately."""
        return self._left + (now - self._at) * self._rate >= self._burst


class BlobServer:
    """The serving side; ``on_sent`` is told the bytes of every chunk that was sent to a peer.

    ``epoch_of`` gives the epoch of a model's placement as this node knows it, 0 for none.
    """

    def __init__(
        self,
        store: ModelStore,
        on_sent: Callable[[PeerId, int], None] | None = None,
        *,
        epoch_of: Callable[[Digest], int] = lambda _: 0,
    ) -> None:
        self.refused: Counter[str] = Counter()
        """Requests of peers that were refused, by the error's code."""
        self._store = store
        self._epoch_of = epoch_of
        self._on_sent = on_sent
        self._streams = StreamCounts(STREAMS_PER_PEER, "transfers from this node")
        self._asks: dict[PeerId, Allowance] = {}
        self._reads = trio.CapacityLimiter(READS_AT_ONCE)

    def attach(self, mesh: Mesh) -> None:
        """Serve inbound streams of ``mesh``; peers were authorised by it."""
        mesh.handle(PROTOCOL, self.handle)

    async def handle(self, stream: FrameStream) -> None:
        """Answer the requests of one stream, in order, until it ends."""

        async def answer(frame: Frame) -> None:
            request = REQUESTS.decode(frame.header)
            reply, tail = await self._answer(stream.peer, request)
            if not await self._send(stream, reply, tail):
                raise Unavailable("The peer took no answer.", code="stream_closed")
            if isinstance(reply, ChunkReply) and self._on_sent is not None:
                self._on_sent(stream.peer, len(tail))

        async def refuse(error: PyAgentError) -> None:
            if error.code == "too_many_streams":
                self.refused[error.code] += 1
            await self._send(stream, BlobError(error.to_info()))

        await serve_stream(
            stream, self._streams, idle_seconds=IDLE_SECONDS, answer=answer, refuse=refuse
        )

    async def _send(self, stream: FrameStream, reply: BlobReply, tail: bytes = b"") -> bool:
        with trio.move_on_after(SEND_SECONDS) as slow:
            try:
                await stream.send(Frame(REPLIES.encode(reply), tail))
            except Unavailable:
                return False
        if slow.cancelled_caught:
            _log.info("peer %s took no answer for %.0f s", stream.peer, SEND_SECONDS)
        return not slow.cancelled_caught

    async def _answer(self, peer: PeerId, request: BlobRequest) -> tuple[BlobReply, bytes]:
        try:
            self._fence(request)
            match request:
                case GetManifest(model):
                    self._allow(peer)
                    manifest = await self._read(lambda: self._store.manifest(model))
                    return ManifestReply(model), manifest.encode()
                case GetHave(model):
                    self._allow(peer)
                    have = await self._read(lambda: self._store.have(model))
                    return HaveReply(model, have.count), have.to_bytes()
                case GetChunk(model, index):
                    data = await self._read(lambda: self._store.read_chunk(model, index))
                    return ChunkReply(model, index), data
        except PyAgentError as error:
            self.refused[error.code] += 1
            return BlobError(_public(error)), b""

    def _fence(self, request: BlobRequest) -> None:
        """Refuse what is asked for a placement that has been replaced."""
        current = self._epoch_of(request.model)
        if 0 < request.epoch < current:
            raise Conflict(
                f"The placement of {request.model[:16]} is at epoch {current}, not"
                f" {request.epoch}.",
                code="stale_epoch",
                remedy="Wait for this node's log to catch up, then ask for the new placement.",
                epoch=current,
            )

    async def _read(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._reads)

    def _allow(self, peer: PeerId) -> None:
        """Count a request that costs much for few bytes asked."""
        now = trio.current_time()
        if peer not in self._asks and len(self._asks) >= MAX_PEERS:
            self._asks = {p: a for p, a in self._asks.items() if not a.full(now)}
        allowance = self._asks.setdefault(peer, Allowance(ASKS_PER_PEER, ASKS_PER_SECOND, now))
        if not allowance.take(now):
            raise LimitExceeded(
                "This node was asked for manifests too often.",
                code="too_many_requests",
                remedy="Wait some seconds.",
            )


def _public(error: PyAgentError) -> ErrorInfo:
    """Return what a peer may know of an error: no paths of this machine."""
    if error.code in PUBLIC:
        return error.to_info()
    _log.warning("a request of a peer failed: %s", error)
    return Unavailable("The model cannot be read on this node.", code="read_failed").to_info()
