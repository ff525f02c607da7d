"""Streams between Raft nodes: one to each connected peer, kept for as long as it is there.

A link only sends; what the peer says comes on the stream that the peer opened.  Frames wait in a
bounded queue and are lost when it is full or the stream breaks: Raft sends again, and is told.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import trio

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    LimitExceeded,
    PyAgentError,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.limits import DIAL_SECONDS, HANDSHAKE_SECONDS, MAX_PEERS, MIB
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.raft_messages import (
    MAX_MESSAGE,
    PIECE_BYTES,
    RAFT_MESSAGES,
    Hello,
    NotTransferred,
    Piece,
    Propose,
    RaftMessage,
    Refusal,
    Stop,
    Transfer,
    frame,
)
from pyagent_node.consensus.raft_storage import INCARNATION_BYTES, raft_id
from pyagent_node.consensus.replica import REQUEST_BYTES

log = logging.getLogger("pyagent_node.consensus.raft")

QUEUE_FRAMES = 1024
QUEUE_BYTES = 8 * MIB
"""What may wait for one peer, besides one message of any size."""
INBOUND_WAITING = 64
"""Messages of one peer that wait for the engine before its stream is not read any more."""
RETRY_FIRST = 0.05
RETRY_MOST = 2.0
SEND_SECONDS = 30.0
"""Longest wait for a peer to take a frame before its stream is given up."""

Sent = Callable[[bool], None]
Done = Callable[[], None]
Inbound = bytes | Propose | Refusal | Transfer | NotTransferred
"""What a peer may send; ``bytes`` are a message of Raft."""


class LinkCounters(msgspec.Struct):
    """What the streams count, for ``/metrics``."""

    streams: int = 0
    refused_messages: int = 0
    dropped_messages: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Node(Protocol):
    """The engine behind the streams."""

    @property
    def node_id(self) -> int:
        """This node's Raft id."""
        ...

    def hello(self) -> Hello:
        """Return what this node says of itself now."""
        ...

    def take_hello(self, peer: PeerId, hello: Hello) -> None:
        """Note what a peer says of itself."""
        ...

    def obeys(self, peer: PeerId, hello: Hello) -> bool:
        """Whether everything counts that the node says at present, snapshots included."""
        ...

    def take(self, peer: PeerId, hello: Hello, message: Inbound, done: Done) -> None:
        """Queue a message; ``done`` is called when it was handled."""
        ...

    def lost(self, peer: PeerId) -> None:
        """Note that what was sent to ``peer`` lately may not have arrived."""
        ...


class _Queued(msgspec.Struct):
    frames: Sequence[Frame]
    size: int
    sent: Sent | None


