"""A secured connection as streams of bytes: Noise packets, yamux, and who waits for what.

:class:`Link` is the shell around the pure :class:`~pyagent_node.node.mesh.yamux.Yamux`: one task
reads the wire and feeds it, everything else happens in plain calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded, Unavailable
from pyagent_node.base.limits import MAX_STREAMS_PER_PEER
from pyagent_node.node.mesh import yamux
from pyagent_node.node.mesh.faults import stream_closed
from pyagent_node.node.mesh.handshake import MAX_PACKET, Secured
from pyagent_node.node.mesh.negotiation import EndOfBytes
from pyagent_node.node.mesh.wire import RECEIVE_BYTES, Wire, WireClosed
from pyagent_node.node.mesh.yamux import Yamux, YamuxError, YamuxStream

_SCRATCH: Final = bytearray(RECEIVE_BYTES)
"""Where every wire of the process receives to; used only between two awaits."""


class Link:
    """One secured connection; :meth:`run` must run for as long as it is used."""

    def __init__(
        self,
        wire: Wire,
        secured: Secured,
        *,
        initiator: bool,
        max_inbound: int = MAX_STREAMS_PER_PEER,
        on_accept: Callable[[Channel], None],
        on_refuse: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.wire = wire
        self.peer = secured.peer
        self.mux = Yamux(initiator=initiator, max_inbound=max_inbound)
        self.ended = trio.Event()
        """Set when no more bytes will come."""
        self.reason = "the connection ended"
        self._encrypt = secured.encrypt
        self._decrypt = secured.decrypt
        self._sealed = bytearray(secured.rest)
        self._plain = secured.plain
        self._on_accept = on_accept
        self._on_refuse = on_refuse

    async def run(self) -> None:
        """Read the connection until it ends; never raises for what the peer does."""
        try:
            if self._plain:
                self.mux.feed(self._plain)
            self._feed(b"")
            while True:
                data = await self.wire.receive(_SCRATCH)
                if not data:
                    break
                self._feed(data)
        except WireClosed as error:
            self.reason = str(error)
        except YamuxError as error:
            self.close(f"it broke the protocol: {error}", yamux.PROTOCOL_ERROR)
        finally:
            self.close()

    def _feed(self, data: bytes | memoryview) -> None:
        """Decrypt what is complete, feed it to the muxer, and serve what comes of it."""
        if self._sealed:
            self._sealed += data
            sealed = self._sealed
            self._sealed = bytearray()
            self._packets(memoryview(sealed))
        elif data:
            self._packets(memoryview(data))
        accepted = self.mux.accepted
        if accepted:
            self.mux.accepted = []
            for stream in accepted:
                self._on_accept(Channel(self, stream))
        if self.mux.refused:
            self._on_refuse(self.mux.refused)
            self.mux.refused = 0
        self.flush()

    def _packets(self, view: memoryview) -> None:
        at, end = 0, len(view)
        decrypt, feed = self._decrypt, self.mux.feed
        while end - at >= 2:
            stop = at + 2 + (view[at] << 8 | view[at + 1])
            if stop > end:
                break
            try:
                plain = decrypt(bytes(view[at + 2 : stop]))
            except Exception as error:  # two libraries, several classes, one meaning
                raise YamuxError(f"a packet is not authentic ({type(error).__name__})") from None
            feed(plain)
            at = stop
        if at < end:
            self._sealed += view[at:]

    def send(self, plain: bytes) -> None:
        """Encrypt and send at most :data:`MAX_PACKET` bytes; never waits."""
        sealed = self._encrypt(plain)
        self.wire.send(len(sealed).to_bytes(2, "big") + sealed)

    def flush(self) -> None:
        """Send the muxer's own packets; raises :class:`WireClosed`."""
        outbox = self.mux.outbox
        if outbox:
            self.mux.outbox = []
            plain = b"".join(outbox)
            for at in range(0, len(plain), MAX_PACKET):
                self.send(plain[at : at + MAX_PACKET])

    def flush_quietly(self) -> None:
        """Send the muxer's own packets, or nothing if the connection is gone."""
        try:
            self.flush()
        except WireClosed:
            self.close()

    def open(self) -> Channel:
        """Open a stream.

        Raises :class:`LimitExceeded` (``too_many_streams``) and :class:`Unavailable`
        (``stream_closed``).
        """
        outbound = len(self.mux.streams) - self.mux.inbound
        if outbound >= MAX_STREAMS_PER_PEER:
            raise LimitExceeded(
                f"This node holds {outbound} streams to {self.peer}, which is the limit.",
                code="too_many_streams",
                limit=MAX_STREAMS_PER_PEER,
            )
        try:
            channel = Channel(self, self.mux.open())
            self.flush()
        except (YamuxError, WireClosed):
            raise stream_closed(self.reason) from None
        return channel

    async def goodbye(self) -> None:
        """Send everything and say that nothing follows; the peer, if well, then closes."""
        if not self.wire.closed:
            self.mux.go_away(yamux.NORMAL)
            self.flush_quietly()
            await self.wire.flushed()
        if not self.wire.closed:
            self.wire.finish()

    def close(self, reason: str | None = None, code: int = yamux.NORMAL) -> None:
        """End the connection; every stream's user learns it, and the peer the ``code``."""
        if self.ended.is_set():
            return
        if reason is not None:
            self.reason = reason
        self.ended.set()
        if not self.wire.closed:
            try:
                self.mux.go_away(code)
                self.flush()
            except WireClosed:
                pass
        self.mux.end()
        self.wire.close()


