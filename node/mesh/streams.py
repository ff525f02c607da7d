"""``FrameStream`` over a yamux stream: the frames of ``base.wire`` with limits and counters."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import PREFIX, Frame, FrameDecoder, frame_prefix
from pyagent_node.node.mesh.channels import Channel
from pyagent_node.node.mesh.faults import stream_closed
from pyagent_node.node.mesh.settings import MeshMetrics
from pyagent_node.node.mesh.yamux import MAX_PAYLOAD


class ChannelStream:
    """A stream of frames over a :class:`Channel`; see :class:`~pyagent_node.base.mesh.FrameStream`.

    A frame that fits into one packet is sent without a trip through the scheduler.  Being
    cancelled in the middle of a longer one leaves half a frame on the wire, so the stream is then
    reset.  ``on_close`` is called once, when this side is done with it.
    """

    __slots__ = (
        "_broken",
        "_channel",
        "_closed",
        "_decoder",
        "_frames",
        "_max_header",
        "_max_tail",
        "_metrics",
        "_on_close",
        "_sending",
        "peer",
    )

    def __init__(
        self,
        channel: Channel,
        metrics: MeshMetrics,
        *,
        max_header: int,
        max_tail: int,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.peer: PeerId = channel.link.peer
        self._channel = channel
        self._metrics = metrics
        self._max_header = max_header
        self._max_tail = max_tail
        self._decoder = FrameDecoder(max_header=max_header, max_tail=max_tail)
        self._frames: deque[Frame] = deque()
        self._sending = trio.Lock()
        self._closed = False
        self._broken: LimitExceeded | None = None
        self._on_close = on_close

    @property
    def remote(self) -> str:
        """The IP address at the other end of the connection."""
        return self._channel.link.wire.remote()[0]

    async def send(self, frame: Frame) -> None:
        """Send one frame; see :meth:`pyagent_node.base.mesh.FrameStream.send`."""
        prefix = frame_prefix(frame, max_header=self._max_header, max_tail=self._max_tail)
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self._closed:
                raise stream_closed("this side has closed it")
            tail = memoryview(frame.tail).cast("B")
            size = PREFIX.size + len(frame.header) + tail.nbytes
            if size <= self._channel.room():
                self._channel.push([prefix, frame.header, tail], size)
            else:
                await self._send_long(prefix + frame.header, tail)
        finally:
            self._sending.release()
        self._metrics.frames_out += 1
        self._metrics.bytes_out += size

    def try_send(self, frame: Frame) -> bool:
        """Send one frame at once or not at all; see the port."""
        prefix = frame_prefix(frame, max_header=self._max_header, max_tail=self._max_tail)
        if self._closed:
            raise stream_closed("this side has closed it")
        tail = memoryview(frame.tail).cast("B")
        size = PREFIX.size + len(frame.header) + tail.nbytes
        if self._sending.locked() or size > self._channel.room():
            return False
        self._channel.push([prefix, frame.header, tail], size)
        self._metrics.frames_out += 1
        self._metrics.bytes_out += size
        return True

    async def _send_long(self, head: bytes, tail: memoryview) -> None:
        started = False
        try:
            while head or tail:
                room = min(await self._channel.wait_for_room(), MAX_PAYLOAD)
                first = head[:room]
                head = head[room:]
                second = tail[: room - len(first)]
                tail = tail[len(second) :]
                self._channel.push([first, second], len(first) + len(second))
                started = True
        except BaseException:
            if started:
                self.abort()
            raise

    async def receive(self) -> Frame | None:
        """Return the next frame; see :meth:`pyagent_node.base.mesh.FrameStream.receive`."""
        frames = self._frames
        while not frames:
            if self._closed:
                raise stream_closed("this side has closed it")
            if self._broken is not None:
                self.abort()
                raise self._broken
            data = await self._channel.read()
            if not data:
                if self._decoder.pending:
                    self.abort()
                    raise stream_closed("it ended inside a frame")
                return None
            try:
                frames.extend(self._decoder.feed(data))
            except LimitExceeded as error:
                self._metrics.refused[error.code] += 1
                self._broken = error  # raised after the good frames before it
        frame = frames.popleft()
        self._metrics.frames_in += 1
        self._metrics.bytes_in += PREFIX.size + len(frame.header) + len(frame.tail)
        return frame

    async def aclose(self) -> None:
        """Close both directions; frames already sent still arrive."""
        if not self._closed:
            self._channel.close()
            self._done()

    def abort(self) -> None:
        """Reset the stream: the peer's next call fails with ``stream_closed``."""
        if not self._closed:
            self._channel.reset()
            self._done()

    def _done(self) -> None:
        self._closed = True
        self._frames.clear()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
