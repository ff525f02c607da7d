"""Tells the living from the dead among peers.  Pure: time is passed in, questions come out.

Three kinds of evidence go in.

* *Beats*: answers to questions asked at a steady pace.  How late the next one is, measured against
  how regular they were, gives the suspicion level phi of Hayashibara, Défago, Yared and Katayama,
  "The phi accrual failure detector" (2004): phi = -log10 of the probability that it still comes.
* *Connections* that come and go, and what a new dial meets.  A host that refuses the connection is
  alive and its daemon is not: two refusals a moment apart need no patience.
* *Witnesses*: what other members say when they are asked to try for themselves (the indirect
  probes of Das, Gupta and Motivala, "SWIM", 2002).  One that hears the peer outweighs our silence.

A peer is ``dead`` only when our own evidence says so and no witness objects.  A pause of this
process itself (a laptop that slept) is nobody's silence: :meth:`Detector.tick` forgives it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from pyagent_node.base.types import PeerId

Health = Literal["unknown", "alive", "suspect", "dead"]
"""``unknown``: never heard of, and that not for long."""

BEAT_SECONDS: Final = 0.5
"""Pause between two questions to a peer."""
WINDOW: Final = 64
"""Intervals between beats that are remembered."""
THRESHOLD: Final = 8.0
"""Suspicion from which a silent peer counts as gone: wrong once in a hundred million beats."""
PAUSE_SECONDS: Final = 3.0
"""Lateness that is always forgiven: a busy machine, a lost packet sent again."""
LEAST_DEVIATION: Final = 0.2
"""Smallest standard deviation of the intervals that is believed, in seconds."""
CONFIRM_SECONDS: Final = 0.05
"""Pause between two probes of a suspect; refusals count when they are about as far apart."""
REFUSALS: Final = 2
WITNESSES: Final = 3
"""Members that are asked about a suspect."""
WITNESS_SECONDS: Final = 0.25
"""How long their answers are waited for, beside the round trips that they take."""
WITNESS_TRIPS: Final = 4
"""Round trips that are waited besides: there, from there to the suspect, and as much for losses."""
MOST_WITNESS_SECONDS: Final = 0.9
"""Less than the pause before they are asked again."""
ASK_AGAIN_SECONDS: Final = 1.0
"""Pause between two rounds of questions about the same suspect."""
GRACE_SECONDS: Final = 20.0
"""How long a peer that was never heard of may take to appear."""
STALL_SECONDS: Final = 1.0
"""A longer pause between two ticks was ours."""


def phi(elapsed: float, mean: float, deviation: float) -> float:
    """Return -log10 of the probability that a beat comes later than ``elapsed`` seconds.

    Intervals are taken for normally distributed.  At most 300.
    """
    later = 0.5 * math.erfc((elapsed - mean) / (deviation * math.sqrt(2.0)))
    return min(300.0, -math.log10(later)) if later > 0.0 else 300.0


class Probe(NamedTuple):
    """Dial the peer, or ask it anything, now; tell :meth:`Detector.beat` or ``missed``."""

    peer: PeerId


class AskWitness(NamedTuple):
    """Let ``witness`` try to reach the peer; tell :meth:`Detector.told`."""

    peer: PeerId
    witness: PeerId


Question = Probe | AskWitness


def witness_patience(trip: float) -> float:
    """Return how long witnesses are waited for where the longest round trip is ``trip`` seconds."""
    return min(MOST_WITNESS_SECONDS, WITNESS_SECONDS + WITNESS_TRIPS * trip)


@dataclass(slots=True)
class _Peer:
    watched_since: float
    connected: bool = False
    up_at: float = -math.inf
    seen: bool = False
    heard: float = 0.0
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    beating: bool = False
    refusals: int = 0
    refused_at: float = -math.inf
    probed_at: float = -math.inf
    asked_at: float = -math.inf
    waiting: set[PeerId] = field(default_factory=set)
    heard_by: dict[PeerId, float] = field(default_factory=dict)
    dead: bool = False

    def trust(self) -> None:
        """It was heard: forget every suspicion."""
        self.seen = True
        self.dead = False
        self.refusals = 0
        self.refused_at = self.probed_at = self.asked_at = -math.inf
        self.waiting.clear()
        self.heard_by.clear()


class Detector:
    """What one node knows of the health of others.

    Connections are followed for every peer (:meth:`up`, :meth:`down`); questions are asked only
    about those in :meth:`watch`.
    """

    def __init__(self, now: float) -> None:
        self._peers: dict[PeerId, _Peer] = {}
        self._watched: frozenset[PeerId] = frozenset()
        self._started = now
        self._ticked = now
        self.patience = WITNESS_SECONDS
        """How long witnesses are waited for now."""

    # ---- evidence --------------------------------------------------------------------------

    def watch(self, peers: Iterable[PeerId], now: float) -> None:
        """Ask about these peers from now on, and about no others."""
        before, self._watched = self._watched, frozenset(peers)
        for peer in self._watched - before:
            known = self._of(peer)
            known.watched_since = known.heard = now
            known.beating = False
            known.intervals.clear()
        for peer in before - self._watched:
            if not (self._of(peer).connected or self._of(peer).seen):
                del self._peers[peer]

    def up(self, peer: PeerId, now: float) -> None:
        """A connection to the peer was made."""
        known = self._of(peer)
        known.connected = True
        known.up_at = known.heard = now
        known.beating = False
        known.trust()

    def down(self, peer: PeerId, now: float) -> None:
        """The last connection to the peer is gone."""
        self._of(peer).connected = False

    def beat(self, peer: PeerId, now: float) -> None:
        """The peer answered."""
        known = self._of(peer)
        if known.beating:
            known.intervals.append(now - known.heard)
        known.beating = True
        known.heard = now
        known.trust()

    def missed(self, peer: PeerId, now: float, *, refused: bool) -> None:
        """A probe failed; ``refused`` when its host said that nothing listens there."""
        known = self._of(peer)
        if refused and now - known.refused_at >= 0.8 * CONFIRM_SECONDS:
            known.refusals += 1
            known.refused_at = now

    def told(self, peer: PeerId, witness: PeerId, now: float, *, hears: bool) -> None:
        """A witness answered, or did not: then it hears nothing."""
        known = self._of(peer)
        known.waiting.discard(witness)
        if hears:
            known.heard_by[witness] = now
            known.dead = False
        else:
            known.heard_by.pop(witness, None)

    def tick(self, now: float, *, trip: float = 0.0) -> None:
        """Note that this process runs; after a pause of its own nobody was silent.

        ``trip`` is the longest round trip to those that can be asked, in seconds.
        """
        self.patience = witness_patience(trip)
        gap = now - self._ticked
        self._ticked = now
        if gap > STALL_SECONDS:
            for known in self._peers.values():
                known.heard = min(now, known.heard + gap)
                known.watched_since = min(now, known.watched_since + gap)
                known.beating = False

    # ---- conclusions -----------------------------------------------------------------------

    def phi(self, peer: PeerId, now: float) -> float:
        """Return the suspicion level of a watched peer."""
        known = self._of(peer)
        known_intervals = known.intervals or (BEAT_SECONDS,)
        mean = sum(known_intervals) / len(known_intervals)
        square = sum((x - mean) ** 2 for x in known_intervals) / len(known_intervals)
        deviation = max(LEAST_DEVIATION, math.sqrt(square))
        return phi(now - known.heard, mean + PAUSE_SECONDS, deviation)

    def health(self, peer: PeerId, now: float) -> Health:
        """Return what is to be thought of a peer."""
        known = self._peers.get(peer)
        if known is None or not known.seen:
            since = known.watched_since if known is not None else self._started
            if now - max(since, self._started) < GRACE_SECONDS:
                return "unknown"
            known = self._of(peer)
        elif not self._suspicious(peer, known, now):
            return "alive"
        if not self._gone(peer, known, now) or self._objected(known, now):
            return "suspect"
        asked = now - known.asked_at
        known.dead |= math.isfinite(asked) and (not known.waiting or asked >= self.patience)
        return "dead" if known.dead else "suspect"

    def questions(self, now: float, witnesses: Iterable[PeerId]) -> list[Question]:
        """Return what to find out now; ``witnesses`` are the members that could be asked."""
        able = [p for p in witnesses if self._able(p, now)]
        found: list[Question] = []
        for peer in sorted(self._watched):
            known = self._of(peer)
            late = not known.seen and now - known.watched_since >= GRACE_SECONDS
            if not late and (not known.seen or not self._suspicious(peer, known, now)):
                continue
            if now - known.probed_at >= 0.9 * CONFIRM_SECONDS:
                known.probed_at = now
                found.append(Probe(peer))
            if now - known.asked_at >= ASK_AGAIN_SECONDS:
                known.asked_at = now
                chosen = [p for p in able if p != peer][:WITNESSES]
                known.waiting = set(chosen)
                found += [AskWitness(peer, witness) for witness in chosen]
        return found

    def silent_for(self, peer: PeerId, now: float) -> float:
        """Return for how long nothing was heard of a peer."""
        known = self._peers.get(peer)
        return now - (known.heard if known is not None else self._started)

    def connected_for(self, peer: PeerId, now: float) -> float:
        """Return for how long a peer has been connected without a break."""
        known = self._peers.get(peer)
        return now - known.up_at if known is not None and known.connected else 0.0

    # ---- inside ----------------------------------------------------------------------------

    def _of(self, peer: PeerId) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            known = self._peers[peer] = _Peer(watched_since=self._ticked, heard=self._ticked)
        return known

    def _suspicious(self, peer: PeerId, known: _Peer, now: float) -> bool:
        if not known.connected:
            return True
        return peer in self._watched and self.phi(peer, now) >= THRESHOLD

    def _gone(self, peer: PeerId, known: _Peer, now: float) -> bool:
        """Whether our own evidence says that the peer is dead."""
        if not known.connected and known.refusals >= REFUSALS:
            return True
        return self.phi(peer, now) >= THRESHOLD

    def _objected(self, known: _Peer, now: float) -> bool:
        """Whether a witness heard the peer lately."""
        fresh = now - ASK_AGAIN_SECONDS - self.patience
        return any(at >= fresh for at in known.heard_by.values())

    def _able(self, peer: PeerId, now: float) -> bool:
        known = self._peers.get(peer)
        return known is not None and known.connected and not self._suspicious(peer, known, now)
