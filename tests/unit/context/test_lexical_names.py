"""Which questions name something of code, and what that makes of words."""

from __future__ import annotations

import pytest

from pyagent_node.sharding.context.index import NAMED_WEIGHT, WORDS_WEIGHT, words_weight


@pytest.mark.parametrize(
    "question",
    [
        "What does read_limited do?",
        "Where is ModelStore made?",
        "what is utf8 for",
        "who calls __init__ of the base class, or os.path.isfile_not_dir",
    ],
)
def test_a_name_of_code_makes_words_count(question: str) -> None:
    assert words_weight(question) == NAMED_WEIGHT


@pytest.mark.parametrize(
    "question",
    ["", "Where does the honey maker live?", "What of 1931?", "Is it the UN, or __, or a Turk's?"],
)
def test_plain_words_and_numbers_do_not(question: str) -> None:
    assert words_weight(question) == WORDS_WEIGHT
