"""Hits compared again by single words: order, scores, and which words count."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.node.api.context_schema import QueryRequest
from pyagent_node.sharding.context.port import Found
from pyagent_node.sharding.context.records import ChunkId, Version
from pyagent_node.sharding.context.rerank import (
    COMPARED,
    best_windows,
    reordered,
    says_something,
    word_likeness,
)

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
    question = np.array([[2, 0], [0, 1]], np.float32)
    window = np.array([[5, 0], [1, 0], [3, 3]], np.float32)
    assert word_likeness(question, window) == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert word_likeness(question, question) == pytest.approx(1)
    assert word_likeness(np.zeros((1, 2), np.float32), window) == 0


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

    def compare(self, question: str, texts: list[str]) -> NDArray[np.float32]:  # type: ignore[override]
        self.asked.append(len(texts))
        return np.array(["right" in text for text in texts], np.float32)


async def test_questions_are_answered_in_the_new_order(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        encoder = Comparing()
        world.contexts._encoder.embedder = encoder  # type: ignore[attr-defined]
        await world.create()
        for number in range(30):
            await world.add(f"{number}.txt", f"A bell number{number} rings in the tower.")
        await world.add("x.txt", "A bell rings in the right tower.")
        reply = await world.contexts.query(
            "docs", QueryRequest(question="a bell rings in which tower", count=3)
        )
        assert reply.hits[0].source == "x.txt"
        assert len(reply.hits) == 3
        assert encoder.asked == [COMPARED]
        named = QueryRequest(question="where is number_17", count=3)
        await world.contexts.query("docs", named)
        await world.contexts.query("docs", QueryRequest(question="a bell", way="words"))
        assert encoder.asked == [COMPARED]
