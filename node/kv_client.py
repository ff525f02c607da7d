"""Asks peers about KV blocks: one stream at a time for each question, kept for the next one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.limits import DIAL_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.kv_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    AskRest,
    Bytes,
    Done,
    Failed,
    Fetch,
    Had,
    Have,
    KvReply,
    KvRequest,
    Piece,
    RestPiece,
    split,
)

KEPT_STREAMS: Final = 2
"""Idle streams that are kept for each peer."""
KEEP_SECONDS: Final = 60.0
"""How long an idle stream is used again; the other end closes it later."""
REPLY_SECONDS: Final = 20.0
"""Longest wait for the next frame of an answer."""
CLOSE_SECONDS: Final = 1.0


class KvClient:
    """Asks peers; every method raises what the peer answered, or why it did not.

    :class:`Unavailable`, :class:`DeadlineExceeded` (``peer_slow``), :class:`CorruptData`
    (``unexpected_reply``, ``bad_kv_piece``) for a peer that breaks the protocol.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.bytes_received = 0
        self._mesh = mesh
        self._idle: dict[PeerId, list[tuple[float, FrameStream]]] = {}

    async def have(self, peer: PeerId, request: Have) -> tuple[int, ...]:
        """Return how many leading blocks ``peer`` holds of each layer."""
        async with self._stream(peer) as stream:
            await _send(stream, request)
            reply, _ = await _receive(stream)
        layers = request.last_layer - request.first_layer
        if not isinstance(reply, Had) or len(reply.counts) != layers:
            raise _unexpected(reply)
        return tuple(min(max(count, 0), len(request.chain)) for count in reply.counts)

    async def fetch(
        self, peer: PeerId, request: Fetch, take: Callable[[int, int, bytes], None]
    ) -> None:
        """Ask for blocks; ``take(index in the chain, layer, sealed block)`` gets each as it comes.

        What ``take`` raises ends the fetch.
        """
        seen: set[tuple[int, int]] = set()
        async with self._stream(peer) as stream:
            await _send(stream, request)
            while True:
                reply, tail = await _receive(stream)
                if isinstance(reply, Done):
                    return
                if not isinstance(reply, Piece):
                    raise _unexpected(reply)
                self.bytes_received += memoryview(tail).nbytes
                for layer, sealed in enumerate(split(reply, tail), reply.first_layer):
                    at = (reply.index, layer)
                    if (
                        not 0 <= reply.index < len(request.chain)
                        or not request.first_layer <= layer < request.last_layer
                        or at in seen
                    ):
                        raise _unexpected(reply)
                    seen.add(at)
                    take(reply.index, layer, sealed)

    async def rest(
        self, peer: PeerId, request: AskRest, take: Callable[[int, int, bytes], None]
    ) -> None:
        """Ask for a rest; ``take(tokens, layer, sealed cells)`` gets each layer as it comes.

        What ``take`` raises ends the request.
        """
        async with self._stream(peer) as stream:
            await _send(stream, request)
            while True:
                reply, tail = await _receive(stream)
                if isinstance(reply, Done):
                    return
                last = request.last_layer - len(reply.sizes) if isinstance(reply, RestPiece) else -1
                if (
                    not isinstance(reply, RestPiece)
                    or not 0 < reply.tokens <= len(request.links)
                    or not request.first_layer <= reply.first_layer <= last
                ):
                    raise _unexpected(reply)
                self.bytes_received += memoryview(tail).nbytes
                for layer, sealed in enumerate(split(reply, tail), reply.first_layer):
                    take(reply.tokens, layer, sealed)

    async def tell(self, peer: PeerId, request: KvRequest, tail: Bytes = b"") -> int:
        """Send something to be kept or noted; returns how many bytes of it were taken."""
        async with self._stream(peer) as stream:
            await _send(stream, request, tail)
            reply, _ = await _receive(stream)
        if not isinstance(reply, Done):
            raise _unexpected(reply)
        return reply.bytes

    def forget(self, peer: PeerId) -> None:
        """A peer went away: its streams are of no use."""
        self._idle.pop(peer, None)

    @asynccontextmanager
    async def _stream(self, peer: PeerId) -> AsyncIterator[FrameStream]:
        """Use a stream to ``peer``; it is kept only if all that was asked was answered."""
        stream = self._take(peer) or await self._open(peer)
        good = False
        try:
            yield stream
            good = True
        finally:
            idle = self._idle.setdefault(peer, [])
            if good and len(idle) < KEPT_STREAMS:
                idle.append((trio.current_time() + KEEP_SECONDS, stream))
            else:
                with trio.move_on_after(CLOSE_SECONDS, shield=True):
                    await stream.aclose()

    def _take(self, peer: PeerId) -> FrameStream | None:
        idle = self._idle.get(peer, [])
        while idle:
            until, stream = idle.pop()
            if until > trio.current_time():
                return stream
        return None

    async def _open(self, peer: PeerId) -> FrameStream:
        try:
            with trio.fail_after(DIAL_SECONDS):
                return await self._mesh.open(peer, PROTOCOL)
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"{peer} opened no stream about KV in {DIAL_SECONDS:.0f} s.", code="peer_slow"
            ) from None


async def _send(stream: FrameStream, request: KvRequest, tail: Bytes = b"") -> None:
    try:
        with trio.fail_after(REPLY_SECONDS):
            await stream.send(Frame(REQUESTS.encode(request), tail))
    except trio.TooSlowError:
        raise _slow(stream) from None


async def _receive(stream: FrameStream) -> tuple[KvReply, Bytes]:
    try:
        with trio.fail_after(REPLY_SECONDS):
            frame = await stream.receive()
    except trio.TooSlowError:
        raise _slow(stream) from None
    if frame is None:
        raise Unavailable("The peer ended the stream about KV.", code="stream_closed")
    reply = REPLIES.decode(frame.header)
    if isinstance(reply, Failed):
        raise error_from_info(reply.error)
    return reply, frame.tail


def _slow(stream: FrameStream) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{stream.peer} sent nothing about KV for {REPLY_SECONDS:.0f} s.", code="peer_slow"
    )


def _unexpected(reply: KvReply) -> CorruptData:
    return CorruptData(
        f"A peer answered with {type(reply).__name__}, which does not fit what it was asked.",
        code="unexpected_reply",
    )
