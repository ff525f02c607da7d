"""Who is computed with whom, and that nobody is kept waiting by what others send."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.inference.backend import (
    MAX_CALL_ROWS,
    MAX_DECODE_ROWS,
    MAX_DRAFTS,
    StepOutput,
)
from pyagent_node.inference.pipeline.stage_queue import CROWD, Batch
from pyagent_node.inference.sampling import Sampled

from .stage_driver import Driver, names, spec

SHAPES = ((2, 4), (4, 4), (8, 4), (16, 1))
RIGHT, WRONG = 1, 2
"""What the driver sends for guesses, and what is not among them."""


def opened(names: str, *, rank: int = 2, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Driver:
    """Return a stage with sessions whose prompt is computed, in slots in order."""
    driver = Driver(spec(rank, 3, n_seq=16), joint_shapes=shapes)
    for name in names:
        driver.open(name)
        driver.step(name)
    while driver.core.has_work:
        finish(driver, driver.batch(), 0)
    for name in names:
        driver.at[name] = (1, 1)
    return driver


def guess(driver: Driver, name: str, drafts: int) -> None:
    """Send a step with so many guesses, from where the session's sure tokens end."""
    driver.step(name, drafts + 1, drafts=drafts)


def finish(driver: Driver, batch: Batch, right: int) -> None:
    """Report a batch of which the first ``right`` guesses of each step held."""
    outputs = []
    for (session, queued), step in zip(batch.work, batch.inputs, strict=True):
        if not step.sample:
            outputs += driver.outputs([step])
            continue
        held = min(right, step.drafts)
        tail = RIGHT if held < step.drafts else WRONG
        tokens = [RIGHT] * held + [WRONG if held < step.drafts else tail]
        outputs.append(StepOutput(sampled=tuple(map(Sampled, tokens))))
        known = queued.message.n - step.drafts
        driver.at[session.id] = (queued.message.step + 1, step.position + known + held)
    driver.core.completed(batch, outputs, 0.1, driver.now)


def test_guesses_of_neighbours_are_computed_together() -> None:
    driver = opened("abcd")
    for name in "bdca":
        guess(driver, name, 4)
    assert sorted(names(driver.batch())) == list("abcd")


def test_where_no_shape_passed_each_is_computed_alone() -> None:
    driver = opened("abc", shapes=())
    for name in "abc":
        guess(driver, name, 2)
    assert [names(driver.batch()) for _ in range(3)] == [["a"], ["b"], ["c"]]


def test_together_they_have_no_more_rows_than_a_call_may_have() -> None:
    driver = opened("abcd")
    for name in "abcd":
        guess(driver, name, 11)
    assert [names(driver.batch()) for _ in range(2)] == [["a", "b"], ["c", "d"]]


def test_those_who_are_no_neighbours_keep_each_other_no_company() -> None:
    driver = opened("abcd")
    for name in "acd":
        guess(driver, name, 3)
    assert [names(driver.batch()) for _ in range(2)] == [["a"], ["c", "d"]]


def test_single_tokens_and_guesses_are_not_mixed() -> None:
    driver = opened("abcdef")
    for name in "abcdef":
        if name in "ade":
            driver.step(name)
        else:
            guess(driver, name, 3)
    assert [names(driver.batch()) for _ in range(4)] == [["a"], ["d", "e"], ["b", "c"], ["f"]]


def test_in_a_crowd_short_steps_go_together_whatever_they_hold() -> None:
    driver = opened("abcdefgh")
    for name in "abcdefgh":
        if name in "cf":
            guess(driver, name, 3)
        elif name == "h":
            guess(driver, name, 11)
        else:
            driver.step(name)
    assert [sorted(names(driver.batch())) for _ in range(2)] == [list("abcdefg"), ["h"]]


def test_sixteen_single_tokens_are_one_batch_where_that_passed() -> None:
    driver = opened("abcdefghijklmnop")
    for name in "abcdefghijklmnop":
        driver.step(name)
    assert len(driver.batch().work) == 16


@pytest.mark.parametrize("right", [0, 4, MAX_DRAFTS])
@pytest.mark.parametrize("rank", [1, 2])
def test_one_that_sends_all_the_guesses_it_may_does_not_hold_up_the_others(
    right: int, rank: int
) -> None:
    """It has its next step ready at once, always; the others still get as many rows each."""
    driver = opened("abcdef", rank=rank)
    served = dict.fromkeys("abcdef", 0)
    waited, most = dict.fromkeys("bcdef", 0), 0
    for name in "bcdef":
        driver.step(name)
    guess(driver, "a", MAX_DRAFTS)
    for _ in range(300):
        batch = driver.batch()
        finish(driver, batch, right)
        computed = names(batch)
        for name in computed:
            served[name] += 1
            if name == "a":
                guess(driver, "a", MAX_DRAFTS)
            else:
                driver.step(name)
                waited[name] = 0
        for name in set(waited) - set(computed):
            waited[name] += 1
            most = max(most, waited[name])
    assert most <= 2
    rows = 8 if rank == 2 and right == 0 else MAX_DRAFTS + 1
    assert served["b"] >= served["a"] * (8 if rank == 2 and right < 8 else rows) - rows


def test_one_that_was_away_comes_first_once_and_saves_nothing_up() -> None:
    driver = opened("abcz")
    for _ in range(40):
        for name in "ab":
            driver.step(name)
        finish(driver, driver.batch(), 0)
    driver.step("a")
    driver.step("b")
    guess(driver, "z", 7)
    seen = []
    for _ in range(6):
        batch = driver.batch()
        seen.append("".join(sorted(names(batch))))
        finish(driver, batch, 7)
        for name in names(batch):
            if name == "z":
                guess(driver, "z", 7)
            else:
                driver.step(name)
    assert seen.count("z") == 0


@given(st.integers(0, 2**32), st.sampled_from([1, 2]))
def test_whoever_has_a_step_waiting_gets_its_turn(seed: int, rank: int) -> None:
    """Random company: every batch is allowed, and nobody waits longer than all others take."""
    rng = random.Random(seed)
    all_names = "abcdefghij"
    driver = opened(all_names, rank=rank)
    ready: dict[str, int] = {}
    rows: dict[str, int] = {}
    for _ in range(60):
        for name in all_names:
            if name not in ready and rng.random() < 0.7:
                drafts = rng.choice([0, 0, 1, 4, 11, MAX_DRAFTS])
                guess(driver, name, drafts) if drafts else driver.step(name)
                ready[name], rows[name] = 0, drafts + 1
        if not ready:
            continue
        batch = driver.batch()
        together = names(batch)
        seqs = sorted(step.seq for step in batch.inputs)
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        if len(together) > 1:
            crowd = len(ready) >= CROWD
            kinds = {(rows[name] > MAX_DECODE_ROWS) if crowd else rows[name] for name in together}
            assert crowd or len({kind == 1 for kind in kinds}) == 1
            assert not crowd or len(kinds) == 1 or min(rows[name] for name in together) > 1
        assert sum(rows[name] for name in together) <= MAX_CALL_ROWS
        finish(driver, batch, rng.randrange(12))
        for name in together:
            del ready[name]
        ready = {name: turns + 1 for name, turns in ready.items()}
        assert max(ready.values(), default=0) <= (MAX_DRAFTS + 1) * len(all_names)
