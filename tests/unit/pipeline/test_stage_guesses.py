"""Guesses in a stage: what is trimmed, what is dropped, and what a head may not do."""

from __future__ import annotations

import pytest

from pyagent_node.base.types import PeerId
from pyagent_node.inference.backend import MAX_DRAFTS, OpenSequence, TrimSequence
from pyagent_node.inference.pipeline.frames import StageError, Step

from .stage_driver import AFTER, HEAD, Driver, errors, names, results, spec

PROMPT = 10


def prompted(driver: Driver, name: str = "s") -> Driver:
    """Open a session of ten prompt tokens and compute them."""
    driver.open(name, prompt_tokens=PROMPT)
    driver.step(name, PROMPT)
    driver.run(driver.batch())
    return driver


def middle() -> Driver:
    return prompted(Driver(spec(1, 3)))


def tail() -> Driver:
    return prompted(Driver(spec(2, 3)))


# ---- one step after the other ----------------------------------------------------------------


def test_a_rank_passes_guesses_on_and_drops_those_that_were_wrong() -> None:
    driver = middle()
    driver.step("s", 4, drafts=3)
    batch = driver.batch()
    assert [(i.position, i.drafts, i.sample) for i in batch.inputs] == [(10, 3, False)]
    (out,) = driver.run(batch)
    assert isinstance(out.message, Step)
    assert (out.peer, out.message.n, out.message.drafts) == (AFTER, 4, 3)
    driver.step("s", 2, position=12, drafts=1)
    batch = driver.batch()
    assert batch.ops == (TrimSequence(0, 12),)
    assert batch.inputs[0].position == 12
    driver.run(batch)
    driver.step("s", 1)
    assert driver.batch().ops == ()


def test_the_tail_answers_with_what_held_and_goes_on_from_there() -> None:
    driver = tail()
    driver.step("s", 4, drafts=3)
    (result,) = results(driver.verdict(1, 1, 9))
    assert [sampled.token for sampled in result.sampled] == [1, 1, 9]
    driver.step("s", 1, position=13)
    batch = driver.batch()
    assert (batch.ops, batch.inputs[0].position) == ((), 13)
    (session,) = driver.core.sessions()
    assert session.generated == 2  # as far as steps have told


@pytest.mark.parametrize("n", [0, 5])
def test_more_or_fewer_tokens_than_asked_for_are_the_runners_fault(n: int) -> None:
    driver = tail()
    driver.step("s", 4, drafts=3)
    assert errors(driver.verdict(*range(n))) == [(HEAD, "s", "runner_protocol")]


def test_steps_with_guesses_are_computed_alone_and_the_shorter_first() -> None:
    driver = Driver(spec(1, 3, n_seq=8))
    for name in "abcd":
        prompted(driver, name)
    driver.step("a")
    driver.step("b", 3, drafts=2)
    driver.step("c")
    driver.step("d", 2, drafts=1)
    got = []
    for _ in range(4):
        batch = driver.batch()
        got.append(names(batch))
        driver.run(batch)
    assert got == [["a"], ["c"], ["d"], ["b"]]


# ---- steps before the verdict ----------------------------------------------------------------


def test_a_child_is_computed_when_its_parent_held_and_guessed_the_next_token() -> None:
    driver = tail()
    driver.step("s", 3, drafts=2)
    driver.step("s", 3, drafts=2, parent=1, token=7)
    driver.verdict(1, 1, 7)
    assert driver.batch().inputs[0].position == 13


@pytest.mark.parametrize("sampled", [(9,), (1, 9), (1, 1, 9)])
def test_children_of_a_parent_that_did_not_hold_are_dropped(sampled: tuple[int, ...]) -> None:
    driver = tail()
    driver.step("s", 3, drafts=2)
    driver.step("s", 3, drafts=2, parent=1, token=7)
    driver.step("s", 3, drafts=2, parent=2, token=7)
    driver.verdict(*sampled)
    assert not driver.core.has_work
    driver.step("s", 3, drafts=2, parent=3, token=7)
    assert not driver.core.has_work
    driver.step("s", 2, position=10 + len(sampled), drafts=1)
    batch = driver.batch()
    assert (batch.ops, batch.inputs[0].position) == ((), 10 + len(sampled))
    view = driver.core.view()
    assert (view.dropped, view.queued) == (3, 0)


def test_a_cancelled_child_is_dropped_queued_or_still_to_come() -> None:
    driver = middle()
    for parent in (None, 1, 2):
        driver.step("s", 3, drafts=2, parent=parent)
    batch = driver.batch()
    driver.cancel("s", 2, 5)
    driver.run(batch)
    driver.step("s", 3, drafts=2, parent=3)
    assert not driver.core.has_work
    driver.step("s", 2, position=11, drafts=1)
    batch = driver.batch()
    assert batch.ops == (TrimSequence(0, 11),)
    (out,) = driver.run(batch)
    assert isinstance(out.message, Step)
    assert out.message.step == 5
    assert driver.core.view().dropped == 3


