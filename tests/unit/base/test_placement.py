"""A placement covers every layer once, in order, with the output head on the last rank only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, Slice


def placement(*slices: Slice) -> Placement:
    ranks = tuple(Rank(i, part, PeerId(f"peer{i}")) for i, part in enumerate(slices))
    return Placement(Digest("d"), 1, ranks, 512, 4)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n)))))
def test_any_ordered_cut_is_accepted(case: tuple[int, set[int]]) -> None:
    n_layers, cuts = case
    ends = sorted(cuts | {n_layers})
    starts = [0, *ends[:-1]]
    parts = [Slice(a, b, b == n_layers) for a, b in zip(starts, ends, strict=True)]
    placement(*parts).check(n_layers)


@pytest.mark.parametrize(
    "slices",
    [
        (),
        (Slice(0, 9, True),),
        (Slice(0, 11, True),),
        (Slice(0, 10, False),),
        (Slice(1, 10, True),),
        (Slice(0, 5, True), Slice(5, 10, True)),
        (Slice(0, 5, False), Slice(6, 10, True)),
        (Slice(0, 6, False), Slice(5, 10, True)),
        (Slice(0, 0, False), Slice(0, 10, True)),
        (Slice(5, 10, False), Slice(0, 5, True)),
    ],
)
def test_any_other_cover_is_refused(slices: tuple[Slice, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        placement(*slices).check(10)
    assert caught.value.code == "bad_placement"


def test_a_rank_out_of_order_is_refused() -> None:
    first, second = Slice(0, 5, False), Slice(5, 10, True)
    ranks = (Rank(1, first, PeerId("a")), Rank(0, second, PeerId("b")))
    with pytest.raises(InvalidRequest):
        Placement(Digest("d"), 1, ranks, 512, 4).check(10)


def test_a_slice_prints_as_its_bounds() -> None:
    assert (str(Slice(0, 10, False)), str(Slice(10, 30, True))) == ("0-10", "10-30+head")
