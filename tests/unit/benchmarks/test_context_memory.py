"""``bench context --part memory``: the text with facts in it, its plot, and what it refuses."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from pyagent_node.benchmarks.context_memory import fitting
from pyagent_node.benchmarks.context_memory_plot import plot
from pyagent_node.benchmarks.context_memory_text import EACH, FIRST, MAX_TOKENS, plant
from pyagent_node.benchmarks.context_memory_types import ARMS, MemoryRow


def letters(text: str) -> list[int]:
    """Return a token for four letters, roughly what a vocabulary does."""
    return [sum(text[at : at + 4].encode()) for at in range(0, len(text), 4)]


def row(arm: str, tokens: int) -> MemoryRow:
    return MemoryRow(
        tokens=tokens,
        arm=arm,
        cells=tokens // 2,
        bytes=tokens << 14,
        resident=tokens << 14,
        most=tokens,
        most_bytes=tokens << 15,
        perplexity=9.0,
        divergence=0.01,
        facts=4,
        later=0.5,
        later_loss=1.0,
        asked=0.75,
        asked_loss=0.5,
    )


@pytest.mark.parametrize("length", [FIRST, 1000, 4096, MAX_TOKENS + 100])
def test_facts_are_told_all_over_the_text(length: int) -> None:
    text = plant(["filler text " * 200] * 40, length, letters)
    assert len(text.tokens) == length
    for fact in text.facts:
        told = (*fact.question, *fact.answer)
        end = fact.stop - len(letters(".\n\n"))
        assert text.tokens[end - len(told) : end] == told
    for tokens in (FIRST, 512, 1024, 2048, 4096, MAX_TOKENS):
        if tokens <= length:
            asked = text.asked(tokens, 8)
            assert min(8, EACH) <= len(asked) <= 8
            assert asked[-1].stop <= tokens
            assert asked[0].stop < FIRST


def test_a_text_that_ends_early_has_the_facts_that_fit() -> None:
    text = plant(["short"], 200, letters)
    assert len(text.tokens) <= 200
    assert all(fact.stop <= 200 for fact in text.facts)


def test_lengths_that_are_too_long_for_the_model_are_cut() -> None:
    assert fitting((256, 512, 8192), 2048, 100) == (256, 512, 1948)
    assert fitting((4096, 8192), 2048, 100) == (1948,)
    assert fitting((256, 1 << 20), 1 << 21, 100) == (256, MAX_TOKENS)


@pytest.mark.parametrize("lengths", [(256,), (256, 512, 1024)])
def test_the_plot_is_svg_and_the_same_every_time(lengths: tuple[int, ...]) -> None:
    rows = [row(arm, length) for length in lengths for arm in ARMS]
    drawn = plot(rows)
    assert drawn == plot(rows[::-1])
    names = {element.text for element in ElementTree.fromstring(drawn).iter() if element.text}
    assert {*ARMS, *map(str, lengths), "facts told right"} <= names
    assert "nan" not in drawn
