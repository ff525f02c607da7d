"""Who votes: sizes, words, replacement, and that nothing flaps."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.types import PeerId
from pyagent_node.consensus.voters import (
    DOWN_SECONDS,
    MOST_VOTERS,
    SETTLE_SECONDS,
    STEADY_SECONDS,
    Candidate,
    choose_voters,
)

NAMES = [PeerId(name) for name in "abcdefghij"]


def node(
    name: str, *, up: float = STEADY_SECONDS, rtt: float | None = 0.01, **more: object
) -> Candidate:
    return msgspec.structs.replace(Candidate(PeerId(name), "voter", up=up, rtt=rtt), **more)


def chosen(nodes: list[Candidate], current: str = "a", most: int = 7) -> str:
    return "".join(sorted(choose_voters(nodes, frozenset(map(PeerId, current)), most)))


@pytest.mark.parametrize(
    ("count", "most", "size"),
    [
        *((1, 7, 1), (2, 7, 1), (3, 7, 3), (4, 7, 3), (5, 7, 5), (6, 7, 5), (7, 7, 7), (10, 7, 7)),
        *((10, 1, 1), (10, 2, 1), (10, 4, 3), (10, 9, 7)),
    ],
)
def test_sizes(count: int, most: int, size: int) -> None:
    nodes = [node(name) for name in NAMES[:count]]
    assert chosen(nodes, most=most) == "abcdefghij"[:size]


def test_who_may_not_vote() -> None:
    rest = [node("a"), node("b")]
    for other in (
        node("c", role="learner"),
        node("c", role="client", vote="always"),
        node("c", vote="never"),
        node("c", barred=True),
        node("c", up=SETTLE_SECONDS - 1),
        node("c", up=-1.0),
    ):
        assert chosen([*rest, other]) == "a"
    assert chosen([*rest, node("c", role="learner", vote="always")]) == "abc"


def test_always_comes_first() -> None:
    nodes = [node(name) for name in "abcde"] + [node("z", vote="always", rtt=3.0, up=10.0)]
    assert chosen(nodes, "abc", 3) == "abz"


def test_a_voter_that_is_away_is_given_time_and_then_replaced_if_another_can() -> None:
    three = [node("a"), node("b")]
    assert chosen([*three, node("c", up=-DOWN_SECONDS + 1), node("d")], "abc") == "abc"
    assert chosen([*three, node("c", up=-DOWN_SECONDS - 1), node("d")], "abc") == "abd"
    assert chosen([*three, node("c", up=-DOWN_SECONDS - 1)], "abc") == "abc"


def test_who_is_away_gives_up_its_place_first() -> None:
    nodes = [node("b", up=-1.0), node("c", vote="never"), node("a", rtt=0.5)]
    assert chosen(nodes, "abc") == "a"


def test_two_of_five_away_leave_three() -> None:
    nodes = [node(n) for n in "abc"] + [node(n, up=-DOWN_SECONDS - 1) for n in "de"]
    assert chosen(nodes, "abcde") == "abc"


def test_who_must_not_vote_goes_at_once() -> None:
    assert chosen([node("a"), node("b"), node("c", vote="never"), node("d")], "abc") == "abd"
    assert chosen([node("a"), node("b"), node("c", barred=True)], "abc") == "a"


def test_nobody_able_changes_nothing() -> None:
    assert chosen([node("a", barred=True)], "a") == "a"
    assert chosen([], "a") == "a"
    assert chosen([], "") == ""


def test_without_a_majority_in_sight_nothing_changes() -> None:
    nodes = [node("a"), *(node(n, up=-1.0) for n in "bc"), node("d", barred=True)]
    assert chosen(nodes, "abcd") == "abcd"


def test_a_much_nearer_node_takes_a_far_ones_place_and_keeps_it() -> None:
    near = [node("a", rtt=0.001), node("b", rtt=0.001)]
    assert chosen([*near, node("c", rtt=0.1), node("d", rtt=0.06)], "abc", 3) == "abc"
    assert chosen([*near, node("c", rtt=0.2), node("d", rtt=0.01)], "abc", 3) == "abd"
    assert chosen([*near, node("c", rtt=0.2), node("d", rtt=0.01, up=10.0)], "abc", 3) == "abc"


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.sampled_from(NAMES),
        st.sampled_from(["voter", "voter", "voter", "learner", "client"]),
        st.sampled_from(["auto", "auto", "always", "never"]),
        st.sampled_from([False, False, False, True]),
        st.floats(-200, 2000),
        st.none() | st.floats(0, 2),
    ),
    max_size=10,
    unique_by=lambda each: each.peer_id,
)


@given(CANDIDATES, st.frozensets(st.sampled_from(NAMES), min_size=1), st.integers(1, 9))
def test_any_choice_is_sound_and_stays(
    nodes: list[Candidate], current: frozenset[PeerId], most: int
) -> None:
    voters = choose_voters(nodes, current, most)
    assert voters
    if voters != current:
        by_id = {each.peer_id: each for each in nodes}
        assert all(by_id[peer].able for peer in voters)
        assert len(voters) % 2 == 1
        assert len(voters) <= min(most, MOST_VOTERS)
        assert 2 * sum(by_id[peer].up >= 0 for peer in voters) > len(voters)
    assert choose_voters(nodes, voters, most) == voters
    assert choose_voters(nodes[::-1], current, most) == voters
