"""Portions of drafts, and the account of what guessing has won and lost."""

from __future__ import annotations

import itertools

import pytest

from pyagent_node.inference.drafting.allowance import EXPLORE_PASSES, Allowance
from pyagent_node.inference.drafting.costs import CostModel
from pyagent_node.inference.drafting.port import Pass
from pyagent_node.inference.drafting.portions import Portions, tokens_added

RANKS = 3


def costs(a: float = 0.006, b: float = 0.003, rtt: float = 0.0) -> CostModel:
    model = CostModel()
    for width in (1, 5, 9, 17) * 6:
        model.add_pass(width, rtt + a + b * width, a + b * width)
    return model


def worth(sizes: tuple[int, ...], odds: list[float], model: CostModel, rate: float) -> float:
    """Return what a first step and those behind it are worth, as the module says."""
    first, *others = sizes
    value = tokens_added(odds[:first]) - rate * model.seconds(first + 1)
    start = first
    for size in others:
        right = 1.0
        for chance in odds[: start + 1]:
            right *= chance
        tokens, together = 0.0, right
        for place in range(start, start + size):
            together *= odds[place] if place > start else 1.0
            tokens += together
        pace, busy = model.pace_seconds(size, RANKS), model.busy_seconds(size, RANKS)
        pace += (RANKS - 1) * max(0.0, busy - model.busy_seconds(start + 1, RANKS))
        value += tokens - rate * (right * pace + (1 - right) * model.waste * busy)
        start += size
    return value


def splits(count: int) -> list[tuple[int, ...]]:
    """Return all ways to send the first guesses of ``count`` in portions."""
    found: list[tuple[int, ...]] = []
    for total in range(1, count + 1):
        for cuts in itertools.product((False, True), repeat=total - 1):
            sizes, size = [], 1
            for cut in cuts:
                if cut:
                    sizes.append(size)
                    size = 0
                size += 1
            found.append((*sizes, size))
    return found


@pytest.mark.parametrize("rtt", [0.0, 0.05])
@pytest.mark.parametrize("chance", [0.5, 0.8, 0.9])
def test_the_first_portion_is_that_of_the_best_of_all_splits(chance: float, rtt: float) -> None:
    model, odds = costs(rtt=rtt), [chance] * 7
    plain = model.seconds(1)
    rate = 1.5 / plain
    best = max(splits(7), key=lambda sizes: worth(sizes, odds, model, rate))
    gain = worth(best, odds, model, rate) - (1.0 - rate * plain)
    # so many steps that each need not reach far
    found = Portions(model, ranks=RANKS, depth=10_000).alone(odds, rate, plain)
    assert found == (best[0] if gain > 0 else 0)


def test_what_is_nearly_sure_goes_in_portions_where_ranks_wait_for_each_other() -> None:
    model, odds = costs(), [0.95] * 16
    plain = model.seconds(1)
    alone = Portions(model, ranks=RANKS, depth=1).alone(odds, 2.0 / plain, plain)
    piped = Portions(model, ranks=RANKS, depth=8)
    first = piped.alone(odds, 2.0 / plain, plain)
    assert 0 < first < alone
    assert 0 < piped.child(odds[first:], 0.95**first, 2.0 / plain, first + 1) < alone


def test_few_steps_in_flight_reach_as_far_as_is_likely() -> None:
    model, odds = costs(rtt=0.2), [0.98] * 16
    plain = model.seconds(1)
    many = Portions(model, ranks=RANKS, depth=64).alone(odds, 5.0 / plain, plain)
    few = Portions(model, ranks=RANKS, depth=4).alone(odds, 5.0 / plain, plain)
    assert many < few == 16


def test_nothing_is_sent_that_is_never_right() -> None:
    model = costs()
    portions = Portions(model, ranks=RANKS, depth=8)
    plain = model.seconds(1)
    assert portions.alone([], 1.0 / plain, plain) == 0
    assert portions.alone([0.002] * 9, 1.0 / plain, plain) == 0
    assert portions.child([], 1.0, 1.0 / plain, 1) == 0
    assert portions.child([0.002] * 9, 0.5, 1.0 / plain, 1) == 0


def wrong(model: CostModel) -> Pass:
    return Pass(9, model.seconds(9), drafts=8, compute_seconds=model.seconds(9))


def test_losses_end_and_what_would_have_been_won_makes_them_good() -> None:
    model = costs()
    account = Allowance(model, ranks=RANKS)
    spent = 0
    while account.affordable:
        account.passed(wrong(model))
        spent += 1
    lost = model.seconds(9) - model.seconds(1)
    assert spent <= EXPLORE_PASSES * model.seconds(1) / lost + 1
    for _ in range(10):  # in vain: it would have lost more
        account.forgo([1] * 8)
        account.accepted([2])
        assert not account.affordable
    for _ in range(10):
        account.forgo([1] * 8)
        account.accepted([1] * 3)
        account.forgo([5] * 8)  # the first one is not seen to its end yet
        account.accepted([1] * 5)
    assert account.affordable


def test_void_steps_cost_what_they_hold_up() -> None:
    model = costs()
    account = Allowance(model, ranks=RANKS)
    before = model.waste
    for _ in range(40):
        account.passed(Pass(9, 0.1, drafts=8, gained=0, in_flight=2))
        account.passed(Pass(1, model.seconds(1), compute_seconds=0.009, crowded=True))
    assert model.waste < before / 2
    assert account.affordable
    for _ in range(40):
        account.passed(Pass(9, 0.1, drafts=8, gained=0, in_flight=2))
        account.passed(Pass(1, model.seconds(1) + 1.0, compute_seconds=0.009, crowded=True))
    assert model.waste == pytest.approx(1.0, abs=0.1)