class Link:
    """The stream to one peer."""

    def __init__(
        self, mesh: Mesh, peer: PeerId, node: Node, counters: LinkCounters, protocol: str
    ) -> None:
        self.scope = trio.CancelScope()
        self._mesh = mesh
        self._peer = peer
        self._protocol = protocol
        self._node = node
        self._counters = counters
        self._queue: deque[_Queued] = deque()
        self._size = 0
        self._wake = trio.Event()
        self._open = False

    def put(self, frames: Sequence[Frame], sent: Sent | None = None) -> bool:
        """Queue frames; ``False`` if there is no stream or no room.  ``sent`` hears the end."""
        size = sum(len(each.header) + memoryview(each.tail).nbytes for each in frames)
        full = len(self._queue) >= QUEUE_FRAMES or self._size + size > QUEUE_BYTES
        if not self._open or (self._queue and full):
            self._counters.dropped_messages += 1
            return False
        self._queue.append(_Queued(frames, size, sent))
        self._size += size
        self._wake.set()
        return True

    async def run(self, rng: random.Random) -> None:
        """Keep the stream until cancelled, with growing pauses between attempts."""
        pause = RETRY_FIRST
        with self.scope:
            while True:
                begun = trio.current_time()
                try:
                    await self._session()
                except PyAgentError as error:
                    log.debug("the raft stream to %s: %s", self._peer, error)
                finally:
                    self._forget()
                if trio.current_time() - begun > RETRY_MOST:  # it was a session
                    pause = RETRY_FIRST
                await trio.sleep(pause * rng.uniform(0.5, 1.0))
                pause = min(RETRY_MOST, pause * 2)

    def _forget(self) -> None:
        was_open, self._open = self._open, False
        queue, self._queue, self._size = self._queue, deque(), 0
        for queued in queue:
            if queued.sent is not None:
                queued.sent(False)
        if was_open:
            self._node.lost(self._peer)

    async def _session(self) -> None:
        try:
            with trio.fail_after(DIAL_SECONDS):
                stream = await self._mesh.open(self._peer, self._protocol)
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"{self._peer} did not answer within {DIAL_SECONDS:g} s.", code="peer_unreachable"
            ) from None
        failures: list[PyAgentError] = []
        try:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    failures.append(await _end_of(stream))
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                try:
                    await self._pump(stream)
                except PyAgentError as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()
        raise failures[0]

    async def _pump(self, stream: FrameStream) -> None:
        await _send(stream, frame(self._node.hello()))
        self._open = True
        self._counters.streams += 1
        while True:
            while self._queue:
                queued = self._queue[0]
                for each in queued.frames:
                    await _send(stream, each)
                self._queue.popleft()
                self._size -= queued.size
                self._counters.bytes_sent += queued.size
                if queued.sent is not None:
                    queued.sent(True)
            self._wake = trio.Event()
            await self._wake.wait()


