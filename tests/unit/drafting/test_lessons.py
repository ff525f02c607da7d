"""What earlier sessions have taught: passes, guesses, and which sessions it is for."""

from __future__ import annotations

import pytest

from pyagent_node.base.types import Digest
from pyagent_node.inference.drafting.calibration import Calibration
from pyagent_node.inference.drafting.controller import Controller, FixedController
from pyagent_node.inference.drafting.costs import CostModel
from pyagent_node.inference.drafting.lessons import MAX_LESSONS, Archive, Lessons
from pyagent_node.inference.drafting.port import Draft, Pass, Plan
from pyagent_node.inference.drafting.profile import FEW, Profile, best_plan, piped_rate

from .piped_world import PipedWorld
from .world import World

MODEL, OTHER = Digest("a" * 64), Digest("b" * 64)


def test_a_session_begins_where_the_ones_before_it_ended() -> None:
    world = PipedWorld(0.006, 0.002, 0.0, 0.1, 0.97, tokens=60)
    lessons = Lessons()
    first = world.run(Controller(ranks=3, lessons=lessons))
    second = world.run(Controller(ranks=3, lessons=lessons))
    assert second > 1.1 * first
    controller = Controller(ranks=3, lessons=lessons)
    assert controller.plan().length > 0, "no plain pass is needed to know what one takes"
    assert controller.choose(Draft((1,) * 9, (0.97,) * 9, "world")) > 2, "it is trusted at once"


def test_a_session_that_goes_otherwise_is_believed_before_the_others() -> None:
    lessons = Lessons()
    for _ in range(3):
        World(0.008, 0.003, 0.0, 0.0, lambda t: 0.9, tokens=200).run(Controller(lessons=lessons))
    # it says 0.9 as before, and is nearly always wrong
    bad = World(0.008, 0.003, 0.0, 0.0, lambda t: 0.05, claim=lambda chance: 0.9, tokens=200)
    assert bad.run(Controller(lessons=lessons)) > 0.95 * bad.fixed(0)


def test_what_is_fixed_for_measuring_teaches_nothing() -> None:
    archive = Archive()
    lessons = archive.get(MODEL, 1, "suffix")
    World(0.008, 0.003, 0.0, 0.1, lambda t: 0.9, tokens=60).run(FixedController(Plan(8)))
    assert not lessons.costs.known
    assert not lessons.profile.known


def test_drafters_of_a_placement_share_what_passes_take_and_nothing_else() -> None:
    archive = Archive()
    suffix, model = archive.get(MODEL, 1, "suffix"), archive.get(MODEL, 1, "small")
    suffix.costs.add_pass(1, 0.05, 0.04)
    suffix.costs.add_pace(3, 0.02, ranks=3)
    suffix.costs.add_draft(4, 0.4)
    suffix.calibration.add("suffix", 0, 0.5, hit=True)
    assert model.costs.seconds(1) == pytest.approx(0.05)
    assert model.costs.pace_seconds(3, 3) == suffix.costs.pace_seconds(3, 3)
    assert not model.costs.draft_known
    assert model.calibration.hits("suffix") == 0


def test_a_new_placement_takes_other_times_but_its_guesses_are_right_as_often() -> None:
    archive = Archive()
    before = archive.get(MODEL, 1, "suffix")
    before.costs.add_pass(1, 0.05, 0.04)
    before.calibration.add("suffix", 0, 0.5, hit=True)
    after = archive.get(MODEL, 2, "suffix")
    assert not after.costs.known
    assert after.calibration.hits("suffix") == 1
    assert archive.get(OTHER, 1, "suffix").calibration.hits("suffix") == 0
    assert archive.get(MODEL, 1, "suffix") is before


def test_only_so_many_are_remembered() -> None:
    archive = Archive()
    first = archive.get(MODEL, 0, "suffix")
    for epoch in range(1, MAX_LESSONS):
        archive.get(OTHER, epoch, "suffix")
    assert archive.get(MODEL, 0, "suffix") is first
    archive.get(OTHER, MAX_LESSONS, "suffix")
    assert archive.get(MODEL, 0, "suffix") is first, "what was used last is kept"
    for epoch in range(MAX_LESSONS):
        archive.get(OTHER, epoch + 1000, "suffix")
    assert archive.get(MODEL, 0, "suffix") is not first


def test_own_outcomes_weigh_more_than_those_of_earlier_sessions() -> None:
    before = Calibration(memory=0.99)
    for _ in range(200):
        before.add("a", 0, 0.5, hit=True)
    own = Calibration(before)
    assert own.probability("a", 0, 0.5) > 0.9
    for _ in range(12):
        own.add("a", 0, 0.5, hit=False)
    assert own.probability("a", 0, 0.5) < 0.4
    assert before.probability("a", 0, 0.5) > 0.8, "it learns from it, and slowly"


def test_a_profile_begins_from_an_earlier_one() -> None:
    before = Profile(share=0.05)
    for _ in range(FEW):
        before.add([0.9, 0.8])
    profile = Profile(before)
    assert profile.known
    assert profile.chance(1) == pytest.approx(0.8)
    assert not Profile(Profile()).known


def test_a_step_that_follows_another_takes_the_time_of_a_rank_until_more_is_known() -> None:
    costs = CostModel()
    assert not costs.computing_known
    for width in (1, 5, 1, 5):
        costs.add_pass(width, 0.1 + 0.03 * width, 0.03 * width)
    assert costs.computing_known
    assert costs.pace_seconds(5, 3) == pytest.approx(0.05, rel=0.1)
    for _ in range(30):
        costs.add_pace(5, 0.12, 3)
    assert costs.pace_seconds(5, 3) == pytest.approx(0.12, rel=0.1)


def test_slow_guesses_are_sent_in_small_portions_where_several_steps_may_fly() -> None:
    costs, profile = CostModel(), Profile()
    for width in (1, 5, 9, 1, 5, 9):
        costs.add_pass(width, 0.15 + 0.01 * width, 0.01 * width)
    costs.add_draft(10, 0.2)
    for _ in range(FEW):
        profile.add([0.97] * 16)
    alone, depth = best_plan(profile, costs, ranks=3, max_length=16, max_depth=1)
    assert depth == 1
    piped, depth = best_plan(profile, costs, ranks=3, max_length=16, max_depth=8)
    assert depth == 8
    assert piped < alone / 2
    hopeless = Profile()
    for _ in range(FEW):
        hopeless.add([0.01] * 4)
    assert best_plan(hopeless, costs, ranks=3, max_length=16, max_depth=8) == (0, 1)


def test_steps_that_never_hold_go_no_faster_than_one_after_the_other() -> None:
    assert piped_rate(3.0, 0.0, 0.2, 0.05) == pytest.approx(15)
    assert piped_rate(3.0, 0.9, 0.2, 0.05) == pytest.approx(30 / 0.65)
    assert piped_rate(3.0, 1.0, 0.2, 0.05) < 3 / 0.05


def test_a_step_that_follows_plain_ones_is_no_plain_one() -> None:
    """A drafter that has nothing to say may have something for the token after the next."""
    controller = Controller(ranks=3, max_depth=4)
    controller.accepted([1] * 4)
    for _ in range(4):
        controller.plan()
        controller.passed(Pass(1, 0.1, compute_seconds=0.02))
        controller.accepted([1])
    controller.plan()
    controller.choose(Draft())
    plain = controller.forecast().tokens_per_second
    controller.plan()
    assert controller.choose(Draft(), (), 1) == 0
    assert controller.forecast().tokens_per_second == pytest.approx(plain)
