"""The cost model of fetching against computing, and the estimators behind it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.sharding.block_costs import (
    WORTH,
    Link,
    Plan,
    Prefill,
    Rate,
    Source,
    fetch_seconds,
    plan_prefix,
)

sources = st.builds(
    Source,
    name=st.just("s"),
    held=st.integers(0, 40),
    block_bytes=st.floats(1e3, 1e7),
    round_trip=st.floats(0, 0.3),
    bandwidth=st.floats(1e5, 1e10),
)
many = st.lists(sources, max_size=4)
prefills = st.builds(Prefill, st.floats(1e-6, 0.1), st.floats(0, 1e-5))
decodes = st.floats(0, 0.05)


def sent_one_by_one(held: list[Source], start: int, stop: int) -> float:
    """Send whole blocks: the last one first, each by who has it and is done first."""
    free = [(s.round_trip, i) for i, s in enumerate(held)]
    end = 0.0
    for block in range(stop - 1, start - 1, -1):
        able = [(at + held[i].block_seconds, i) for at, i in free if held[i].held > block]
        if not able:
            return math.inf
        done, who = min(able)
        free = [(done, i) if i == who else (at, i) for at, i in free]
        end = max(end, done)
    return end


@given(many, st.integers(0, 20), st.integers(0, 20))
def test_the_time_to_fetch_is_that_of_blocks_sent_one_by_one(
    held: list[Source], start: int, count: int
) -> None:
    expected = sent_one_by_one(held, start, start + count)
    found = fetch_seconds(held, start, start + count)
    if math.isinf(expected) or not count:
        assert found == expected
        return
    # Blocks cannot be divided: no more than one of them late at each source.
    slack = max(s.block_seconds for s in held) * (1 + len(held))
    assert found <= expected * (1 + 1e-9)
    assert expected <= found + slack


@given(many, st.integers(0, 60), prefills, decodes)
def test_no_plan_is_worse_than_everything_or_nothing(
    held: list[Source], blocks: int, prefill: Prefill, decode: float
) -> None:
    nothing = prefill.of(0, blocks)
    most = min(blocks, max((s.held for s in held), default=0))
    everything = fetch_seconds(held, 0, most, decode) + prefill.of(most, blocks)
    plan = plan_prefix(held, blocks, prefill, decode_seconds=decode)
    assert 0 <= plan.count <= most
    assert plan.computing == nothing
    assert plan.seconds <= nothing
    assert plan.seconds <= everything / WORTH * (1 + 1e-9)
    if plan.count:
        assert plan.seconds < WORTH * nothing


def true_seconds(plan: Plan, held: list[Source], blocks: int, prefill: Prefill) -> float:
    return fetch_seconds(held, 0, plan.count) + prefill.of(plan.count, blocks)


@given(
    many,
    st.integers(1, 40),
    prefills,
    st.lists(st.floats(1 / 1.3, 1.3), min_size=9, max_size=9),
)
def test_numbers_that_are_wrong_by_a_factor_cost_no_more_than_it_squared(
    held: list[Source], blocks: int, prefill: Prefill, wrong: list[float]
) -> None:
    believed = [
        Source(s.name, s.held, s.block_bytes, s.round_trip * wrong[i], s.bandwidth / wrong[i + 4])
        for i, s in enumerate(held)
    ]
    guess = Prefill(prefill.seconds * wrong[8], prefill.growth * wrong[8])
    plan = plan_prefix(believed, blocks, guess)
    best = plan_prefix(held, blocks, prefill)
    found = true_seconds(plan, held, blocks, prefill)
    assert found <= best.seconds * 1.3**2 / WORTH * (1 + 1e-9)


def source(held: int, megabits: float, trip: float = 0.05, size: float = 1.5e6) -> Source:
    return Source("peer", held, size, trip, megabits * 125_000)


def test_the_cases_that_one_expects() -> None:
    fast, slow = Prefill(1e-5), Prefill(2e-3)  # a token of a prompt
    assert plan_prefix([], 32, slow).count == 0
    assert plan_prefix([source(32, 10_000)], 0, slow).count == 0
    assert plan_prefix([source(32, 10_000)], 32, slow).count == 32
    assert plan_prefix([source(32, 100)], 32, fast).count == 0
    assert plan_prefix([source(10, 10_000)], 32, slow).count == 10
    assert plan_prefix([source(32, 0)], 32, slow).count == 0
    # Attention makes late blocks dearer.
    growing = Prefill(1e-3, 1e-6)
    assert growing.of(0, 10) + growing.of(10, 32) == pytest.approx(growing.of(0, 32))
    assert growing.of(31, 32) > growing.of(0, 1)
    # Two sources are twice as fast where both have it, and decoding is one core's work.
    two = [source(32, 100, 0.0), source(32, 100, 0.0)]
    assert fetch_seconds(two, 0, 32) == pytest.approx(fetch_seconds(two[:1], 0, 32) / 2)
    assert fetch_seconds(two, 0, 32, 1.0) == pytest.approx(32.0, rel=0.01)
    assert fetch_seconds(two, 0, 33) == math.inf


def test_a_rate_follows_what_is_measured() -> None:
    rate = Rate(1e6)
    assert rate.per_second == 1e6
    for _ in range(20):
        rate.add(5e6, 0.5)
    assert rate.per_second == pytest.approx(1e7, rel=0.05)
    for _ in range(60):
        rate.add(1e6, 0.5)
    assert rate.per_second == pytest.approx(2e6, rel=0.05)
    before = rate.per_second
    for amount, seconds in ((0, 1), (1, 0), (-1, 1), (1, math.inf), (math.nan, 1), (1, math.nan)):
        rate.add(amount, seconds)
    assert rate.per_second == before


def test_a_link_tells_round_trip_and_bandwidth_apart() -> None:
    link = Link()
    for turn in range(60):
        link.add(200, 0.08)
        size = 100_000 * (1 + turn % 7)
        link.add(size, 0.08 + size / 3e6)
    assert link.round_trip == pytest.approx(0.08, rel=0.01)
    assert link.bandwidth == pytest.approx(3e6, rel=0.05)
    link.add(0, 2.0)  # somebody was busy
    assert link.round_trip < 0.33
    for _ in range(6):
        link.add(0, 0.08)
    assert link.round_trip < 0.085
    before = (link.round_trip, link.bandwidth)
    for nbytes, seconds in ((-1, 1.0), (10, 0.0), (10, -1.0), (10, math.nan), (10, math.inf)):
        link.add(nbytes, seconds)
    assert (link.round_trip, link.bandwidth) == before
    assert link.samples == 127


@given(st.integers(1, 6), st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
def test_more_sources_never_make_it_slower(count: int, speeds: list[float]) -> None:
    held = [Source("s", 8, 1.0, 0.1 * i, 1 / s) for i, s in enumerate(speeds[:count])]
    found = [fetch_seconds(held[: i + 1], 0, 8) for i in range(count)]
    assert found == sorted(found, reverse=True)
