"""Which guesses a tree is made of: the best ones, whatever the order in which they were found."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.inference.drafting.growth import GATE, Candidate, Growth, merged
from pyagent_node.inference.drafting.port import Draft
from pyagent_node.inference.drafting.tree import ROOT, usable_tree

Text = dict[tuple[int, ...], list[Candidate]]


def text(seed: int, depth: int = 4) -> Text:
    """Return what a made-up model says after each path."""
    rng = random.Random(seed)
    found: Text = {}
    for n in range(depth):
        for path in itertools.product(range(3), repeat=n):
            left, here = 1.0, []
            for token in range(3):
                chance = left * rng.random()
                left -= chance
                here.append(Candidate(token, chance))
            found[path] = here
    return found


def grown(model: Text, limit: int, *, floor: float = 0.0, gate: float = 0.0) -> tuple[Draft, int]:
    growth, asked = Growth(limit, floor=floor, gate=gate), 0
    at: int | None = ROOT
    while at is not None:
        asked += 1
        growth.add(at, model.get(tuple(growth.path(at)), []))
        at = growth.next()
    return growth.draft("made up"), asked


def values(draft: Draft) -> list[float]:
    found: list[float] = []
    for confidence, parent in zip(draft.confidence, draft.parents, strict=True):
        found.append(confidence * (found[parent] if parent != ROOT else 1.0))
    return found


@given(seed=st.integers(0, 2**32), limit=st.integers(0, 20))
def test_the_best_guesses_are_found_without_looking_at_all(seed: int, limit: int) -> None:
    model = text(seed)
    every: list[float] = []
    for path, here in model.items():
        value = 1.0
        for n, token in enumerate(path):
            value *= model[path[:n]][token].confidence
        every += [value * candidate.confidence for candidate in here]
    draft, asked = grown(model, limit)
    assert usable_tree(draft) == draft
    assert sorted(values(draft)) == pytest.approx(sorted(sorted(every)[::-1][:limit]))
    assert asked <= limit + 1
    firsts = [c for c, parent in zip(draft.confidence, draft.parents, strict=True) if parent < 0]
    assert firsts == sorted(firsts, reverse=True), "the likelier is the principal one"


def test_what_is_worth_little_is_left_out() -> None:
    model = {
        (): [Candidate(1, 0.9), Candidate(2, 0.01)],
        (1,): [Candidate(3, 0.9), Candidate(4, 0.9 * GATE / 2)],
        (1, 3): [Candidate(5, 0.5)],
    }
    draft, _ = grown(model, 9, gate=GATE)
    assert (draft.tokens, draft.parents) == ((1, 3, 5, 2), (-1, 0, 1, -1))
    draft, _ = grown(model, 9, floor=0.5)
    assert draft.tokens == (1, 3)
    assert grown(model, 0)[0] == Draft((), (), "made up")


def test_a_sure_text_makes_a_chain_and_an_unsure_one_a_bush() -> None:
    sure = {(0,) * n: [Candidate(0, 0.97), Candidate(1, 0.03)] for n in range(9)}
    draft, asked = grown(sure, 6)
    assert (draft.straight.tokens, asked) == ((0,) * 6, 6)
    unsure = text(1) | {(): [Candidate(n, 0.3) for n in range(3)]}
    draft, _ = grown(unsure, 3)
    assert draft.parents == (-1, -1, -1)


def test_two_chains_are_two_branches_from_where_they_part() -> None:
    one = Draft((1, 2, 3), (0.9, 0.5, 0.5), "a")
    other = Draft((1, 4, 5), (0.7, 0.6, 0.9), "b")
    both = merged((one, other), 9, "both")
    assert (both.tokens, both.parents) == ((1, 4, 5, 2, 3), (-1, 0, 1, 0, 3))
    assert both.confidence == (0.9, 0.6, 0.9, 0.5, 0.5)
    assert merged((one, other), 3, "both").tokens == (1, 4, 5)
    assert merged((one, Draft()), 9, "both").straight.tokens == one.tokens
    assert merged((Draft(), Draft()), 9, "both").tokens == ()
