"""Frame streams in memory: of a node to itself, and of the simulated network.

They keep the limits and the back-pressure of the real ones, and can be given a latency and be cut.
Frames are copied on the way (a sender may reuse its buffer, as with a socket).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

from pyagent_node.base import limits
from pyagent_node.base.errors import LimitExceeded
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame, frame_prefix
from pyagent_node.node.mesh.faults import stream_closed

WINDOW: Final = MIB
"""Bytes under way in one direction before its sender waits."""

Meddle = Callable[[Frame], Sequence[Frame]]
"""What a simulated network makes of a frame under way: none, itself, others besides."""


class _Pipe:
    """One direction: frames with the time at which they arrive."""

    def __init__(self) -> None:
        self.frames: deque[tuple[float, Frame]] = deque()
        self.size = 0
        self.finished_at = math.inf
        """When the end of the stream arrives."""
        self.broken: str | None = None
        self.unwanted = False
        """The receiver has closed: a sender learns it at its next frame."""
        self.held = False
        """Nothing arrives until the network lets go of it."""
        self.meddle: Meddle | None = None
        self.late: Callable[[], float] | None = None
        """By how many seconds more than the latency the next frame is late."""
        self.last_arrival = 0.0
        self._changed = trio.Event()

    def touch(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self, until: float = math.inf) -> None:
        event = self._changed
        if until == math.inf:
            await event.wait()
        else:
            with trio.move_on_at(until):
                await event.wait()


class MemoryStream:
    """One end; see :class:`~pyagent_node.base.mesh.FrameStream`."""

    def __init__(
        self,
        peer: PeerId,
        incoming: _Pipe,
        outgoing: _Pipe,
        *,
        latency: float,
        max_header: int,
        max_tail: int,
    ) -> None:
        self.peer = peer
        self._in = incoming
        self._out = outgoing
        self._latency = latency
        self._max_header = max_header
        self._max_tail = max_tail
        self._sending = trio.Lock()
        self._closed = False

    @property
    def over(self) -> bool:
        """Whether this side has closed it, or the network did."""
        return self._closed or self._in.broken is not None

    async def send(self, frame: Frame) -> None:
        """Send one frame; see :meth:`pyagent_node.base.mesh.FrameStream.send`."""
        frame_prefix(frame, max_header=self._max_header, max_tail=self._max_tail)
        copy = Frame(bytes(frame.header), bytes(frame.tail))
        async with self._sending:
            while not self._has_room():
                await self._out.changed()
            self._put(copy)

    def try_send(self, frame: Frame) -> bool:
        """Send one frame at once or not at all; see the port."""
        frame_prefix(frame, max_header=self._max_header, max_tail=self._max_tail)
        if not self._has_room() or self._sending.locked():
            return False
        self._put(Frame(bytes(frame.header), bytes(frame.tail)))
        return True

    def _has_room(self) -> bool:
        pipe = self._out
        if self._closed:
            raise stream_closed("this side has closed it")
        if pipe.broken is not None or pipe.unwanted:
            raise stream_closed(pipe.broken or "the peer has closed it")
        return pipe.size < WINDOW

    def _put(self, copy: Frame) -> None:
        pipe = self._out
        arrives = trio.current_time() + self._latency
        if pipe.late is not None:  # frames do not overtake each other within a stream
            arrives = pipe.last_arrival = max(pipe.last_arrival, arrives + pipe.late())
        for frame in (copy,) if pipe.meddle is None else pipe.meddle(copy):
            pipe.size += len(frame.header) + len(frame.tail)
            pipe.frames.append((arrives, frame))
        pipe.touch()

    async def receive(self) -> Frame | None:
        """Return the next frame; see :meth:`pyagent_node.base.mesh.FrameStream.receive`."""
        await trio.lowlevel.checkpoint()
        pipe = self._in
        while True:
            if self._closed:
                raise stream_closed("this side has closed it")
            arrives = pipe.frames[0][0] if pipe.frames else pipe.finished_at
            if pipe.held:
                arrives = math.inf
            if arrives <= trio.current_time():
                if not pipe.frames:
                    return None
                _, frame = pipe.frames.popleft()
                pipe.size -= len(frame.header) + len(frame.tail)
                pipe.touch()
                try:
                    frame_prefix(frame, max_header=self._max_header, max_tail=self._max_tail)
                except LimitExceeded:
                    self.abort()
                    raise
                return frame
            if pipe.broken is not None:
                raise stream_closed(pipe.broken)
            await pipe.changed(arrives)

    async def aclose(self) -> None:
        """Close both directions; frames already sent still arrive."""
        if self._closed:
            return
        self._closed = True
        self._out.finished_at = trio.current_time() + self._latency
        self._in.unwanted = True
        self._in.frames.clear()
        self._in.touch()
        self._out.touch()

    def abort(self, reason: str = "the peer aborted it") -> None:
        """End both directions at once: the other end's next call fails."""
        self._closed = True
        self.cut(reason)

    def hold_outgoing(self, held: bool) -> None:
        """Keep what this end sends from arriving, or let it arrive, in order, all at once."""
        self._out.held = held
        self._out.touch()

    def hold_incoming(self, held: bool) -> None:
        """The same for what the other end sends."""
        self._in.held = held
        self._in.touch()

    def meddle(self, outgoing: Meddle | None, incoming: Meddle | None) -> None:
        """Pass what either end sends through a function from now on."""
        self._out.meddle, self._in.meddle = outgoing, incoming

    def delay(self, late: Callable[[], float]) -> None:
        """Make each frame, either way, as much later than the latency as ``late`` says."""
        self._out.late = self._in.late = late

    def cut(self, reason: str) -> None:
        """The network between the two ends is gone: both get ``stream_closed``."""
        for pipe in (self._in, self._out):
            if pipe.broken is None:
                pipe.broken = reason
            pipe.touch()


def memory_pair(
    a: PeerId,
    b: PeerId,
    *,
    latency: float = 0.0,
    max_header: int = limits.MAX_HEADER,
    max_tail: int = limits.MAX_TAIL,
) -> tuple[MemoryStream, MemoryStream]:
    """Return the end that ``a`` holds and the end that ``b`` holds of a new stream.

    ``latency`` is one way, in seconds of trio's clock.
    """
    there, back = _Pipe(), _Pipe()
    return (
        MemoryStream(b, back, there, latency=latency, max_header=max_header, max_tail=max_tail),
        MemoryStream(a, there, back, latency=latency, max_header=max_header, max_tail=max_tail),
    )
