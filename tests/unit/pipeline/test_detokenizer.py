"""Text assembly against a plain reference, over every way to cut the bytes into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.inference.pipeline.detokenizer import TextAssembler


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """Cut ``data`` at the given places."""
    marks = [0, *sorted({i for i in at if i < len(data)}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def reference(data: bytes, stop: list[str]) -> tuple[str, bool]:
    """Return the wanted text: decode everything, walk it, stop at the first complete stop."""
    text = data.decode("utf-8", "replace")
    for end in range(1, len(text) + 1):
        begun = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begun:
            return text[: min(begun)], True
    return text, False


def assemble(pieces: list[bytes], stop: list[str]) -> tuple[str, bool]:
    """Run the assembler over ``pieces``."""
    assembler = TextAssembler(stop)
    shown = ""
    for piece in pieces:
        shown += assembler.push(piece)
        if assembler.stopped:
            return shown, True
    shown += assembler.finish()
    return shown, assembler.stopped


alphabet = st.sampled_from("ab\né€😀")
texts = st.text(alphabet, max_size=30).map(lambda s: s.encode())
garbage = st.lists(st.one_of(texts, st.binary(max_size=4)), max_size=8).map(b"".join)
stops = st.lists(st.text(alphabet, min_size=1, max_size=4), max_size=3)


@given(garbage, st.lists(st.integers(0, 60), max_size=20), stops)
def test_every_cut_gives_the_reference_text(data: bytes, at: list[int], stop: list[str]) -> None:
    assert assemble(cut(data, at), stop) == reference(data, stop)


@given(texts, st.lists(st.integers(0, 60), max_size=20), stops)
def test_nothing_shown_is_ever_taken_back(data: bytes, at: list[int], stop: list[str]) -> None:
    wanted, _ = reference(data, stop)
    assembler = TextAssembler(stop)
    shown = ""
    for piece in cut(data, at):
        shown += assembler.push(piece)
        assert wanted.startswith(shown)


def test_a_character_over_three_tokens_appears_when_it_is_whole() -> None:
    assembler = TextAssembler()
    assert [assembler.push(b"\xe2"), assembler.push(b"\x82"), assembler.push(b"\xac!")] == [
        "",
        "",
        "€!",
    ]


def test_an_unfinished_character_is_replaced_at_the_end_only() -> None:
    assembler = TextAssembler()
    assert assembler.push(b"a\xf0\x9f\x98") == "a"
    assert assembler.finish() == "\ufffd"


def test_what_could_become_a_stop_string_is_held_back() -> None:
    assembler = TextAssembler(["</s>"])
    assert assembler.push(b"hi <") == "hi "
    assert assembler.push(b"/") == ""
    assert assembler.push(b"b") == "</b"
    assert assembler.push(b" </") == " "
    assert assembler.push(b"s> more") == ""
    assert assembler.stopped
    assert assembler.push(b"x") == ""
    assert assembler.finish() == ""


def test_held_back_text_is_given_out_at_the_end() -> None:
    assembler = TextAssembler(["END"])
    assert assembler.push(b"the EN") == "the "
    assert assembler.finish() == "EN"
    assert not assembler.stopped


@pytest.mark.parametrize("pieces", [[b"abcX"], [b"abc", b"X"], [b"ab", b"cX"]])
def test_the_stop_string_that_is_complete_first_counts(pieces: list[bytes]) -> None:
    assert assemble(pieces, ["abcX", "c"]) == ("ab", True)
