"""Chunks and windows: nothing lost, nothing too large, natural ends, hostile texts."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest, LimitExceeded
from pyagent_node.sharding.context import chunking
from pyagent_node.sharding.context.chunking import chunks


def words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


texts = st.text(st.sampled_from("ab.\n\r\t #(_é漢😀"), max_size=400) | st.text(max_size=200)


@given(texts.filter(lambda t: "\0" not in t), st.integers(1, 40))
def test_chunks_are_the_text_in_order(text: str, tokens: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    end = 0
    for chunk in chunks(text, "a", words, tokens=tokens):
        assert not re.search(r"\w", text[end : chunk.start])
        assert text[chunk.start : chunk.end] == chunk.text
        assert re.search(r"\w", chunk.text)
        assert words(chunk.text) <= chunk.tokens <= tokens
        before = text[: chunk.start]
        assert chunk.line == 1 + len(re.findall(r"\r\n|\r|\n", before)) - (
            before.endswith("\r") and chunk.text.startswith("\n")
        )
        assert chunk.start >= end
        end = chunk.end
    assert not re.search(r"\w", text[end:])


def test_a_chunk_ends_before_a_function_rather_than_within_one() -> None:
    body = "".join(f"    value_{i} = {i}\n\n" for i in range(6))
    text = f"def one():\n{body}\ndef two():\n{body}\ndef three():\n{body}"
    found = list(chunks(text, "m.py", words, tokens=40))
    assert [c.text.split("(")[0] for c in found] == ["def one", "def two", "def three"]
    assert [c.line for c in found] == [1, 15, 29]
    assert {c.source for c in found} == {"m.py"}


def test_one_huge_line_is_cut_in_reasonable_time() -> None:
    text = "word " * 100_000 + "x" * 100_000
    began = time.perf_counter()
    found = list(chunks(text, "a", lambda t: len(t) // 4, tokens=256))
    assert time.perf_counter() - began < 30  # a guard against quadratic work, not a measurement
    assert "".join(c.text for c in found) == text
    assert max(c.tokens for c in found) <= 256
    assert all(c.text.endswith(" ") for c in found[:300])


def test_a_long_line_is_cut_between_sentences() -> None:
    text = "One two three four. " * 20
    found = list(chunks(text, "a", words, tokens=30))
    assert all(c.text.endswith(". ") for c in found)


@pytest.mark.parametrize(
    ("text", "source", "tokens", "code"),
    [
        ("a\0b", "a", 8, "bad_context_text"),
        ("\ud800", "a", 8, "bad_context_text"),
        ("a", "", 8, "bad_context_text"),
        ("a", "\udfff", 8, "bad_context_text"),
        ("a", "a" * 5000, 8, "bad_context_text"),
        ("a", "a", 0, "bad_chunk_tokens"),
        ("a", "a", 1 << 20, "bad_chunk_tokens"),
    ],
)
def test_bad_input_is_refused(text: str, source: str, tokens: int, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list(chunks(text, source, words, tokens=tokens))
    assert caught.value.code == code


def test_too_long_a_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "MAX_TEXT", 10)
    with pytest.raises(LimitExceeded) as caught:
        list(chunks("a" * 11, "a", words))
    assert caught.value.code == "text_too_large"
