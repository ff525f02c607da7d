"""One direction between two places: a packet in at a time, its arrival or its loss out.  Pure.

A packet first takes its chance to be lost, then waits for tokens of a bucket that fills at the
link's rate, in a queue that drops what does not fit (tail drop), and then travels for the link's
delay give or take the jitter.  Packets keep their order: one that jitter would let overtake another
arrives together with it, as on a path with one route.

The bucket is kept as one number, the time at which it will be full again (the virtual scheduling
form of the generic cell rate algorithm, ITU-T I.371), so that an idle link costs nothing.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol

import msgspec

Loss = Literal["lost", "queue"]
"""Why a packet does not arrive: by chance, or because the queue was full."""

PERFECT_QUEUE: Final = 256 * 1024
DEFAULT_BURST: Final = 16 * 1024


class LinkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one direction of a link does to packets.

    ``delay`` and ``jitter`` are one-way seconds (``jitter <= delay``), ``loss`` the share of
    packets in [0, 1], ``rate`` bits a second (``None``: no bound, no queue), ``queue`` and
    ``burst`` bytes.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float | None = None
    queue: int = PERFECT_QUEUE
    burst: int = DEFAULT_BURST


class Random(Protocol):
    """A source of numbers in [0, 1)."""

    def random(self) -> float:
        """Return the next number."""
        ...


class Link:
    """The state of one direction; times are seconds on any clock that does not go back."""

    def __init__(self, spec: LinkSpec, rng: Random) -> None:
        self.spec = spec
        self._rng = rng
        self._full_at = 0.0
        """When the bucket will be full again; the queue is what lies beyond one burst of that."""
        self._last_arrival = 0.0

    def send(self, size: int, now: float) -> float | Loss:
        """Take a packet of ``size`` bytes; return when it arrives, or why it does not."""
        spec = self.spec
        if spec.loss and self._rng.random() < spec.loss:
            return "lost"
        leaves = now
        if spec.rate is not None:
            if self.queued(now) + size > spec.queue:
                return "queue"
            full_at = max(self._full_at, now) + size * 8 / spec.rate
            leaves = max(now, full_at - spec.burst * 8 / spec.rate)
            self._full_at = full_at
        delay = spec.delay
        if spec.jitter:
            delay += spec.jitter * (2 * self._rng.random() - 1)
        self._last_arrival = max(self._last_arrival, leaves + delay)
        return self._last_arrival

    def change(self, spec: LinkSpec, now: float) -> None:
        """Be another link from now on; what waits in the queue waits at the new rate."""
        waiting = self.queued(now)
        self.spec = spec
        if spec.rate is not None:
            self._full_at = now + (waiting + spec.burst) * 8 / spec.rate if waiting else now

    def queued(self, now: float) -> float:
        """Return how many bytes wait for tokens."""
        rate = self.spec.rate
        if rate is None:
            return 0.0
        return max(0.0, (self._full_at - now) * rate / 8 - self.spec.burst)
