"""Token trees: which there are, how they are walked, and that they are computed as chains are."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.backend import StepInput, StepOutput
from pyagent_node.inference.drafting.port import Draft
from pyagent_node.inference.drafting.tree import after, stem, usable_tree
from pyagent_node.inference.sampling import Sampled
from pyagent_node.inference.trees import (
    check_tree,
    decode_tree,
    depths,
    follow,
    principal,
    reach,
    runs,
)
from pyagent_node.simulations.guesses import random_tree

N_VOCAB = 7
SEEDS = st.integers(0, 2**32)


def following(history: Sequence[int]) -> int:
    """Return the token that comes after ``history``."""
    return sum((token + 3) * (index + 1) for index, token in enumerate(history)) * 5 % N_VOCAB


def tree(seed: int, known: Sequence[int], right: float = 0.6) -> Draft:
    """Return guesses for what comes after ``known``."""
    rng = random.Random(seed)
    return random_tree(
        rng,
        rng.randrange(1, 32),
        lambda path: following([*known, *path]),
        right=right,
        n_vocab=N_VOCAB,
    )


def step(
    known: Sequence[int], draft: Draft, *, position: int = 5, sample: bool = True
) -> StepInput:
    """Return a step of ``known`` tokens and guesses."""
    n = len(known)
    ids = np.array([*known, *draft.tokens], np.int32)
    parents = tuple(n + parent for parent in draft.parents)
    rows = np.arange(2 * len(ids), dtype=np.float32).reshape(-1, 2)
    return StepInput(0, position, ids, rows, sample, len(draft.tokens), parents)


class Cells:
    """A sequence that remembers what each of its tokens was computed over."""

    def __init__(self, history: Sequence[int]) -> None:
        self.cells = [*history]
        self.computed = 0

    def trim(self, start: int) -> None:
        del self.cells[start:]

    def decode(self, part: StepInput) -> StepOutput:
        """Compute a chain; a row is a number of all before it."""
        assert not part.parents
        assert part.position == len(self.cells)
        assert part.activations is not None
        assert len(part.activations) == len(part.tokens)
        sampled: list[Sampled] = []
        rows = np.zeros((len(part.tokens), 1), np.float32)
        for index, token in enumerate(part.tokens.tolist()):
            if sampled and sampled[-1].token != token:
                break
            self.cells.append(token)
            self.computed += 1
            rows[index] = hash(tuple(self.cells)) % 2**20
            if part.sample and index >= len(part.tokens) - part.drafts - 1:
                sampled.append(Sampled(following(self.cells)))
        return StepOutput(None if part.sample else rows, tuple(sampled))


@given(seed=SEEDS, known=st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=8))
def test_every_token_is_computed_once_over_its_own_path(seed: int, known: list[int]) -> None:
    history = [1, 2, 3, 4, 5]
    draft = tree(seed, [*history, *known])
    asked = step(known, draft, sample=False)
    cells = Cells(history)
    rows = decode_tree(asked, cells.decode, cells.trim).activations
    assert rows is not None
    assert cells.computed == len(asked.tokens)
    for index in range(len(asked.tokens)):
        path: list[int] = []
        at = index
        while at >= len(known):
            path.insert(0, int(asked.tokens[at]))
            at = asked.parents[at - len(known)]
        own = [*history, *known[: at + 1], *path]
        assert rows[index] == hash(tuple(own)) % 2**20
    straight = principal(asked.parents, len(known), asked.drafts)
    assert cells.cells == [*history, *known, *draft.tokens[:straight]]


@given(
    seed=SEEDS,
    known=st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=8),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_what_is_sampled_is_what_single_steps_sample(
    seed: int, known: list[int], right: float
) -> None:
    history = [1, 2, 3, 4, 5]
    draft = tree(seed, [*history, *known], right)
    asked = step(known, draft)
    cells = Cells(history)
    sampled = [one.token for one in decode_tree(asked, cells.decode, cells.trim).sampled]
    text = [*history, *known]
    came = []
    for _ in sampled:
        came.append(following(text))
        text.append(came[-1])
    assert sampled == came
    assert cells.cells == text[:-1]
    tokens = asked.tokens.tolist()
    path = follow(asked.parents, tokens, asked.drafts, came)
    assert len(path) == len(sampled) - 1, "it ends where no guess is right"
    assert [draft.tokens[at] for at in path] == came[:-1]
    assert cells.computed <= len(asked.tokens), "nothing is computed twice"


@given(seed=SEEDS)
def test_random_trees_are_trees(seed: int) -> None:
    draft = tree(seed, [1])
    asked = step([1, 2], draft)
    tokens = asked.tokens.tolist()
    check_tree(asked.parents, tokens, asked.drafts)
    assert usable_tree(draft) == draft
    found = depths(asked.parents, 2)
    assert reach(asked.parents, 2, asked.drafts) == max(found)
    order = runs(asked.parents, 2)
    assert sorted(i for run in order for i in range(run.offset, run.stop)) == list(
        range(len(tokens))
    )
    assert order[-1].stop == 2 + len(draft.straight.tokens) or len(order) == 1
    first, rest = stem(draft)
    assert after(draft, [first]) == rest
    assert after(draft, [N_VOCAB]) is None


@pytest.mark.parametrize(
    ("parents", "tokens", "reason"),
    [
        ((0,), (1, 2, 3), "length"),
        ((), (1, 2, 3), "length"),
        ((0, 1, 2), (1, 2, 3), "length"),
        ((0, 2), (1, 2, 3), "cycle"),
        ((1, 1), (1, 2, 3), "cycle"),
        ((0, 3), (1, 2, 3), "parent"),
        ((0, -1), (1, 2, 3), "parent"),
        ((-(2**70), 2**70), (1, 2, 3), "parent"),
        ((0, 0, 1), (1, 2, 3, 4), "order"),
        ((0, 0), (1, 3, 3), "siblings"),
        ((0, 1, 1), (1, 3, 2, 2), "siblings"),
    ],
)
def test_what_is_no_tree_is_refused_by_name(
    parents: tuple[int, ...], tokens: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tree(parents, tokens, 2 if len(tokens) == 3 else 3)
    assert (caught.value.code, caught.value.facts["reason"]) == ("bad_tree", reason)
    assert len(str(caught.value)) < 200


def test_a_guess_may_not_follow_a_token_before_the_last_known_one() -> None:
    with pytest.raises(InvalidRequest, match="follows token 0"):
        check_tree((1, 0), (1, 2, 3, 4), 2)


_ANY = st.one_of(st.integers(-3, 12), st.sampled_from([2**70, -(2**70)]))


@settings(max_examples=300)
@given(
    tokens=st.lists(_ANY, max_size=12),
    parents=st.lists(_ANY, max_size=12),
    confidence=st.lists(st.floats(), max_size=12),
    limit=st.integers(0, 9),
    deepest=st.integers(-1, 4),
)
def test_of_any_draft_a_tree_is_left(
    tokens: list[int], parents: list[int], confidence: list[float], limit: int, deepest: int
) -> None:
    draft = Draft(tuple(tokens), tuple(confidence), "x", tuple(parents))
    left = usable_tree(draft, n_vocab=N_VOCAB, limit=limit, deepest=deepest, ends={3})
    assert len(left.tokens) == len(left.parents) == len(left.confidence) <= limit
    assert all(0.0 <= value <= 1.0 for value in left.confidence)
    assert all(0 <= token < N_VOCAB and token != 3 for token in left.tokens)
    if left.tokens:
        asked = step([1], left)
        check_tree(asked.parents, asked.tokens.tolist(), asked.drafts)
        assert max(depths(asked.parents, 1)) <= deepest
    assert usable_tree(left) == left
