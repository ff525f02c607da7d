"""Dialling peers: one attempt at a time for each, address after address, and again when lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError, Refused, Unavailable
from pyagent_node.base.types import PeerId
from pyagent_node.node.mesh.book import Book
from pyagent_node.node.mesh.connection import Connection
from pyagent_node.node.mesh.settings import MeshMetrics

log = logging.getLogger("pyagent_node.mesh")

MAX_DIALS: Final = 8
"""Attempts at once that nobody waits for."""

DialOne = Callable[[PeerId, str], Awaitable[Connection]]
"""Dials one address and returns the authorised connection; raises :class:`PyAgentError`."""


class _Attempt:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.connection: Connection | None = None
        self.error: PyAgentError = Unavailable("The dial was given up.", code="peer_unreachable")


class Dialler:
    """Makes outbound connections.

    ``present`` returns the connection that there is already, ``dial_one`` makes a new one.
    """

    def __init__(
        self,
        book: Book,
        metrics: MeshMetrics,
        nursery: trio.Nursery,
        *,
        present: Callable[[PeerId], Connection | None],
        dial_one: DialOne,
    ) -> None:
        self._book = book
        self._metrics = metrics
        self._nursery = nursery
        self._present = present
        self._dial_one = dial_one
        self._going: dict[PeerId, _Attempt] = {}
        self._limit = trio.CapacityLimiter(MAX_DIALS)
        self._changed = trio.Event()

    def wake(self) -> None:
        """The book has changed: look at it again."""
        self._changed.set()

    async def dial(self, peer: PeerId, addresses: Sequence[str] | None = None) -> Connection:
        """Return a connection to ``peer``, dialling the given addresses or those of the book.

        Callers at once share one attempt, which goes on when one of them is cancelled.  Raises
        :class:`Unavailable` (``peer_unreachable``, ``handshake_failed``, ...) or
        :class:`Refused`; a refusal comes before a failure to connect.
        """
        while True:
            connection = self._present(peer)
            if connection is not None:
                return connection
            attempt = self._going.get(peer)
            shared = attempt is not None
            if attempt is None:
                attempt = self._going[peer] = _Attempt()
                where = list(addresses) if addresses else self._book.addresses(peer)
                self._nursery.start_soon(self._try, peer, where, attempt)
            await attempt.done.wait()
            if attempt.connection is not None:
                return attempt.connection
            if not shared or addresses is None:
                raise attempt.error

    async def _try(self, peer: PeerId, addresses: list[str], attempt: _Attempt) -> None:
        try:
            if not addresses:
                attempt.error = Unavailable(
                    f"{peer} is not connected, and no address of it is known.",
                    code="peer_unreachable",
                    remedy="Connect it: pyagent-node connect ADDRESS.",
                )
            for address in addresses:
                try:
                    attempt.connection = await self._dial_one(peer, address)
                    return
                except PyAgentError as error:
                    log.debug("dialling %s at %s failed: %s", peer, address, error)
                    if not isinstance(attempt.error, Refused) or isinstance(error, Refused):
                        attempt.error = error
        except Exception:
            log.exception("dialling %s failed", peer)
        finally:
            del self._going[peer]
            attempt.done.set()

    async def keep(self) -> None:
        """Dial whoever is due by the book, for ever."""
        while True:
            self._changed = trio.Event()
            for peer in self._book.due(trio.current_time()):
                self._book.postpone(peer, float("inf"))
                self._nursery.start_soon(self._redial, peer)
            with trio.move_on_at(self._book.next_at()):
                await self._changed.wait()

    async def _redial(self, peer: PeerId) -> None:
        async with self._limit:
            try:
                await self.dial(peer)
            except PyAgentError as error:
                self._metrics.dial_failures += 1
                if isinstance(error, Refused):
                    log.warning("%s refuses this node: %s", peer, error)
                else:
                    log.debug("%s is not there: %s", peer, error)
                refused = isinstance(error, Refused)
                self._book.failed(peer, trio.current_time(), refused=refused)
                self.wake()
