"""The arithmetic of first tokens behind a prefix that was computed before."""

from __future__ import annotations

from pyagent_node.base.types import Digest, PeerId, Placement, Rank, Slice
from pyagent_node.benchmarks.kv_reuse import _row, _Times
from pyagent_node.node.client import Answer

PLACEMENT = Placement(
    Digest("0" * 64), 1, (Rank(0, Slice(0, 30, True), PeerId("12D3KooWTest")),), n_ctx=64, n_seq=1
)


def answer(ttft: float, cached: int, tokens: tuple[int, ...] = (1, 2)) -> Answer:
    return Answer(
        text="",
        token_ids=tokens,
        finish_reason="length",
        prompt_tokens=2000,
        completion_tokens=len(tokens),
        seed=0,
        ttft_seconds=ttft,
        seconds=ttft,
        tokens_per_second=1.0,
        placement=PLACEMENT,
        cached_tokens=cached,
    )


def times(remote: float, tokens: tuple[int, ...] = (1, 2)) -> _Times:
    made = _Times()
    made.computed = [answer(9.0, 0), answer(10.0, 0), answer(20.0, 0)]
    made.local = [answer(0.5, 1984), answer(0.6, 1920)]
    made.remote = [answer(remote, 1984, tokens)]
    return made


def test_medians_are_told_in_milliseconds_and_the_least_that_was_reused() -> None:
    row = _row("int4", "loopback", times(2.0), [(1, 2)])
    assert (row.recompute_ms, row.local_ms, row.remote_ms) == (10_000.0, 550.0, 2000.0)
    assert (row.local_cached, row.remote_cached, row.prompt_tokens) == (1920, 1984, 2000)
    assert row.identical
    assert row.loss == 0.0


def test_a_choice_that_was_slower_than_computing_and_other_tokens_are_told() -> None:
    row = _row("int4", "loopback", times(11.0, (1, 3)), [(1, 2)])
    assert row.loss == 0.1
    assert not row.identical
