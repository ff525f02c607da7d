"""The arithmetic of the speculation benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pyagent_node.base.types import Digest, PeerId, Placement, Rank, Slice
from pyagent_node.benchmarks.speculation import (
    DEPTHS,
    LENGTHS,
    PIPED_LENGTH,
    PLAIN,
    Arm,
    Plan,
    Row,
    choice,
    pipelining,
    summarise,
)
from pyagent_node.benchmarks.texts import KINDS, TEXTS
from pyagent_node.inference.generation import SpeculationUsage
from pyagent_node.node.answers import Answer

PLACEMENT = Placement(
    Digest("0" * 64), 1, (Rank(0, Slice(0, 30, True), PeerId("12D3KooWTest")),), n_ctx=64, n_seq=1
)
TOKENS = tuple(range(11))


def answer(
    rate: float,
    usage: SpeculationUsage | None = None,
    tokens: Sequence[int] = TOKENS,
) -> Answer:
    return Answer(
        text="",
        token_ids=tuple(tokens),
        finish_reason="length",
        prompt_tokens=3,
        completion_tokens=len(tokens),
        seed=0,
        ttft_seconds=0.5,
        seconds=0.5 + (len(tokens) - 1) / rate,
        tokens_per_second=rate,
        placement=PLACEMENT,
        speculation=usage,
    )


def used(
    passes: int = 5,
    accepted: int = 5,
    cancelled: int = 0,
    reused: int = 0,
    predicted: float = 20.0,
) -> SpeculationUsage:
    return SpeculationUsage(
        "suffix", passes, 10, accepted, cancelled, False, 4, 1, predicted, 10.0, reused
    )


def plan(**changes: object) -> Plan:
    fields: dict[str, object] = {
        "model": "m",
        "drafters": ("suffix",),
        "kinds": ("code", "copy"),
        "tokens": 8,
        "texts": 2,
        "rounds": 1,
        "temperature": 0.0,
    }
    return Plan(**(fields | changes))  # type: ignore[arg-type]


def test_a_row_is_all_tokens_over_the_medians_of_each_text() -> None:
    arm = Arm("suffix")
    row = Row(
        50.0,
        "code",
        "suffix",
        {
            PLAIN: [[answer(10)] * 3, [answer(10)] * 3],
            # the slow one of the first text is chance, the second text goes half as well
            arm: [
                [answer(40, used()), answer(4, used()), answer(40, used())],
                [answer(20, used(predicted=40.0))] * 3,
            ],
        },
    )
    run = summarise(row)
    assert run.plain_tokens_per_second == 10
    assert run.tokens_per_second == pytest.approx(20 / (10 / 40 + 10 / 20), rel=1e-3)
    assert run.speedup == pytest.approx(run.tokens_per_second / 10, rel=1e-3)
    assert run.tokens_per_pass == 2
    assert run.acceptance == 0.5
    assert run.identical
    assert run.predicted_tokens_per_second == pytest.approx(6 / (3 / 20 + 3 / 40), rel=1e-3)
    assert run.predicted_speedup == pytest.approx(run.predicted_tokens_per_second / 10, rel=1e-3)


def test_one_other_token_anywhere_is_seen() -> None:
    other = answer(10, used(), (*TOKENS[:-1], 99))
    for plain, guessed in (
        ([answer(10)], [other]),
        ([answer(10), answer(10)], [answer(10, used()), other]),
        ([answer(10), other], [answer(10, used()), answer(10, used())]),
    ):
        row = Row(0.0, "code", "suffix", {PLAIN: [plain], Arm("suffix"): [guessed]})
        assert not summarise(row).identical


def test_a_row_without_guesses_expects_nothing() -> None:
    row = Row(0.0, "code", "none", {PLAIN: [[answer(10)]], Arm("none", 0): [[answer(9.0)]]})
    run = summarise(row)
    assert (run.speedup, run.tokens_per_pass, run.predicted_speedup) == (0.9, 1.0, 1.0)
    assert run.acceptance == run.cancelled == 0.0


def test_steps_in_flight_are_told_by_what_they_came_to() -> None:
    arms = {
        Arm("suffix", PIPED_LENGTH, depth): [[answer(10.0 * depth, used(6, 5, 2, reused))]]
        for depth, reused in zip(DEPTHS, (0, 3, 5), strict=True)
    }
    row = Row(50.0, "copy", "suffix", {PLAIN: [[answer(5)]], Arm("suffix"): [[answer(9)]], **arms})
    found = pipelining(row)
    assert [(each.depth, each.gain) for each in found] == [(1, 1.0), (2, 2.0), (4, 4.0)]
    assert [each.reused for each in found] == [0.0, 0.375, 0.625]
    assert {each.wasted for each in found} == {0.25}
    assert choice(row) is None


def test_the_controller_is_compared_with_the_best_setting_plain_decoding_among_them() -> None:
    arms = {Arm("suffix", n, d): [[answer(n + d, used())]] for n in LENGTHS for d in DEPTHS}
    answers = {PLAIN: [[answer(5)]], Arm("suffix"): [[answer(19, used())]], **arms}
    found = choice(Row(50.0, "copy", "suffix", answers))
    assert found is not None
    assert (found.best_length, found.best_depth) == (16, 4)
    assert found.share == 0.95
    assert len(found.settings) == 1 + len(LENGTHS) * len(DEPTHS)
    answers[PLAIN] = [[answer(50)]]
    found = choice(Row(0.0, "copy", "suffix", answers))
    assert found is not None
    assert (found.best_length, found.share) == (0, 0.38)


def test_a_plan_says_beforehand_how_many_answers_it_takes() -> None:
    assert plan().answers(100) == 2 * 2 * 2
    assert plan().answers(0) == 5 * 2 * 2 * 2
    assert plan(drafters=("none", "suffix"), rounds=3).answers(200) == 3 * 4 * 2 * 2
    both = plan(pipelining=True, grid=True).arms("suffix")
    assert len(both) == len(set(both)) == 1 + len(LENGTHS) * len(DEPTHS)
    assert plan(grid=True).arms("none") == [Arm("none")]


def test_there_are_several_texts_of_each_kind() -> None:
    assert set(TEXTS) == set(KINDS)
    assert all(len(texts) == 3 and len(set(texts)) == 3 for texts in TEXTS.values())
    for text in TEXTS["copy"]:
        quoted, opening = text.split("Here is the same text again, word for word:\n\n")
        assert len(opening.split()) == 5
        assert opening in quoted
