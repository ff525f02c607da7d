"""A :class:`Wire` whose bytes leave late and slowly, as :mod:`pyagent_node.node.shaping` says.

What is written waits here for as long as it would travel, and goes to the socket when it would have
arrived.  Bytes that have not been sent yet hold senders of data back as a full socket does; those
on their way do so beyond :data:`MAX_FLIGHT`, which bounds the memory and, with a long round trip
and no rate, the throughput.
"""

from __future__ import annotations

import math
import random
import socket
from collections import deque
from typing import Final

import trio

from pyagent_node.base.limits import MIB
from pyagent_node.node.mesh.wire import HIGH_WATER, MAX_BACKLOG, StreamCipher, Wire, WireClosed
from pyagent_node.node.shaping import Pacer, Shape

MAX_FLIGHT: Final = 2 * MIB
"""Bytes on their way above which senders of data wait."""


class ShapedWire(Wire):
    """A socket behind a slow link of our own making."""

    def __init__(
        self,
        sock: socket.socket,
        cipher: StreamCipher | None = None,
        *,
        shape: Shape,
        rng: random.Random,
    ) -> None:
        super().__init__(sock, cipher)
        self._pacer = Pacer(shape)
        self._rng = rng
        self._unsent: deque[tuple[float, int]] = deque()
        self._waiting = 0
        self._flying: deque[tuple[float, bytes]] = deque()
        self._flight = 0
        self._written: trio.Event | None = None

    @property
    def congested(self) -> bool:
        """Whether senders of data should wait in :meth:`drained`."""
        self._note_sent()
        return self._waiting > HIGH_WATER or self._flight > MAX_FLIGHT or super().congested

    def _note_sent(self) -> None:
        """Count what has left the queue for the rate by now."""
        now = trio.current_time()
        while self._unsent and self._unsent[0][0] <= now:
            self._waiting -= self._unsent.popleft()[1]

    def _put(self, data: bytes) -> None:
        if self._flight + len(data) > MAX_BACKLOG:
            self.close()
            raise WireClosed("the peer does not read what it asks for")
        sent_at, arrives_at = self._pacer.write(len(data), trio.current_time(), self._rng.random())
        self._unsent.append((sent_at, len(data)))
        self._waiting += len(data)
        self._flying.append((arrives_at, data))
        self._flight += len(data)
        if self._written is not None:
            self._written.set()

    def _idle(self) -> bool:
        return not self._flying and super()._idle()

    async def run_writer(self) -> None:
        """Let bytes arrive when they are due; returns when the wire is closed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver)
            await super().run_writer()
            nursery.cancel_scope.cancel()

    async def _deliver(self) -> None:
        while not self.closed:
            self._written = trio.Event()
            with trio.move_on_at(self._next_at()):
                await self._written.wait()
            now = trio.current_time()
            due: list[bytes] = []
            while self._flying and self._flying[0][0] <= now:
                due.append(self._flying.popleft()[1])
            data = b"".join(due)
            self._flight -= len(data)
            if data:
                try:
                    super()._put(data)
                except WireClosed:
                    return
            self._wake()

    def _next_at(self) -> float:
        """Return when something is sent or arrives next."""
        self._note_sent()
        soonest = self._flying[0][0] if self._flying else math.inf
        return min(soonest, self._unsent[0][0]) if self._unsent else soonest

    def close(self) -> None:
        """Close the socket; what was on its way is lost, as in a cut cable."""
        super().close()
        self._flying.clear()
        self._unsent.clear()
        if self._written is not None:
            self._written.set()