def test_a_child_that_is_cancelled_while_it_is_computed_goes_no_further() -> None:
    driver = middle()
    driver.step("s", 3, drafts=2)
    driver.run(driver.batch())
    driver.step("s", 3, drafts=2, parent=1)
    batch = driver.batch()
    driver.cancel("s", 2, 3)
    assert driver.run(batch) == []
    driver.step("s", 3, drafts=2, parent=2)
    assert not driver.core.has_work
    driver.step("s", 1, position=11)
    assert driver.batch().ops == (TrimSequence(0, 11),)


def test_a_later_cancelling_does_not_bring_orphans_back() -> None:
    driver = middle()
    driver.step("s", 3, drafts=2)
    driver.step("s", 3, drafts=2, parent=1)
    driver.cancel("s", 2, 4)
    driver.run(driver.batch())
    driver.cancel("s", 5, 6)
    driver.step("s", 3, drafts=2, parent=2)
    assert not driver.core.has_work


def test_steps_that_are_missing_were_dropped_before() -> None:
    driver = middle()
    driver.step("s", 3, drafts=2)
    driver.run(driver.batch())
    driver.step("s", 2, step=5, position=11, drafts=1)
    assert driver.batch().inputs[0].position == 11


def test_what_has_no_parent_is_never_cancelled() -> None:
    driver = middle()
    driver.step("s", 2, drafts=1)
    driver.cancel("s", 0, 2**40)
    assert driver.core.has_work


def test_cancelling_while_a_session_waits_for_a_slot() -> None:
    driver = Driver(spec(1, 3, n_seq=1))
    driver.open("a")
    driver.open("b", prompt_tokens=1)
    driver.step("b")
    driver.step("b", 2, drafts=1)
    driver.step("b", 2, drafts=1, parent=1)
    driver.cancel("b", 2, 3)
    driver.close("a")
    batch = driver.batch()
    assert OpenSequence(0) in batch.ops
    driver.run(batch)
    driver.run(driver.batch())
    assert not driver.core.has_work


# ---- what a head may not do ------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [-1, 4, 5, MAX_DRAFTS + 1, 2**40])
def test_guesses_without_a_token_before_them_are_refused(drafts: int) -> None:
    driver = middle()
    assert errors(driver.step("s", 4, drafts=drafts)) == [(HEAD, "s", "bad_parameter")]


def test_more_guesses_than_the_limit_are_refused() -> None:
    driver = middle()
    assert driver.step("s", MAX_DRAFTS + 1, drafts=MAX_DRAFTS) == []
    driver = middle()
    got = driver.step("s", MAX_DRAFTS + 2, drafts=MAX_DRAFTS + 1)
    assert errors(got) == [(HEAD, "s", "bad_parameter")]
    driver = middle()
    got = driver.step("s", MAX_DRAFTS + 2, drafts=1)
    assert errors(got) == [(HEAD, "s", "bad_parameter")]


def test_guesses_in_the_prompt_or_without_sampling_are_refused() -> None:
    driver = Driver(spec(1, 3))
    driver.open("s", prompt_tokens=PROMPT)
    assert errors(driver.step("s", 4, drafts=3)) == [(HEAD, "s", "bad_parameter")]
    driver = middle()
    got = driver.step("s", 4, drafts=3, sample=False)
    assert errors(got) == [(HEAD, "s", "bad_parameter")]


@pytest.mark.parametrize("position", [-1, 0, PROMPT - 1, 14, 2**40])
@pytest.mark.parametrize("queued", [True, False])
def test_going_back_below_the_prompt_or_ahead_is_refused(position: int, queued: bool) -> None:
    driver = middle()
    driver.step("s", 3, drafts=2)
    if not queued:
        driver.run(driver.batch())
    assert errors(driver.step("s", 1, position=position)) == [(HEAD, "s", "out_of_order")]


def test_ahead_of_what_is_sure_is_refused_at_the_tail() -> None:
    """A step without a parent may not count on guesses that are still queued."""
    driver = tail()
    driver.step("s", 3, drafts=2)
    assert errors(driver.step("s", 1, position=12)) == [(HEAD, "s", "out_of_order")]


