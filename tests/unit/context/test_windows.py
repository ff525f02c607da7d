"""Windows: each sentence by itself, code together, no word lost, hostile texts."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.sharding.context.windows import windows

WORD = re.compile(r"\w+")
texts = (
    st.text(st.sampled_from("ab.\n\r\t #(_é漢😀"), max_size=400)
    | st.text(max_size=200)
    | st.lists(
        st.sampled_from(
            [
                "A dog ran home today. ",
                "so it did",
                "# ",
                "\n",
                "x = f(1)",
                "Yes! ",
                '"""',
                " ",
                "No",
            ]
        ),
        max_size=40,
    ).map("".join)
)


@given(texts, st.integers(1, 12))
def test_windows_hold_every_word_once(text: str, size: int) -> None:
    found = windows(text, words=size)
    assert Counter(WORD.findall(text)) == Counter(
        word for window in found for word in WORD.findall(window.text)
    )
    assert [w.start for w in found] == sorted(w.start for w in found)
    for window in found:
        own = WORD.findall(window.text)
        assert 1 <= len(own) <= size
        assert not Counter(own) - Counter(WORD.findall(text[window.start : window.end]))
        assert window.text == window.text.strip()


def test_code_is_put_together_by_lines() -> None:
    text = "one = two(three)\nfour(five)\nsix = seven(eight, nine)\nten()\n"
    assert [w.text for w in windows(text, words=5)] == [
        "one = two(three)\nfour(five)",
        "six = seven(eight, nine)\nten()",
    ]
    assert windows("", words=5) == windows("...\n", words=5) == ()


def test_a_window_of_no_words_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        windows("a", words=0)


def test_sentences_have_windows_of_their_own_wherever_they_stand() -> None:
    text = (
        "def show(first, second):\n"
        '    """Show one of them. The second is only shown\n'
        "    where the first is empty.\n"
        '    """\n'
        "    # h: where it stands\n"
        "    # The owl of the abbey sleeps at noon.\n"
        "    return first(second)\n"
    )
    assert [w.text for w in windows(text)] == [
        "def show(first, second):\n    return first(second)",
        '"""Show one of them.',
        "The second is only shown where the first is empty.",
        "h: where it stands",
        "The owl of the abbey sleeps at noon.",
    ]


def test_a_paragraph_on_one_line_is_its_sentences() -> None:
    text = "The boat is old but it floats. Really. Nobody has ever seen it in the harbour!"
    assert [w.text for w in windows(text)] == [
        "The boat is old but it floats.",
        "Really. Nobody has ever seen it in the harbour!",
    ]


def test_a_long_sentence_is_cut_into_parts_of_nearly_the_same_length() -> None:
    text = "# " + "\n# ".join("and then it went on and on" for _ in range(9))
    assert [len(WORD.findall(w.text)) for w in windows(text)] == [21, 21, 21]
    assert "#" not in "".join(w.text for w in windows(text))


@pytest.mark.parametrize("text", ["word " * 50_000, "a\n" * 50_000, '"' * 100_000, "a-" * 50_000])
def test_huge_lines_take_reasonable_time(text: str) -> None:
    began = time.perf_counter()
    windows(text)
    assert time.perf_counter() - began < 20  # a guard against quadratic work, not a measurement
