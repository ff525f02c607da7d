"""How often the leader shows a sign of life to nodes without a vote.  Pure.

Voters need every heartbeat: an election follows their absence.  Nobody else does: entries and
commits are sent to learners at once in any case, and a heartbeat only tells them that the leader
lives, and starts again what was lost on the way.  In a large mesh most nodes are learners, and
nearly all that the leader would say and hear are their heartbeats.
"""

from __future__ import annotations

from typing import Final

LEARNERS_A_ROUND: Final = 16
"""Learners that hear every heartbeat; of more each hears some."""
SLOWEST: Final = 4
"""Each learner hears at least every fourth; two silent seconds count as no leader."""


def heartbeat_due(learner: int, learners: int, beat: int) -> bool:
    """Say whether ``learner``, the Raft id of one of so many, hears the ``beat``-th heartbeat.

    Raft ids are random, so that each beat goes to about as many.
    """
    every = min(SLOWEST, max(1, -(-learners // LEARNERS_A_ROUND)))
    return (learner + beat) % every == 0
