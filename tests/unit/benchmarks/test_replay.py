"""Recorded answers that are guessed again: the same tokens, and the times that were asked for."""

from __future__ import annotations

import pytest

from pyagent_node.benchmarks.replay import HOP_SECONDS, RANKS, Costs, Record, Replay
from pyagent_node.inference.drafting.controller import Controller, FixedController
from pyagent_node.inference.drafting.port import Plan

ANSWER = tuple(n % 7 + n % 11 for n in range(60))
COPY = Record((*range(100, 120), *ANSWER, 99, 98), ANSWER)
SURE = Record((1, 2, 3), ANSWER, tuple((token, 0.95) for token in ANSWER))
WRONG = Record((1, 2, 3), ANSWER, tuple((token + 1, 0.95) for token in ANSWER))


def test_plain_tokens_take_a_trip_and_what_the_ranks_compute() -> None:
    rate, usage = Replay(COPY, Costs(0.006, 0.003, rtt=0.1), None).run()
    assert usage is None
    token = 0.009 + 1.5 * 0.1 + (RANKS + 1) * HOP_SECONDS
    assert rate == pytest.approx(1 / token, rel=0.02)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("rtt", [0.0, 0.1])
@pytest.mark.parametrize("record", [COPY, SURE, WRONG])
def test_guesses_change_the_speed_and_no_token(record: Record, rtt: float, depth: int) -> None:
    costs = Costs(0.006, 0.003, 0.004, rtt)
    plain, _ = Replay(record, costs, None).run()
    fixed = FixedController(Plan(4, depth), ranks=RANKS)
    rate, usage = Replay(record, costs, fixed, model_drafts=bool(record.guesses)).run()
    assert usage is not None
    if record is WRONG:
        assert usage.accepted == 0
        assert rate < plain
        assert (usage.cancelled > 0) == (depth > 1)
    else:
        assert usage.accepted > 0
        assert rate > plain * (1.5 if rtt else 1.0)
        assert (usage.reused > 0) == (depth > 1)


def test_two_runs_are_one() -> None:
    costs = Costs(0.006, 0.003, 0.004, 0.05)
    runs = [Replay(SURE, costs, Controller(ranks=RANKS), model_drafts=True).run() for _ in range(2)]
    assert runs[0] == runs[1]
