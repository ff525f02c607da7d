"""The yamux multiplexer as a pure state machine: bytes in, bytes and stream states out.

It follows https://github.com/hashicorp/yamux/blob/master/spec.md (``/yamux/1.0.0`` of libp2p).
It does no I/O and waits for nothing: :meth:`Yamux.feed` takes what came from the network, the
methods of :class:`Yamux` put packets to send into :attr:`Yamux.outbox`, and a stream calls its
``on_readable``, ``on_writable`` hooks when something changed.

Unlike py-libp2p's own, it enforces the receive window (a peer that sends past it is a protocol
error, so what is buffered is bounded), lets a writer wait for the window for as long as its
caller wants (there: an error after five seconds, polled every ten milliseconds), and grants new
window only when half of it was consumed.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from pyagent_node.base.limits import KIB, MIB

PROTOCOL: Final = "/yamux/1.0.0"
HEADER: Final = struct.Struct(">BBHII")
"""Version (0), type, flags, stream id, length."""

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

INITIAL_WINDOW: Final = 256 * KIB
"""Window of both directions of a new stream, by the specification."""
WINDOW: Final = MIB
"""Receive window that we grant to every stream."""
MAX_PAYLOAD: Final = 65535 - 16 - HEADER.size
"""Payload of a packet that fits into one Noise message."""
MAX_LINGERING: Final = 256
"""Streams closed by us whose other half the peer has not closed yet; the oldest are reset."""
_MAX_WINDOW: Final = 2**32 - 1
_MAX_STREAM_ID: Final = 2**32 - 3

NORMAL, PROTOCOL_ERROR, INTERNAL_ERROR = range(3)
"""Reasons in a ``GO_AWAY``."""


class YamuxError(Exception):
    """The peer broke the protocol; the connection cannot go on."""


class YamuxStream:
    """The state of one stream; change it only through its :class:`Yamux`."""

    __slots__ = (
        "buffer",
        "credit",
        "finished",
        "id",
        "inbound",
        "on_readable",
        "on_writable",
        "remote_finished",
        "reset",
        "taken",
        "window",
    )

    def __init__(self, stream_id: int, *, inbound: bool) -> None:
        self.id = stream_id
        self.inbound = inbound
        self.buffer = bytearray()
        """Bytes received and not yet taken."""
        self.window = INITIAL_WINDOW
        """Bytes that we may still send."""
        self.credit = INITIAL_WINDOW
        """Bytes that the peer may still send."""
        self.taken = 0
        """Bytes taken for which no window was granted yet."""
        self.finished = False
        """We have sent FIN or RST."""
        self.remote_finished = False
        """The peer has sent FIN."""
        self.reset = False
        """The stream died without an orderly end (RST of either side, or the connection's end)."""
        self.on_readable: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    def _wake(self) -> None:
        if self.on_readable is not None:
            self.on_readable()
        if self.on_writable is not None:
            self.on_writable()


class Yamux:
    """One connection's multiplexer.

    ``max_inbound`` bounds the streams the peer may hold open: one more is reset, and counted in
    :attr:`refused`.  New inbound streams are appended to :attr:`accepted`.
    """

    def __init__(self, *, initiator: bool, max_inbound: int, window: int = WINDOW) -> None:
        self.streams: dict[int, YamuxStream] = {}
        self.accepted: list[YamuxStream] = []
        self.outbox: list[bytes] = []
        self.refused = 0
        self.inbound = 0
        self.max_inbound = max_inbound
        self.gone_away: int | None = None
        self.closed = False
        self._next_id = 1 if initiator else 2
        self._remote_parity = 0 if initiator else 1
        self._highest_remote = 0
        self._window = window
        self._lingering: OrderedDict[int, None] = OrderedDict()
        self._partial = bytearray()
        self._payload_left = 0
        self._payload_stream: YamuxStream | None = None
        self._payload_flags = 0

    # What we want ------------------------------------------------------------------------------

    def open(self) -> YamuxStream:
        """Open a stream; it may be written to at once.

        Raises :class:`YamuxError` when the connection is closed, closing, or out of ids.
        """
        if self.closed or self.gone_away is not None or self._next_id > _MAX_STREAM_ID:
            raise YamuxError("The connection takes no new streams.")
        stream = YamuxStream(self._next_id, inbound=False)
        self._next_id += 2
        self.streams[stream.id] = stream
        self._grant_first(stream, SYN)
        return stream

    def packet(self, stream: YamuxStream, parts: list[bytes | memoryview], size: int) -> bytes:
        """Return a data packet of ``parts`` (``size`` bytes), spending window.

        The caller keeps ``size`` within :data:`MAX_PAYLOAD` and ``stream.window``.
        """
        stream.window -= size
        return b"".join((HEADER.pack(0, DATA, 0, stream.id, size), *parts))

    def take(self, stream: YamuxStream, most: int | None = None) -> bytes | bytearray:
        """Take received bytes (all, or at most ``most``), granting window when it is time."""
        data: bytes | bytearray
        if most is None or most >= len(stream.buffer):
            data = stream.buffer
            stream.buffer = bytearray()
        else:
            data = bytes(stream.buffer[:most])
            del stream.buffer[:most]
        stream.taken += len(data)
        if stream.taken >= self._window // 2 and not stream.remote_finished and not stream.reset:
            self._send(WINDOW_UPDATE, 0, stream.id, stream.taken)
            stream.credit += stream.taken
            stream.taken = 0
        return data

    def finish(self, stream: YamuxStream) -> None:
        """Close our direction; what the peer still sends can be taken."""
        if not stream.finished and not stream.reset:
            stream.finished = True
            self._send(WINDOW_UPDATE, FIN, stream.id, 0)
            self._forget_if_over(stream)

    def close(self, stream: YamuxStream) -> None:
        """Close both directions: FIN now; the peer is reset if it sends any more."""
        if stream.reset:
            return
        self.finish(stream)
        if stream.id in self.streams:
            stream.buffer.clear()
            self._lingering[stream.id] = None
            if len(self._lingering) > MAX_LINGERING:
                self.reset(self.streams[next(iter(self._lingering))])

    def reset(self, stream: YamuxStream) -> None:
        """Abort both directions."""
        if stream.id in self.streams:
            self._send(WINDOW_UPDATE, RST, stream.id, 0)
        stream.buffer.clear()
        self._drop(stream)

    def go_away(self, reason: int) -> None:
        """Tell the peer that the connection ends."""
        self._send(GO_AWAY, 0, 0, reason)

    def end(self) -> None:
        """The connection is gone: every stream without an orderly end is reset."""
        self.closed = True
        for stream in list(self.streams.values()):
            self._drop(stream)

    # What the peer says ------------------------------------------------------------------------

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes from the connection.

        Raises :class:`YamuxError` when they break the protocol; the connection must then be
        closed (:meth:`end`).
        """
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            if self._payload_left:
                size = min(self._payload_left, end - at)
                self._payload(view[at : at + size])
                at += size
            elif self._partial or end - at < HEADER.size:
                size = min(HEADER.size - len(self._partial), end - at)
                self._partial += view[at : at + size]
                at += size
                if len(self._partial) == HEADER.size:
                    header = bytes(self._partial)
                    self._partial.clear()
                    self._header(*HEADER.unpack(header))
            else:
                self._header(*HEADER.unpack_from(view, at))
                at += HEADER.size

    def _header(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version != 0:
            raise YamuxError(f"The peer speaks yamux version {version}.")
        if kind in (DATA, WINDOW_UPDATE):
            self._stream_header(kind, flags, stream_id, length)
        elif kind == PING:
            if flags & SYN:
                self._send(PING, ACK, 0, length)
        elif kind == GO_AWAY:
            self.gone_away = length
        else:
            raise YamuxError(f"The peer sent a packet of unknown type {kind}.")

    def _stream_header(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if flags & SYN:
            self._accept(stream_id)
        stream = self.streams.get(stream_id)
        if kind == DATA and length:
            self._expect(stream, flags, length)
            return
        if stream is None:
            return
        if kind == WINDOW_UPDATE and length:
            stream.window += length
            if stream.window > _MAX_WINDOW:
                raise YamuxError("The peer granted more window than there can be.")
            if stream.on_writable is not None:
                stream.on_writable()
        if flags & (FIN | RST):
            self._ended(stream, flags)

    def _accept(self, stream_id: int) -> None:
        if stream_id % 2 != self._remote_parity or stream_id <= self._highest_remote:
            raise YamuxError(f"The peer opened a stream under the id {stream_id}.")
        self._highest_remote = stream_id
        if self.inbound >= self.max_inbound or self.closed:
            self.refused += 1
            self._send(WINDOW_UPDATE, RST, stream_id, 0)
            return
        stream = YamuxStream(stream_id, inbound=True)
        self.streams[stream_id] = stream
        self.inbound += 1
        self.accepted.append(stream)
        self._grant_first(stream, ACK)

    def _expect(self, stream: YamuxStream | None, flags: int, length: int) -> None:
        """Prepare for the payload of a data packet; that of an unknown stream is discarded."""
        if stream is None:
            # It crossed our RST or FIN on the way.
            if length > max(self._window, INITIAL_WINDOW):
                raise YamuxError("The peer sent past the window of a closed stream.")
        elif stream.remote_finished:
            raise YamuxError("The peer sent data after the end of its stream.")
        elif length > stream.credit:
            raise YamuxError("The peer sent past the receive window.")
        elif stream.id in self._lingering:
            self.reset(stream)
            stream = None
        else:
            stream.credit -= length
        self._payload_left = length
        self._payload_stream = stream
        self._payload_flags = flags

    def _payload(self, data: memoryview) -> None:
        self._payload_left -= len(data)
        stream = self._payload_stream
        if stream is None or stream.reset:
            return
        if stream.finished and stream.id in self._lingering:
            return
        stream.buffer += data
        if stream.on_readable is not None:
            stream.on_readable()
        if not self._payload_left and self._payload_flags & (FIN | RST):
            self._ended(stream, self._payload_flags)

    def _ended(self, stream: YamuxStream, flags: int) -> None:
        if flags & RST:
            self._drop(stream)
        else:
            stream.remote_finished = True
            if stream.on_readable is not None:
                stream.on_readable()
            self._forget_if_over(stream)

    # Bookkeeping -------------------------------------------------------------------------------

    def _grant_first(self, stream: YamuxStream, flag: int) -> None:
        more = max(0, self._window - INITIAL_WINDOW)
        stream.credit += more
        self._send(WINDOW_UPDATE, flag, stream.id, more)

    def _forget_if_over(self, stream: YamuxStream) -> None:
        if stream.finished and stream.remote_finished:
            self._forget(stream)

    def _drop(self, stream: YamuxStream) -> None:
        """End a stream without order; what has arrived can still be taken."""
        self._forget(stream)
        stream.finished = True
        stream.reset = True
        stream._wake()

    def _forget(self, stream: YamuxStream) -> None:
        if self.streams.pop(stream.id, None) is not None and stream.inbound:
            self.inbound -= 1
        self._lingering.pop(stream.id, None)

    def _send(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if not self.closed:
            self.outbox.append(HEADER.pack(0, kind, flags, stream_id, length))
