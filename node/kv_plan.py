"""From whom to fetch which blocks, and whom not to ask for a while.  Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from pyagent_node.base.types import PeerId
from pyagent_node.sharding.block_costs import Prefill, Source, plan_prefix
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

SLOWEST: Final = 0.2
"""A peer is given nothing to send that is so much slower than the fastest of those who have it."""
LEAST_WATCHED: Final = 0.4
"""Seconds after which the speed of a fetch is believed."""
STOP_WORTH: Final = 1.1
"""A fetch is ended when it would take so many times as long as computing what is to come."""
WAITED: Final = 0.25
"""The part of the time of computing for which a first block is waited for."""
FIRST_SHUN: Final = 30.0
"""Seconds for which a peer is asked nothing that sent a wrong block; twice as long each time."""
LONGEST_SHUN: Final = 3600.0
SHORT_SHUN: Final = 5.0
"""Seconds for which a peer is asked nothing that failed to answer."""
MAX_SHUNNED: Final = 1024


class Ask(NamedTuple):
    """Blocks ``[start, stop)`` of the layers ``[first_layer, last_layer)``, of one peer."""

    peer: PeerId
    first_layer: int
    last_layer: int
    start: int
    stop: int


def leading(layers: range, held: Sequence[Mapping[int, int]]) -> int:
    """Return how many leading blocks of all ``layers`` there are.

    ``held`` gives for each source how many it has of each layer.
    """
    return min(
        (max((counts.get(layer, 0) for counts in held), default=0) for layer in layers), default=0
    )


def share_out(
    layers: range,
    local: Mapping[int, int],
    remote: Mapping[PeerId, Mapping[int, int]],
    count: int,
    speeds: Mapping[PeerId, float],
) -> list[Ask]:
    """Say whom to ask for what, so that the first ``count`` blocks of ``layers`` are here.

    ``local`` and ``remote`` are how many leading blocks of each layer are here and at each peer;
    ``speeds`` are in bytes a second.  Every layer comes from one peer that has all that is
    missing of it; neighbouring layers that several peers have are divided among them by speed.
    """
    asks: list[Ask] = []
    group: list[int] = []
    shape: tuple[int, tuple[PeerId, ...]] = (0, ())

    def close() -> None:
        if group:
            asks.extend(_divide(range(group[0], group[-1] + 1), shape[0], count, shape[1], speeds))
            group.clear()

    for layer in layers:
        start = min(local.get(layer, 0), count)
        able = tuple(peer for peer, counts in remote.items() if counts.get(layer, 0) >= count)
        if start >= count or not able:
            close()
            continue
        if group and (start, able) != shape:
            close()
        shape = (start, able)
        group.append(layer)
    close()
    return asks


def worth(
    count: int,
    have: int,
    *,
    blocks: int,
    block_bytes: float,
    prefill_seconds: float,
    round_trip: float,
    bandwidth: float,
) -> int:
    """Return how many leading blocks to have, of ``count`` that can be had.

    ``have`` of them are here; ``blocks`` are wanted in all, and what is not had is computed.
    ``block_bytes`` is what a block takes on the way, ``bandwidth`` what its senders give together,
    ``prefill_seconds`` what a token takes here.  What is not known yet speaks for fetching.
    """
    if prefill_seconds <= 0 or block_bytes <= 0 or count <= have:
        return count
    source = Source("peers", count - have, block_bytes, round_trip, bandwidth)
    return have + plan_prefix([source], blocks - have, Prefill(prefill_seconds)).count


def _divide(
    layers: range,
    start: int,
    stop: int,
    peers: Sequence[PeerId],
    speeds: Mapping[PeerId, float],
) -> list[Ask]:
    """Divide layers among ``peers`` in proportion to their speeds."""
    first, last = layers.start, layers.stop
    best = max(speeds.get(peer, 0.0) for peer in peers)
    good = [p for p in peers if speeds.get(p, 0.0) >= SLOWEST * best]
    good.sort(key=lambda peer: -speeds.get(peer, 0.0))
    good = good[: last - first]
    total = sum(speeds.get(peer, 0.0) for peer in good)
    asks, at, passed = [], first, 0.0
    for i, peer in enumerate(good):
        passed += speeds.get(peer, 0.0)
        rest = len(good) - 1 - i
        share = passed / total if total > 0 else (i + 1) / len(good)
        end = min(last - rest, max(at + 1, first + round((last - first) * share)))
        end = last if not rest else end
        asks.append(Ask(peer, at, end, start, stop))
        at = end
    return asks


class Watch:
    """Whether a fetch is worth going on with, by how fast its blocks come."""

    def __init__(self, asks: Sequence[Ask], now: float) -> None:
        self.given_up = False
        self._began = now
        self._came = dict.fromkeys(asks, 0)

    def came(self, ask: Ask) -> None:
        """Note that a layer of a block is here."""
        self._came[ask] += 1

    def pays(self, now: float, seconds: float) -> bool:
        """Whether the rest is here before it would be computed, at ``seconds`` a token.

        Blocks come in order, so what is here of every layer need not be computed.  Nothing is given
        up that has just begun, or that is slower by a hair only.
        """
        passed = now - self._began
        if passed < LEAST_WATCHED:
            return True
        fetching = computing = 0.0
        for ask, came in self._came.items():
            layers = ask.last_layer - ask.first_layer
            left = (ask.stop - ask.start) * layers - came
            if left > 0:
                fetching = max(fetching, passed * left / came if came else math.inf)
                computing = max(computing, seconds * BLOCK_TOKENS * math.ceil(left / layers))
        if math.isinf(fetching):  # of something nothing has come yet
            return passed < WAITED * computing
        return fetching <= STOP_WORTH * computing


class Trust:
    """Whom not to ask now: peers that sent wrong blocks, or failed to answer."""

    def __init__(self) -> None:
        self._until: dict[PeerId, float] = {}
        self._lies: Counter[PeerId] = Counter()

    def lied(self, peer: PeerId, now: float) -> None:
        """A peer sent a block that was not what it should be."""
        if len(self._lies) >= MAX_SHUNNED:
            self._lies.clear()
        self._lies[peer] = min(self._lies[peer] + 1, 16)
        self._shun(peer, now + min(LONGEST_SHUN, FIRST_SHUN * 2 ** (self._lies[peer] - 1)))

    def failed(self, peer: PeerId, now: float) -> None:
        """A peer did not answer."""
        self._shun(peer, now + SHORT_SHUN)

    def good(self, peer: PeerId, now: float) -> bool:
        """Whether to ask a peer."""
        return self._until.get(peer, 0.0) <= now

    def distrusted(self, now: float) -> int:
        """Return how many peers are not asked now."""
        return sum(until > now for until in self._until.values())

    def _shun(self, peer: PeerId, until: float) -> None:
        if len(self._until) >= MAX_SHUNNED:
            self._until.pop(min(self._until, key=lambda each: self._until[each]))
        self._until[peer] = max(self._until.get(peer, 0.0), until)
