"""Owners of buckets: shares follow weights, and only what must move does."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import PeerId
from pyagent_node.sharding.context.owners import (
    BUCKETS,
    owner_table,
    owners_of,
    ranking,
    sources,
)

WEIGHTS = st.dictionaries(
    st.integers(0, 40).map(lambda n: PeerId(f"node{n}")),
    st.floats(0.01, 100.0),
    min_size=1,
    max_size=12,
)


def even(*numbers: int) -> dict[PeerId, float]:
    return {PeerId(f"node{n}"): 1.0 for n in numbers}


@given(WEIGHTS)
def test_every_bucket_has_two_different_owners_where_there_are_two(weights):
    table = owner_table(weights, buckets=16)
    assert len(table) == 16
    for row in table:
        assert len(row) == len(set(row)) == min(2, len(weights))
        assert set(row) <= weights.keys()


@given(WEIGHTS, st.floats(0.01, 100.0))
def test_a_node_that_comes_takes_and_nothing_else_moves(weights, weight):
    new = PeerId("newcomer")
    before = owner_table(weights, buckets=16)
    after = owner_table({**weights, new: weight}, buckets=16)
    for old, now in zip(before, after, strict=True):
        assert [peer for peer in now if peer != new] == list(old[: 2 - (new in now)])
    # It leaves again: what it had goes to others, and nothing else moves.
    assert owner_table({**weights, new: 0.0}, buckets=16) == before


@given(WEIGHTS, st.data())
def test_a_node_that_leaves_gives_and_nothing_else_moves(weights, data):
    gone = data.draw(st.sampled_from(sorted(weights)))
    before = owner_table(weights, buckets=16)
    after = owner_table({p: w for p, w in weights.items() if p != gone}, buckets=16)
    if len(weights) == 1:
        assert after == ()
        return
    for old, now in zip(before, after, strict=True):
        assert set(old) - {gone} <= set(now)
        if gone not in old:
            assert now == old


@given(WEIGHTS, st.data(), st.floats(1.0, 50.0))
def test_more_weight_only_gains(weights, data, factor):
    peer = data.draw(st.sampled_from(sorted(weights)))
    before = owner_table(weights, buckets=16, replication=1)
    after = owner_table({**weights, peer: weights[peer] * factor}, buckets=16, replication=1)
    for old, now in zip(before, after, strict=True):
        assert now in (old, (peer,))


def test_shares_follow_weights():
    weights = {PeerId("small"): 1.0, PeerId("middle"): 2.0, PeerId("large"): 5.0}
    table = owner_table(weights, buckets=4096, replication=1)
    shares = Counter(row[0] for row in table)
    for peer, weight in weights.items():
        assert shares[peer] / 4096 == pytest.approx(weight / 8, abs=0.03)


def test_ten_even_nodes_hold_about_the_same():
    table = owner_table(even(*range(10)))
    shares = Counter(peer for row in table for peer in row)
    assert len(shares) == 10
    assert max(shares.values()) < 2 * 2 * BUCKETS / 10


def test_the_table_does_not_depend_on_the_order_of_the_nodes():
    weights = even(1, 2, 3, 4)
    assert owner_table(weights) == owner_table(dict(reversed(weights.items())))


def test_nobody_owns_anything_without_nodes():
    assert owner_table({}) == ()
    assert owner_table({PeerId("full"): 0.0}) == ()
    assert owners_of((), 3) == ()
    assert owners_of(owner_table(even(1)), BUCKETS) == ()


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_weights_are_checked(weight):
    with pytest.raises(InvalidRequest) as caught:
        ranking(0, {PeerId("a"): weight})
    assert caught.value.code == "bad_weight"


def test_sources_are_owners_then_those_before_then_anybody():
    old, new = owner_table(even(1, 2, 3)), owner_table(even(1, 2, 3, 4))
    for bucket in range(BUCKETS):
        found = sources(bucket, [new, old], even(1, 2, 3, 4, 5))
        assert found[:2] == new[bucket]
        assert set(found[:3]) >= set(old[bucket])
        assert sorted(found) == sorted(even(1, 2, 3, 4, 5))
        # Without the earlier table, those who had it before come early all the same.
        assert set(old[bucket]) <= set(sources(bucket, [new], even(1, 2, 3, 4))[:3])


def test_a_table_of_fewer_rows_leaves_no_bucket_without_owners() -> None:
    rows = owner_table(even(3))[:4]
    assert [owners_of(rows, bucket) for bucket in range(BUCKETS)] == list(rows) * (BUCKETS // 4)
