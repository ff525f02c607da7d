"""The judge of answers, and what a row says."""

from __future__ import annotations

import pytest

from pyagent_node.benchmarks.context_answers import is_right
from pyagent_node.benchmarks.context_corpus import Fact, facts

FACT = Fact(
    "Marta Olivetti keeps her beehives on the roof of the post office.",
    "Where does the honey maker have her colonies?",
    tuning=False,
)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The honey maker has her colonies on the roof of the post office.", True),
        ("Marta Olivetti keeps them at home.", True),
        ("On the ROOF.", False),
        ("Where does the honey maker have her colonies?", False),
        ("The sources do not say.", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_it_says_what_the_question_does_not(text: str, right: bool) -> None:
    assert is_right(FACT, text) is right


def test_every_fact_can_be_told_and_no_question_tells_it() -> None:
    for fact in facts():
        assert is_right(fact, fact.sentence)
        assert not is_right(fact, fact.question)