class Channel:
    """One yamux stream: bytes with back-pressure, for one reader and one writer at a time."""

    __slots__ = ("_link", "_stream")

    def __init__(self, link: Link, stream: YamuxStream) -> None:
        self._link = link
        self._stream = stream

    @property
    def link(self) -> Link:
        """The connection it belongs to."""
        return self._link

    @property
    def over(self) -> bool:
        """Whether nothing can be sent or received any more."""
        return self._stream.reset or (self._stream.finished and self._stream.remote_finished)

    def take(self, most: int | None = None) -> bytes | bytearray:
        """Return what has arrived (nothing, perhaps), without waiting."""
        data = self._link.mux.take(self._stream, most)
        if self._link.mux.outbox:
            self._link.flush_quietly()
        return data

    async def read(self, most: int | None = None) -> bytes | bytearray:
        """Return at least one byte, or nothing at an orderly end.

        Raises :class:`Unavailable` (``stream_closed``) when the stream was reset.
        """
        stream = self._stream
        while not stream.buffer:
            if stream.remote_finished:
                return b""
            if stream.reset:
                raise stream_closed(self._why())
            if stream.on_readable is not None:
                raise RuntimeError("two tasks receive from one stream")
            event = trio.Event()
            stream.on_readable = event.set
            try:
                await event.wait()
            finally:
                stream.on_readable = None
        return self.take(most)

    async def read_exactly(self, size: int) -> bytes:
        """Return ``size`` bytes; raises :class:`EndOfBytes` when the stream ends before."""
        result = b""
        while len(result) < size:
            try:
                data = await self.read(size - len(result))
            except Unavailable as error:
                raise EndOfBytes(error.message) from None
            if not data:
                raise EndOfBytes("the stream ended")
            result += data
        return result

    def room(self) -> int:
        """Return how many bytes :meth:`push` would take now; 0 when one has to wait."""
        stream = self._stream
        if stream.reset or stream.finished:
            raise stream_closed(self._why())
        return 0 if self._link.wire.congested else min(stream.window, yamux.MAX_PAYLOAD)

    async def wait_for_room(self) -> int:
        """Wait until something can be sent; return how many bytes :meth:`push` takes.

        Raises :class:`Unavailable` (``stream_closed``).
        """
        while not (room := self.room()):
            if self._link.wire.congested:
                try:
                    await self._link.wire.drained()
                except WireClosed:
                    raise stream_closed(self._why()) from None
                continue
            event = trio.Event()
            self._stream.on_writable = event.set
            try:
                await event.wait()
            finally:
                self._stream.on_writable = None
        return room

    def push(self, parts: list[bytes | memoryview], size: int) -> None:
        """Send ``parts`` (``size`` bytes, at most :meth:`room`) as one packet."""
        try:
            self._link.send(self._link.mux.packet(self._stream, parts, size))
        except WireClosed:
            raise stream_closed(self._why()) from None

    async def write(self, data: bytes) -> None:
        """Send all of ``data``; raises :class:`EndOfBytes` when the stream is gone."""
        view = memoryview(data)
        try:
            while view:
                size = min(await self.wait_for_room(), len(view))
                self.push([view[:size]], size)
                view = view[size:]
        except Unavailable as error:
            raise EndOfBytes(error.message) from None

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        self._link.mux.finish(self._stream)
        self._link.flush_quietly()

    def close(self) -> None:
        """End both directions in order."""
        self._link.mux.close(self._stream)
        self._link.flush_quietly()

    def reset(self) -> None:
        """Abort both directions."""
        self._link.mux.reset(self._stream)
        self._link.flush_quietly()

    def _why(self) -> str:
        if self._link.ended.is_set():
            return self._link.reason
        return "the peer aborted it" if self._stream.reset else "this side has closed it"
