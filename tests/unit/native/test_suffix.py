"""The suffix automaton against a plain search through the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.native import SuffixCorpus, SuffixIndex

LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24, 48)
Found = tuple[int, int, int, int]  # token, count, total, length of the context


class Reference:
    """What ``SuffixIndex`` should do, by looking at everything every time."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.cells: dict[tuple[int, int], tuple[float, float]] = {}

    def followers(self, context: list[int]) -> list[int]:
        n = len(context)
        return [t for i, t in enumerate(self.text) if i >= n and self.text[i - n : i] == context]

    def context(self, ahead: list[int]) -> list[int]:
        """Return the longest suffix that is in the text (and not only at its end)."""
        whole = self.text + ahead
        for start in range(len(whole) + 1):
            suffix = whole[start:]
            n = len(suffix)
            last = len(self.text) - n - (0 if ahead else 1)
            if any(self.text[i : i + n] == suffix for i in range(last + 1)):
                return suffix
        return []

    def continuation(self, context: list[int]) -> Found | None:
        for start in range(len(context) + 1):
            found = self.followers(context[start:])
            if found:
                latest = {t: i for i, t in enumerate(found)}
                best = max(latest, key=lambda t: (found.count(t), latest[t]))
                return best, found.count(best), len(found), len(context) - start
        return None

    def cell(self, found: Found) -> tuple[int, int]:
        _, count, total, length = found
        if total <= 1:
            kind = 0
        elif count == total:
            kind = 2 if total >= 4 else 1
        else:
            kind = 3 if count * 4 >= total * 3 else 4 if count * 2 >= total else 5
        return sum(length >= n for n in LENGTHS), kind

    def confidence(self, found: Found) -> float:
        _, count, total, length = found
        hits, trials = self.cells.get(self.cell(found), (0.0, 0.0))
        odds = 0.5 * length * count**1.5
        belief = odds / (odds + 1) if count == total else (count / total) ** 1.7
        return min(0.999, max(0.001, (hits + 4 * belief) / (trials + 4)))

    def extend(self, tokens: list[int], weight: float) -> None:
        for token in tokens:
            found = self.continuation(self.context([]))
            if found is not None and weight:
                hits, trials = self.cells.get(self.cell(found), (0.0, 0.0))
                hits = hits * 0.98 + (weight if found[0] == token else 0.0)
                self.cells[self.cell(found)] = hits, trials * 0.98 + weight
            self.text.append(token)

    def propose(
        self, ahead: list[int], limit: int, min_match: int, floor: float
    ) -> tuple[list[int], list[float]]:
        context = self.context(ahead)
        tokens: list[int] = []
        confidences: list[float] = []
        everything = 1.0
        while len(tokens) < limit:
            found = self.continuation(context)
            if found is None or found[3] < min_match:
                break
            confidence = self.confidence(found)
            everything *= confidence
            if everything < floor:
                break
            tokens.append(found[0])
            confidences.append(confidence)
            context = [*context[len(context) - found[3] :], found[0]]
        return tokens, confidences


@settings(max_examples=120, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=9), st.sampled_from([0.0, 0.25, 1.0])),
        max_size=6,
    ),
    ahead=st.lists(st.integers(0, 5), max_size=4),
    limit=st.integers(0, 9),
    min_match=st.integers(1, 4),
    floor=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_it_guesses_what_a_search_finds(
    pieces: list[tuple[list[int], float]],
    ahead: list[int],
    limit: int,
    min_match: int,
    floor: float,
) -> None:
    index, reference = SuffixIndex(1000), Reference()
    for tokens, weight in pieces:
        index.extend(tokens, weight)
        reference.extend(tokens, weight)
        expected, sure = reference.propose(ahead, limit, min_match, floor)
        guessed, confidence = index.propose(ahead, limit, min_match, floor)
        assert guessed == expected
        assert confidence == pytest.approx(sure)
        assert index.matched == len(reference.context([]))
        assert len(index) == len(reference.text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5), st.data())
def test_a_corpus_knows_every_text_and_joins_none(
    texts: list[list[int]], data: st.DataObject
) -> None:
    corpus = SuffixCorpus(1 << 20)
    for text in texts:
        corpus.add(text)
    assert len(corpus) == sum(len(text) + 1 for text in texts)
    tail = data.draw(st.lists(st.integers(0, 3), max_size=6))
    tokens, confidence = corpus.propose(tail, 5, 2)
    assert len(tokens) == len(confidence)
    context = next(
        (
            tail[i:]
            for i in range(len(tail) - 1)
            if any(
                text[at : at + len(tail) - i] == tail[i:]
                for text in texts
                for at in range(len(text) - len(tail) + i)
            )
        ),
        None,
    )
    assert bool(tokens) == (context is not None)
    if context is not None:
        pairs = [
            text[at + len(context)]
            for text in texts
            for at in range(len(text) - len(context))
            if text[at : at + len(context)] == context
        ]
        assert pairs.count(tokens[0]) == max(pairs.count(t) for t in pairs)


def test_old_text_is_forgotten() -> None:
    index = SuffixIndex(64)
    index.extend(range(1000))
    assert 32 <= len(index) <= 64
    assert index.propose([3], 4, 1) == ([], [])
    index.extend([998])
    assert index.propose([], 1, 1)[0] == [999]
    assert index.nbytes < 64 * 300


@pytest.mark.parametrize(
    ("tokens", "error"),
    [([1, -1], ValueError), ([2**32 - 1], ValueError), ([1, "a"], TypeError), (7, TypeError)],
)
def test_what_is_no_token_is_refused(tokens: object, error: type[Exception]) -> None:
    index, corpus = SuffixIndex(10), SuffixCorpus(1 << 16)
    with pytest.raises(error, match="tokens"):
        index.extend(tokens)  # type: ignore[arg-type]
    with pytest.raises(error, match="tokens"):
        corpus.add(tokens)  # type: ignore[arg-type]
    assert len(index) == len(corpus) == 0


def test_arguments_out_of_range_are_refused() -> None:
    index = SuffixIndex(10)
    with pytest.raises(ValueError, match="weight is 2"):
        index.extend([1], 2.0)
    with pytest.raises(ValueError, match="floor"):
        index.propose([], 1, 1, float("nan"))
    with pytest.raises(ValueError, match="limit is"):
        index.propose([], 1 << 20, 1)
    with pytest.raises(ValueError, match="min_match is 0"):
        index.propose([], 1, 0)
    with pytest.raises(ValueError, match="max_tokens is 1"):
        SuffixIndex(1)
    with pytest.raises(ValueError, match="max_bytes"):
        SuffixCorpus(1 << 40)
