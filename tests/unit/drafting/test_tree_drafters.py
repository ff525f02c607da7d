"""Drafters that guess in several ways: by suffix, with the toy model, with both."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from pyagent_node.base.types import Slice
from pyagent_node.inference.drafting.combined import CombinedDrafters
from pyagent_node.inference.drafting.model import ModelDrafters
from pyagent_node.inference.drafting.port import Draft, TreeDrafter
from pyagent_node.inference.drafting.suffix import SuffixDrafter, SuffixDrafters
from pyagent_node.inference.drafting.tree import ROOT, after, usable_tree
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import ToyRunner, toy_generate, toy_vocabulary

LAYERS = 3
PIECES = toy_vocabulary().pieces
PROMPT = [ord(c) for c in "the quick brown fox"]
WARM = SamplingParams(seed=7, temperature=0.8, top_k=40, repetition_penalty=1.1)


def models(n_ctx: int = 4096) -> ModelDrafters:
    runner = ToyRunner(Slice(0, LAYERS, True), whole=True, n_seq=2, n_ctx=n_ctx, one_way=True)
    return ModelDrafters("toy", runner, PIECES)


def roots(draft: Draft) -> set[int]:
    return {t for t, parent in zip(draft.tokens, draft.parents, strict=True) if parent == ROOT}


def test_a_text_that_went_on_in_two_ways_is_guessed_in_both() -> None:
    drafter = SuffixDrafter()
    drafter.extend([1, 2, 3, 9, 9, 1, 2, 4, 8, 8, 1, 2])
    draft = drafter.look_tree((), 6)
    assert usable_tree(draft) == draft
    roots = {t for t, parent in zip(draft.tokens, draft.parents, strict=True) if parent == ROOT}
    assert roots == {3, 4}
    assert len(drafter.look_tree((3,), 2).tokens) <= 2
    assert drafter.look_tree((77,), 6).tokens == ()
    assert drafter.look_tree((), 0).tokens == ()


@pytest.mark.parametrize("sampling", [WARM, SamplingParams(temperature=0.0)])
async def test_a_model_learns_that_its_first_choice_is_right(
    sampling: SamplingParams, autojump_clock: MockClock
) -> None:
    """It is the target itself: the noise gives it the target's tokens, likely or not."""
    wanted = toy_generate(LAYERS, PROMPT, 40, sampling, one_way=True)
    drafter = models().for_model(PIECES, sampling)
    assert isinstance(drafter, TreeDrafter)
    drafter.expect_trees()
    drafter.extend(PROMPT)
    known = 0
    for _ in range(10):
        draft = await drafter.propose_tree((), 6)
        assert usable_tree(draft) == draft
        assert len(draft.tokens) == 6
        assert wanted[known] in roots(draft)
        assert (await drafter.propose((), 2)).tokens == tuple(wanted[known : known + 2])
        drafter.extend(wanted[known : known + 2])
        known += 2
    assert draft.straight.tokens[:2] == tuple(wanted[known - 2 : known])
    ahead = await drafter.propose_tree(wanted[known : known + 3], 4)
    assert wanted[known + 3] in roots(ahead)
    assert (await drafter.propose_tree((), 0)).tokens == ()
    await drafter.aclose()


async def test_both_guess_a_branch_each(autojump_clock: MockClock) -> None:
    factory = CombinedDrafters("both", SuffixDrafters(), models())
    drafter = factory.for_model(PIECES, WARM)
    assert isinstance(drafter, TreeDrafter)
    drafter.expect_trees()
    drafter.extend(PROMPT)
    text = PROMPT[:2]  # a longer match is believed more than this model ever is
    drafter.extend(text)
    draft = await drafter.propose_tree((), 8)
    assert usable_tree(draft) == draft
    assert after(draft, PROMPT[2:4]) is not None, "what followed the same letters"
    assert len(roots(draft)) == 2, "and what the model says"
    await drafter.aclose()
