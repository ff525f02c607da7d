"""One TCP socket: bytes out without waiting where possible, bytes in, and the cipher of a PSK.

Sending is a plain call: the bytes go to the kernel at once, and only what it does not take waits
in a backlog that a writer task drains.  A frame of a token then costs one system call and no trip
through the scheduler.  Whoever sends much waits in :meth:`Wire.drained`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Final, Protocol

import trio

from pyagent_node.base.limits import KIB, MIB

HIGH_WATER: Final = 256 * KIB
"""Backlog above which senders of data wait."""
MAX_BACKLOG: Final = 4 * MIB
"""Backlog above which the peer is dropped: it makes us answer but does not read."""
STALL_SECONDS: Final = 30.0
"""A peer that takes nothing from a full socket for this long is dropped."""
RECEIVE_BYTES: Final = 256 * KIB
RESEND_SECONDS: Final = 1.0
"""Longest pause before TCP sends again what was not acknowledged, where the system lets us say so.

It doubles its pauses up to two minutes, so that a path which comes back after ten seconds is found
out up to ten seconds later; a token's frame waits for that.
"""
_TCP_RTO_MAX_MS: Final = 44
"""Linux 6.15 and later; the standard library has no name for it yet."""


class WireClosed(Exception):
    """The connection is gone; the text says how."""


class StreamCipher(Protocol):
    """Enciphers the whole stream of both directions, nonces included (a private network's PSK)."""

    def outgoing(self, data: bytes) -> bytes:
        """Return what to put on the socket for ``data``; the first call puts a nonce in front."""
        ...

    def incoming(self, data: bytes) -> bytes:
        """Return the plain bytes in ``data``; the nonce in front of the first ones is taken off."""
        ...


class Wire:
    """A connected, non-blocking socket.

    Someone must run :meth:`run_writer` for as long as it is open; one task may receive.
    """

    def __init__(self, sock: socket.socket, cipher: StreamCipher | None = None) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sys.platform == "linux":
                with contextlib.suppress(OSError):  # an older kernel
                    limit = int(1000 * RESEND_SECONDS)
                    sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, limit)
        self._sock = sock
        self._fd = sock.fileno()
        self._cipher = cipher
        self._backlog = bytearray()
        self._pending: trio.Event | None = None
        self._drained: trio.Event | None = None
        self._emptied: trio.Event | None = None
        self.closed = False
        self.received = 0
        """Raw bytes received so far."""

    @property
    def congested(self) -> bool:
        """Whether senders of data should wait in :meth:`drained`."""
        return len(self._backlog) > HIGH_WATER

    def remote(self) -> tuple[str, int]:
        """Return the address at the other end, or ``("?", 0)`` when it is gone."""
        try:
            name = self._sock.getpeername()
        except OSError:
            return "?", 0
        return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("?", 0)

    def send(self, data: bytes) -> None:
        """Send ``data`` or queue it; never waits.

        Raises :class:`WireClosed`.
        """
        if self.closed:
            raise WireClosed("the connection is closed")
        self._put(data if self._cipher is None else self._cipher.outgoing(data))

    def _put(self, data: bytes) -> None:
        """Give bytes that are ready for the wire to the kernel, or queue them."""
        sent = 0
        if not self._backlog:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self.close()
                raise WireClosed(error.strerror or str(error)) from None
            if sent == len(data):
                return
        if len(self._backlog) + len(data) > MAX_BACKLOG:
            self.close()
            raise WireClosed("the peer does not read what it asks for")
        self._backlog += memoryview(data)[sent:]
        if self._pending is not None:
            self._pending.set()

    async def drained(self) -> None:
        """Wait until the backlog is no longer congested.

        Raises :class:`WireClosed`.
        """
        while self.congested and not self.closed:
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()
        if self.closed:
            raise WireClosed("the connection is closed")

    async def flushed(self) -> None:
        """Wait until the kernel has everything that was sent, or the wire is closed."""
        while not self._idle() and not self.closed:
            if self._emptied is None:
                self._emptied = trio.Event()
            await self._emptied.wait()

    def _idle(self) -> bool:
        """Whether nothing waits here."""
        return not self._backlog

    def _wake(self) -> None:
        """Tell those who wait for room or for the end of what waits."""
        if self._drained is not None and not self.congested:
            self._drained.set()
            self._drained = None
        if self._emptied is not None and self._idle():
            self._emptied.set()
            self._emptied = None

    async def run_writer(self) -> None:
        """Put the backlog on the socket as it takes it; returns when the wire is closed."""
        while not self.closed:
            if not self._backlog:
                self._pending = trio.Event()
                await self._pending.wait()
                self._pending = None
                continue
            try:
                with trio.move_on_after(STALL_SECONDS) as stalled:
                    await trio.lowlevel.wait_writable(self._fd)
                if stalled.cancelled_caught:
                    self.close()
                    return
                with memoryview(self._backlog) as view:
                    sent = self._sock.send(view[:RECEIVE_BYTES])
                del self._backlog[:sent]
            except (BlockingIOError, InterruptedError):
                continue
            except (OSError, trio.ClosedResourceError):
                self.close()
                return
            self._wake()

    async def receive(self, scratch: bytearray | None = None) -> memoryview | bytes:
        """Return the next bytes, empty at the end; a view is good until the next call.

        Raises :class:`WireClosed` when the connection broke.
        """
        while True:
            if self.closed:
                raise WireClosed("the connection is closed")
            try:
                await trio.lowlevel.wait_readable(self._fd)
                data: memoryview | bytes
                if scratch is None:
                    data = self._sock.recv(4 * KIB)
                else:
                    data = memoryview(scratch)[: self._sock.recv_into(scratch)]
            except (BlockingIOError, InterruptedError):
                continue
            except (OSError, trio.ClosedResourceError) as error:
                reason = getattr(error, "strerror", None) or "the connection was closed"
                self.close()
                raise WireClosed(reason) from None
            self.received += len(data)
            if self._cipher is None or not data:
                return data
            plain = self._cipher.incoming(bytes(data))
            if plain:  # else it was all nonce
                return plain

    def finish(self) -> None:
        """Tell the peer that nothing more comes; receiving goes on."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the socket; whoever waits on it gets :class:`WireClosed`."""
        if self.closed:
            return
        self.closed = True
        self._backlog.clear()
        trio.lowlevel.notify_closing(self._fd)
        self._sock.close()
        for event in (self._pending, self._drained, self._emptied):
            if event is not None:
                event.set()
