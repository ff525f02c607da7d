"""The controller in worlds whose truth is known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.inference.drafting.controller import Controller, FixedController
from pyagent_node.inference.drafting.lessons import Lessons
from pyagent_node.inference.drafting.port import Draft, Pass, Plan

from .piped_world import PipedWorld
from .world import LENGTHS, World

# a and b of small and large models on processors, d of the suffix drafter and of models
MACHINES = {
    "small": (0.008, 0.003, 0.0),
    "large": (0.04, 0.03, 0.015),
    "fast": (0.02, 0.004, 0.004),
}


def harmonic(values: list[float]) -> float:
    return len(values) / sum(1 / value for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("machine", sorted(MACHINES))
@pytest.mark.parametrize("rtt", [0.0, 0.05, 0.2])
def test_it_comes_within_5_percent_of_the_best_fixed_length(rtt: float, machine: str) -> None:
    a, b, d = MACHINES[machine]
    for likely in (0.9, 0.7, 0.3):
        worlds = [World(a, b, d, rtt, lambda t, p=likely: p, seed=seed) for seed in range(2)]
        got = harmonic([world.adaptive() for world in worlds])
        rates = {n: harmonic([world.fixed(n) for world in worlds]) for n in LENGTHS}
        assert got >= 0.95 * max(rates.values()), (likely, got / rates[0], rates)
        assert got >= 0.97 * rates[0]


@settings(max_examples=60, deadline=None)
@given(
    a=st.floats(0.001, 0.1),
    share=st.floats(0.1, 1.0),
    price=st.floats(0.0, 1.0),
    likely=st.floats(0.0, 0.15),
    seed=st.integers(0, 1000),
    tells=st.booleans(),
)
def test_where_guessing_never_pays_it_costs_next_to_nothing(
    a: float, share: float, price: float, likely: float, seed: int, tells: bool
) -> None:
    """A token costs a tenth of a pass or more and is right in one of seven at best.

    Of 1,500 such sessions of 200 tokens, of a drafter that boasts, the worst lost 4%.
    """
    b = a * share
    world = World(
        a,
        b,
        b * price,
        0.0,
        lambda t: likely,
        tokens=200,
        seed=seed,
        claim=lambda chance: chance**0.3,
        tells_computing=tells,
    )
    assert world.adaptive() >= 0.95 * world.fixed(0)


@settings(max_examples=40, deadline=None)
@given(
    a=st.floats(0.001, 0.1),
    share=st.floats(0.02, 1.0),
    price=st.floats(0.0, 0.5),
    rtt=st.floats(0.0, 0.3),
    likely=st.floats(0.0, 0.99),
    seed=st.integers(0, 1000),
)
def test_it_is_never_much_slower_than_plain_decoding(
    a: float, share: float, price: float, rtt: float, likely: float, seed: int
) -> None:
    world = World(a, a * share, a * share * price, rtt, lambda t: likely, tokens=300, seed=seed)
    assert world.adaptive() >= 0.95 * world.fixed(0)


@pytest.mark.parametrize("claim", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rtt", [0.0, 0.1])
def test_a_drafter_that_lies_is_seen_through(claim: float, rtt: float) -> None:
    useless = World(0.008, 0.003, 0.0, rtt, lambda t: 0.0, claim=lambda chance: claim, tokens=300)
    assert useless.adaptive() >= 0.97 * useless.fixed(0)
    good = World(0.008, 0.003, 0.0, rtt, lambda t: 0.9, claim=lambda chance: claim)
    if claim:  # with no confidence at all it does not even propose
        assert good.adaptive() >= 0.9 * good.best()


def test_it_follows_a_text_that_changes() -> None:
    world = World(0.008, 0.003, 0.0, 0.05, lambda t: 0.95 if 300 <= t < 700 else 0.03, tokens=1000)
    spent: list[float] = []
    world.run(Controller(max_depth=1), spent)
    plain = 0.061
    assert sum(spent[:300]) < 1.03 * 300 * plain
    assert sum(spent[340:700]) < 360 * plain / 3.5
    assert sum(spent[720:]) < 1.03 * 280 * plain


def test_it_says_what_it_believes() -> None:
    controller = Controller(max_depth=1)
    before = controller.forecast()
    assert before.tokens_per_second == before.plain_tokens_per_second == 0.0
    world = World(0.02, 0.004, 0.004, 0.1, lambda t: 0.85)
    rate = world.run(controller)
    after = controller.forecast()
    assert after.tokens_per_second == pytest.approx(rate, rel=0.06)
    assert after.plain_tokens_per_second == pytest.approx(world.fixed(0), rel=0.05)
    assert after.token_seconds == pytest.approx(0.004, rel=0.4)
    assert after.draft_seconds == pytest.approx(0.004, rel=0.01)
    assert 0.5 < after.acceptance <= 1
    assert after.tokens_per_pass > 3


@pytest.mark.parametrize("length", [0, 3, 16])
def test_a_fixed_length_is_kept_and_predicted(length: int) -> None:
    controller = FixedController(Plan(length))
    world = World(0.02, 0.004, 0.004, 0.05, lambda t: 0.8)
    rate = world.run(controller)
    assert controller.forecast().tokens_per_second == pytest.approx(rate, rel=0.06)
    assert controller.plan() == Plan(length)


@pytest.mark.parametrize("d", [0.0, 0.003])
@pytest.mark.parametrize("rtt", [0.0, 0.1])
def test_steps_in_flight_are_used_where_they_pay(rtt: float, d: float) -> None:
    good = PipedWorld(0.02, 0.004, d, rtt, 0.95)
    alone = good.run(Controller(ranks=3, max_depth=1))
    assert good.run(Controller(ranks=3)) > 1.2 * alone
    assert alone > 1.5 * good.run(FixedController(Plan(0), ranks=3))
    bad = PipedWorld(0.02, 0.004, d, rtt, 0.1)
    assert bad.run(Controller(ranks=3)) > 0.96 * bad.run(FixedController(Plan(0), ranks=3))


def test_a_fixed_depth_is_kept() -> None:
    controller = FixedController(Plan(3, 4), ranks=3)
    world = PipedWorld(0.02, 0.004, 0.0, 0.1, 0.9)
    assert world.run(controller) > 2 * world.run(FixedController(Plan(0), ranks=3))
    assert controller.plan() == Plan(3, 4)


def test_what_was_learnt_is_handed_on() -> None:
    world = World(0.008, 0.003, 0.0, 0.1, lambda t: 0.9, tokens=60)
    lessons = Lessons()
    world.run(Controller(max_depth=1, lessons=lessons))
    assert world.run(Controller(max_depth=1, lessons=lessons)) > world.run(Controller(max_depth=1))


def test_a_session_unlike_those_before_it_loses_little() -> None:
    """What was copied before makes guesses look sure; here they are wrong, all together."""
    lessons = Lessons()
    for _ in range(3):
        copying = PipedWorld(0.01, 0.006, 0.0, 0.0, 0.99, tokens=60)
        copying.run(Controller(ranks=3, lessons=lessons))
    other = PipedWorld(0.01, 0.006, 0.0, 0.0, 0.0, claim=0.98, tokens=48)
    plain = other.run(FixedController(Plan(0), ranks=3))
    assert other.run(Controller(ranks=3, lessons=lessons)) > 0.95 * plain


def test_asking_a_slow_drafter_costs_no_more_than_may_be_lost() -> None:
    """Short answers, by ranks for which two rows cost nearly twice as much as one."""
    lessons = Lessons()
    for seed in range(5):
        world = World(0.005, 0.048, 0.035, 0.0, lambda t: 0.2, tokens=32, seed=seed, noise=0.02)
        rate = world.run(Controller(max_depth=1, lessons=lessons))
        assert rate > (0.9 if not seed else 0.96) * world.fixed(0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_it_is_told_it_answers(data: st.DataObject) -> None:
    """Passes that cannot be, drafts without end: plans stay within their limits."""
    controller = Controller(ranks=3, max_length=8, max_depth=4)
    times = st.sampled_from([0.0, 1e-9, 0.01, 5.0, 1e6])
    for _ in range(data.draw(st.integers(1, 25))):
        plan = controller.plan()
        assert 0 <= plan.length <= 8
        assert 1 <= plan.depth <= 4
        assert 0 <= plan.floor <= 1
        claims = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0]), max_size=9))
        ahead = data.draw(st.lists(st.integers(0, 1), max_size=2))
        draft = Draft(tuple(data.draw(st.integers(0, 1)) for _ in claims), tuple(claims), "d")
        sent = controller.choose(draft, ahead)
        assert 0 <= sent <= len(claims)
        gained = data.draw(st.integers(0, sent + 1))
        controller.passed(
            Pass(
                width=sent + 1,
                seconds=data.draw(times),
                drafts=sent,
                accepted=max(0, gained - 1),
                gained=gained,
                compute_seconds=data.draw(times),
                draft_seconds=data.draw(times),
                in_flight=data.draw(st.integers(1, 4)),
                elapsed=data.draw(times),
                crowded=data.draw(st.booleans()),
            )
        )
        controller.accepted([data.draw(st.integers(0, 1)) for _ in range(gained)])
        assert controller.forecast().tokens_per_second >= 0


def test_a_pass_behind_void_steps_does_not_tell_what_one_takes() -> None:
    controller = Controller(ranks=3)
    for crowded, seconds in ((False, 0.01), (True, 0.016)):
        for _ in range(20):
            controller.passed(Pass(1, seconds, compute_seconds=0.008, crowded=crowded))
    assert controller.forecast().plain_tokens_per_second == pytest.approx(100)


def test_behind_a_trip_void_steps_are_no_excuse() -> None:
    controller = Controller(ranks=3)
    for seconds in (0.1, 0.2):
        for _ in range(200):
            controller.passed(Pass(1, seconds, compute_seconds=0.008, crowded=seconds == 0.2))
    assert controller.forecast().plain_tokens_per_second == pytest.approx(5, rel=0.01)
