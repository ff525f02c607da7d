"""Asks one peer for manifests, bitmaps and chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from pyagent_node.base.errors import CorruptData, DeadlineExceeded, Unavailable, error_from_info
from pyagent_node.base.limits import DIAL_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.models.blob_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    BlobError,
    BlobRequest,
    ChunkReply,
    GetChunk,
    GetHave,
    GetManifest,
    HaveReply,
    ManifestReply,
)
from pyagent_node.inference.models.chunks import ChunkSet

REPLY_SECONDS: Final = 30.0
"""Longest wait for the answer that is next in order."""
CLOSE_SECONDS: Final = 2.0

Tail = bytes | bytearray | memoryview


class BlobClient:
    """One stream to a peer; one task may use it.  ``epoch`` is that of the placement to be served.

    Errors: :class:`Conflict` (``stale_epoch``, fact ``epoch``) when the peer knows a later one,
    :class:`Unavailable`, :class:`DeadlineExceeded` (``peer_slow``), what the peer answered
    (:class:`NotFound`, :class:`LimitExceeded`, ...), and :class:`CorruptData`
    (``unexpected_reply``, ``malformed_message``, ``bitmap_malformed``) for a peer that breaks the
    protocol.
    """

    def __init__(self, stream: FrameStream, epoch: int = 0) -> None:
        self._stream = stream
        self._epoch = epoch
        self._asked: deque[int] = deque()

    @property
    def unanswered(self) -> int:
        """How many chunks were asked for and did not come yet."""
        return len(self._asked)

    async def manifest(self, model: Digest) -> Tail:
        """Return the peer's encoded manifest, unchecked."""
        await self._send(GetManifest(model, self._epoch))
        reply, tail = await self._receive()
        if not isinstance(reply, ManifestReply) or reply.model != model:
            raise _unexpected(reply)
        return tail

    async def have(self, model: Digest, count: int) -> ChunkSet:
        """Return which of the ``count`` chunks the peer holds; only while none is unanswered."""
        await self._send(GetHave(model, self._epoch))
        reply, tail = await self._receive()
        if not isinstance(reply, HaveReply) or reply.model != model or reply.count != count:
            raise _unexpected(reply)
        return ChunkSet(count, bytes(tail))

    async def ask_chunk(self, model: Digest, index: int) -> None:
        """Ask for a chunk without waiting for it."""
        self._asked.append(index)
        await self._send(GetChunk(model, index, self._epoch))

    async def next_chunk(self, model: Digest) -> tuple[int, Tail | None]:
        """Wait for the chunk asked for first; its bytes are ``None`` if the peer lacks it."""
        expected = self._asked[0]
        reply, tail = await self._receive(lacking=True)
        self._asked.popleft()
        if isinstance(reply, BlobError):
            return expected, None
        if not isinstance(reply, ChunkReply) or (reply.model, reply.index) != (model, expected):
            raise _unexpected(reply)
        return expected, tail

    async def _send(self, request: BlobRequest) -> None:
        try:
            with trio.fail_after(REPLY_SECONDS):
                await self._stream.send(Frame(REQUESTS.encode(request)))
        except trio.TooSlowError:
            raise self._slow() from None

    async def _receive(self, *, lacking: bool = False) -> tuple[object, Tail]:
        try:
            with trio.fail_after(REPLY_SECONDS):
                frame = await self._stream.receive()
        except trio.TooSlowError:
            raise self._slow() from None
        if frame is None:
            raise Unavailable("The peer ended the transfer.", code="stream_closed")
        reply = REPLIES.decode(frame.header)
        if isinstance(reply, BlobError):
            error = error_from_info(reply.info)
            if not (lacking and error.code == "chunk_not_held"):
                raise error
        return reply, frame.tail

    def _slow(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"Peer {self._stream.peer} sent nothing for {REPLY_SECONDS:.0f} s.", code="peer_slow"
        )


@asynccontextmanager
async def open_blob_client(mesh: Mesh, peer: PeerId, epoch: int = 0) -> AsyncIterator[BlobClient]:
    """Open a stream to ``peer`` for the block; errors as for :class:`BlobClient`."""
    try:
        with trio.fail_after(DIAL_SECONDS):
            stream = await mesh.open(peer, PROTOCOL)
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"Peer {peer} did not open a transfer in {DIAL_SECONDS:.0f} s.", code="peer_slow"
        ) from None
    try:
        yield BlobClient(stream, epoch)
    finally:
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await stream.aclose()


def _unexpected(reply: object) -> CorruptData:
    return CorruptData(
        f"The peer answered with {type(reply).__name__}, which was not asked for.",
        code="unexpected_reply",
    )