class Links:
    """All streams of one node, both ways."""

    def __init__(self, mesh: Mesh, node: Node, rng: random.Random, protocol: str) -> None:
        self.counters = LinkCounters()
        self._mesh = mesh
        self._node = node
        self._rng = rng
        self._protocol = protocol
        self._links: dict[PeerId, Link] = {}
        self._serving: dict[PeerId, trio.CancelScope] = {}
        self._closed = False

    @property
    def peers(self) -> frozenset[PeerId]:
        """The peers that are connected."""
        return frozenset(self._links)

    def put(self, peer: PeerId, frames: Sequence[Frame], sent: Sent | None = None) -> bool:
        """Queue frames for ``peer``; ``False`` when they cannot be sent now."""
        link = self._links.get(peer)
        if link is None:
            self.counters.dropped_messages += 1
            return False
        return link.put(frames, sent)

    def broadcast(self, message: RaftMessage) -> None:
        """Send one small message to every peer."""
        for link in self._links.values():
            link.put([frame(message)])

    async def run(self) -> None:
        """Keep a link to every connected peer, for ever."""
        async with trio.open_nursery() as nursery, self._mesh.events() as events:
            async for event in events:
                link = self._links.pop(event.peer_id, None)
                if link is not None:
                    link.scope.cancel()
                if event.change == "up" and len(self._links) < MAX_PEERS:
                    link = Link(
                        self._mesh, event.peer_id, self._node, self.counters, self._protocol
                    )
                    self._links[event.peer_id] = link
                    nursery.start_soon(link.run, self._rng)

    def close(self) -> None:
        """End every stream, refuse what comes."""
        self._closed = True
        for scope in list(self._serving.values()):
            scope.cancel()

    async def serve(self, stream: FrameStream) -> None:
        """Read what one peer sends; the handler of the protocol.

        A second stream of the same peer replaces the first.
        """
        if self._closed:
            return
        before = self._serving.get(stream.peer)
        if before is not None:
            before.cancel()
        with trio.CancelScope() as scope:
            self._serving[stream.peer] = scope
            try:
                await self._read(stream)
            except Unavailable as error:
                log.debug("the raft stream of %s ended: %s", stream.peer, error)
            except PyAgentError as error:
                self.counters.refused_messages += 1
                log.warning("the raft stream of %s was ended: %s", stream.peer, error)
                await _stop(stream, error)
            finally:
                if self._serving.get(stream.peer) is scope:
                    del self._serving[stream.peer]

    async def _read(self, stream: FrameStream) -> None:
        hello: Hello | None = None
        parts: list[bytes] = []
        size = 0
        room = trio.Semaphore(INBOUND_WAITING)
        with trio.move_on_after(HANDSHAKE_SECONDS):
            hello = await self._first(stream)
        if hello is None:
            return
        while (received := await stream.receive()) is not None:
            tail = received.tail
            self.counters.bytes_received += len(received.header) + memoryview(tail).nbytes
            message = RAFT_MESSAGES.decode(received.header)
            whole: Inbound
            match message:
                case Hello():
                    if (message.raft_id, message.incarnation) != (hello.raft_id, hello.incarnation):
                        raise CorruptData("A node has one Raft id.", code="protocol_error")
                    hello = message
                    self._node.take_hello(stream.peer, hello)
                    continue
                case Piece():
                    parts.append(bytes(tail))
                    size += len(parts[-1])
                    obeyed = self._node.obeys(stream.peer, hello)
                    _check_piece(message, len(parts[-1]), size, obeyed=obeyed)
                    if not message.last:
                        continue
                    whole = parts[0] if len(parts) == 1 else b"".join(parts)
                    parts, size = [], 0
                    if message.to != self._node.node_id:
                        self.counters.refused_messages += 1  # for an earlier life of this node
                        continue
                case Propose() | Refusal():
                    if len(message.request) != REQUEST_BYTES:
                        raise CorruptData(
                            f"A request id has {REQUEST_BYTES} bytes.", code="malformed_message"
                        )
                    whole = message
                case Transfer() | NotTransferred():
                    whole = message
                case _:
                    raise CorruptData(
                        f"A {type(message).__name__} message makes no sense here.",
                        code="protocol_error",
                    )
            await room.acquire()
            self._node.take(stream.peer, hello, whole, room.release)

    async def _first(self, stream: FrameStream) -> Hello | None:
        received = await stream.receive()
        if received is None:
            return None
        hello = RAFT_MESSAGES.decode(received.header)
        if not isinstance(hello, Hello):
            raise CorruptData("A raft stream begins with 'hello'.", code="protocol_error")
        if (
            len(hello.incarnation) != INCARNATION_BYTES
            or raft_id(stream.peer, hello.incarnation) != hello.raft_id
        ):
            raise CorruptData("A peer gave a Raft id that is not its own.", code="forged_raft_id")
        self._node.take_hello(stream.peer, hello)
        return hello


def _check_piece(piece: Piece, size: int, total: int, *, obeyed: bool) -> None:
    """Refuse what would fill the memory."""
    if not piece.last and size != PIECE_BYTES:
        raise CorruptData("A piece of a Raft message is short.", code="protocol_error")
    limit = MAX_MESSAGE if obeyed else PIECE_BYTES
    if total > limit:
        raise LimitExceeded(
            f"A Raft message is over the limit of {limit} bytes.",
            code="message_too_large",
            limit=limit,
        )


async def _send(stream: FrameStream, message: Frame) -> None:
    try:
        with trio.fail_after(SEND_SECONDS):
            await stream.send(message)
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"{stream.peer} took no frame for {SEND_SECONDS:g} s.", code="peer_stalled"
        ) from None


async def _end_of(stream: FrameStream) -> PyAgentError:
    """Return why the receiving end closed the stream."""
    try:
        received = await stream.receive()
        if received is not None:
            message = RAFT_MESSAGES.decode(received.header)
            if isinstance(message, Stop):
                return error_from_info(message.error)
    except PyAgentError as error:
        return error
    return Unavailable("The peer ended the stream.", code="stream_closed")


async def _stop(stream: FrameStream, error: PyAgentError) -> None:
    try:
        await _send(stream, frame(Stop(error.to_info())))
    except PyAgentError as trouble:
        log.debug("%s did not hear why: %s", stream.peer, trouble)
