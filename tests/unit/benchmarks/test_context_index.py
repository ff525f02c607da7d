"""The benchmark of the context index: its facts, its corpus, and its figures on a small one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.benchmarks import context_index
from pyagent_node.benchmarks.context_corpus import corpus, facts
from pyagent_node.sharding.context.embedder import Vectors


def count(text: str) -> int:
    return len(re.findall(r"\w+", text))


class Hashing:
    """Vectors of texts by their words, so that the figures need no model."""

    identity, dimensions, centre = "hashing", 256, None

    def embed_question(self, question: str) -> NDArray[np.float32]:
        return np.asarray(self.embed([question])[0], np.float32)

    def compare(
        self, question: str, texts: Sequence[str], rarities: Mapping[str, float]
    ) -> NDArray[np.float32] | None:
        return None

    def count_tokens(self, text: str) -> int:
        return count(text)

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.full((len(texts), self.dimensions), 1e-3, np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[sum(word.encode()) * 7919 % self.dimensions] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_facts_are_many_and_the_split_is_fixed() -> None:
    found = facts()
    assert len(found) >= 200
    assert len({fact.sentence for fact in found}) == len(found)
    assert len({fact.question for fact in found}) == len(found)
    assert sum(fact.tuning for fact in found) * 3 <= len(found)
    assert [fact.tuning for fact in found[:6]] == [True, False, False] * 2
    keyed = [fact for fact in found if fact.keys]
    assert len(keyed) >= 50
    assert not any(fact.tuning for fact in keyed)
    # A key that the question says is no key; synonyms need not be in the sentence, one is.
    assert all(key not in f.question.lower() for f in keyed for key in f.keys)
    assert all(any(key in f.sentence.lower() for key in f.keys) for f in keyed)
    assert all(fact.question.endswith("?") and fact.sentence.endswith(".") for fact in found)


def test_the_corpus_holds_every_fact_in_a_place_that_follows_from_the_seed() -> None:
    hidden = facts()
    files = corpus(20_000, count, hidden)
    text = "\n".join(text for _, text in files)
    assert all(text.count(fact.sentence) == 1 for fact in hidden)
    assert files == corpus(20_000, count, hidden)
    assert files != corpus(20_000, count, hidden, seed=8)


@pytest.mark.slow
def test_the_figures_of_a_small_corpus(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="needs pyagent-node[context]")
    found = context_index.material(5_000, Hashing(), "tuning", tmp_path)
    again = context_index.material(5_000, Hashing(), "tuning", tmp_path)
    assert (again.searched.vectors == found.searched.vectors).all()
    assert len(list(tmp_path.iterdir())) == 1
    report = context_index.run(found, "hashing")
    ways = report["ways"]
    assert isinstance(ways, dict)
    assert ways["exact"]["kept"] == ways["exact"]["compared"] == 1
    assert ways["sketches"]["recall_at_8"] <= ways["sketches"]["recall_at_16"]
    spread = report["spread"]
    assert isinstance(spread, dict)
    for row in spread.values():
        assert row["nodes_16"] == ways["exact"]["recall_at_8"]
    assert report["lost_answers"] == 0
