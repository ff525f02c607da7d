"""How often learners hear the leader's heartbeats."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.consensus.raft_node import RaftTiming
from pyagent_node.consensus.raft_pace import LEARNERS_A_ROUND, SLOWEST, heartbeat_due


@given(st.integers(1, 2**64 - 1), st.integers(1, LEARNERS_A_ROUND), st.integers(0, 2**32))
def test_a_few_learners_hear_every_heartbeat(learner: int, learners: int, beat: int) -> None:
    assert heartbeat_due(learner, learners, beat)


@given(st.integers(1, 2**64 - 1), st.integers(1, 256), st.integers(0, 2**32))
def test_no_learner_waits_longer_than_said(learner: int, learners: int, beat: int) -> None:
    assert any(heartbeat_due(learner, learners, beat + n) for n in range(SLOWEST))


def test_many_learners_share_the_beats() -> None:
    rng = random.Random(1)
    ids = [rng.getrandbits(64) for _ in range(200)]
    rounds = [sum(heartbeat_due(each, 200, beat) for each in ids) for beat in range(8)]
    assert sum(rounds) == 2 * 200
    assert max(rounds) < 80


def test_a_learner_that_misses_one_of_its_heartbeats_still_has_a_leader() -> None:
    """It takes the leader for gone after two election timeouts of silence."""
    timing = RaftTiming()
    assert 2 * SLOWEST * timing.heartbeat_ticks < 2 * timing.election_ticks