@pytest.mark.parametrize(("step", "position", "parent"), [(3, 13, 2), (2, 12, 1), (2, 13, 0)])
def test_a_child_follows_on_its_parent(step: int, position: int, parent: int) -> None:
    driver = middle()
    driver.step("s", 3, drafts=2)
    got = driver.step("s", 1, step=step, position=position, parent=parent)
    assert errors(got) == [(HEAD, "s", "out_of_order")]


def test_the_same_step_twice_is_refused() -> None:
    driver = middle()
    driver.step("s", 3, drafts=2)
    got = driver.step("s", 1, step=1, position=11)
    assert errors(got) == [(HEAD, "s", "out_of_order")]


def test_nobody_but_its_head_cancels_the_steps_of_a_session() -> None:
    driver = middle()
    driver.step("s", 3, drafts=2)
    driver.step("s", 3, drafts=2, parent=1)
    for sender in (PeerId("mallory"), AFTER):
        assert driver.cancel("s", 2, 3, sender=sender) == []
    assert driver.cancel("nobody", 2, 3) == []
    assert driver.core.view().refused == 2
    driver.run(driver.batch())
    assert driver.core.has_work


# ---- trees -----------------------------------------------------------------------------------

# behind token 10: 11 12, or 11 13, or 14
TREE = (0, 1, 1, 0)
TOKENS = (10, 11, 12, 13, 14)


def test_a_rank_keeps_the_principal_path_and_passes_all_on() -> None:
    driver = middle()
    driver.step("s", 5, drafts=4, parents=TREE, tokens=TOKENS)
    batch = driver.batch()
    assert (batch.inputs[0].parents, batch.inputs[0].sample) == (TREE, False)
    (out,) = driver.run(batch)
    assert isinstance(out.message, Step)
    assert (out.message.n, out.message.parents) == (5, TREE)
    driver.step("s", 1, position=13)
    assert driver.batch().ops == ()


def test_a_child_follows_the_principal_path() -> None:
    driver = tail()
    driver.step("s", 5, drafts=4, parents=TREE, tokens=TOKENS)
    driver.step("s", 3, drafts=2, parent=1, position=13, token=7)
    driver.verdict(11, 12, 7)
    assert driver.batch().inputs[0].position == 13


@pytest.mark.parametrize("sampled", [(9,), (11, 9), (11, 13, 7), (14, 7)])
def test_a_child_is_dropped_where_another_path_came_true(sampled: tuple[int, ...]) -> None:
    driver = tail()
    driver.step("s", 5, drafts=4, parents=TREE, tokens=TOKENS)
    driver.step("s", 3, drafts=2, parent=1, position=13, token=7)
    driver.verdict(*sampled)
    assert not driver.core.has_work
    back = 12 if sampled[1:2] == (13,) else 11
    driver.step("s", 4, drafts=1, position=back)
    (op,) = driver.batch().ops or (None,)
    held = 10 + len(sampled)
    assert op == (TrimSequence(0, back) if back < held else None)


@pytest.mark.parametrize(
    ("parents", "reason"),
    [
        ((0, 1, 1), "length"),
        ((0,) * 4, "siblings"),
        ((0, 1, 2, 9), "parent"),
        ((0, 1, 2, -1), "parent"),
        ((0, 2, 2, 3), "cycle"),
        ((4, 3, 2, 1), "cycle"),
        ((0, 1, 0, 1), "order"),
        ((2**63,) * 4, "parent"),
        (tuple(range(500)), "length"),
    ],
)
@pytest.mark.parametrize("at_tail", [False, True])
def test_guesses_that_form_no_tree_are_refused(
    parents: tuple[int, ...], reason: str, at_tail: bool
) -> None:
    driver = tail() if at_tail else middle()
    (out,) = driver.step("s", 5, drafts=4, parents=parents, tokens=TOKENS[:3])
    assert isinstance(out.message, StageError)
    assert (out.message.error.code, out.message.error.facts["reason"]) == ("bad_tree", reason)
    assert driver.core.view().sessions == 0


def test_a_tree_without_guesses_or_beyond_its_session_is_refused() -> None:
    driver = middle()
    assert errors(driver.step("s", 5, parents=TREE, tokens=TOKENS)) == [(HEAD, "s", "bad_tree")]
    for positions, codes in ((12, ["step_too_long"]), (13, [])):
        driver = Driver(spec(1, 3))
        driver.open("s", prompt_tokens=PROMPT, positions=positions)
        driver.step("s", PROMPT)
        driver.run(driver.batch())
        got = errors(driver.step("s", 5, drafts=4, parents=TREE, tokens=TOKENS))
        assert [code for _, _, code in got] == codes
    driver = middle()
    parents = tuple(range(8, 12))
    wide = driver.step("s", 13, drafts=4, parents=parents)
    assert errors(wide) == [(HEAD, "s", "bad_parameter")]
