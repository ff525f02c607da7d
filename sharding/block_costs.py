"""Fetch a block, or compute it again?  A cost model, and what it is fed with.  Pure.

A session needs the KV of the first ``blocks`` blocks of its tokens.  Some sources (the disk here,
peers) hold leading parts of them.  What is fetched comes from all sources at once, and is decoded
while more arrives; then the others are computed, in order, for each block needs those before it.

:func:`plan_prefix` looks at every possible boundary and takes the best, so it is never worse than
fetching everything or nothing, as far as the measured numbers are right; with every number right
within a factor ``1 + e``, never worse than the best by more than ``(1 + e) ** 2``.

(Computing from the front while fetching from the back until the two meet would be faster where
both take about as long: S. Jin et al., *Compute or load KV cache? Why not both?*, arXiv 2410.03065,
2024.  It needs a pipeline in which a session computes while its later blocks are put in place.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

WORTH: Final = 0.95
"""A plan has to take less than this share of the time of computing everything to be worth it."""


class Source(msgspec.Struct, frozen=True):
    """Where leading blocks can be had.

    ``held`` is how many; ``block_bytes`` what a block of all the layers wanted takes on the way
    (at the level in which it is sent); ``round_trip`` seconds until the first byte is here;
    ``bandwidth`` bytes a second after that.
    """

    name: str
    held: int
    block_bytes: float
    round_trip: float
    bandwidth: float

    @property
    def block_seconds(self) -> float:
        """Seconds that a block is on the way, behind others."""
        return self.block_bytes / self.bandwidth if self.bandwidth > 0 else math.inf


class Prefill(msgspec.Struct, frozen=True):
    """What computing takes: a token at position p takes ``seconds + growth * p``."""

    seconds: float
    growth: float = 0.0

    def of(self, start: int, stop: int) -> float:
        """Return the seconds for the blocks ``[start, stop)``."""
        first, last = start * BLOCK_TOKENS, stop * BLOCK_TOKENS
        return (last - first) * self.seconds + self.growth * (last**2 - first**2) / 2


class Plan(msgspec.Struct, frozen=True):
    """Fetch the first ``count`` blocks; it all takes ``seconds``, by the model.

    ``computing`` is what computing everything would take, and ``fetching`` the part of ``seconds``
    in which blocks are under way.
    """

    count: int
    seconds: float
    fetching: float
    computing: float


def fetch_seconds(
    sources: Sequence[Source], start: int, stop: int, decode_seconds: float = 0.0
) -> float:
    """Return how long it takes until the blocks ``[start, stop)`` are here and decoded.

    Sources send at once, each what only few of them hold first; ``decode_seconds`` a block is the
    work of one core here.  Infinite when some block is held by nobody.
    """
    if start >= stop:
        return 0.0
    # Whoever holds a block holds all before it.  So the time is that of the hardest tail: blocks
    # from some boundary on, with those alone to send them who hold more than that.
    boundaries = {start, *(s.held for s in sources if start < s.held < stop)}
    worst = 0.0
    for boundary in boundaries:
        able = [s for s in sources if s.held > boundary]
        worst = max(worst, _together(able, stop - boundary))
    if max((s.held for s in sources), default=0) < stop:
        return math.inf
    first = min(s.round_trip + s.block_seconds for s in sources if s.held > start)
    return max(worst + decode_seconds, first + decode_seconds * (stop - start))


def _together(sources: Sequence[Source], blocks: float) -> float:
    """Return how long several sources take for so many blocks that all of them hold."""
    if not blocks:
        return 0.0
    rate = lost = 0.0
    best = math.inf
    for source in sorted(sources, key=lambda each: each.round_trip):
        if source.round_trip >= best:
            break
        speed = 1.0 / source.block_seconds if source.block_seconds > 0 else math.inf
        if math.isinf(speed):
            return min(best, source.round_trip)
        if speed > 0:
            rate += speed
            lost += speed * source.round_trip
            best = (blocks + lost) / rate
    return best


def plan_prefix(
    sources: Sequence[Source], blocks: int, prefill: Prefill, *, decode_seconds: float = 0.0
) -> Plan:
    """Return how many leading blocks to fetch before the others are computed.

    ``blocks`` is how many there are in all.  Of equally good plans the one that fetches less.
    """
    computing = prefill.of(0, blocks)
    best = Plan(0, computing, 0.0, computing)
    for stop in range(1, min(blocks, max((s.held for s in sources), default=0)) + 1):
        fetching = fetch_seconds(sources, 0, stop, decode_seconds)
        seconds = fetching + prefill.of(stop, blocks)
        if seconds < best.seconds and seconds < WORTH * computing:
            best = Plan(stop, seconds, fetching, computing)
    return best


class Rate:
    """An amount a second (bytes, tokens), learnt from what took how long.

    The ratio of two sums in which the past fades, so long measurements count for more than short
    ones, which are mostly noise.  ``prior`` is believed as if ``prior_seconds`` had been measured;
    half of what was known is forgotten after ``half_life`` seconds of measurements.
    """

    def __init__(
        self, prior: float, *, prior_seconds: float = 0.05, half_life: float = 5.0
    ) -> None:
        self._seconds = prior_seconds
        self._amount = prior * prior_seconds
        self._half_life = half_life
        self.samples = 0

    def add(self, amount: float, seconds: float) -> None:
        """Take a measurement; what cannot be one is ignored."""
        if not (0 < amount < math.inf and 0 < seconds < math.inf):
            return
        fade = 0.5 ** (seconds / self._half_life)
        self._amount = self._amount * fade + amount
        self._seconds = self._seconds * fade + seconds
        self.samples += 1

    @property
    def per_second(self) -> float:
        """The amount a second."""
        return self._amount / self._seconds


class Link:
    """Round trip and bandwidth of a way to a source, from requests of any size.

    The round trip is taken from replies of at most :attr:`SMALL` bytes and smoothed as TCP does it
    (RFC 6298: an eighth of each new one), but follows shorter ones faster: a reply that came late
    says more of whoever was busy than of the way.  Larger ones teach the bandwidth, less the round
    trip.
    """

    SMALL: Final = 16 * 1024

    def __init__(self, *, round_trip: float = 0.05, bandwidth: float = 12.5e6) -> None:
        self.round_trip = round_trip
        self._rate = Rate(bandwidth)
        self._trips = 0

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self._rate.per_second

    @property
    def samples(self) -> int:
        """How many measurements there were."""
        return self._trips + self._rate.samples

    def add(self, nbytes: int, seconds: float) -> None:
        """Take note that a reply of ``nbytes`` was complete ``seconds`` after it was asked for."""
        if not 0 < seconds < math.inf or nbytes < 0:
            return
        if nbytes <= self.SMALL:
            share = 0.5 if seconds < self.round_trip else 0.125 if self._trips else 1.0
            self.round_trip += (seconds - self.round_trip) * share
            self._trips += 1
        else:
            # Never less than a tenth: a round trip that was overestimated must not make it endless.
            self._rate.add(nbytes, max(seconds - self.round_trip, 0.1 * seconds))
