"""Which members vote: chosen by their word, their stability and their distance.  Pure.

Three voters are the fewest that outlive the loss of one, so below three able members one votes
alone: two voters would stop at the loss of either.  Beyond that the number is odd, because an even
one costs a vote more and outlives no more losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import VotePreference

MOST_VOTERS: Final = 7
SETTLE_SECONDS: Final = 5.0
"""A node must have been connected this long to begin to vote."""
DOWN_SECONDS: Final = 60.0
"""A voter away for longer is replaced if another node can."""
STEADY_SECONDS: Final = 600.0
"""A node connected this long counts as steady."""
UNSTEADY_COST: Final = 0.5
"""Seconds of round trip that a node which has only just come weighs less than a steady one."""
UNKNOWN_RTT: Final = 1.0
MARGIN: Final = 0.02
"""A voter stays unless another node costs less than half of it, less these seconds."""


class Candidate(msgspec.Struct, frozen=True):
    """A member as the leader sees it now.

    ``role`` is the certificate's; ``barred`` says that it was revoked or removed, or is draining.
    ``up`` is for how many seconds it has been connected, negative for how long it has been away;
    ``rtt`` the round trip to it in seconds, ``None`` before it was measured.
    """

    peer_id: PeerId
    role: str
    vote: VotePreference = "auto"
    barred: bool = False
    up: float = 0.0
    rtt: float | None = None

    @property
    def able(self) -> bool:
        """Whether it may vote at all."""
        return (
            not self.barred
            and self.vote != "never"
            and (self.role == "voter" or (self.vote == "always" and self.role != "client"))
        )


def choose_voters(
    candidates: Iterable[Candidate], current: frozenset[PeerId], voters_max: int
) -> frozenset[PeerId]:
    """Return who should vote, given the ``current`` voters.

    An operator's ``always`` comes first, then the lower of round trip and unsteadiness, with an
    advantage for those that vote already, so that two alike nodes do not take turns.  The answer
    is ``current`` while too few are up to carry a change, and never empty unless ``current`` is.
    """
    able = {each.peer_id: each for each in candidates if each.able}
    here = [c for c in able.values() if _present(c, c.peer_id in current)]
    size = _odd(min(len(here), voters_max, MOST_VOTERS))
    kept = [c for c in able.values() if c.peer_id in current and c not in here]
    # To shrink below three would cost more safety than a voter that is away.
    size = max(size, _odd(min(len(here) + len(kept), 3, voters_max, MOST_VOTERS)))
    # Who was cut off a moment ago keeps its place, unless places are given up.
    shrinks = size < sum(1 for c in here if c.peer_id in current)
    away = math.inf if shrinks else -MARGIN
    order = sorted(here, key=lambda c: _rank(c, c.peer_id in current, away))
    order += sorted(kept, key=lambda c: (-c.up, c.peer_id))
    chosen = frozenset(c.peer_id for c in order[:size])
    alive = sum(1 for c in here if c.peer_id in chosen and c.up >= 0)
    if not chosen or 2 * alive <= len(chosen):
        return current
    return chosen


def _present(candidate: Candidate, votes: bool) -> bool:
    """Say whether a node is there: a voter is given time to come back, others time to settle."""
    return candidate.up >= (-DOWN_SECONDS if votes else SETTLE_SECONDS)


def _odd(count: int) -> int:
    """Return the number of voters that ``count`` able nodes give: 1, 3, 5 or 7; 0 of none."""
    return count if count % 2 or not count else count - 1


def _rank(candidate: Candidate, votes: bool, away: float) -> tuple[bool, float, PeerId]:
    cost = UNKNOWN_RTT if candidate.rtt is None else candidate.rtt
    cost += UNSTEADY_COST * max(0.0, 1.0 - max(candidate.up, 0.0) / STEADY_SECONDS)
    if votes:
        cost = away if candidate.up < 0 else cost / 2 - MARGIN
    return (candidate.vote != "always", cost, candidate.peer_id)
