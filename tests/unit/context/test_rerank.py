"""Hits compared again by single words: order, scores, and which words count."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.node.api.context_schema import QueryRequest
from pyagent_node.sharding.context.lexical import Lexical, rarity
from pyagent_node.sharding.context.port import Found
from pyagent_node.sharding.context.records import ChunkId, Version
from pyagent_node.sharding.context.rerank import (
    COMPARED,
    best_windows,
    reordered,
    says_something,
    word_likenesses,
)
from pyagent_node.sharding.context.search import Scored, question_terms, rarities

from .context_world import WordEmbedder, one_node


def hit(number: int, likeness: float | None, window: tuple[int, int] | None = (2, 4)) -> Found:
    return Found(
        id=ChunkId(bytes([number]) * 16),
        source=f"{number}.txt",
        version=Version(1, "me"),
        ordinal=0,
        first_line=1,
        last_line=1,
        tokens=3,
        score=0.01,
        text=f"a {number:02} text",
        likeness=likeness,
        window=window,
    )


def test_words_that_say_nothing_do_not_count() -> None:
    assert not any(map(says_something, ("What", "the", "?", "of")))
    assert all(map(says_something, ("bell", "##ing", "not", "tower")))


def test_the_likeness_of_words_is_the_mean_of_the_best() -> None:
    question = np.array([[3, 1], [1, 2]], np.float32)
    windows = [np.array([[2, 1], [0, 1]], np.float32), np.array([[1, 2], [1, 0]], np.float32)]
    # The mean of the windows' words, [1, 1], is taken off first.
    assert word_likenesses(question, [1, 1], windows) == pytest.approx([0.5, 0.5])
    assert word_likenesses(question, [3, 1], windows) == pytest.approx([0.75, 0.25])
    assert word_likenesses(question, [0, 2], windows) == pytest.approx([0, 1])
    assert word_likenesses(question, [0, 0], windows) == pytest.approx([0.5, 0.5])


def test_what_all_states_share_does_not_count() -> None:
    generator = np.random.default_rng(1)
    question = generator.standard_normal((3, 8)).astype(np.float32)
    windows = [generator.standard_normal((n, 8)).astype(np.float32) for n in (2, 5, 9)]
    plain = word_likenesses(question, [1, 2, 3], windows)
    moved = word_likenesses(question + 100, [2, 4, 6], [own + 100 for own in windows])
    assert moved == pytest.approx(plain, abs=1e-3)


def test_the_likeness_of_nothing() -> None:
    one = np.ones((1, 2), np.float32)
    assert word_likenesses(one, [1], []).shape == (0,)
    assert word_likenesses(one, [1], [one]) == pytest.approx([0])


def test_the_new_order() -> None:
    hits = [hit(0, 0.9), hit(1, 0.5), hit(2, None, None), hit(3, 0.5), hit(4, 0.4)]
    words = np.array([0.0, 0.8, 0.2, 0.8], np.float32)
    found = reordered(hits, words)
    assert [each.source for each in found] == ["1.txt", "3.txt", "0.txt", "2.txt", "4.txt"]
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    assert scores[3] > 1 > scores[4]
    assert found[0].closeness == pytest.approx(0.8)
    assert found[4].closeness is None
    assert best_windows(hits)[:3] == ["00", "01", ""]
    assert len(best_windows([hits[0]] * 99)) == COMPARED
    assert reordered([], words[:0]) == []
    assert reordered(hits[:2], np.array([-1, -1], np.float32))[-1].score >= 1


class Comparing(WordEmbedder):
    """Knows which text is the right one; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.rarities: Mapping[str, float] = {}

    def compare(
        self, question: str, texts: Sequence[str], rarities: Mapping[str, float]
    ) -> NDArray[np.float32]:
        self.asked.append(len(texts))
        self.rarities = rarities
        return np.array(["right" in text for text in texts], np.float32)


async def test_questions_are_answered_in_the_new_order(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        encoder = Comparing()
        await world.create()
        for number in range(COMPARED + 6):
            await world.add(f"{number}.txt", f"A bell number{number} rings in the tower.")
        # The only ones with "which": so both are compared, however the ids of the others fall.
        await world.add("near.txt", "In which tower does one ring.")
        await world.add("x.txt", "Which steeple: the right one, which has rooks on all sides.")
        question = "in which tower"
        assert (await world.ask(question))[0] == "near.txt"
        world.contexts._encoder.embedder = encoder  # type: ignore[attr-defined]
        reply = await world.contexts.query("docs", QueryRequest(question=question, count=3))
        assert reply.hits[0].source == "x.txt"
        assert len(reply.hits) == 3
        assert encoder.asked == [COMPARED]
        assert encoder.rarities["which"] > encoder.rarities["tower"] > 0
        named = QueryRequest(question="where is number_17", count=3)
        await world.contexts.query("docs", named)
        await world.contexts.query("docs", QueryRequest(question="a bell", way="words"))
        assert encoder.asked == [COMPARED]


def test_what_a_term_weighs_follows_from_the_candidates() -> None:
    def said(number: int, *counts: int) -> Scored:
        return Scored(ChunkId(bytes([number]) * 16), 0.5, 0, 9, counts)

    question = "Which bell_tower, which?"
    assert len(question_terms(question)) == 4
    found = rarities(question, [said(0, 2, 1, 0, 1), said(1, 1, 0, 0, 3), said(2, 5, 0, 0, 0)])
    assert list(found) == ["which", "bell_tower", "bell", "tower"]
    assert 0 < found["which"] < found["tower"] < found["bell_tower"] < found["bell"]
    assert found["which"] == rarity(3, 3)
    assert rarities(question, []) == {}
    assert rarities(question, [said(0, 1), said(1, 1, 0)]) == {"which": rarity(2, 2)}
    texts = Lexical(["which bell_tower", "which tower", "which", "bell"])
    asked = "Which bell, unheard"
    every = texts.rarities(asked, range(4))
    assert every == {"which": rarity(3, 4), "bell": rarity(2, 4), "unheard": rarity(0, 4)}
    assert texts.rarities(asked, [0, 3])["which"] == rarity(1, 2)
    assert texts.rarities("", []) == {}
