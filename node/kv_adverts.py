"""What peers hold, as they say; and telling them what this node holds.

Adverts are hints.  A wrong one costs a question in vain: blocks are asked for by name, and checked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError
from pyagent_node.base.limits import KIB, MAX_PEERS
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_messages import Advert
from pyagent_node.node.kv_plan import leading
from pyagent_node.node.kv_vault import KvVault
from pyagent_node.sharding.block_summary import Summary, build_summary

log = logging.getLogger("pyagent_node.kv")

ADVERT_SECONDS: Final = 0.5
"""How often peers are told, if what is held has changed ..."""
ADVERT_RATE: Final = 256 * KIB
"""... and not more bytes a second than this, to all of them together."""
TELL_SECONDS: Final = 2.0
"""Longest time for a peer to take an advert."""
QUIET_SECONDS: Final = 10.0
"""How long a peer that did not take one is told nothing."""


class AdvertBook:
    """What peers say that they hold."""

    def __init__(self) -> None:
        self._said: dict[PeerId, Summary] = {}

    def __len__(self) -> int:
        return len(self._said)

    def learned(self, peer: PeerId, data: bytes) -> None:
        """Take an advert, instead of the last one.

        Raises :class:`CorruptData` (``bad_summary``), :class:`LimitExceeded`
        (``too_many_summaries``).
        """
        summary = Summary(data)
        if peer not in self._said and len(self._said) >= MAX_PEERS:
            raise LimitExceeded(
                f"The summaries of {MAX_PEERS} peers are known already.", code="too_many_summaries"
            )
        self._said[peer] = summary

    def forget(self, peer: PeerId) -> None:
        """A peer went away."""
        self._said.pop(peer, None)

    def holders(
        self, model: Digest, codec: str, chain: Sequence[bytes], layers: range
    ) -> list[PeerId]:
        """Return who says to have leading blocks of some of the layers, the most first."""
        found: list[tuple[int, PeerId]] = []
        for peer, summary in self._said.items():
            share = sum(summary.counts(model, chain, layers, codec).values())
            if share:
                found.append((share, peer))
        return [peer for _, peer in sorted(found, key=lambda each: (-each[0], each[1]))]

    def promises(
        self, model: Digest, chain: Sequence[bytes], layers: range, own: Sequence[Summary] = ()
    ) -> int:
        """Return how many leading blocks there are of all ``layers``, wherever each of them is.

        ``own`` is what this node holds itself.
        """
        known = [*own, *self._said.values()]
        codecs = {codec for summary in known for codec in summary.codecs(model)}
        return max((_common(known, model, each, chain, layers) for each in codecs), default=0)


def _common(
    known: Sequence[Summary], model: Digest, codec: str, chain: Sequence[bytes], layers: range
) -> int:
    return leading(layers, [each.counts(model, chain, layers, codec) for each in known])


class Advertiser:
    """Tells peers what this node holds: on change, and when they come."""

    def __init__(self, mesh: Mesh, client: KvClient, vault: KvVault, book: AdvertBook) -> None:
        self.own: Summary | None = None
        """What this node holds, as it was told last."""
        self._mesh = mesh
        self._client = client
        self._vault = vault
        self._book = book
        self._told: dict[PeerId, int] = {}
        self._quiet: dict[PeerId, float] = {}

    async def run(self) -> None:
        """Tell, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_peers)
            while True:
                pause = await self._tell_all()
                await trio.sleep(pause)

    async def _follow_peers(self) -> None:
        async with self._mesh.events() as events:
            async for event in events:
                self._told.pop(event.peer_id, None)
                self._quiet.pop(event.peer_id, None)
                if event.change == "down":
                    self._book.forget(event.peer_id)

    async def _tell_all(self) -> float:
        """Tell those who do not know yet; returns for how long to be quiet then."""
        changes = self._vault.changes
        now = trio.current_time()
        peers = [
            peer.peer_id
            for peer in self._mesh.peers()
            if self._told.get(peer.peer_id, 0) != changes
            and self._quiet.get(peer.peer_id, now) <= now
        ]
        if not changes or (not peers and self.own is not None):
            return ADVERT_SECONDS
        data = build_summary(self._vault.store.held())
        self.own = Summary(data)
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(self._tell, peer, changes, data)
        return max(ADVERT_SECONDS, len(data) * len(peers) / ADVERT_RATE)

    async def _tell(self, peer: PeerId, changes: int, data: bytes) -> None:
        try:
            with trio.move_on_after(TELL_SECONDS):
                await self._client.tell(peer, Advert(), data)
                self._told[peer] = changes
                return
        except PyAgentError as error:
            log.debug("%s was not told what is held here: %s", peer, error)
        self._quiet[peer] = trio.current_time() + QUIET_SECONDS
