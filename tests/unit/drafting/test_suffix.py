"""The suffix drafter and its corpora."""

from __future__ import annotations

import pytest

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.drafting.port import Draft, usable
from pyagent_node.inference.drafting.suffix import SuffixDrafter, SuffixDrafters, expected
from pyagent_node.inference.sampling import SamplingParams

PIECES = [bytes([i]) for i in range(100)]
SAMPLING = SamplingParams()
SECRET = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


async def past(drafters: SuffixDrafters, tenant: str = "") -> SuffixDrafter:
    """Let a session come and go; return the drafter of the next one, which begins like it."""
    drafter = drafters.for_model(PIECES, SAMPLING, tenant=tenant)
    drafter.extend(SECRET)
    await drafter.aclose()
    await drafter.aclose()
    following = drafters.for_model(PIECES, SAMPLING, tenant="alice")
    following.extend([1, 2, *SECRET[:5]])
    return following


async def test_it_goes_on_as_the_text_did_before() -> None:
    drafter = SuffixDrafter()
    drafter.extend([1, 2, 3, 4, 5, 6, 9])
    drafter.extend([2, 3])
    draft = await drafter.propose([], 3)
    assert draft.tokens == (4, 5, 6)
    assert draft.source == drafter.name == "suffix"
    assert all(0 < c < 1 for c in draft.confidence)
    assert (await drafter.propose([4, 5], 1)).tokens == (6,)
    assert (await drafter.propose([4, 8], 1)).tokens == ()
    assert (await drafter.propose([], 0)).tokens == ()
    assert (await drafter.propose([], 3, floor=0.99)).tokens == ()


async def test_a_session_is_guessed_from_its_own_text_alone_by_default() -> None:
    following = await past(SuffixDrafters(), tenant="alice")
    assert (await following.propose([], 4)).tokens == ()


async def test_a_tenant_may_profit_from_its_past_and_no_other() -> None:
    drafters = SuffixDrafters(corpus_bytes=1 << 20)
    following = await past(drafters, tenant="bob")
    assert (await following.propose([], 4)).tokens == ()
    following = await past(drafters, tenant="alice")
    assert (await following.propose([], 4)).tokens == (16, 17, 18, 19)
    assert (await following.propose([16, 17], 4)).tokens[:3] == (18, 19, 20)
    other = drafters.for_model(PIECES[:-1], SAMPLING, tenant="alice")
    other.extend(SECRET[:5])
    assert (await other.propose([], 4)).tokens == ()


async def test_the_past_of_many_tenants_is_bounded() -> None:
    drafters = SuffixDrafters(corpus_bytes=1 << 16)
    await past(drafters, tenant="alice")
    for tenant in range(40):
        drafters.for_model(PIECES, SAMPLING, tenant=str(tenant))
    following = drafters.for_model(PIECES, SAMPLING, tenant="alice")
    following.extend(SECRET[:5])
    assert (await following.propose([], 4)).tokens == ()


def test_a_corpus_that_is_too_small_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="or between 65536"):
        SuffixDrafters(corpus_bytes=5)


def test_what_a_drafter_says_is_cut_to_what_can_be_sent() -> None:
    nan = float("nan")
    draft = Draft((1, 2, 3, 99, 4), (0.5, nan, 7.0, 0.5, 0.5), "liar")
    assert usable(draft, n_vocab=10, limit=8) == Draft((1, 2, 3), (0.5, 0.0, 1.0), "liar")
    assert usable(draft, n_vocab=100, limit=2) == Draft((1, 2), (0.5, 0.0), "liar")
    assert usable(Draft((1, -2), (0.5,)), n_vocab=10, limit=8).tokens == (1,)
    assert len(usable(Draft((1,) * 5000, (1.0,) * 5000), n_vocab=2, limit=9999).tokens) == 64
    assert draft.cut(-1).tokens == ()
    assert draft.cut(9) is draft
    assert expected(Draft((1, 2), (0.5, 0.5))) == 0.75
