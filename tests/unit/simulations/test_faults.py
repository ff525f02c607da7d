"""Schedules of faults: drawn, checked, stored, shrunk."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.simulations.draws import MIXES
from pyagent_node.simulations.fault_kinds import (
    Crash,
    Fault,
    Leave,
    OneWay,
    Partition,
    Replace,
    Reshard,
    Revoke,
)
from pyagent_node.simulations.faults import (
    Schedule,
    check_schedule,
    decode_schedule,
    draw_schedule,
    encode_schedule,
    most_departures,
)
from pyagent_node.simulations.shrink import ddmin, shrink_schedule


@given(st.integers(0, 1 << 63), st.integers(1, 40), st.sampled_from(sorted(MIXES)))
def test_every_drawn_schedule_is_valid_and_survives_its_file(
    seed: int, nodes: int, mix: str
) -> None:
    schedule = draw_schedule(seed, nodes=nodes, duration=30.0, mix=mix)
    assert schedule == draw_schedule(seed, nodes=nodes, duration=30.0, mix=mix)
    assert decode_schedule(encode_schedule(schedule)) == schedule
    assert all(fault.at < 30.0 for fault in schedule.faults)
    assert schedule.end >= 30.0


def test_the_standard_mix_holds_every_kind_of_fault() -> None:
    kinds = {
        type(fault)
        for seed in range(60)
        for fault in draw_schedule(seed, nodes=7, duration=60.0).faults
    }
    assert kinds == set(Fault.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fault",
    [
        Crash(-1.0, 0, 1.0),
        Crash(1.0, 3, 1.0),
        Crash(float("nan"), 0, 1.0),
        Crash(1.0, 0, float("inf")),
        Partition(1.0, 1.0, (0, 9)),
        OneWay(1.0, 1.0, 0, -1),
        Replace(1.0, (4, 4), (0, 1, 2)),
        Replace(1.0, (4,), (0, 1, 2)),
        Replace(1.0, (10,), (0, 1)),
        Reshard(1.0, (4, 4), (0, 1, 2), 0),
        Reshard(1.0, (4,), (0, 1), 9),
        Reshard(1.0, (4,), (0, 1), 0, "ready", 9),
        Reshard(1.0, (4,), (0, 9), 0),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(fault: Fault) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_schedule(Schedule(3, 10.0, (fault,)))
    assert caught.value.code == "bad_schedule"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"nodes":3}', b"\xff", b"[" * 5000])
def test_a_file_that_is_no_schedule_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_schedule(data)
    assert caught.value.code == "bad_schedule"


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_cannot_be_is_refused(duration: float) -> None:
    with pytest.raises(InvalidRequest, match="duration"):
        draw_schedule(1, nodes=3, duration=duration)


def test_an_unknown_mix_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="sunshine"):
        draw_schedule(1, nodes=3, duration=1.0, mix="sunshine")


@given(st.sets(st.integers(0, 40), max_size=4), st.integers(0, 41))
def test_shrinking_finds_exactly_the_faults_that_matter(needed: set[int], count: int) -> None:
    items = list(range(count))
    needed &= set(items)

    def fails(some: Sequence[int]) -> bool:
        return needed <= set(some)

    assert ddmin(items, fails, runs=2000) == sorted(needed)


def test_shrinking_keeps_to_its_budget() -> None:
    asked = 0

    def fails(some: Sequence[int]) -> bool:
        nonlocal asked
        asked += 1
        return {3, 77} <= set(some)

    assert {3, 77} <= set(ddmin(range(100), fails, runs=10))
    assert asked <= 10


@given(st.integers(0, 1 << 63), st.integers(2, 12), st.sampled_from(["churn", "standard"]))
def test_no_swarm_loses_its_authority_or_half_of_its_nodes(seed: int, nodes: int, mix: str) -> None:
    schedule = draw_schedule(seed, nodes=nodes, duration=120.0, mix=mix)
    gone: list[int] = []
    for fault in schedule.faults:
        gone += fault.nodes if isinstance(fault, Leave) else ()
        gone += [fault.node] if isinstance(fault, Revoke) else []
    assert len(gone) == len(set(gone)) <= most_departures(nodes)
    assert 0 not in gone


@pytest.mark.parametrize("fault", [Leave(1.0, 1.0, (1, 2)), Revoke(1.0, 1.0, 0)])
def test_a_departure_that_no_swarm_bears_is_refused(fault: Fault) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_schedule(Schedule(4, 10.0, (fault,)))
    assert caught.value.code == "bad_schedule"


def test_a_schedule_shrinks_in_faults_time_and_nodes() -> None:
    told: list[Schedule] = []
    faults = tuple(Crash(at, node, 1.0) for node, at in enumerate((3.0, 9.0, 20.0, 21.0, 28.0)))

    def fails(schedule: Schedule) -> bool:
        nodes = {fault.node for fault in schedule.faults if isinstance(fault, Crash)}
        return {2, 3} <= nodes and schedule.nodes >= 4

    small = shrink_schedule(Schedule(9, 30.0, faults), fails, runs=100, say=told.append)
    assert fails(small)
    assert [(fault.at, fault.at + 1.0) for fault in small.faults] == [(1.0, 2.0), (2.0, 3.0)]
    assert (small.nodes, small.duration) == (4, 3.0)
    assert told[-1] == small
    assert check_schedule(small) == small


def test_a_schedule_of_which_nothing_can_be_spared_stays_as_it_is() -> None:
    schedule = Schedule(3, 30.0, (Crash(15.0, 1, 1.0),))
    asked: list[Schedule] = []

    def fails(other: Schedule) -> bool:
        asked.append(other)
        return other == schedule

    assert shrink_schedule(schedule, fails, runs=5) == schedule
    assert len(asked) <= 5
