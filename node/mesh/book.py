"""Whom to dial, where, and when: the addresses of peers and the waits between attempts.

Pure: the time and the random generator are passed in.
"""

from __future__ import annotations

import enum
import math
import random
from dataclasses import dataclass, field
from typing import Final

from pyagent_node.base.types import PeerId

MAX_ADDRESSES: Final = 8
"""Addresses kept for one peer; the ones that failed longest ago go first."""
MAX_ENTRIES: Final = 1024
"""Peers in the book; more that are only heard of are not taken in."""
MAX_FAILURES: Final = 12
"""Attempts in a row after which a peer we only heard of is forgotten."""
POLITE_SECONDS: Final = 2.0
"""Head start of the one of two strangers with the smaller peer id, against crossing dials."""


class Source(enum.Enum):
    """How we know an address."""

    CONFIGURED = "configured"
    """From the user or the mesh profile: dialled for as long as we run."""
    HEARD = "heard"
    """From other members or the local network: forgotten after :data:`MAX_FAILURES`."""


@dataclass(slots=True)
class _Entry:
    addresses: list[str] = field(default_factory=list)
    configured: bool = False
    connected: bool = False
    failures: int = 0
    next_at: float = math.inf


class Book:
    """The addresses of every peer we know, and when each is to be dialled next.

    ``first`` and ``most`` bound the wait before another attempt, in seconds: it doubles with each
    failure and is drawn evenly from half to one and a half of that, so that a whole mesh does not
    come back in step.
    """

    def __init__(self, me: PeerId, rng: random.Random, *, first: float, most: float) -> None:
        self._me = me
        self._rng = rng
        self._first = first
        self._most = most
        self._entries: dict[PeerId, _Entry] = {}

    def learn(self, peer: PeerId, addresses: list[str], source: Source, now: float) -> bool:
        """Take in addresses (without ``/p2p``); say whether the plan of dials may have changed."""
        if peer == self._me or not addresses:
            return False
        entry = self._entries.get(peer)
        if entry is None:
            if source is Source.HEARD and len(self._entries) >= MAX_ENTRIES:
                return False
            entry = self._entries[peer] = _Entry()
            entry.next_at = now + self._head_start(peer, source)
        fresh = [address for address in addresses if address not in entry.addresses]
        entry.addresses = (fresh + entry.addresses)[:MAX_ADDRESSES]
        if source is Source.CONFIGURED:
            entry.configured = True
        if fresh and not entry.connected and entry.failures:
            entry.failures = 0
            entry.next_at = min(entry.next_at, now + self._wait(0))
        return bool(fresh)

    def _head_start(self, peer: PeerId, source: Source) -> float:
        if source is Source.CONFIGURED:
            return 0.0
        polite = 0.0 if self._me < peer else POLITE_SECONDS
        return polite + self._rng.uniform(0.0, self._first)

    def addresses(self, peer: PeerId) -> list[str]:
        """Return where to dial ``peer``, the most promising address first."""
        entry = self._entries.get(peer)
        return list(entry.addresses) if entry else []

    def connected(self, peer: PeerId, address: str | None = None) -> None:
        """Note that ``peer`` is connected (over ``address``, if we dialled)."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.connected, entry.failures, entry.next_at = True, 0, math.inf
        if address in entry.addresses:
            entry.addresses.remove(address)
            entry.addresses.insert(0, address)

    def lost(self, peer: PeerId, now: float) -> None:
        """Note that the last connection of ``peer`` is gone; it will be dialled again."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.connected = False
            entry.next_at = now + self._wait(0)

    def failed(self, peer: PeerId, now: float, *, refused: bool = False) -> None:
        """Note that dialling failed; a refusal is taken for lasting, and asked again rarely."""
        entry = self._entries.get(peer)
        if entry is None or entry.connected:
            return
        entry.failures += 1
        if not entry.configured and entry.failures >= MAX_FAILURES:
            del self._entries[peer]
            return
        entry.next_at = now + (self._jitter(self._most) if refused else self._wait(entry.failures))

    def postpone(self, peer: PeerId, until: float) -> None:
        """Do not give out ``peer`` as due before ``until`` (it is being dialled)."""
        if peer in self._entries:
            self._entries[peer].next_at = until

    def forget(self, peer: PeerId) -> None:
        """Remove everything known of ``peer``."""
        self._entries.pop(peer, None)

    def due(self, now: float) -> list[PeerId]:
        """Return the peers to dial now."""
        return [p for p, e in self._entries.items() if not e.connected and e.next_at <= now]

    def next_at(self) -> float:
        """Return when the next dial is due; infinity when none is."""
        return min((e.next_at for e in self._entries.values() if not e.connected), default=math.inf)

    def _wait(self, failures: int) -> float:
        return self._jitter(min(self._most, self._first * 2.0 ** min(failures, 32)))

    def _jitter(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.5, 1.5)
