"""The arithmetic of first tokens behind a prefix that was computed before."""

from __future__ import annotations

from pyagent_node.base.types import Digest, PeerId, Placement, Rank, Slice
from pyagent_node.benchmarks.kv_reuse import _close_link, _row, _Times
from pyagent_node.inference.models.architectures import ModelShape
from pyagent_node.node.answers import Answer

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
    assert (row.choice, row.better, row.ratio, row.fetch_ms) == ("fetch", "fetch", 1.0, 2000.0)


def test_a_choice_that_was_slower_than_computing_and_other_tokens_are_told() -> None:
    row = _row("int4", "loopback", times(11.0, (1, 3)), [(1, 2)])
    assert (row.choice, row.better, row.ratio) == ("fetch", "compute", 1.1)
    assert not row.identical


def test_a_choice_to_compute_is_compared_with_fetching_everything() -> None:
    made = times(9.0)
    made.remote = [answer(9.0, 0)]
    made.fetched = [answer(6.0, 1984)]
    row = _row("f16", "slow", made, [(1, 2)])
    assert (row.choice, row.better, row.ratio, row.fetch_ms) == ("compute", "fetch", 1.5, 6000.0)
    made.remote = [answer(7.0, 640)]
    row = _row("f16", "slow", made, [(1, 2)])
    assert (row.choice, row.ratio) == ("part", 1.167)


def test_the_close_link_takes_as_long_as_computing() -> None:
    shape = ModelShape("llama", "m", 30, 576, 1, 1, 9, 3, 64, 1, tied=True)
    made = times(2.0)
    made.computed = [answer(2.0, 0)]
    # 2000 tokens of 10 layers of 768 bytes: 15.36 MB in 2 s
    assert _close_link(made, shape, "f16") == ("61 Mbit, 50 ms", "rtt=50ms,rate=61mbit")
    assert _close_link(made, shape, "int4")[1] == "rtt=50ms,rate=14mbit"
