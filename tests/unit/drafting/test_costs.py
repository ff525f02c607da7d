"""The cost model and the calibration by themselves."""

from __future__ import annotations

import pytest

from pyagent_node.inference.drafting.calibration import Calibration, Judge
from pyagent_node.inference.drafting.costs import CostModel
from pyagent_node.inference.drafting.port import Draft


def test_a_line_is_found_from_widths_that_vary() -> None:
    costs = CostModel()
    assert not costs.known
    assert costs.draft_seconds == 0.0
    for i in range(200):
        width = 1 + i % 7
        costs.add_pass(width, 0.1 + 0.005 * width, 0.0)
    assert costs.known
    assert costs.pass_seconds == pytest.approx(0.1, rel=0.03)
    assert costs.token_seconds == pytest.approx(0.005, rel=0.1)
    assert costs.seconds(16) == pytest.approx(0.18, rel=0.05)


@pytest.mark.parametrize("width", [1, 5, 17])
def test_one_width_alone_leaves_the_slope_to_what_is_usual(width: int) -> None:
    """It once swung between nothing and a share of what a wide pass took."""
    costs = CostModel()
    for _ in range(50):
        costs.add_pass(width, 0.2 + 0.02 + 0.004 * width, 0.02 + 0.004 * width)
    assert 0.003 < costs.token_seconds < 0.009
    assert costs.pass_seconds > 0.19
    assert 0.005 < costs.busy_seconds(1, 3) < 0.015


def test_a_kernel_with_steps_is_corrected_and_a_stall_is_not_believed() -> None:
    costs = CostModel()
    for i in range(100):
        width = (1, 2, 4, 5)[i % 4]
        costs.add_pass(width, 0.010 if width <= 4 else 0.030, 0.0)
    assert costs.seconds(4) < 0.015
    assert costs.seconds(5) > 0.023
    before = costs.seconds(1)
    costs.add_pass(1, 60.0, 0.0)
    assert costs.seconds(1) < 2 * before


def test_times_that_change_are_followed() -> None:
    costs = CostModel()
    for rtt in (0.02, 0.2, 0.05):
        for i in range(80):
            costs.add_pass(1 + i % 3, rtt + 0.01, 0.01)
        assert costs.seconds(1) == pytest.approx(rtt + 0.01, rel=0.05)


def test_claims_become_what_came_true() -> None:
    calibration = Calibration()
    assert calibration.probability("a", 0, 0.8) == pytest.approx(0.8)
    for i in range(200):
        calibration.add("a", 0, 0.8, hit=i % 4 == 0)
    assert calibration.probability("a", 0, 0.8) == pytest.approx(0.25, abs=0.08)
    assert calibration.probability("a", 9, 0.8) < 0.4, "other places learn from it"
    assert calibration.probability("b", 0, 0.8) == pytest.approx(0.8), "other sources do not"
    assert calibration.hits("a") == 50
    for source in range(100):
        calibration.add(str(source), 0, 0.5, hit=True)
    assert calibration.hits("99") == 0, "sources without end are not kept"


def test_guesses_are_judged_whether_sent_or_not() -> None:
    judge = Judge()
    judge.accepted([1, 2])
    judge.wait_for(Draft((3, 4, 9, 5), (0.9, 0.8, 0.7, 0.6), "a"), ())
    judge.wait_for(Draft((5,), (0.5,), "b"), (3, 4))
    judge.wait_for(Draft((5,), (0.5,), "c"), (3, 9))
    first = judge.accepted([3])
    assert [(o.source, o.index, o.claim, o.hit) for o in first] == [("a", 0, 0.9, True)]
    rest = [(o.source, o.index, o.hit) for o in judge.accepted([4, 5, 6])]
    # a's last guess followed a wrong one, c's was made after tokens that never came; b's is the
    # third since what was known
    assert rest == [("a", 1, True), ("a", 2, False), ("b", 2, True)]
    assert judge.accepted([7, 8]) == []
    assert judge.position == 8
