"""The long-lived streams between neighbours: sending never waits, order is kept, loss is told.

For each peer there are two lanes (see ``frames``), each a bounded queue and one task that owns one
stream.  A lane that fails takes its queue with it: whoever relied on it is told once through the
``lost`` callback and ends the sessions concerned; the next message opens the lane anew.  Only what
closes sessions is sent again, for as long as a stage would keep them: nobody else would.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.errors import DeadlineExceeded, LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.limits import DIAL_SECONDS, MIB
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    PIPE_PROTOCOL,
    CloseSession,
    Join,
    Keep,
    OpenSession,
    PipeMessage,
    Restore,
    Step,
    Tail,
)
from pyagent_node.inference.pipeline.stage_types import IDLE_SECONDS

logger = logging.getLogger("pyagent_node.pipeline")

MAX_LANE_MESSAGES: Final = 4096
"""Messages that may wait for one lane of one peer."""
MAX_LANE_BYTES: Final = 512 * MIB
"""Bytes of tails that may wait for one lane of one peer."""
CLOSE_AGAIN_SECONDS: Final = 5.0
"""Pause before closings that a lost lane took with it are sent again."""

Deliver = Callable[[PeerId, PipeMessage, Tail], None]
Lost = Callable[[PeerId, bool, PyAgentError], None]


class _Lane:
    __slots__ = ("control", "error", "idle", "overflow", "peer", "queue", "sending", "size", "wake")

    def __init__(self, peer: PeerId, control: bool) -> None:
        self.peer = peer
        self.control = control
        self.queue: deque[tuple[PipeMessage, Tail]] = deque()
        self.size = 0
        self.sending: PipeMessage | None = None
        self.wake = trio.Event()
        self.idle: FrameStream | None = None
        """The stream, while its task waits for something to send."""
        self.error: PyAgentError | None = None
        self.overflow = trio.CancelScope()


class PipeLinks:
    """Sends pipeline messages to peers and delivers those that come in.

    ``deliver(sender, message, tail)`` takes every inbound message and every message to ourselves;
    ``lost(peer, control, error)`` is told of a failed lane.  Both are called synchronously and must
    not raise.
    """

    def __init__(self, mesh: Mesh, deliver: Deliver, lost: Lost) -> None:
        self._mesh = mesh
        self._deliver = deliver
        self._lost = lost
        self._lanes: dict[tuple[PeerId, bool], _Lane] = {}
        self._nursery: trio.Nursery | None = None
        self._unclosed: dict[tuple[PeerId, CloseSession], float] = {}
        """Closings that were lost with a lane, and until when it is worth sending them again."""

    def start(self, nursery: trio.Nursery) -> None:
        """Serve inbound streams, and run the lanes in ``nursery`` from now on."""
        self._nursery = nursery
        self._mesh.handle(PIPE_PROTOCOL, self._serve)

    def stop(self) -> None:
        """Open no more lanes; the owner is about to cancel the nursery."""
        self._nursery = None

    def send(self, peer: PeerId, message: PipeMessage, tail: Tail = b"") -> None:
        """Queue a message; one to ourselves is delivered before this returns."""
        if peer == self._mesh.peer_id:
            self._deliver(peer, message, tail)
            return
        control = not isinstance(message, Step | OpenSession | Restore | Join | Keep)
        lane = self._lanes.get((peer, control))
        if lane is None:
            if self._nursery is None:
                return
            lane = self._lanes[peer, control] = _Lane(peer, control)
            self._nursery.start_soon(self._run_lane, lane)
        if lane.idle is not None and not lane.queue and _sent_at_once(lane.idle, message, tail):
            return
        if len(lane.queue) >= MAX_LANE_MESSAGES or lane.size + len(tail) > MAX_LANE_BYTES:
            lane.error = LimitExceeded(
                f"Node {peer} takes frames too slowly: {len(lane.queue)} are waiting for it.",
                code="link_overloaded",
                peer_id=peer,
            )
            lane.overflow.cancel()
            return
        lane.queue.append((message, tail))
        lane.size += len(tail)
        lane.wake.set()

    def forget(self, peer: PeerId, session: SessionId) -> None:
        """Drop the queued steps of a closed session, so that they use no bandwidth."""
        lane = self._lanes.get((peer, False))
        if lane is None:
            return
        kept = [entry for entry in lane.queue if entry[0].session != session]
        lane.queue.clear()
        lane.queue.extend(kept)
        lane.size = sum(len(tail) for _, tail in kept)

    async def _serve(self, stream: FrameStream) -> None:
        peer = stream.peer
        decode, deliver = PIPE_CODEC.decode, self._deliver
        while (frame := await stream.receive()) is not None:
            deliver(peer, decode(frame.header), frame.tail)

    async def _run_lane(self, lane: _Lane) -> None:
        try:
            with lane.overflow:
                await self._drive(lane)
        except PyAgentError as error:
            lane.error = error
        finally:
            self._lanes.pop((lane.peer, lane.control), None)
        lost = lane.error or Unavailable(
            f"Node {lane.peer} closed the stream.", code="stream_closed", peer_id=lane.peer
        )
        logger.info("lane to %s lost: %s", lane.peer, lost)
        self._keep_closings(lane)
        self._lost(lane.peer, lane.control, lost)

    def _keep_closings(self, lane: _Lane) -> None:
        """See to it that the sessions that ``lane`` was to close are closed."""
        now = trio.current_time()
        self._unclosed = {key: until for key, until in self._unclosed.items() if until > now}
        messages = [lane.sending, *(message for message, _ in lane.queue)]
        closings = [message for message in messages if isinstance(message, CloseSession)]
        room = MAX_LANE_MESSAGES - len(self._unclosed)
        for closing in closings[: max(0, room)]:
            self._unclosed.setdefault((lane.peer, closing), now + IDLE_SECONDS)
        if closings and self._nursery is not None:
            self._nursery.start_soon(self._close_again, lane.peer, closings)

    async def _close_again(self, peer: PeerId, closings: list[CloseSession]) -> None:
        await trio.sleep(CLOSE_AGAIN_SECONDS)
        # A peer that lost us has ended our sessions by itself.
        connected = any(info.peer_id == peer for info in self._mesh.peers())
        for closing in closings:
            until = self._unclosed.get((peer, closing), 0.0)
            if connected and until > trio.current_time():
                self.send(peer, closing)
            else:
                self._unclosed.pop((peer, closing), None)

    async def _drive(self, lane: _Lane) -> None:
        try:
            with trio.fail_after(DIAL_SECONDS):
                stream = await self._mesh.open(lane.peer, PIPE_PROTOCOL)
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"Node {lane.peer} did not open a stream within {DIAL_SECONDS:.0f} s.",
                code="peer_unreachable",
                peer_id=lane.peer,
            ) from None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, stream, lane, nursery.cancel_scope)
                try:
                    await self._pump(stream, lane)
                except PyAgentError as error:
                    lane.error = error
                    nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(1) as scope:
                scope.shield = True
                await stream.aclose()

    async def _pump(self, stream: FrameStream, lane: _Lane) -> None:
        encode, queue = PIPE_CODEC.encode, lane.queue
        while True:
            if not queue:
                lane.wake = trio.Event()
                lane.idle = stream
                try:
                    await lane.wake.wait()
                finally:
                    lane.idle = None
                continue
            message, tail = queue.popleft()
            lane.size -= len(tail)
            lane.sending = message
            await stream.send(Frame(encode(message), tail))
            lane.sending = None

    async def _watch(self, stream: FrameStream, lane: _Lane, scope: trio.CancelScope) -> None:
        """Notice the end of a stream that nothing is sent on, since nothing ever comes back."""
        try:
            while await stream.receive() is not None:
                pass
        except PyAgentError as error:
            lane.error = error
        scope.cancel()


def _sent_at_once(stream: FrameStream, message: PipeMessage, tail: Tail) -> bool:
    """Spare the lane's task a turn; what fails here fails there again and is told from there."""
    try:
        return stream.try_send(Frame(PIPE_CODEC.encode(message), tail))
    except PyAgentError:
        return False
