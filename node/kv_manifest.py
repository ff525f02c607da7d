"""Who holds the KV blocks of one session, as its head knows it, and when the log hears.  Pure."""

from __future__ import annotations

from typing import Final

from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import BlockHolders
from pyagent_node.node.kv_messages import SessionHolders

MAX_PARTS: Final = 32
"""Slices of which the log is told; of more, the newest."""
MAX_HOLDERS: Final = 8
HOLDERS_SECONDS: Final = 2.0
"""The log hears of new holders this often at most ..."""
BLOCKS_SECONDS: Final = 15.0
"""... and of more blocks at the same ones, if they are half as many more, this often."""


class SessionKv:
    """The holders of one session's blocks."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], dict[PeerId, int]] = {}
        self._told: tuple[BlockHolders, ...] = ()
        self._told_at = float("-inf")

    def learn(self, report: SessionHolders) -> None:
        """Take a rank's report about its slice, instead of the last one."""
        part = (report.first_layer, report.last_layer)
        self._held.pop(part, None)
        self._held[part] = {peer: blocks for peer, blocks in report.holders if blocks > 0}
        while len(self._held) > MAX_PARTS:
            del self._held[next(iter(self._held))]

    def parts(self) -> tuple[BlockHolders, ...]:
        """Return what the log is to know."""
        found = []
        for (first, last), held in sorted(self._held.items()):
            most = sorted(held, key=lambda peer: (-held[peer], peer))[:MAX_HOLDERS]
            if most:
                blocks = min(held[peer] for peer in most)
                found.append(BlockHolders(first, last, blocks, tuple(sorted(most))))
        return tuple(found)

    def due(self, now: float) -> bool:
        """Whether the log is to hear now."""
        parts = self.parts()
        if _who(parts) != _who(self._told):
            return now >= self._told_at + HOLDERS_SECONDS
        more = sum(part.blocks for part in parts) > 1.5 * sum(part.blocks for part in self._told)
        return more and now >= self._told_at + BLOCKS_SECONDS

    def registered(self, now: float) -> None:
        """The log hears of :meth:`parts` now."""
        self._told, self._told_at = self.parts(), now


def _who(parts: tuple[BlockHolders, ...]) -> set[tuple[int, int, tuple[PeerId, ...]]]:
    return {(part.first_layer, part.last_layer, part.holders) for part in parts}
